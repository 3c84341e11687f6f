"""The values that travel between core and a backend. All are immutable; none knows a broker."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, IntEnum
from typing import Final, NewType

import msgspec

from crossdock.errors import CrossdockError

MAX_STORY_BYTES: Final = 16 * 1024
"""Largest `DeadLetter.story`, in bytes. Core trims it; a backend may rely on it."""


class Priority(IntEnum):
    """The four levels a queue has. Other integers from 0 to 9 are rounded down to one of them by core."""

    LOW = 0
    NORMAL = 3
    HIGH = 6
    CRITICAL = 9


LEVELS: Final = (Priority.CRITICAL, Priority.HIGH, Priority.NORMAL, Priority.LOW)
"""Every level, most urgent first."""


class State(Enum):
    """Where a stored message is. It is in exactly one state at any time."""

    SCHEDULED = "scheduled"
    """Waiting for its time: enqueued with an eta or delay, or given back with a delay."""
    READY = "ready"
    """Waiting for a worker."""
    LEASED = "leased"
    """Delivered to a worker and not settled; its lease runs."""
    DEAD = "dead"
    """Dead-lettered: it stays, with its letter, until replayed, removed, purged or beyond its retention."""


class Reason(Enum):
    """Why a message was dead-lettered."""

    ATTEMPTS_EXHAUSTED = "attempts_exhausted"
    """It failed, and the retry policy grants no further attempt."""
    REJECTED = "rejected"
    """The handler raised `Reject`."""
    EXPIRED = "expired"
    """It was delivered after its `expires` instant."""
    POISON = "poison"
    """It was delivered more than `max_deliveries` times without an ending: it probably kills its workers."""
    UNKNOWN_TASK = "unknown_task"
    """For a day no worker that received it had a task of that name."""
    INVALID_PAYLOAD = "invalid_payload"
    """Its arguments do not fit the task's signature."""
    UNDECODABLE = "undecodable"
    """Its body is no envelope."""
    UNSUPPORTED_VERSION = "unsupported_version"
    """Its envelope has a newer major version."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """What a broker stores: routing fields and an opaque body."""

    id: str
    """1 to 64 characters of `[A-Za-z0-9_-]`, unique within the queue while the message is stored."""
    queue: str
    """1 to 63 characters, `[A-Za-z0-9][A-Za-z0-9_-]*`."""
    priority: Priority
    body: bytes
    """The encoded envelope. A backend never reads it and returns it unchanged."""
    eta_ms: int = 0
    """Not before this instant, in milliseconds since the Unix epoch; 0 = now."""
    delay_ms: int = 0
    """Not before this long after the broker stored it, by the broker's clock, in milliseconds. Excludes `eta_ms`.
    A backend returns what it made of it, the absolute `eta_ms`, or both 0."""
    generation: int = 0
    """Raised by one for each replacement and each replay. (id, generation) is the deduplication key."""


class QueueSpec(msgspec.Struct, frozen=True, gc=False):
    """What a backend must know of a queue before it is used. A queue never declared has these defaults."""

    name: str
    lease: float = 30.0
    """Seconds for which a delivery of this queue is owned, at receive and at each extension."""
    max_ready: int | None = None
    """Most messages that may be READY; a further enqueue is refused with `QueueFull`. None = no limit.
    Exact on Redis, SQLite and memory, elsewhere soft by a window. Scheduled, returned and retried messages are not held back by it."""
    dead_max_age: float | None = None
    """Seconds a dead letter is kept; None = for ever."""
    dead_max_count: int | None = None
    """Most dead letters kept, the oldest leave first; None = no limit. What leaves is counted (`QueueStats.dead_dropped`)."""


class Lane(msgspec.Struct, frozen=True, gc=False):
    """One level of one queue, and how much of it is wanted."""

    queue: str
    priority: Priority
    quota: int
    """How many deliveries the first pass of `Broker.receive` may take here; 0 = none in the first pass."""


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One hand-over of a message to a worker."""

    message: Message
    delivery_count: int
    """1 = the first hand-over since the message was last stored; see the two counters in `Broker.receive`."""
    lease_until: float
    """Until when the lease is surely ours: local `Clock.monotonic()` seconds, with a safety margin taken off."""
    receipt: object
    """Opaque and hashable; means something only to the Broker that returned it."""


class DeadLetter(msgspec.Struct, frozen=True, gc=False):
    """A dead message with its story. Core writes it; a backend stores it and gives it back."""

    message: Message
    reason: Reason
    died_ms: int
    """When it was dead-lettered, in milliseconds since the Unix epoch."""
    task: str = ""
    """Task name, for filters without decoding; "" if unknown."""
    error_type: str = ""
    """Qualified name of the last error's class; "" if there was none."""
    fingerprint: str = ""
    """Equal for letters that died of the same fault; "" if unknown."""
    story: bytes = b""
    """Everything else core tells: text, traceback, attempts, worker. Opaque here, at most `MAX_STORY_BYTES`."""


class Ack(msgspec.Struct, frozen=True, gc=False):
    """Done: forget the message."""

    delivery: Delivery


class Nack(msgspec.Struct, frozen=True, gc=False):
    """Not done: deliver again.

    Without `replacement` it is a give-back: the same bytes, and the next delivery has the *same* `delivery_count`.
    With `replacement` it is a retry: the replacement is stored in the message's place and its count starts at 1.
    (AMQP's and NATS' own verbs of this name count differently; this interface does not.)
    """

    delivery: Delivery
    delay: float = 0.0
    """Not before this many seconds from now, by the broker's clock; 0 = at once. The message's own eta is past and forgotten.
    What is longer than `Capabilities.delay_longest` counts as that."""
    replacement: Message | None = None
    """Same id and queue, a higher generation; its `eta_ms` and `delay_ms` are 0: `delay` rules."""


class Dead(msgspec.Struct, frozen=True, gc=False):
    """Given up: keep it among the dead letters of its queue."""

    delivery: Delivery
    letter: DeadLetter


Settlement = Ack | Nack | Dead
"""The three ways a delivery ends."""


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """One item of a batch that was not done, and why."""

    index: int
    """Its place in the sequence the verb was given, from 0."""
    error: CrossdockError


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One stored message as `Broker.peek` shows it."""

    message: Message
    state: State
    delivery_count: int | None = None
    """Hand-overs since it was last stored; None where the server cannot tell without changing it."""
    letter: DeadLetter | None = None
    """Set for DEAD entries, else None."""


Cursor = NewType("Cursor", str)
"""A place in a listing: opaque, URL-safe text. It names a key, not a number, so it stays right while entries come and go."""


class Page(msgspec.Struct, frozen=True, gc=False):
    """A part of a listing."""

    entries: Sequence[Entry]
    next: Cursor | None = None
    """Where the next page starts; None = this was the last."""


class Replay(msgspec.Struct, frozen=True, gc=False):
    """An order to bring one dead letter back to life."""

    id: str
    """Id of the dead letter."""
    message: Message
    """What to store in its stead: a higher generation; body, queue, priority and eta may differ from the dead one's."""


class QueueStats(msgspec.Struct, frozen=True, gc=False):
    """How a queue stands. None = this server cannot tell."""

    queue: str
    ready: int
    scheduled: int | None = None
    leased: int | None = None
    dead: int | None = None
    oldest_ready_age: float | None = None
    """Seconds since the oldest READY message became ready; 0.0 if none is ready."""
    consumers: int | None = None
    """Connected receivers, where the broker knows them."""
    dead_dropped: int | None = None
    """Dead letters removed by retention since the queue exists."""
