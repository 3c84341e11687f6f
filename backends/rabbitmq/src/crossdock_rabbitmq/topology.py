"""Topology: everything that is declared, as data. Pure.

Arguments of a queue can never be changed. So what may differ by version or by taste is in nobody's way: a queue that exists is used as it
is, if it is of a use at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from pamqp.common import FieldTable

from crossdock.spi import LEVELS
from crossdock_rabbitmq import delays, names
from crossdock_rabbitmq.address import QueueType

DELIVERY_LIMIT: Final = 1_000_000_000
"""Never reached, because core says when it is enough. Without one, RabbitMQ 4 deletes messages after 20 deliveries, 3.10 puts what is
returned at the tail; -1 has 3.10 delete a message that is returned once."""
LOST_TTL_MS: Final = 30 * 24 * 3600 * 1000
"""How long a message is kept that fell due when its queue was gone."""

CONSUMER_TIMEOUT_MS: Final = 40 * 24 * 3600 * 1000
"""How long the server lets a delivery be held, where a queue can say so: longer than tasks are. Erlang's timers end at 49 days."""

Arguments = FieldTable


@dataclass(frozen=True)
class Queue:
    """A durable queue."""

    name: str
    arguments: Arguments = field(default_factory=Arguments, hash=False)


@dataclass(frozen=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: str = "topic"
    arguments: Arguments = field(default_factory=Arguments, hash=False)


@dataclass(frozen=True)
class Binding:
    """From an exchange to a queue."""

    queue: str
    exchange: str
    key: str


@dataclass(frozen=True)
class Route:
    """From an exchange to an exchange."""

    destination: str
    source: str
    key: str


Definition = Queue | Exchange | Binding | Route


def of_queue(namespace: str, queue: str, type: QueueType, version: tuple[int, ...]) -> Iterator[Definition]:
    """What a queue is made of, in the order of declaring it: the dead letters first, to which the other queues refer.

    What the server itself would drop, by a policy on length or age, becomes a dead letter. That net is of the simple kind: with
    `x-dead-letter-strategy=at-least-once` each queue has a process of its own, and where some of these queues are deleted amid work, their
    supervisor in RabbitMQ 3.10 gives up, and with it all such queues of the node. For the same reason there is no
    `x-overflow=reject-publish`: it has the server close the connection of who publishes to a queue that is being deleted.
    """
    dead = names.dead(namespace, queue)
    arguments: Arguments = {"x-queue-type": type}
    if type == "quorum":
        arguments["x-delivery-limit"] = DELIVERY_LIMIT
    yield Queue(dead, dict(arguments))
    arguments["x-dead-letter-exchange"] = ""
    arguments["x-dead-letter-routing-key"] = dead
    if sets_timeout(type, version):
        arguments["x-consumer-timeout"] = CONSUMER_TIMEOUT_MS
    for level in LEVELS:
        ready = names.ready(namespace, queue, level)
        yield Queue(ready, dict(arguments))
        yield Binding(ready, names.DELAY_OUT, f"#.{delays.END}.{names.due_key(namespace, queue, level)}")


def sets_timeout(type: QueueType, version: tuple[int, ...]) -> bool:
    """Whether queues say for how long a delivery may be held."""
    return type == "quorum" and version >= (3, 12)


def of_delay(type: QueueType) -> Iterator[Definition]:
    """What all namespaces of a virtual host share: the levels of the delay, and how messages go from level to level.

    The way in comes last: who finds it finds all that is behind it.
    """
    yield Exchange(names.LOST, "fanout")
    yield Queue(names.LOST, {"x-queue-type": type, "x-message-ttl": LOST_TTL_MS})
    yield Binding(names.LOST, names.LOST, "")
    yield Exchange(names.DELAY_OUT, arguments={"alternate-exchange": names.LOST})
    for level in range(delays.LEVELS):
        yield Exchange(names.delay_hop(level))
        yield Route(names.DELAY_OUT, names.delay_hop(level), f"#.{delays.word(level)}.{delays.END}.#")
        yield Queue(names.delay_level(level), _waiting(type, level))
        for lower in range(level):
            yield Binding(names.delay_level(lower), names.delay_hop(level), f"#.{delays.word(level)}.{delays.word(lower)}.#")
    yield Exchange(names.DELAY_IN)
    for level in range(delays.LEVELS):
        yield Binding(names.delay_level(level), names.DELAY_IN, f"{delays.word(level)}.#")


def _waiting(type: QueueType, level: int) -> Arguments:
    arguments: Arguments = {
        "x-queue-type": type,
        "x-message-ttl": delays.ttl_ms(level),
        "x-dead-letter-exchange": names.delay_hop(level),
    }
    if type == "quorum":
        arguments["x-delivery-limit"] = DELIVERY_LIMIT
        arguments["x-overflow"] = "reject-publish"
        arguments["x-dead-letter-strategy"] = "at-least-once"
    return arguments
