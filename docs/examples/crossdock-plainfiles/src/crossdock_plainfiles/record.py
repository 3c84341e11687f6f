"""Record: what the name of a message's file says.

All that changes while a message lives is in the name, so that a change is a rename, and a queue is known by listing directories::

    leased/0000000000000042.3.1767225600000.1.47.0.payment-12.json
           number           | since         | |  | id
                            priority        | |  generation
                                            | fence
                                            delivery count
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from crossdock.spi import Priority, State

ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""An id. Any other text could make a name that is read otherwise than it was written."""


class Record(msgspec.Struct, frozen=True, gc=False):
    """One message, without its body."""

    state: State
    """The directory that the file is in."""
    id: str
    number: int
    """Its place in line, from the queue's sequence. Of two files with one id, the one with the higher number is the newer."""
    priority: Priority
    since_ms: int
    """READY: since when. SCHEDULED: when it is due. LEASED: when the lease ends. DEAD: when it died."""
    delivery_count: int
    """Hand-overs since it was stored, less those given back."""
    fence: int
    """Number of the last hand-over, while its receipt may still end it; else 0."""
    generation: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return (
            f"{self.number:016d}.{self.priority:d}.{self.since_ms}."
            f"{self.delivery_count}.{self.fence}.{self.generation}.{self.id}.json"
        )

    @property
    def path(self) -> str:
        """Where its file is in the queue's folder."""
        return f"{self.state.value}/{self.name}"

    def key(self) -> tuple[int, int | str]:
        """Where it stands among the records of its state."""
        match self.state:
            case State.READY:
                return -self.priority, self.number
            case State.SCHEDULED | State.LEASED:
                return self.since_ms, self.number
            case State.DEAD:
                return self.since_ms, self.id


def parse(state: State, name: str) -> Record | None:
    """Read a file's name; None if it is no name of ours."""
    try:
        *numbers, id, _ = name.split(".")
        number, priority, since_ms, delivery_count, fence, generation = map(int, numbers)
        return Record(state, id, number, Priority(priority), since_ms, delivery_count, fence, generation)
    except ValueError:
        return None
