"""Producers: one Broker per event loop, opened by the first enqueue, with group commit in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from crossdock.batching import MAX_BYTES, MAX_ITEMS, Batcher
from crossdock.errors import BrokerError, CrossdockError, EnqueueError, EnqueueFailed, EnqueueManyError, EnqueueUnknown
from crossdock.forks import forget_after_fork, keep_inherited
from crossdock.spi import Broker, Message, QueueSpec, Support

T = TypeVar("T")


class Producer:
    """Stores messages through one Broker. Belongs to the loop that opened it."""

    def __init__(self, broker: Broker, queues: Sequence[QueueSpec]) -> None:
        self.broker = broker
        self._queues = queues
        self._batcher: Batcher[_Waiting] = Batcher(self._flush, _size)
        self._guard: AsyncGenerator[None, None] | None = None

    async def open(self) -> None:
        """Connect, make the queues known, and arrange to be closed with the loop."""
        await self.broker.open()
        await self.broker.declare(self._queues)
        # asyncio.run() finalises asynchronous generators before it closes its loop: the one moment
        # at which a program that forgot `app.close()` can still be closed properly.
        self._guard = self._close_with_loop()
        await anext(self._guard)

    async def enqueue(self, message: Message) -> None:
        """Store one message, together with others that are being enqueued now. Raises `EnqueueError`, `BrokerError`."""
        done: asyncio.Future[CrossdockError | None] = asyncio.get_running_loop().create_future()
        self._batcher.add((message, done))
        error = await done
        if error is not None:
            raise error

    async def enqueue_many(self, messages: Sequence[Message]) -> None:
        """Store a batch. Raises `EnqueueManyError`; `BrokerError` if nothing at all was attempted."""
        try:
            outcome = await self._store(messages)
        except BrokerError as error:
            if not isinstance(error, EnqueueError):
                raise
            outcome = dict.fromkeys(range(len(messages)), error)
        if outcome:
            stored = [message.id for index, message in enumerate(messages) if index not in outcome]
            errors = outcome.values()
            raise EnqueueManyError(
                stored,
                [error for error in errors if isinstance(error, EnqueueFailed)],
                [error for error in errors if isinstance(error, EnqueueUnknown)],
            )

    async def close(self) -> None:
        """Let what is under way end, then disconnect. Idempotent."""
        await self._batcher.drained()
        await self.broker.close()
        if self._guard is not None and not self._guard.ag_running:
            await self._guard.aclose()

    async def _flush(self, batch: list[_Waiting]) -> None:
        try:
            errors = await self._store([message for message, _ in batch])
        except CrossdockError as error:
            for _, done in batch:
                if not done.done():
                    done.set_result(_own_copy(error))
            return
        except asyncio.CancelledError:
            errors = {i: EnqueueUnknown("the event loop ended during the enqueue", message) for i, (message, _) in enumerate(batch)}
        for index, (_, done) in enumerate(batch):
            if not done.done():
                done.set_result(errors.get(index))

    async def _store(self, messages: Sequence[Message]) -> dict[int, EnqueueError]:
        refusals = await self.broker.enqueue(messages)
        return {refusal.index: self._as_enqueue_error(refusal.error, messages[refusal.index]) for refusal in refusals}

    def _as_enqueue_error(self, error: CrossdockError, message: Message) -> EnqueueError:
        if isinstance(error, EnqueueUnknown):
            error.safe_to_repeat = self.broker.capabilities.deduplication.support is not Support.UNSUPPORTED
        if isinstance(error, EnqueueError):
            error.message = error.message or message
            return error
        wrapped = EnqueueFailed(f"message {message.id} was not stored: {error}", message)
        wrapped.__cause__ = error
        return wrapped

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            await self.close()


_Waiting = tuple[Message, "asyncio.Future[CrossdockError | None]"]


def _size(item: _Waiting) -> int:
    return len(item[0].body)


def _own_copy(error: CrossdockError) -> CrossdockError:
    """One exception object per waiter: tracebacks grow on an object that is raised several times."""
    copy = type(error)(*error.args)
    copy.__cause__ = error
    return copy


def chunks(messages: Sequence[Message]) -> list[Sequence[Message]]:
    """Cut a batch at `MAX_ITEMS` messages or after `MAX_BYTES` of bodies."""
    cut: list[Sequence[Message]] = []
    start = weight = 0
    for at, message in enumerate(messages):
        weight += len(message.body)
        if at + 1 - start >= MAX_ITEMS or weight >= MAX_BYTES:
            cut.append(messages[start : at + 1])
            start, weight = at + 1, 0
    if start < len(messages):
        cut.append(messages[start:])
    return cut


class Producers:
    """The producers of one App in this process, one per event loop.

    Args:
        make: Builds an unopened Producer.
    """

    def __init__(self, make: Callable[[], Producer]) -> None:
        self._make = make
        self._opened: dict[asyncio.AbstractEventLoop, asyncio.Task[Producer]] = {}
        forget_after_fork(self)

    async def here(self) -> Producer:
        """Return the producer of the running loop, opening it first if need be. Raises what `Broker.open` raises."""
        loop = asyncio.get_running_loop()
        opening = self._opened.get(loop)
        if opening is None:
            self._drop_dead_loops()
            opening = self._opened[loop] = loop.create_task(self._open(), name="crossdock-open")
        if not opening.done():
            await asyncio.wait([opening])
        if opening.cancelled() or opening.exception() is not None:
            self._opened.pop(loop, None)
        return await opening

    async def close(self) -> None:
        """Close the producer of the running loop."""
        opening = self._opened.pop(asyncio.get_running_loop(), None)
        if opening is not None:
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()

    def forget(self) -> None:
        """In a forked child: start anew."""
        keep_inherited(self._opened)
        self._opened = {}

    async def _open(self) -> Producer:
        producer = self._make()
        await producer.open()
        return producer

    def _drop_dead_loops(self) -> None:
        for loop in [loop for loop in self._opened if loop.is_closed()]:
            del self._opened[loop]


