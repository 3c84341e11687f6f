"""Streams and consumers as data: what is declared on a server, and what its version can do. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from crossdock.spi import Priority, QueueSpec
from crossdock_nats import names
from crossdock_nats.address import Address

OLDEST: Final = (2, 9)
"""The first version with direct gets."""
LONGEST_LEASE: Final = 365 * 86_400.0
"""Seconds. A longer lease counts as this one: the server reckons in 64 bits of nanoseconds."""
DUPLICATE_WINDOW: Final = 60.0
"""Seconds for which the server remembers a write, in case we have to repeat it: some times the longest `timeout` that makes sense."""
WAITING: Final = 8192
"""Pulls that may wait at a consumer: one for each idle worker."""

_NS: Final = 1_000_000_000
_TITLE: Final = "crossdock queue"


@dataclass(frozen=True)
class Features:
    """What a version of the server can do. Asked of its number: old servers ignore silently what they do not know."""

    version: tuple[int, int]

    @staticmethod
    def of(version: str) -> Features:
        """Read a version such as `2.12.1-RC.3`; what is none counts as the oldest."""
        found = re.match(r"(\d+)\.(\d+)", version)
        return Features((int(found[1]), int(found[2])) if found else OLDEST)

    @property
    def schedules(self) -> bool:
        """Native schedules, and expectations about another subject than the message's own, also by a pattern."""
        return self.version >= (2, 12)

    @property
    def pauses(self) -> bool:
        """A consumer can be told to deliver nothing for a while."""
        return self.version >= (2, 11)

    @property
    def leaves_ghosts(self) -> bool:
        """Killed, it may come back with consumers that do not fit their streams; see `ghosts`."""
        return self.version < (2, 13)

    @property
    def dear_consumers(self) -> bool:
        """To make a consumer, to tell its figures, or to say that it has nothing, costs it some time for each message in the stream."""
        return self.version < (2, 10)

    @property
    def batches_gets(self) -> bool:
        """One direct get can ask for many messages."""
        return self.version >= (2, 11)


def queue_stream(namespace: str, spec: QueueSpec, subjects: names.Subjects, address: Address) -> dict[str, Any]:
    """The stream of a queue. One message for each subject: a write with an expected sequence replaces a stored message, or does nothing."""
    config: dict[str, Any] = {
        "name": names.stream(namespace, spec.name),
        "description": write_spec(spec),
        "subjects": [subjects.everything],
        "retention": "workqueue",
        "max_consumers": -1,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_msgs_per_subject": 1,
        "discard": "old",
        "storage": address.storage,
        "num_replicas": address.replicas,
        "duplicate_window": round(DUPLICATE_WINDOW * _NS),
        "allow_direct": True,
    }
    if subjects.keyed:
        config["allow_msg_schedules"] = True
    return config


def alarm_stream(namespace: str, address: Address) -> dict[str, Any]:
    """The stream of due times, where the server has no schedules."""
    return {
        "name": names.alarm_stream(namespace),
        "description": "crossdock due times",
        "subjects": [names.alarms(namespace)],
        "retention": "limits",
        "max_msgs_per_subject": 1,
        "discard": "old",
        "storage": address.storage,
        "num_replicas": address.replicas,
        "duplicate_window": round(DUPLICATE_WINDOW * _NS),
        "allow_direct": True,
    }


def level_consumer(subjects: names.Subjects, level: Priority, lease: float) -> dict[str, Any]:
    """What the messages of a level are taken by. No limit of deliveries: core decides who has died too often."""
    return _consumer(subjects.consumer(level), subjects.filter(b"%d" % level), lease)


def counter(subjects: names.Subjects, place: bytes) -> dict[str, Any]:
    """What the server counts by what is SCHEDULED or DEAD."""
    return _consumer(subjects.counter(place), subjects.filter(place), QueueSpec("").lease)


def _consumer(name: str, filter: str, lease: float) -> dict[str, Any]:
    return {
        "durable_name": name,
        "filter_subject": filter,
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": round(min(max(lease, 0.001), LONGEST_LEASE) * _NS),
        "max_deliver": -1,
        "max_ack_pending": -1,
        "max_waiting": WAITING,
    }


def write_spec(spec: QueueSpec) -> str:
    """A queue's settings as the description of its stream, which every version of the server keeps and every tool shows."""
    given: Mapping[str, object] = {
        "lease": spec.lease,
        "max_ready": spec.max_ready,
        "dead_max_age": spec.dead_max_age,
        "dead_max_count": spec.dead_max_count,
    }
    return " ".join([f"{_TITLE}:", *(f"{name}={value!r}" for name, value in given.items() if value is not None)])


def read_spec(queue: str, description: str) -> QueueSpec:
    """The settings that a stream's description tells; what it does not tell has its default."""
    found = dict(word.split("=", 1) for word in description.split() if "=" in word)
    try:
        return QueueSpec(
            queue,
            lease=float(found["lease"]) if "lease" in found else QueueSpec(queue).lease,
            max_ready=int(found["max_ready"]) if "max_ready" in found else None,
            dead_max_age=float(found["dead_max_age"]) if "dead_max_age" in found else None,
            dead_max_count=int(found["dead_max_count"]) if "dead_max_count" in found else None,
        )
    except ValueError:  # somebody rewrote it
        return QueueSpec(queue)
