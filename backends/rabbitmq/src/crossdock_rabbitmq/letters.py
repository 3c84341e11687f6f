"""Letters: the dead letters of a queue, looked at, removed and replayed.

AMQP can only deliver messages, not show them. So whoever looks holds all letters of the queue, unacked, for as long as that goes on, and an
exclusive queue says so to others; quorum queues let a second consumer in though it asks to be the only one. Nothing is lost by that and
nothing reordered: what is not acked goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

from pamqp import commands

from crossdock.errors import BrokerError, CrossdockError, NotFound, QueueHeld
from crossdock.spi import Clock, Cursor, DeadLetter, Entry, Page, QueueSpec, Refusal, Replay, State
from crossdock_rabbitmq import cursor, names, record
from crossdock_rabbitmq.link import Link, LinkBroken, Refused
from crossdock_rabbitmq.publisher import Outcome
from crossdock_rabbitmq.reading import Reading
from crossdock_rabbitmq.storing import Storing

HELD_FOR: Final = 1.0
"""Seconds for which letters are held after the last look, so that the next page need not read them all again."""
_PATIENCE: Final = 2.5
"""Seconds for which somebody else, who holds them, is waited for."""
_POLL: Final = 0.1
_MAX_PAGE: Final = 1000
_WINDOW: Final = 100
"""How many letters are replayed at a time: as many may be doubled when the connection is cut just then."""

Key = tuple[int, str, int]
"""Instant of death, id, and the tag, which tells doubles apart."""


class Session:
    """The letters of one queue in our hands."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.reading: Reading
        self.letters: dict[Key, DeadLetter] = {}
        self._keys: list[Key] | None = None
        self._by_id: dict[str, list[Key]] = {}

    def note(self, tag: int, arguments: bytes, header: bytes, body: bytes) -> None:
        """A letter has come."""
        letter = record.letter(header, body, self.queue)
        key = letter.died_ms, letter.message.id, tag
        self.letters[key] = letter
        self._by_id.setdefault(letter.message.id, []).append(key)
        self._keys = None

    @property
    def keys(self) -> list[Key]:
        """In the order of dying."""
        if self._keys is None:
            self._keys = sorted(self.letters)
        return self._keys

    def of_id(self, id: str) -> list[Key]:
        """The letter with this id, and its doubles."""
        return self._by_id.get(id, [])

    async def remove(self, keys: Sequence[Key]) -> None:
        """Remove letters for good. Raises `LinkBroken`."""
        await self.reading.take([tag for _, _, tag in keys])
        for key in keys:
            letter = self.letters.pop(key, None)
            if letter is not None:
                self._by_id.get(letter.message.id, []).remove(key)
        self._keys = None


