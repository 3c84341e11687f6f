"""Choosing dead letters, and bringing them back or discarding them, in batches and at a rate."""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import msgspec

from crossdock.clock import Clock, SystemClock
from crossdock.errors import CodecError, ConfigurationError
from crossdock.letters import revive
from crossdock.names import check_id
from crossdock.spi import Broker, Cursor, DeadLetter, Reason, Replay, State

PAGE = 200
"""Letters asked for at once: their bodies may have a megabyte each."""
DISCARD_BATCH = 1000
"""Ids deleted at once."""


class Filters(msgspec.Struct, frozen=True, kw_only=True):
    """Which letters are meant. All that is given must hold."""

    ids: frozenset[str] = frozenset()
    task: str | None = None
    """Name, or a pattern with `*` and `?`."""
    error: str | None = None
    """Qualified name of the error's class, its last part, or a pattern."""
    reasons: frozenset[Reason] = frozenset()
    since_ms: int | None = None
    until_ms: int | None = None
    limit: int | None = None
    """At most so many, the first to die first, queue by queue."""

    def select(self, letter: DeadLetter) -> bool:
        """Whether this letter is meant; the limit is not looked at."""
        return (
            (not self.ids or letter.message.id in self.ids)
            and (self.task is None or fnmatchcase(letter.task, self.task))
            and (self.error is None or any(fnmatchcase(name, self.error) for name in _names(letter.error_type)))
            and (not self.reasons or letter.reason in self.reasons)
            and (self.since_ms is None or letter.died_ms >= self.since_ms)
            and (self.until_ms is None or letter.died_ms < self.until_ms)
        )


def _names(error_type: str) -> tuple[str, str]:
    """How people call an error's class: in full, or by its last part."""
    return error_type, error_type.rpartition(".")[2]


def read_filters(
    *,
    ids: Iterable[str] = (),
    task: str | None = None,
    error: str | None = None,
    reasons: Sequence[str] = (),
    since_ms: int | None = None,
    until_ms: int | None = None,
    limit: int | None = None,
) -> Filters:
    """Build filters from people's words.

    Raises:
        ConfigurationError: An id is not valid, or there is no such reason; the text has the nearest.
    """
    known = {reason.value: reason for reason in Reason}
    for name in reasons:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
            raise ConfigurationError(f"there is no reason {name!r}; {hint}")
    return Filters(
        ids=frozenset(map(check_id, ids)),
        task=task,
        error=error,
        reasons=frozenset(known[name] for name in reasons),
        since_ms=since_ms,
        until_ms=until_ms,
        limit=limit,
    )


async def letters(
    broker: Broker, queues: Sequence[str], filters: Filters, present: set[str] | None = None
) -> AsyncGenerator[DeadLetter]:
    """Yield the letters that are meant, queue by queue, in order of dying; each once, though it be replayed and die again.

    Args:
        broker: Where to look.
        queues: In which queues.
        filters: Which letters.
        present: Filled with the ids from `filters` that were found, whatever the other filters say.
    """
    left = filters.limit
    for queue in queues:
        seen: set[str] = set()
        async for letter in _of_queue(broker, queue, filters.ids):
            id = letter.message.id
            if present is not None and filters.ids:
                present.add(id)
            if id in seen or not filters.select(letter):
                continue
            if left is not None:
                if left <= 0:
                    return
                left -= 1
            seen.add(id)
            yield letter


async def _of_queue(broker: Broker, queue: str, ids: frozenset[str]) -> AsyncIterator[DeadLetter]:
    if ids:
        ordered = sorted(ids)
        for start in range(0, len(ordered), PAGE):
            page = await broker.peek(queue, State.DEAD, ids=ordered[start : start + PAGE])
            for entry in page.entries:
                if entry.letter is not None:
                    yield entry.letter
        return
    cursor: Cursor | None = None
    while True:
        page = await broker.peek(queue, State.DEAD, after=cursor, limit=PAGE)
        for entry in page.entries:
            if entry.letter is not None:
                yield entry.letter
        cursor = page.next
        if cursor is None:
            return


