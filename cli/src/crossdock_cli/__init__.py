"""The command line of crossdock."""