class Letters:
    """The dead letters of a namespace.

    Args:
        namespace: Whose.
        clock: Tells the age of letters.
        specs: The queues that were declared, with their retention.
        link: Gives the connection.
        storing: Stores what is replayed.
        objection: Why a message cannot be stored, if it cannot.
        not_stored: Makes the error for a message that was not stored for certain.
    """

    def __init__(
        self,
        namespace: str,
        clock: Clock,
        specs: Mapping[str, QueueSpec],
        link: Callable[[], Coroutine[Any, Any, Link]],
        storing: Storing,
        objection: Callable[[Any], CrossdockError | None],
        not_stored: Callable[[Any, Outcome], CrossdockError],
    ) -> None:
        self._namespace = namespace
        self._clock = clock
        self._specs = specs
        self._link = link
        self._storing = storing
        self._objection = objection
        self._not_stored = not_stored
        self._sessions: dict[str, Session] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._jobs: set[asyncio.Task[Any]] = set()
        self._trimmed: dict[str, float] = {}

    # --- verbs ---

    async def peek(self, queue: str, ids: Sequence[str], after: Cursor | None, limit: int) -> Page:
        """As `Broker.peek`, of DEAD."""
        place = cursor.read(after, queue) if after is not None else None
        async with self._lock(queue):
            session = await self._session(queue)
            if session is None:
                return Page(())
            await self._trim(session)
            if ids:
                return Page([_entry(session.letters[key]) for id in dict.fromkeys(ids) for key in session.of_id(id)[:1]])
            keys = session.keys
            start = 0 if place is None else bisect_right(keys, (*place, 1 << 62))
            shown = keys[start : start + max(1, min(limit, _MAX_PAGE))]
            more = start + len(shown) < len(keys)
            return Page([_entry(session.letters[key]) for key in shown], cursor.write(queue, shown[-1][:2]) if more else None)

    async def remove(self, queue: str, ids: Sequence[str]) -> list[Refusal]:
        """As `Broker.remove`, of DEAD."""
        async with self._lock(queue):
            session = await self._session(queue)
            refusals: list[Refusal] = []
            keys: list[Key] = []
            for index, id in enumerate(ids):
                found = [key for key in session.of_id(id) if key not in keys] if session is not None else []
                if not found:
                    refusals.append(Refusal(index, no_letter(id, queue)))
                keys += found
            if session is not None and keys:
                await self._whole(session.remove(keys))
            return refusals

    async def replay(self, queue: str, replays: Sequence[Replay]) -> list[Refusal]:
        """As `Broker.replay`."""
        async with self._lock(queue):
            session = await self._session(queue)
            refusals: list[Refusal] = []
            orders: list[tuple[int, Replay, list[Key]]] = []
            taken: set[str] = set()
            for index, order in enumerate(replays):
                keys = session.of_id(order.id) if session is not None and order.id not in taken else []
                error = no_letter(order.id, queue) if not keys else self._objection(order.message)
                if error is not None:
                    refusals.append(Refusal(index, error))
                else:
                    taken.add(order.id)
                    orders.append((index, order, list(keys)))
            for start in range(0, len(orders), _WINDOW):
                assert session is not None
                refusals += await self._whole(self._replay(session, orders[start : start + _WINDOW]))
            return refusals

    async def _replay(self, session: Session, orders: Sequence[tuple[int, Replay, list[Key]]]) -> list[Refusal]:
        parcels = [self._storing.parcel(order.message, self._storing.wait_ms(order.message)) for _, order, _ in orders]
        outcomes = await self._storing.store(parcels)
        stored = [key for number, (_, _, keys) in enumerate(orders) if number not in outcomes for key in keys]
        if stored:
            await session.remove(stored)
        return [
            Refusal(index, self._not_stored(order.message, outcomes[number]))
            for number, (index, order, _) in enumerate(orders)
            if number in outcomes
        ]

    async def purge(self, queue: str) -> int:
        """As `Broker.purge`, of DEAD."""
        async with self._lock(queue):
            session = await self._session(queue)
            if session is None:
                return 0
            keys = list(session.letters)
            await self._whole(session.remove(keys))
            await self._let_go(queue)
            return len(keys)

    async def count(self, queue: str) -> int | None:
        """How many letters there are; None if somebody else holds them, so that nobody can tell."""
        link = await self._link()
        name = names.dead(self._namespace, queue)
        if (found := await link.count(name)) is None:
            return 0
        ready, consumers = found
        session = self._sessions.get(queue)
        spec = self._specs.get(queue)
        if spec is not None and self._is_due(spec, ready, session):
            try:
                async with self._lock(queue):
                    session = await self._session(queue)
                    if session is not None:
                        await self._trim(session)
                        return len(session.letters)
            except QueueHeld:
                return None
        if session is not None and session.reading.broken is None:
            return ready + len(session.letters)
        return None if consumers else ready

    # --- retention ---

    def _is_due(self, spec: QueueSpec, ready: int, session: Session | None) -> bool:
        count = ready + (len(session.letters) if session is not None else 0)
        if spec.dead_max_count is not None and count > spec.dead_max_count:
            return True
        return spec.dead_max_age is not None and count > 0

    async def _trim(self, session: Session) -> None:
        """Drop the letters beyond their retention, oldest first."""
        spec = self._specs.get(session.queue)
        if spec is None:
            return
        keys = session.keys
        count = max(0, len(keys) - spec.dead_max_count) if spec.dead_max_count is not None else 0
        if spec.dead_max_age is not None:
            oldest = self._clock.time_ms() - spec.dead_max_age * 1000
            while count < len(keys) and keys[count][0] < oldest:
                count += 1
        if count:
            await self._whole(session.remove(keys[:count]))

    def tend(self, queue: str) -> None:
        """A letter was added: apply the retention, beside everything else."""
        spec = self._specs.get(queue)
        if spec is not None and (spec.dead_max_age is not None or spec.dead_max_count is not None):
            self._do(self._tend(queue))

    async def _tend(self, queue: str) -> None:
        with contextlib.suppress(BrokerError, LinkBroken, Refused):  # else the next letter, or the next look, does it
            await self.count(queue)

    # --- sessions ---

    def _lock(self, queue: str) -> asyncio.Lock:
        return self._locks.setdefault(queue, asyncio.Lock())

    async def _session(self, queue: str) -> Session | None:
        """The letters of a queue, all of them; None if there are none."""
        session = self._sessions.get(queue)
        if session is not None and session.reading.broken is not None:
            await self._let_go(queue)
            session = None
        link = await self._link()
        name = names.dead(self._namespace, queue)
        if session is None and await link.count(name) in (None, (0, 0)):
            return None
        self._stop_timer(queue)
        try:
            if session is None:
                await self._take_hold(link, queue)
                await self._all_are_back(link, queue)
                session = Session(queue)
                session.reading = await Reading.begin(link, name, session.note)
                self._sessions[queue] = session
            await session.reading.catch_up()
        finally:  # also where the caller is cancelled, who may have the hold without knowing it
            self._timers[queue] = asyncio.get_running_loop().call_later(HELD_FOR, self._time_is_up, queue)
        return session

    async def _take_hold(self, link: Link, queue: str) -> None:
        """Make the queue that says whose the letters are. Raises `QueueHeld`, `LinkBroken`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        while True:
            try:
                await link.call(commands.Queue.Declare(queue=names.dead_lock(self._namespace, queue), exclusive=True))
                return
            except Refused as error:
                if error.code != 405:
                    raise
                if loop.time() > deadline:
                    raise _held(queue) from error
            await asyncio.sleep(_POLL)

    async def _all_are_back(self, link: Link, queue: str) -> None:
        """Wait for what the last holder had: a quorum queue writes to disk that its consumer went, and only then has the messages again.

        Raises:
            QueueHeld: Somebody consumes them who did not ask.
            LinkBroken: The connection is lost.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PATIENCE
        while (found := await link.count(names.dead(self._namespace, queue))) is not None and found[1]:
            if loop.time() > deadline:
                raise _held(queue)
            await asyncio.sleep(_POLL)

    def _stop_timer(self, queue: str) -> None:
        if (timer := self._timers.pop(queue, None)) is not None:
            timer.cancel()

    def _time_is_up(self, queue: str) -> None:
        del self._timers[queue]
        self._do(self._end(queue))

    async def _end(self, queue: str) -> None:
        async with self._lock(queue):
            if queue not in self._timers:  # else somebody has looked since
                await self._let_go(queue)

    async def _let_go(self, queue: str) -> None:
        self._stop_timer(queue)
        session = self._sessions.pop(queue, None)
        try:
            if session is not None:
                await session.reading.close()
            link = await self._link()
            await link.call(commands.Queue.Delete(queue=names.dead_lock(self._namespace, queue)))
        except (LinkBroken, Refused, BrokerError):
            pass  # both go with the connection

    async def let_go(self, queue: str) -> None:
        """Let the letters of a queue go back, if they are in our hands."""
        async with self._lock(queue):
            if queue in self._sessions or queue in self._timers:
                await self._let_go(queue)

    async def close(self) -> None:
        """Let all go back, and end."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._jobs:
            await asyncio.wait(self._jobs, timeout=1.0)
        for session in self._sessions.values():
            await session.reading.close()
        self._sessions.clear()

    async def end_jobs(self) -> None:
        """Wait for all that was begun, and has no time any more."""
        while self._jobs:
            for job in self._jobs:
                job.cancel()
            await asyncio.wait(self._jobs)

    def _do(self, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(job, name="crossdock-rabbitmq-letters")
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        task.add_done_callback(_look_at_error)
        return task

    async def _whole(self, job: Coroutine[Any, Any, Any]) -> Any:
        """Do this to its end, also where the caller is cancelled."""
        return await asyncio.shield(self._do(job))


def _look_at_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _held(queue: str) -> QueueHeld:
    return QueueHeld(
        f"Somebody else is looking at the dead letters of queue {queue!r}, and RabbitMQ shows them to one at a time; "
        "try again when they are done."
    )


def _entry(letter: DeadLetter) -> Entry:
    return Entry(letter.message, State.DEAD, None, letter)


def no_letter(id: str, queue: str) -> NotFound:
    """The error for an id that no dead letter has."""
    return NotFound(f"No dead letter {id!r} is in queue {queue!r}.")
