"""Incoming: how messages get into queues. A batch goes by one script per queue; where that finds it is not simple, item by item. What
is on its own goes by a shorter script first."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Container, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Final

from crossdock.errors import BrokerError, CrossdockError, EnqueueFailed, EnqueueUnknown, QueueFull
from crossdock.spi import Message, Refusal
from crossdock_redis import record, replies, scripts
from crossdock_redis.lane import Lane, NoAnswer
from crossdock_redis.limits import BATCH_BYTES, STORED_AT_ONCE, objection
from crossdock_redis.link import Command, LinkRefused
from crossdock_redis.replies import ServerError
from crossdock_redis.servertime import ServerTime

_LATER: Final = -1
"""Stands for a level where something has a due time of its own."""

Item = tuple[int, Message]
"""A message and its place in the batch that the caller gave."""


@dataclass
class _Chunk:
    """What goes to one queue in one script."""

    queue: str
    items: list[Item]
    script: str
    """`enqueue_one`, `enqueue` or, item by item, `store`."""


class Incoming:
    """Stores messages.

    Args:
        prefix_of: The prefix of a queue's keys.
        register: Adds queues to the namespace's registry.
        timeout: Seconds after which to give up.
        time: The server's clock.
        unavailable: Makes the error for a server that does not answer or refuses, from a reason.
        blocked: Told why the server stores nothing; None = it does (again).
    """

    def __init__(
        self,
        *,
        prefix_of: Callable[[str], str],
        register: Callable[[Sequence[str]], Awaitable[None]],
        timeout: float,
        time: ServerTime,
        unavailable: Callable[[str], BrokerError],
        blocked: Callable[[str | None], None],
    ) -> None:
        self._prefix_of = prefix_of
        self._register = register
        self._timeout = timeout
        self._time = time
        self._unavailable = unavailable
        self._blocked = blocked
        self._careful: set[str] = set()

    async def enqueue(self, lane: Lane, messages: Sequence[Item], *, beyond_limit: bool = False) -> list[Refusal]:
        """Store messages by way of one lane.

        Args:
            lane: To the server that has all their queues.
            messages: With their places, which the refusals name.
            beyond_limit: Whether `max_ready` holds nothing back.

        Raises:
            BrokerUnavailable: Nothing was attempted.
        """
        refusals: list[Refusal] = []
        queues = self._sort(messages, refusals)
        new: set[str] = set()
        attempted = False
        while queues:
            chunks = [self._cut(queue, waiting, beyond_limit, attempted) for queue, waiting in queues.items()]
            try:
                make = partial(self._commands, lane, chunks, frozenset(new), beyond_limit)
                answers = await lane.call(make, self._timeout, replicated=True)
            except (NoAnswer, LinkRefused) as error:
                written = isinstance(error, NoAnswer) and error.written
                if not written and not attempted:
                    raise self._unavailable(str(error)) from error
                for chunk in chunks:
                    refusals += (_not_stored(item, self._unavailable(str(error)), perhaps=written) for item in chunk.items)
                for waiting in queues.values():
                    refusals += (_not_stored(item, self._unavailable(str(error)), perhaps=False) for item in waiting)
                break
            attempted = True
            unknown: list[str] = []
            for chunk, answer in zip(chunks, answers, strict=True):
                again = self._judge(chunk, answer, refusals, unknown)
                if again:
                    queues[chunk.queue].extendleft(reversed(chunk.items))
            if unknown:
                try:
                    await self._register(unknown)
                except BrokerError as error:
                    self._note_blocked(error)
                    for queue in unknown:
                        refusals += (_not_stored(item, error, perhaps=False) for item in queues.pop(queue))
                new.update(unknown)
            queues = {queue: waiting for queue, waiting in queues.items() if waiting}
        if new:  # once more, should the queue have been erased in between
            with contextlib.suppress(BrokerError):
                await self._register(sorted(new))
        return refusals

    def _note_blocked(self, error: BaseException) -> None:
        """If that is why."""
        cause = error.__cause__
        if isinstance(cause, ServerError) and cause.code in replies.BLOCKED:
            self._blocked(replies.explain(cause))

    def _sort(self, messages: Sequence[Item], refusals: list[Refusal]) -> dict[str, deque[Item]]:
        now = self._time.now_ms()
        queues: dict[str, deque[Item]] = {}
        for item in messages:
            index, message = item
            error = objection(message, now)
            if error is not None:
                refusals.append(Refusal(index, error))
                continue
            try:
                queues[message.queue].append(item)
            except KeyError:
                queues[message.queue] = deque([item])
        return queues

    def _cut(self, queue: str, waiting: deque[Item], careful: bool, attempted: bool) -> _Chunk:
        items: list[Item] = []
        size = 0
        while waiting and len(items) < STORED_AT_ONCE and size < BATCH_BYTES:
            item = waiting.popleft()
            size += len(item[1].body)
            items.append(item)
        if careful or queue in self._careful:
            return _Chunk(queue, items, "store")
        if len(items) == 1:
            message = items[0][1]
            is_short = not attempted and message.delay_ms == 0 and message.eta_ms <= self._time.now_ms()
            return _Chunk(queue, items, "enqueue_one" if is_short else "enqueue")
        has_doubles = len({message.id for _, message in items}) < len(items)
        return _Chunk(queue, items, "store" if has_doubles else "enqueue")

    def _commands(self, lane: Lane, chunks: Sequence[_Chunk], new: Container[str], beyond_limit: bool) -> list[Command]:
        return [self._command(lane.token(), chunk, chunk.queue in new, beyond_limit) for chunk in chunks]

    def _command(self, token: str, chunk: _Chunk, new: bool, beyond_limit: bool) -> Command:
        prefix = self._prefix_of(chunk.queue)
        now = self._time.now_ms()
        if chunk.script == "enqueue_one":
            message = chunk.items[0][1]
            value = record.pack(message, 0, now)
            return ("EVALSHA", scripts.digest("enqueue_one"), 1, prefix, token, int(message.priority), message.id, value)
        may_create = "2" if beyond_limit else "1" if new else "0"
        if chunk.script == "store":
            parts: list[str | bytes | int] = []
            for _, message in chunk.items:
                parts += (message.id, *stored(message, now))
            return ("EVALSHA", scripts.digest("store"), 1, prefix, token, may_create, *parts)
        ids: dict[int, list[str]] = {9: [], 6: [], 3: [], 0: [], _LATER: []}
        values: dict[int, list[bytes]] = {9: [], 6: [], 3: [], 0: [], _LATER: []}
        dues: list[int] = []
        for _, message in chunk.items:
            value, due = stored(message, now)
            where: int = _LATER if due else message.priority
            ids[where].append(message.id)
            values[where].append(value)
            if due:
                dues.append(due)
        return (
            "EVALSHA",
            scripts.digest("enqueue"),
            1,
            prefix,
            token,
            may_create,
            *map(len, ids.values()),
            *chain.from_iterable(ids.values()),
            *chain.from_iterable(values.values()),
            *dues,
        )

    def _judge(self, chunk: _Chunk, answer: Any, refusals: list[Refusal], unknown: list[str]) -> bool:
        """Read a script's answer. Returns whether the chunk has to be sent again."""
        if isinstance(answer, ServerError):
            certain = replies.is_certain(answer)
            error = self._unavailable(replies.explain(answer))
            error.__cause__ = answer
            self._note_blocked(error)
            refusals += (_not_stored(item, error, perhaps=not certain) for item in chunk.items)
            return False
        if chunk.script == "enqueue_one":
            if not answer:
                return True  # it is for the others
            answer = (b"stored", answer)
        word = answer[0]
        self._time.heard(answer[1])
        self._blocked(None)
        if word == b"unknown":
            unknown.append(chunk.queue)
            return True
        if word == b"careful":
            self._careful.add(chunk.queue)
            return True
        if word == b"done":
            if not answer[2]:
                self._careful.discard(chunk.queue)
            refused: Sequence[int] = answer[3]
            for number, reason in zip(refused[::2], refused[1::2], strict=True):
                index, message = chunk.items[number]
                refusals.append(Refusal(index, _full(message) if reason == -1 else out_of_date(message, reason)))
        return False


