"""Names: every stream, consumer and subject. Pure.

A queue is one stream, `CD=<namespace>=<queue>`; `=` is in no name of ours, so no two queues share one. Its subjects are

    cd.<namespace>.<queue>.<life>.<place>.<id>.<key>

where the place is a level (`9`, `6`, `3`, `0`: READY or LEASED), `sched` or `dead`. The key is what a listing is sorted by: the due time
of what is scheduled and the time of death of a letter, in milliseconds, and `r` at a level. So an id is found, wherever it is, by one
pattern, and a level's messages share a prefix. The life is drawn when the stream is made: what is said to an earlier queue of the same
name, an ack as well as a publish, reaches nobody.

Streams made on servers without schedules (below 2.12) do without the key: there an id is looked for subject by subject, and the due
times are in a stream that belongs to the namespace, `CD=<namespace>==alarms`, under `cd.<namespace>.=.<second>.<queue>.<life>.<id>`.
"""

from __future__ import annotations

import secrets
from typing import Final, NamedTuple

from crossdock.spi import LEVELS, Priority, State

SCHEDULED: Final = b"sched"
DEAD: Final = b"dead"
PLACES: Final = (*(b"%d" % level for level in LEVELS), SCHEDULED, DEAD)
"""Where a message may be, as subjects call it."""
LEVEL_NAMES: Final = {Priority.CRITICAL: "critical", Priority.HIGH: "high", Priority.NORMAL: "normal", Priority.LOW: "low"}
"""What the consumers of the levels are called."""


class Place(NamedTuple):
    """What a subject says of a message."""

    place: bytes
    id: str
    key: int
    """Milliseconds; 0 where the subject has none."""

    @property
    def state(self) -> State:
        """SCHEDULED, DEAD, or READY, which may be LEASED too."""
        return {SCHEDULED: State.SCHEDULED, DEAD: State.DEAD}.get(self.place, State.READY)


def new_life() -> str:
    """Draw what tells a stream from others of the same name."""
    return secrets.token_hex(4)


def stream(namespace: str, queue: str) -> str:
    """The stream of a queue."""
    return f"CD={namespace}={queue}"


def queue_of(namespace: str, stream: str) -> str | None:
    """The queue that a stream belongs to; None if it is none of the namespace's."""
    prefix = f"CD={namespace}="
    name = stream.removeprefix(prefix)
    return name if stream.startswith(prefix) and name and "=" not in name else None


def alarm_stream(namespace: str) -> str:
    """The stream of the namespace's due times, where servers have no schedules."""
    return f"CD={namespace}==alarms"


def alarms(namespace: str, second: int | str = "*") -> str:
    """The subjects of due times within a second."""
    return f"cd.{namespace}.=.{second}.*.*.*"


def notes(namespace: str) -> bytes:
    """The subject on which Brokers tell each other that a queue's definition changed. No stream keeps it."""
    return f"cd.{namespace}.notes".encode()


def ack(stream: str, consumer: bytes, seq: int) -> bytes:
    """Where a delivery is acked, by its sequence alone. Up to 2.12 only: newer servers write it in other ways, too."""
    return b"$JS.ACK.%s.%s.1.%d.0.0.0" % (stream.encode(), consumer, seq)


class Subjects:
    """The subjects of one queue in one life.

    Args:
        namespace: Of the queue.
        queue: Its name.
        life: See this module's heading.
        keyed: Whether subjects end with a key.
    """

    def __init__(self, namespace: str, queue: str, life: str, *, keyed: bool) -> None:
        self.life = life
        self.keyed = keyed
        self._queue = queue
        self._namespace = namespace
        self._root = f"cd.{namespace}.{queue}.{life}.".encode()
        self._end = b".r" if keyed else b""
        self.everything = (self._root + (b"*.*.*" if keyed else b"*.*")).decode()
        """What the stream takes."""
        self._prefixes = {int(level): self._root + b"%d." % level for level in LEVELS}

    @staticmethod
    def read_life(everything: str) -> tuple[str, bool] | None:
        """The life and whether there are keys, from what a stream takes; None if it is none of ours."""
        tokens = everything.split(".")
        if tokens[0] != "cd" or tokens[4:] not in (["*", "*"], ["*", "*", "*"]):
            return None
        return tokens[3], len(tokens) == 7

    def level(self, priority: int, id: str) -> bytes:
        """Where a message of this level is READY or LEASED."""
        return self._prefixes[priority] + id.encode() + self._end

    def keyed_place(self, place: bytes, id: str, key: int) -> bytes:
        """Where a message is SCHEDULED or DEAD."""
        return (
            b"%s%s.%s.%d" % (self._root, place, id.encode(), key) if self.keyed else b"%s%s.%s" % (self._root, place, id.encode())
        )

    def alarm(self, id: str, due_ms: int) -> bytes:
        """Where its due time is kept, where subjects have no keys."""
        return f"cd.{self._namespace}.=.{due_ms // 1000}.{self._queue}.{self.life}.{id}".encode()

    def anywhere(self, id: str) -> bytes:
        """A pattern for the id in every place."""
        return self._root + b"*." + id.encode() + (b".*" if self.keyed else b"")

    def at(self, place: bytes, id: str) -> bytes:
        """A pattern for the id in one place."""
        return self._root + place + b"." + id.encode() + (b".*" if self.keyed else b"")

    def each_place(self, id: str) -> list[bytes]:
        """The subjects in which the id may be, where they have no keys."""
        return [b"%s%s.%s" % (self._root, place, id.encode()) for place in PLACES]

    def filter(self, place: bytes) -> str:
        """A pattern for all that is in a place."""
        return (self._root + place + (b".*.*" if self.keyed else b".*")).decode()

    def read(self, subject: bytes) -> Place:
        """What a subject says."""
        tokens = subject[len(self._root) :].split(b".")
        key = int(tokens[2]) if len(tokens) > 2 and tokens[2].isdigit() else 0
        return Place(tokens[0], tokens[1].decode(), key)

    def consumer(self, level: Priority) -> str:
        """The consumer of a level."""
        return f"{LEVEL_NAMES[level]}-{self.life}"

    def counter(self, place: bytes) -> str:
        """The consumer that counts what is SCHEDULED or DEAD. Nobody ever takes anything by it."""
        return f"{place.decode()}-{self.life}"
