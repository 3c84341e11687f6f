"""The scenarios, one module per group. Importing this runs nothing."""

from typing import Final

GROUPS: Final = (
    "delivery",
    "settlement",
    "redelivery",
    "delay",
    "priority",
    "limits",
    "deduplication",
    "dead_letters",
    "listing",
    "stats",
    "removal",
    "namespaces",
    "lifecycle",
    "errors",
    "processes",
    "restarts",
    "model",
)
"""In the order in which they are run and told."""