def stored(message: Message, now_ms: int) -> tuple[bytes, int]:
    """A message's value, and when it is due as the scripts want it: 0 now, > 0 an instant, < 0 so many milliseconds from now."""
    if message.delay_ms > 0:
        return record.pack(message, 0, now_ms), -message.delay_ms
    eta = message.eta_ms if message.eta_ms > now_ms else 0
    return record.pack(message, eta, now_ms), eta


def _not_stored(item: Item, cause: CrossdockError, *, perhaps: bool) -> Refusal:
    index, message = item
    if perhaps:
        return Refusal(index, _unknown(message, cause))
    error = EnqueueFailed(f"Message {message.id!r} was not stored: {cause}", message)
    error.__cause__ = cause
    return Refusal(index, error)


def _unknown(message: Message, cause: CrossdockError) -> EnqueueUnknown:
    error = EnqueueUnknown(f"Message {message.id!r} may be stored or not: {cause}", message, safe_to_repeat=True)
    error.__cause__ = cause
    return error


def _full(message: Message) -> QueueFull:
    return QueueFull(f"Queue {message.queue!r} is full: it holds its max_ready messages; {message.id!r} was not stored.", message)


def out_of_date(message: Message, held: int) -> EnqueueFailed:
    """The refusal of a message whose id the queue holds at an earlier generation."""
    return EnqueueFailed(
        f"Queue {message.queue!r} still holds message {message.id!r} at generation {held}, so generation {message.generation} was "
        "not stored; settle, replay or remove that one first.",
        message,
    )