# --- acting ---------------------------------------------------------------------------------------


class Pace:
    """How fast to go.

    Args:
        rate: Items per second; None = as fast as the broker takes them.
        clock: Source of time.
    """

    def __init__(self, rate: float | None, clock: Clock | None = None) -> None:
        self._rate = rate
        self._clock = clock or SystemClock()
        self._next = self._clock.monotonic()
        # A tenth of a second's worth at once, so that a rate is smooth and a high one still goes in batches.
        self.batch = PAGE if rate is None else max(1, min(PAGE, int(rate / 10)))
        """Items to do at once."""

    async def wait(self, count: int) -> None:
        """Return when `count` items more may be done."""
        if self._rate is None:
            return
        now = self._clock.monotonic()
        if self._next > now:
            await self._clock.sleep(self._next - now)
        self._next = max(self._next, now) + count / self._rate


class Failed(msgspec.Struct, frozen=True):
    """A letter that stayed as it was."""

    id: str
    queue: str | None
    error: str


class Outcome(msgspec.Struct):
    """What became of the letters, so far."""

    selected: int = 0
    done: int = 0
    failed: list[Failed] = []


async def replay(
    broker: Broker,
    selected: AsyncIterator[DeadLetter],
    outcome: Outcome,
    *,
    to: str | None,
    changes: Mapping[str, Any],
    pace: Pace,
    advance: Callable[[int], None],
) -> None:
    """Bring letters back to life, counting in `outcome`, which so tells the truth after an error too.

    Args:
        broker: Where they are.
        selected: Which.
        outcome: Filled as it goes.
        to: Another queue to put them in; None = where each died.
        changes: Arguments to change, merged over each task's own.
        pace: How fast.
        advance: Told of the progress.
    """
    async for batch in _batches(selected, pace.batch):
        await pace.wait(len(batch))
        outcome.selected += len(batch)
        queue = batch[0].message.queue
        replays: list[Replay] = []
        now_ms = SystemClock().time_ms()
        for letter in batch:
            try:
                replays.append(Replay(letter.message.id, revive(letter, now_ms=now_ms, queue=to, arguments=changes or None)))
            except CodecError as error:
                outcome.failed.append(Failed(letter.message.id, queue, f"its arguments cannot be changed: {error}"))
        refusals = await broker.replay(queue, replays)
        outcome.failed += [Failed(replays[refusal.index].id, queue, str(refusal.error)) for refusal in refusals]
        outcome.done += len(replays) - len(refusals)
        advance(len(batch))


async def _batches(selected: AsyncIterator[DeadLetter], size: int) -> AsyncGenerator[list[DeadLetter]]:
    """Group letters of one queue."""
    batch: list[DeadLetter] = []
    async for letter in selected:
        if batch and (len(batch) == size or batch[0].message.queue != letter.message.queue):
            yield batch
            batch = []
        batch.append(letter)
    if batch:
        yield batch


async def discard(broker: Broker, ids: Mapping[str, Sequence[str]], outcome: Outcome, *, advance: Callable[[int], None]) -> None:
    """Delete letters for good, counting in `outcome`.

    Args:
        broker: Where they are.
        ids: Of each queue. Ids, not a new selection: nothing is deleted that died after somebody said yes.
        outcome: Filled as it goes.
        advance: Told of the progress.
    """
    for queue, of_queue in ids.items():
        for start in range(0, len(of_queue), DISCARD_BATCH):
            batch = of_queue[start : start + DISCARD_BATCH]
            refusals = await broker.remove(queue, State.DEAD, batch)
            outcome.failed += [Failed(batch[refusal.index], queue, str(refusal.error)) for refusal in refusals]
            outcome.done += len(batch) - len(refusals)
            advance(len(batch))
