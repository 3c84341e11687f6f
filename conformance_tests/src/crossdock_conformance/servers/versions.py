"""Versions are asked for by prefix: "7" means any 7.x, "7.0" any 7.0.x."""

from __future__ import annotations


def matches(version: str, wanted: str | None) -> bool:
    """Whether a version is the wanted one or below it, part by part; None wants any."""
    return wanted is None or f"{version}.".startswith(f"{wanted}.")
