"""Facts: what a server promises. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from crossdock.spi import Ability, Capabilities, QueueSpec, State, Support, Survives
from crossdock_rabbitmq import delays
from crossdock_rabbitmq.address import QueueType

MAX_BODY: Final = 16 * 1024 * 1024
"""Bytes: what RabbitMQ 4 takes unless it is told otherwise."""
_OLDEST: Final = (3, 10)
_UNSYNCED: Final = (3, 13)
"""Since then the server confirms what is in a classic queue without having it on its disk. Measured by `benchmarks/power_loss.py`."""
_SWEEP: Final = 1.0
"""Seconds after the end of a lease within which its message is somebody else's."""


def version_of(server: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The version of a server as text and as numbers, from what it introduced itself with."""
    text = server.get("version", "")
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    numbers = re.match(r"\d+(\.\d+)*", text)
    return text, tuple(map(int, numbers[0].split("."))) if numbers else (0,)


def obstacle(server: Mapping[str, Any]) -> str | None:
    """Why a server cannot be used, if it cannot."""
    product = server.get("product", "")
    product = product.decode(errors="replace") if isinstance(product, bytes) else str(product)
    text, numbers = version_of(server)
    if product != "RabbitMQ":
        return f"it is {product or 'a server that does not name itself'}, and not RabbitMQ"
    if numbers < _OLDEST:
        return f"it is RabbitMQ {text}, and 3.10 is the oldest that has what is needed (quorum queues whose messages wait)"
    return None


def capabilities(server: Mapping[str, Any], type: QueueType) -> Capabilities:
    """What a server can do, and what AMQP cannot."""
    text, numbers = version_of(server)
    unsynced = type == "classic" and numbers >= _UNSYNCED
    return Capabilities(
        server="RabbitMQ",
        version=text,
        survives=frozenset({Survives.PROCESS} if unsynced else {Survives.PROCESS, Survives.POWER}),
        durability_note=_UNSYNCED_NOTE if unsynced else _DURABILITY[type],
        clock="broker",
        fencing=Ability(
            Support.EMULATED,
            "A delivery belongs to its channel; leases are kept, and late settlements refused, by the worker that holds them.",
        ),
        takeover=QueueSpec("").lease + _SWEEP,
        delay=Ability(Support.EMULATED, "A message goes through queues in which every message waits for the same time."),
        delay_resolution=delays.TICK_MS / 1000,
        delay_lateness=0.5,
        delay_longest=delays.LONGEST,
        deduplication=Ability(Support.UNSUPPORTED, "RabbitMQ looks at no ids; what is enqueued twice is stored twice."),
        deduplication_window=None,
        listable=frozenset({State.DEAD}),
        removable=frozenset({State.DEAD}),
        purgeable=frozenset({State.READY, State.DEAD}),
        by_id=Ability(Support.EMULATED, "All dead letters of the queue are read."),
        list_queues=Ability(Support.UNSUPPORTED, "AMQP names no queues; name those that you mean."),
        signals=Ability(Support.UNSUPPORTED, "RabbitMQ keeps nothing that one could ask for: messages are all there is."),
        max_body=MAX_BODY,
    )


_DURABILITY: Final[Mapping[QueueType, str]] = {
    "quorum": "Quorum queues are written to disk before they confirm, by most of their replicas; on a cluster of three nodes or more "
    "they also outlive the loss of one, on a single node they do not.",
    "classic": "Classic queues are on one node only, which writes them to its disk before it confirms.",
}
_UNSYNCED_NOTE: Final = (
    "Classic queues are on one node only, which leaves it to its operating system when they are on its disk: "
    "a power cut loses what was confirmed shortly before, seconds or half a minute."
)
