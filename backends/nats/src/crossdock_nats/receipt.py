"""Receipts: what a Broker remembers of a delivery that it returned."""

from __future__ import annotations

import asyncio
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crossdock_nats.queues import Level


class Fate(Enum):
    """How far the ending of a delivery is."""

    OPEN = 0
    UNDER_WAY = 1
    DONE = 2
    LOST = 3
    """Refused: somebody else has the message, or had it."""
    UNKNOWN = 4
    """Written, and not answered: the same ending may be tried again."""


class Receipt:
    """One delivery.

    Args:
        owner: The Broker that returned it, as it was opened then.
        level: Where it came from.
        seq: The sequence that was handed over.
        ack: The subject on which it is answered.
        deadline: Until when the lease is surely ours, in seconds of the clock.
    """

    __slots__ = ("ack", "deadline", "due_ms", "ended", "ending", "fate", "level", "mark", "owner", "seq")

    def __init__(self, owner: object, level: Level, seq: int, ack: bytes, deadline: float) -> None:
        self.owner = owner
        self.level = level
        self.seq = seq
        self.ack = ack
        self.deadline = deadline
        self.fate = Fate.OPEN
        self.ending: object = None
        """What tells its settlement from others, once there is one."""
        self.ended: asyncio.Future[None] | None = None
        """Done when the settlement that is under way has an outcome, if anybody waits for that."""
        self.mark = b""
        """What the server knows the settlement's write by."""
        self.due_ms = 0
        """When the message is due again, by the first try of the settlement."""

    def end(self, fate: Fate) -> None:
        """The settlement that was under way has an outcome."""
        self.fate = fate
        if fate in (Fate.DONE, Fate.LOST):
            self.level.out.pop(self.seq, None)
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)
        self.ended = None
