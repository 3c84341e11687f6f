"""Repairs: the verbs that look and mend, one script each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from crossdock.errors import NotFound
from crossdock.spi import Cursor, Entry, Page, QueueSpec, QueueStats, Refusal, Replay, State
from crossdock_redis import cursor, keys, record, scripts
from crossdock_redis.incoming import out_of_date, stored
from crossdock_redis.limits import BATCH, LONGEST_MS, objection
from crossdock_redis.link import Command
from crossdock_redis.route import Route
from crossdock_redis.servertime import ServerTime

_MAX_PAGE: Final = 1000


class Repairs:
    """Looks into queues and mends them.

    Args:
        namespace: Theirs.
        prefix_of: The prefix of a queue's keys.
        time: The server's clock.
    """

    def __init__(self, namespace: str, prefix_of: Callable[[str], str], time: ServerTime) -> None:
        self._namespace = namespace
        self._prefix_of = prefix_of
        self._time = time

    def _script(self, name: str, queue: str, *arguments: str | bytes | int) -> Command:
        return ("EVALSHA", scripts.digest(name), 1, self._prefix_of(queue), *arguments)

    def _scripts(self, name: str, queues: Sequence[str]) -> list[Command]:
        return [self._script(name, queue) for queue in queues]

    def _change(self, route: Route, name: str, queue: str, *arguments: str | bytes | int) -> Command:
        """A script that changes something: with a token, drawn when it is sent."""
        return self._script(name, queue, route.side.token(), *arguments)

    async def _until_caught_up(self, route: Route, make: Callable[[], Command], *, replicated: bool = False) -> Any:
        """The answer of a script that answers nil until all that time has to do is done."""
        while True:
            [answer] = await route.ask(lambda: [make()], replicated=replicated)
            if answer is not None:
                return answer

    # --- queues ---

    async def register(self, route: Route, queues: Sequence[str]) -> None:
        """Add names to the namespace's registry; the route is the registry's. Names that are there cost no memory, should that be full."""
        registry = keys.registry(self._namespace)
        [known] = await route.ask(lambda: [("SMISMEMBER", registry, *queues)])
        new = [queue for queue, there in zip(queues, known, strict=True) if not there]
        if new:
            await route.ask(lambda: [("SADD", registry, *new)])

    async def registered(self, route: Route) -> list[str]:
        """The names in the registry, in order; a queue of that name need not exist."""
        [names] = await route.ask(lambda: [("SMEMBERS", keys.registry(self._namespace))])
        return sorted(name.decode() for name in names)

    async def declare(self, route: Route, specs: Sequence[QueueSpec]) -> None:
        """Set what queues of this route are like."""
        await route.ask(lambda: [self._script("declare", spec.name, *_settings(spec)) for spec in specs])

    async def missing(self, route: Route, queues: Sequence[str]) -> list[str]:
        """Those of these queues of this route that are not as declared any more; somebody may have made them anew by an enqueue."""
        answers = await route.ask(lambda: [("HEXISTS", self._prefix_of(queue) + "q", "lease_ms") for queue in queues])
        return [queue for queue, there in zip(queues, answers, strict=True) if not there]

    async def erase(self, route: Route, queue: str) -> None:
        """Delete all keys of a queue."""
        named = [self._prefix_of(queue), *keys.fixed(self._prefix_of(queue))]
        await route.ask(lambda: [("EVALSHA", scripts.digest("erase"), len(named), *named)])

    async def unregister(self, route: Route, queues: Sequence[str]) -> None:
        """Take names out of the namespace's registry; the route is the registry's."""
        await route.ask(lambda: [("SREM", keys.registry(self._namespace), *queues)])

    # --- looking ---

    async def stats(self, route: Route, queues: Sequence[str]) -> dict[str, QueueStats]:
        """Figures of queues of this route; those that do not exist are left out."""
        found: dict[str, QueueStats] = {}
        left = list(queues)
        while left:
            now, left = left[:BATCH], left[BATCH:]
            answers = await route.ask(partial(self._scripts, "stats", now))
            for queue, answer in zip(now, answers, strict=True):
                if answer is None:
                    left.append(queue)
                elif answer:
                    found[queue] = _stats(queue, answer)
        return found

    async def peek(self, route: Route, queue: str, state: State, ids: Sequence[str], after: Cursor | None, limit: int) -> Page:
        """One page of a listing."""
        if ids:
            entries: list[Entry] = []
            for first in range(0, len(ids), BATCH):
                some = ids[first : first + BATCH]
                answer = await self._until_caught_up(route, partial(self._script, "peek", queue, state.value, 0, *some))
                entries += _entries(queue, state, answer[0])
            return Page(entries)
        place = cursor.read(after, queue, state) if after is not None else ()
        most = max(1, min(limit, _MAX_PAGE))
        shown, last = await self._until_caught_up(route, lambda: self._script("peek", queue, state.value, most, *place))
        follow = cursor.write(queue, state, (last[0].decode(), last[1].decode())) if last else None
        return Page(_entries(queue, state, shown), follow)

    # --- mending ---

    async def remove(self, route: Route, queue: str, state: State, ids: Sequence[str]) -> list[Refusal]:
        """Delete messages by id."""
        refusals: list[Refusal] = []
        for first in range(0, len(ids), BATCH):
            some = ids[first : first + BATCH]
            refused = await self._until_caught_up(route, partial(self._change, route, "remove", queue, state.value, *some))
            for number in refused:
                why = NotFound(f"No {state.value} message {some[number]!r} is in queue {queue!r}.")
                refusals.append(Refusal(first + number, why))
        return refusals

    async def purge(self, route: Route, queue: str, state: State) -> int:
        """Delete the messages of a state that are there now, in steps."""
        purged, left = 0, BATCH
        while left > 0:
            most = min(left, BATCH)
            make = partial(self._change, route, "purge", queue, state.value, most)
            deleted, there = await self._until_caught_up(route, make)
            # What the first step leaves is what there was; those that come later do not keep us.
            left = there if purged == 0 else min(left - deleted, there)
            purged += deleted
            if deleted == 0:
                break
        return purged

    async def replay(self, route: Route, queue: str, replays: Sequence[tuple[int, Replay]], target: str) -> list[Refusal]:
        """Bring letters of a queue back to life in a queue of the same route."""
        refusals: list[Refusal] = []
        sent: list[tuple[int, Replay]] = []
        for index, replay in replays:
            error = objection(replay.message, self._time.now_ms())
            if error is None:
                sent.append((index, replay))
            else:
                refusals.append(Refusal(index, error))
        for first in range(0, len(sent), BATCH):
            some = sent[first : first + BATCH]
            make = partial(self._replay, route, queue, some, target)
            refused: Sequence[int] = await self._until_caught_up(route, make, replicated=True)
            for number, reason in zip(refused[::2], refused[1::2], strict=True):
                index, replay = some[number]
                refusals.append(
                    Refusal(index, no_letter(replay.id, queue) if reason == -1 else out_of_date(replay.message, reason))
                )
        return refusals

    def _replay(self, route: Route, queue: str, replays: Sequence[tuple[int, Replay]], target: str) -> Command:
        now = self._time.now_ms()
        parts: list[str | bytes | int] = []
        for _, replay in replays:
            parts += (replay.id, replay.message.id, *stored(replay.message, now))
        return ("EVALSHA", scripts.digest("replay"), 2, self._prefix_of(queue), self._prefix_of(target), route.side.token(), *parts)


def no_letter(id: str, queue: str) -> NotFound:
    """The refusal of a replay for which there is no dead letter."""
    return NotFound(f"No dead letter {id!r} is in queue {queue!r}.")


def _settings(spec: QueueSpec) -> tuple[str, str, str, str]:
    def text(number: float | None, factor: int = 1) -> str:
        return "" if number is None else str(round(min(number * factor, LONGEST_MS)))

    return text(spec.lease, 1000), text(spec.max_ready), text(spec.dead_max_age, 1000), text(spec.dead_max_count)


def _stats(queue: str, answer: Sequence[int]) -> QueueStats:
    ready, scheduled, leased, dead, since, dropped, now = answer
    return QueueStats(
        queue,
        ready=ready,
        scheduled=scheduled,
        leased=leased,
        dead=dead,
        oldest_ready_age=max(0.0, (now - since) / 1000) if since >= 0 else 0.0,
        dead_dropped=dropped,
    )


def _entries(queue: str, state: State, shown: Sequence[bytes]) -> list[Entry]:
    return [_entry(queue, state, id.decode(), value) for id, value in zip(shown[::2], shown[1::2], strict=True)]


def _entry(queue: str, state: State, id: str, value: bytes) -> Entry:
    if state is State.DEAD:
        letter, count = record.unpack_letter(id, queue, value)
        return Entry(letter.message, state, count, letter)
    message, lost = record.unpack(id, queue, value)
    return Entry(message, state, lost + 1 if state is State.LEASED else lost)
