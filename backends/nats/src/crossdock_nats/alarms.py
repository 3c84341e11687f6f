"""Alarms: due times where the server has no schedules (below 2.12). There a Broker moves what falls due.

A message that waits is in its queue's stream, under an exact subject; its due time is in a stream of the namespace, in a bucket for each
second, set before the message is stored. Every Broker that receives follows them. Several may move the same message: the server knows
the write by the sequence of what was moved, and takes it once. What is found without a message is an alarm that was overtaken.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import random
from collections.abc import Sequence
from typing import Final

from crossdock.errors import BrokerError, BrokerUnavailable
from crossdock_nats import names, record, topology
from crossdock_nats.address import Address
from crossdock_nats.api import STREAM_MISSING, Api, Problem, StreamInfo, problem
from crossdock_nats.link import Link
from crossdock_nats.names import Subjects
from crossdock_nats.queues import Queues
from crossdock_nats.record import Stored
from crossdock_nats.servertime import ServerTime

AHEAD_MS: Final = 1500
"""Buckets are read so long before their time."""
AT_ONCE: Final = 500
"""Messages that are moved in one go."""
_UNSTORED_MS: Final = 30_000
"""How long after its time an alarm without a message is kept: the message may still be on its way."""
_AGAIN_MS: Final = 50
_STAGGER_MS: Final = 25.0
"""Movers wait for a random part of this, so that mostly one of them does the work."""
_log = logging.getLogger("crossdock.nats")


class Alarms:
    """The due times of a namespace.

    Args:
        link: The connection.
        api: JetStream on it.
        namespace: Whose.
        address: Says how streams are to be kept.
        time: The server's time.
    """

    def __init__(self, link: Link, api: Api, namespace: str, address: Address, time: ServerTime) -> None:
        self._link = link
        self._api = api
        self._namespace = namespace
        self._address = address
        self._time = time
        self._stream = names.alarm_stream(namespace)
        self._there = False
        self._heap: list[tuple[float, str, int]] = []
        self._known: set[str] = set()
        self._task: asyncio.Task[None] | None = None
        self._woken = asyncio.Event()
        self._read_until = 0
        self._stagger_ms = random.uniform(0, _STAGGER_MS)  # no secret

    # --- setting ---

    async def set(self, alarms: Sequence[tuple[Subjects, str, int]]) -> None:
        """Store due times, of ids in milliseconds. Raises `BrokerUnavailable`."""
        await self._make()
        reply = self._link.reply_to()
        frames = [
            record.publish(subjects.alarm(id, due_ms), b"%s.%d" % (reply, index), b"", b"%d" % due_ms)
            for index, (subjects, id, due_ms) in enumerate(alarms)
        ]
        answers, answered = await self._link.exchange(reply, frames)
        if answers or not all(answered):
            self._there = False
            told = problem(next(iter(answers.values()))).description if answers else "no answer came"
            raise BrokerUnavailable(f"The NATS server did not store when messages are due: {told}.")

    async def ask_time(self) -> None:
        """Learn the server's time where no answer tells it: from the moment at which it stores something."""
        await self._make()
        await self._measure()

    async def _measure(self) -> None:
        """Ask for the time. Nothing comes of it where there is no stream."""
        subject = f"cd.{self._namespace}.=.clock.x.x.x".encode()
        reply = self._link.reply_to()
        began = self._time.begin()
        await self._link.exchange(reply, [record.publish(subject, reply + b".0", b"", b"")], repeat=False)
        took = self._time.begin() - began
        [stored] = await self._api.get(self._stream, [{"last_by_subj": subject.decode()}], exact=self._address.replicas > 1)
        if stored is not None:
            now = self._time.begin()
            self._time.heard(stored.time_ms + (now - began - took / 2) * 1000 - took * 500, now - took)

    async def _make(self) -> None:
        if self._there:
            return
        answer = await self._api.ask_one(
            f"STREAM.CREATE.{self._stream}", topology.alarm_stream(self._namespace, self._address), StreamInfo
        )
        if isinstance(answer, Problem) and isinstance((await self._api.streams([self._stream]))[0], Problem):
            raise BrokerUnavailable(f"The NATS server makes no stream for due times: {answer.description}.")
        self._there = True

    async def erase_if_idle(self, queues: Queues) -> None:
        """Delete the stream of due times when the namespace has no queue any more."""
        if (self._there or not queues.features.schedules) and not await queues.all_names():
            self._there = False
            await self._api.ask_one(f"STREAM.DELETE.{self._stream}", None, StreamInfo)

    # --- moving ---

    def follow(self) -> None:
        """Begin to move what falls due, if that did not happen yet."""
        if self._task is None:
            self._link.subscribe(names.alarms(self._namespace).encode(), self._on_alarm)
            self._task = asyncio.ensure_future(self._run())

    def back(self) -> None:
        """The connection was away, and alarms with it: read again what is there."""
        self._read_until = 0
        self._there = False
        self._woken.set()

    async def close(self) -> None:
        """Stop moving."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _on_alarm(self, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        if data.isdigit() and int(data) <= self._time.now_ms() + AHEAD_MS:
            self._add(subject.decode(), int(data))

    def _add(self, subject: str, due_ms: float) -> None:
        if subject not in self._known:
            self._known.add(subject)
            heapq.heappush(self._heap, (due_ms + self._stagger_ms, subject, int(due_ms)))
            self._woken.set()

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            pause = 0.2
            try:
                await self._read()
                pause = await self._move_due()
            except BrokerError:
                pause = 0.2
            except Exception as error:
                _log.error("moving what is due failed, will go on: %s", error)
            try:
                async with asyncio.timeout(pause):
                    await self._woken.wait()
            except TimeoutError:
                continue

    async def _read(self) -> None:
        """Read the buckets that come next; first of all, everything that is overdue."""
        if self._time.stale:
            if isinstance((await self._api.streams([self._stream]))[0], Problem):
                return
            await self._measure()
        until = (self._time.now_ms() + AHEAD_MS) // 1000
        if not self._read_until:
            subjects = await self._api.subjects(self._stream, names.alarms(self._namespace))
            buckets = [(subject, subject.split(".")[3]) for subject in subjects]
            subjects = [subject for subject, second in buckets if second.isdigit() and int(second) <= until]
        else:
            subjects = list[str]()
            for second in range(self._read_until + 1, until + 1):
                subjects += await self._api.subjects(self._stream, names.alarms(self._namespace, second))
        self._read_until = until
        fresh = [subject for subject in subjects if subject not in self._known]
        for start in range(0, len(fresh), 1000):
            some = fresh[start : start + 1000]
            got = await self._api.get(self._stream, [{"last_by_subj": subject} for subject in some], exact=False)
            for subject, stored in zip(some, got, strict=True):
                if stored is not None and stored.data.isdigit():
                    self._add(subject, int(stored.data))

    async def _move_due(self) -> float:
        """Move what is due; returns how many seconds there is nothing to do then."""
        now = self._time.now_ms()
        due: list[tuple[str, int]] = []
        while self._heap and self._heap[0][0] <= now and len(due) < AT_ONCE:
            _, subject, due_ms = heapq.heappop(self._heap)
            self._known.discard(subject)
            due.append((subject, due_ms))
        queues: dict[tuple[str, str], list[tuple[str, str, int]]] = {}
        for subject, due_ms in due:
            _, _, _, _, queue, life, id = subject.split(".")
            queues.setdefault((queue, life), []).append((subject, id, due_ms))
        for (queue, life), some in queues.items():
            await self._move(queue, life, some)
        if due:
            return 0.0
        return min(0.2, max(0.0, (self._heap[0][0] - now) / 1000)) if self._heap else 0.2

    async def _move(self, queue: str, life: str, alarms: Sequence[tuple[str, str, int]]) -> None:
        subjects = Subjects(self._namespace, queue, life, keyed=False)
        stream = names.stream(self._namespace, queue)
        wanted = [{"last_by_subj": subjects.keyed_place(names.SCHEDULED, id, 0).decode()} for _, id, _ in alarms]
        found = await self._api.get(stream, wanted, exact=self._address.replicas > 1)
        over: list[str] = []
        moving: list[tuple[str, str, Stored]] = []
        now = self._time.now_ms()
        for (subject, id, due_ms), stored in zip(alarms, found, strict=True):
            if stored is not None and record.number(stored.headers, b"cd-due") == due_ms:
                moving.append((subject, id, stored))
            elif stored is not None or now > due_ms + _UNSTORED_MS:
                over.append(subject)
            else:  # it is not stored yet, or another Broker has moved it
                self._known.add(subject)
                heapq.heappush(self._heap, (now + _AGAIN_MS + (now - due_ms) / 4, subject, due_ms))
        if moving:
            over += await self._store(stream, subjects, moving)
        for answer in await self._api.ask([(f"STREAM.PURGE.{self._stream}", {"filter": subject}) for subject in over], StreamInfo):
            if isinstance(answer, Problem) and answer.err_code != STREAM_MISSING:
                _log.warning("an alarm that is over stays: %s", answer.description)

    async def _store(self, stream: str, subjects: Subjects, moving: Sequence[tuple[str, str, Stored]]) -> list[str]:
        """Store messages at their levels, then delete them where they waited. Returns the alarms that are over."""
        reply = self._link.reply_to()
        frames: list[bytes] = []
        for index, (_, id, stored) in enumerate(moving):
            level = record.number(stored.headers, b"cd-p")
            kept = b"".join(
                b"%s: %d\r\n" % (name, number) for name in (b"cd-g", b"cd-n") if (number := record.number(stored.headers, name))
            )
            mark = b"%s.%d.due" % (subjects.life.encode(), stored.seq)
            frames.append(record.publish(subjects.level(level, id), b"%s.%d" % (reply, index), kept, stored.data, mark))
        answers, answered = await self._link.exchange(reply, frames)
        moved = [each for index, each in enumerate(moving) if answered[index] and index not in answers]
        await self._api.delete(stream, [stored.seq for _, _, stored in moved])
        for subject, _, stored in moving:
            if (subject, stored) not in [(each[0], each[2]) for each in moved]:
                self._add(subject, record.number(stored.headers, b"cd-due"))
        return [subject for subject, _, _ in moved]
