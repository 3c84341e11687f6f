"""Producers: one Broker per event loop, opened by the first enqueue, with group commit in front of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

from crossdock.batching import MAX_BYTES, MAX_ITEMS, Batcher
from crossdock.errors import CrossdockError, EnqueueError, EnqueueFailed, EnqueueManyError, EnqueueUnknown
from crossdock.forks import forget_after_fork, keep_inherited
from crossdock.spi import Broker, Message, QueueSpec, Support


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
        try:
            await self.broker.declare(self._queues)
        except BaseException:
            await self.broker.close()
            raise
        # asyncio.run() finalises asynchronous generators before it closes its loop: the one moment
        # at which a program that forgot `app.close()` can still be closed properly.
        self._guard = self._close_with_loop()
        await anext(self._guard)

    async def enqueue(self, message: Message) -> None:
        """Store one message, together with others that are being enqueued now. Raises `EnqueueError`, `BrokerError`."""
        error: CrossdockError | None
        if self._batcher.is_quiet:
            with self._batcher.by_owner():
                error = (await self._store((message,))).get(0)
        else:
            done: asyncio.Future[CrossdockError | None] = asyncio.get_running_loop().create_future()
            self._batcher.add((message, done))
            error = await done
        if error is not None:
            raise error

    async def enqueue_many(self, messages: Sequence[Message]) -> None:
        """Store a batch. Raises `EnqueueManyError`; another `BrokerError` if nothing at all was attempted."""
        outcome = await self._store(messages)
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
        if self._guard is not None:
            await self._guard.aclose()

    async def _flush(self, batch: list[_Waiting]) -> None:
        errors: Mapping[int, CrossdockError]
        try:
            errors = await self._store([message for message, _ in batch])
        except CrossdockError as error:
            errors = {index: _own_copy(error) for index in range(len(batch))}
        except asyncio.CancelledError:
            errors = {i: self._unknown("the event loop ended during the enqueue", message) for i, (message, _) in enumerate(batch)}
        for index, (_, done) in enumerate(batch):
            if not done.done():
                done.set_result(errors.get(index))

    async def _store(self, messages: Sequence[Message]) -> dict[int, EnqueueFailed | EnqueueUnknown]:
        """Return the errors of what was not stored. Raises a `CrossdockError` if nothing was attempted."""
        try:
            refusals = await self.broker.enqueue(messages)
            return {refusal.index: self._as_enqueue_error(refusal.error, messages[refusal.index]) for refusal in refusals}
        except EnqueueError as error:
            return {index: self._as_enqueue_error(_own_copy(error), message) for index, message in enumerate(messages)}
        except CrossdockError:
            raise
        except Exception as error:  # a bug of the backend: its callers must not wait for ever
            text = f"the backend failed with {type(error).__name__}, which it should not: report it to its authors"
            return {index: self._unknown(text, message, error) for index, message in enumerate(messages)}

    def _as_enqueue_error(self, error: CrossdockError, message: Message) -> EnqueueFailed | EnqueueUnknown:
        if isinstance(error, EnqueueUnknown):
            error.safe_to_repeat = self._safe_to_repeat
        if isinstance(error, EnqueueFailed | EnqueueUnknown):
            error.message = error.message or message
            return error
        return not_stored(message, error)

    def _unknown(self, text: str, message: Message, cause: Exception | None = None) -> EnqueueUnknown:
        unknown = EnqueueUnknown(f"message {message.id} may be stored or not: {text}", message, safe_to_repeat=self._safe_to_repeat)
        unknown.__cause__ = cause
        return unknown

    @property
    def _safe_to_repeat(self) -> bool:
        return self.broker.capabilities.deduplication.support is not Support.UNSUPPORTED

    async def _close_with_loop(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._guard = None
            await self.close()


_Waiting = tuple[Message, "asyncio.Future[CrossdockError | None]"]


def _size(item: _Waiting) -> int:
    return len(item[0].body)


def _own_copy(error: CrossdockError) -> CrossdockError:
    """One exception object per waiter: tracebacks grow on an object that is raised several times."""
    copy = type(error).__new__(type(error), *error.args)  # without __init__, whose parameters differ from class to class
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error
    return copy


def not_stored(message: Message, error: Exception) -> EnqueueFailed:
    """An error that is none of ours about enqueuing, as what it means for one message: it is certainly not stored."""
    failed = EnqueueFailed(f"message {message.id} was not stored: {error}", message)
    failed.__cause__ = error
    return failed


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
        if (opening.cancelled() or opening.exception() is not None) and self._opened.get(loop) is opening:
            del self._opened[loop]  # the next one tries again
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
        for loop in list(self._opened):  # a copy: other threads add their loops
            if loop.is_closed():
                self._opened.pop(loop, None)
