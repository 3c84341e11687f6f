"""Looking: figures and listings. They change nothing, take nothing, and make no queue."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from crossdock.errors import UnsupportedCapability
from crossdock.spi import LEVELS, Cursor, Entry, Page, Priority, QueueStats, State
from crossdock_nats import cursor, limits, names, record
from crossdock_nats.api import Api, Position, Problem, StreamInfo
from crossdock_nats.letters import Letters
from crossdock_nats.queues import Queue, Queues
from crossdock_nats.record import Stored
from crossdock_nats.servertime import ServerTime

_MAX_PAGE: Final = 1000
_ATTEMPTS: Final = 3
_EXACT_ATTEMPTS: Final = 25
_SHORT: Final = 0.004
"""Seconds between two of these: a tenth of a second for what consumers have not heard of."""


class Looking:
    """Looks, for one Broker while it is open.

    Args:
        api: JetStream.
        queues: Their streams and consumers.
        letters: Keeps the dead to what was asked for.
        time: The server's time.
    """

    def __init__(self, api: Api, queues: Queues, letters: Letters, time: ServerTime) -> None:
        self._api = api
        self._queues = queues
        self._letters = letters
        self._time = time

    # --- figures ---

    async def stats(self, wanted: Sequence[str] | None) -> list[QueueStats]:
        """As `Broker.stats`."""
        asked = await self._queues.all_names() if wanted is None else list(dict.fromkeys(wanted))
        self._queues.doubt(asked)
        there = await self._queues.look(asked)
        found: dict[str, QueueStats] = {}
        for name, queue in there.items():
            await self._letters.retain(queue)
            found[name], _ = await self.count(queue)
        if wanted is None:
            return [found[name] for name in asked if name in found]
        return [found.get(name) or QueueStats(name, 0, 0, 0, 0, 0.0, None, None) for name in wanted]

    async def count(self, queue: Queue, *, exactly: bool = False) -> tuple[QueueStats, int]:
        """The figures of a queue, and the last sequence of its stream when they were true.

        Consumers hear of what is stored a little later than who stored it.

        Args:
            queue: Which.
            exactly: Count what is SCHEDULED, too, and wait until every message of the stream is in one of the counts.
        """
        seq = total = ready = leased = dead = 0
        levels: dict[Priority, _Either] = {}
        places = (names.DEAD, names.SCHEDULED) if exactly else (names.DEAD,)
        for attempt in range(_EXACT_ATTEMPTS if exactly else _ATTEMPTS):
            subjects = queue.there
            consumers = [*(subjects.consumer(level) for level in LEVELS), *map(subjects.counter, places)]
            requests: list[tuple[str, object]] = [(f"STREAM.INFO.{queue.stream}", None)]
            requests += [(f"CONSUMER.INFO.{queue.stream}.{consumer}", None) for consumer in consumers]
            requests.append((f"STREAM.INFO.{queue.stream}", None))
            before, *infos, after = await self._api.ask(requests, _Either)
            if isinstance(before, Problem) or isinstance(after, Problem):
                return QueueStats(queue.name, 0, 0, 0, 0, 0.0, None, None), 0
            levels = {level: info for level, info in zip(LEVELS, infos, strict=False) if not isinstance(info, Problem)}
            counters = {
                place: info.num_pending
                for place, info in zip(places, infos[len(LEVELS) :], strict=True)
                if not isinstance(info, Problem)
            }
            ready = sum(info.num_pending for info in levels.values())
            leased = sum(info.num_ack_pending for info in levels.values())
            dead = counters.get(names.DEAD, 0)
            total, seq = after.state.messages, before.state.last_seq
            uncounted = total - ready - leased - sum(counters.values())
            missing = [level for level in LEVELS if level not in levels]
            if uncounted > 0 and (missing or len(counters) < len(places)):
                # It may be where nobody counts. The server counts only by consumers.
                await self._queues.levels([(queue, level) for level in missing if not queue.levels[level].ready])
                for level in missing:
                    queue.levels[level].ready = False
                await self._queues.levels([(queue, level) for level in missing])
                for place in places:
                    queue.counters.discard(place)
                    await self._queues.counter(queue, place)
                continue
            if not exactly:
                if (before.state.last_seq, before.state.messages) == (after.state.last_seq, after.state.messages):
                    break
            elif before.state.last_seq == after.state.last_seq:
                if uncounted <= queue.unexplained or attempt == _EXACT_ATTEMPTS - 1:
                    queue.unexplained = max(0, uncounted)
                    break
                await asyncio.sleep(_SHORT)
        scheduled = max(0, total - ready - leased - dead)
        oldest = await self._oldest(queue, levels) if ready else 0.0
        return QueueStats(queue.name, ready, scheduled, leased, dead, oldest), seq

    async def _oldest(self, queue: Queue, levels: dict[Priority, _Either]) -> float:
        subjects = queue.there
        wanted: list[dict[str, Any]] = [
            {"seq": info.delivered.stream_seq + 1, "next_by_subj": subjects.filter(b"%d" % level)}
            for level, info in levels.items()
            if info.num_pending
        ]
        stored = [each.time_ms for each in await self._api.get(queue.stream, wanted, exact=False) if each is not None]
        if self._time.stale:
            await self._queues.tell_time(queue)
        return max(0.0, (self._time.now_ms() - min(stored)) / 1000) if stored else 0.0

    # --- listings ---

    async def peek(self, name: str, state: State, ids: Sequence[str], after: Cursor | None, limit: int) -> Page:
        """As `Broker.peek`."""
        if state is State.LEASED:
            raise UnsupportedCapability("The NATS broker cannot list leased messages: the server does not tell which they are.")
        place = cursor.read(after, name, state) if after is not None and not ids else None
        queue = (await self._queues.look([name])).get(name)
        if queue is None:
            return Page([])
        if state is State.DEAD:
            await self._letters.retain(queue)
        if ids:
            found = await self.find(queue, state, ids)
            return Page([record.read(queue.there, name, stored, state) for stored in found.values()])
        limit = max(1, min(limit, _MAX_PAGE))
        if state is State.READY:
            return await self._ready_page(queue, place, limit)
        return await self._timed_page(queue, state, place, limit)

    async def find(self, queue: Queue, state: State, ids: Sequence[str]) -> dict[str, Stored]:
        """Those of these messages that are in this state, by id."""
        subjects = queue.there
        asked = [id for id in dict.fromkeys(ids) if limits.is_id(id)]
        if state is not State.READY:
            # Of an id that is there twice, since somebody died in the middle of a move, the letter is found too.
            token = names.SCHEDULED if state is State.SCHEDULED else names.DEAD
            patterns = [subjects.at(token, id).decode() for id in asked]
        elif queue.keyed:
            patterns = [subjects.anywhere(id).decode() for id in asked]
        else:
            patterns = [place.decode() for id in asked for place in subjects.each_place(id)]
        got = await self._api.get(queue.stream, [{"last_by_subj": pattern} for pattern in patterns], exact=queue.replicas > 1)
        found: dict[str, Stored] = {}
        for stored in got:
            if stored is None:
                continue
            place = subjects.read(stored.subject)
            if place.state is state:
                found[place.id] = stored
        if state is State.READY and found:
            delivered = await self.delivered(queue)
            found = {id: each for id, each in found.items() if each.seq > delivered.get(subjects.read(each.subject).place, 0)}
        return found

    async def delivered(self, queue: Queue) -> dict[bytes, int]:
        """How far each level is: what has a higher sequence was never delivered."""
        subjects = queue.there
        infos = await self._api.consumer_infos([(queue.stream, subjects.consumer(level)) for level in LEVELS])
        return {
            b"%d" % level: info.delivered.stream_seq
            for level, info in zip(LEVELS, infos, strict=True)
            if not isinstance(info, Problem)
        }

    async def _ready_page(self, queue: Queue, place: cursor.Place | None, limit: int) -> Page:
        delivered = await self.delivered(queue)
        subjects = queue.there
        found: list[Stored] = []
        for level in LEVELS:
            if place is not None and level > place[0]:
                continue
            token = b"%d" % level
            seq = delivered.get(token, 0)
            if place is not None and level == place[0]:
                seq = max(seq, int(place[1]))
            found += await self._from(queue, seq + 1, subjects.filter(token), limit + 1 - len(found))
            if len(found) > limit:
                break
        entries = [record.read(subjects, queue.name, stored, State.READY) for stored in found[:limit]]
        if len(found) <= limit:
            return Page(entries)
        return Page(entries, cursor.write(queue.name, State.READY, (int(entries[-1].message.priority), str(found[limit - 1].seq))))

    async def _from(self, queue: Queue, seq: int, pattern: str, limit: int) -> list[Stored]:
        """Messages that fit a pattern from a sequence on, in their order."""
        if self._queues.features.batches_gets and queue.replicas == 1:
            found: list[Stored] = []
            while len(found) < limit and (some := await self._api.get_many(queue.stream, seq, pattern, limit - len(found))):
                found += some
                seq = some[-1].seq + 1
            return found
        found = []
        while len(found) < limit:
            [stored] = await self._api.get(queue.stream, [{"seq": seq, "next_by_subj": pattern}], exact=queue.replicas > 1)
            if stored is None:
                break
            found.append(stored)
            seq = stored.seq + 1
        return found

    async def _timed_page(self, queue: Queue, state: State, place: cursor.Place | None, limit: int) -> Page:
        token = names.SCHEDULED if state is State.SCHEDULED else names.DEAD
        index = await self._letters.index(queue, token)
        left = [each for each in index if place is None or each[:2] > place]
        entries: list[Entry] = []
        last: cursor.Place | None = None
        while left and len(entries) < limit:
            some, left = left[: limit - len(entries)], left[limit - len(entries) :]
            got = await self._api.get(queue.stream, [{"last_by_subj": subject} for _, _, subject in some], exact=queue.replicas > 1)
            entries += [record.read(queue.there, queue.name, stored, state) for stored in got if stored is not None]
            last = some[-1][0], some[-1][1]
        return Page(entries, cursor.write(queue.name, state, last) if left and last is not None else None)


class _Either(StreamInfo, frozen=True):
    """What STREAM.INFO and CONSUMER.INFO answer, asked for in one write."""

    num_pending: int = 0
    num_ack_pending: int = 0
    delivered: Position = Position()
