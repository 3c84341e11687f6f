"""What travels between the event loop and the thread that uses the file."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from enum import Enum
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

from crossdock.backends.sqlite.store import Store
from crossdock.errors import BrokerUnavailable, CrossdockError
from crossdock.spi import Delivery, Lane, Nack

T = TypeVar("T")


class Loss(NamedTuple):
    """A transaction that was begun and did not end well."""

    error: BrokerUnavailable
    perhaps: bool
    """It failed at the very end, so what it did may be there when the file is opened again."""


class Command(Generic[T]):
    """Something to do in the store, and who waits for it.

    Args:
        run: Does it, inside a transaction; may be called again after that was rolled back.
        excuse: Turns a `Loss` into an answer; None: its error is raised.
        future: Gets the answer; None: nobody waits.
    """

    def __init__(
        self,
        run: Callable[[Store], T],
        excuse: Callable[[Loss], T] | None = None,
        future: asyncio.Future[T] | None = None,
    ) -> None:
        self.run = run
        self.excuse = excuse
        self.future = future

    @property
    def unwanted(self) -> bool:
        """Whether whoever waited for the answer was cancelled, or is gone with the event loop."""
        return self.future is not None and (self.future.cancelled() or self.future.get_loop().is_closed())


class Receive(Command[Sequence[Delivery]]):
    """A receive, which may stay with the thread until there is something.

    Args:
        lanes: What is wanted.
        limit: Most deliveries.
        deadline: Monotonic seconds until which it stays.
        future: Gets the deliveries.
    """

    def __init__(self, lanes: Sequence[Lane], limit: int, deadline: float, future: asyncio.Future[Sequence[Delivery]]) -> None:
        super().__init__(lambda store: store.deliveries.receive(lanes, limit), future=future)
        self.lanes = lanes
        self.deadline = deadline
        self.look_at_ms = -math.inf
        """When to look again even if nobody has written; in milliseconds since the Unix epoch."""


class Note(Enum):
    """What the thread is told beside commands."""

    WRITTEN = "somebody is writing to the file"
    END = "there will be no more"


Inbox = SimpleQueue[Command[Any] | Note]


class Answer(NamedTuple):
    """How a command ended."""

    command: Command[Any]
    value: Any
    error: CrossdockError | None = None


def give_back(deliveries: Sequence[Delivery]) -> Command[object]:
    """The command that returns deliveries as if they had never been made. If it fails their leases run out."""
    settlements = [Nack(delivery) for delivery in deliveries]
    return Command(lambda store: store.deliveries.settle(settlements))
