"""Group commit: the one rule by which single items become batches, for enqueues and for settlements.

Flush at once when no flush is under way; else collect until it returns. There is no timer: an idle sender never waits, a busy one
gets batches as large as its broker is slow. Who is the only sender may flush his own item himself: to hand it to a task and to be
woken by it takes two turns of the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

MAX_ITEMS: Final = 1000
"""Most items in one flush."""
MAX_BYTES: Final = 1024 * 1024
"""A flush ends with the item that reaches this many bytes."""


class Batcher(Generic[T]):
    """Collects items of one event loop and flushes them, one batch at a time.

    Args:
        flush: Sends a batch and deals with its outcome; must not raise.
        size: Bytes of an item.
    """

    def __init__(self, flush: Callable[[list[T]], Awaitable[None]], size: Callable[[T], int]) -> None:
        self._flush = flush
        self._size = size
        self._waiting: deque[T] = deque()
        self._flusher: asyncio.Task[None] | None = None
        self._single = True
        """Whether the last flush was of one item, so that there seems to be one sender."""
        self._flushed_by_owner: asyncio.Future[None] | None = None

    def add(self, item: T) -> None:
        """Take an item in; it is flushed as soon as the rule allows."""
        self.extend((item,))

    def extend(self, items: Sequence[T]) -> None:
        """Take several items in."""
        self._waiting.extend(items)
        self._start()

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is under way and there seems to be one sender: he may flush his next item himself, within `by_owner`."""
        return self._single and self._flusher is None and self._flushed_by_owner is None

    @contextmanager
    def by_owner(self) -> Generator[None]:
        """Whoever sends meanwhile waits, as for any flush. Only while `is_quiet`."""
        over = self._flushed_by_owner = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            self._flushed_by_owner = None
            over.set_result(None)
            self._start()

    async def drained(self) -> None:
        """Return when nothing is waiting or under way."""
        while under_way := self._flushed_by_owner or self._flusher:
            await asyncio.wait([under_way])

    def _start(self) -> None:
        if self._waiting and self._flusher is None and self._flushed_by_owner is None:
            self._flusher = asyncio.get_running_loop().create_task(self._run(), name="crossdock-batcher")

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._flush(self._take())
        finally:
            self._flusher = None

    def _take(self) -> list[T]:
        waiting = self._waiting
        batch: list[Any] = []
        weight = 0
        while waiting and len(batch) < MAX_ITEMS and weight < MAX_BYTES:
            item = waiting.popleft()
            weight += self._size(item)
            batch.append(item)
        self._single = len(batch) == 1
        return batch
