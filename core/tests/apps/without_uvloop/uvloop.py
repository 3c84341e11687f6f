"""Stands in for uvloop where it is not installed."""

raise ImportError("hidden by a test")
