"""Incoming: enqueues.

A message is written under a subject with its id in it, on the condition that nothing of that id is in the queue, in whatever place (on
servers below 2.12: at its own level; the other places are looked at before). Where the server refuses by that condition, what is there
decides whether the message counts as stored.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from crossdock.errors import BrokerUnavailable, CrossdockError, EnqueueFailed, EnqueueUnknown, QueueFull
from crossdock.spi import Message, Refusal
from crossdock_nats import limits, record
from crossdock_nats.alarms import Alarms
from crossdock_nats.api import OVERTAKEN, WRONG_SEQUENCE, Api, problem
from crossdock_nats.link import Link
from crossdock_nats.names import SCHEDULED
from crossdock_nats.queues import Queue, Queues, Vanished, explain
from crossdock_nats.record import Stored
from crossdock_nats.room import Room
from crossdock_nats.servertime import ServerTime

_ATTEMPTS: Final = 12
_PAUSE: Final = 0.05
_ROUNDS: Final = 40
"""Tries to store in a queue with a limit, while others do."""
_SHORT: Final = 0.005


class Item(NamedTuple):
    """A message on its way in."""

    at: int
    """Its place in the batch."""
    message: Message
    over: Stored | None = None
    """What it may take the place of: the dead letter that it is a replay of."""
    mark: bytes = b""
    """What the server knows its write by, once it was tried."""


class Incoming:
    """Stores, for one Broker while it is open.

    Args:
        link: The connection.
        api: JetStream on it.
        queues: Their streams.
        room: Knows which queues are full.
        alarms: Keeps due times where the server does not.
        time: The server's time.
        most: Tells how many bytes a body may have.
    """

    def __init__(
        self, link: Link, api: Api, queues: Queues, room: Room, alarms: Alarms, time: ServerTime, most: Callable[[], int]
    ) -> None:
        self._link = link
        self._api = api
        self._queues = queues
        self._room = room
        self._alarms = alarms
        self._time = time
        self._most = most

    @property
    def most(self) -> int:
        """Bytes that a body may have."""
        return self._most()

    async def enqueue(self, messages: Sequence[Message]) -> list[Refusal]:
        """As `Broker.enqueue`."""
        refusals: list[Refusal] = []
        most, now_ms = self._most(), self._time.now_ms()
        items: list[Item] = []
        for index, message in enumerate(messages):
            if (error := limits.objection(message, most, now_ms)) is not None:
                refusals.append(Refusal(index, error))
            else:
                items.append(Item(index, message))
        size = count = 0
        start = 0
        for place, item in enumerate(items):
            size += len(item.message.body)
            count += 1
            if count == limits.WINDOW or size >= limits.WINDOW_BYTES or place == len(items) - 1:
                await self._window(items[start : place + 1], refusals, first=start == 0)
                start, size, count = place + 1, 0, 0
        return refusals

    async def _window(self, items: Sequence[Item], refusals: list[Refusal], *, first: bool) -> None:
        try:
            await self.store(items, refusals)
        except BrokerUnavailable as error:
            if first and not refusals:
                raise
            for item in items:
                if all(refusal.index != item.at for refusal in refusals):
                    refusals.append(
                        Refusal(item.at, EnqueueFailed(f"Message {item.message.id!r} is not stored: {error}", item.message))
                    )

    async def store(self, items: Sequence[Item], refusals: list[Refusal], *, beyond_limit: bool = False) -> None:
        """Store messages; what is not stored is refused.

        Raises:
            BrokerUnavailable: Nothing was attempted.
        """
        left = list(items)
        for attempt in range(_ATTEMPTS):
            try:
                left = await self._round(left, refusals, beyond_limit=beyond_limit)
            except Vanished:  # nothing of it was written
                continue
            except BrokerUnavailable as error:
                if not attempt:
                    raise
                _refuse(left, str(error), refusals)
                return
            if not left:
                return
            if attempt:
                await asyncio.sleep(_PAUSE)
        _refuse(left, "nobody takes it for its stream, which starts just now, or its cluster has no quorum; try again.", refusals)

    async def _round(self, items: Sequence[Item], refusals: list[Refusal], *, beyond_limit: bool) -> list[Item]:
        """Try each once. Returns the items that have to be tried again. Raises `BrokerUnavailable` if none was written."""
        queues = await self._queues.ensure(item.message.queue for item in items)
        if self._time.stale and any(item.message.delay_ms > 0 or item.message.eta_ms > 0 for item in items):
            await self._queues.tell_time(next(iter(queues.values())))
        if beyond_limit or all(queue.spec.max_ready is None for queue in queues.values()):
            return await self._try(items, queues, refusals)
        free, limited, again = self._sort_out(items, queues)
        again += await self._try(free, queues, refusals) if free else []
        for name in dict.fromkeys(item.message.queue for item in limited):
            await self._store_limited(queues[name], [item for item in limited if item.message.queue == name], refusals)
        return again

    def _sort_out(self, items: Sequence[Item], queues: Mapping[str, Queue]) -> tuple[list[Item], list[Item], list[Item]]:
        """Those that no limit holds back, those that one may, and those whose namesakes in the batch come first."""
        free: list[Item] = []
        limited: list[Item] = []
        later: list[Item] = []
        seen: set[tuple[str, str]] = set()
        for item in items:
            key = item.message.queue, item.message.id
            if key in seen:
                later.append(item)
                continue
            seen.add(key)
            queue = queues.get(item.message.queue)
            held_back = queue is not None and queue.spec.max_ready is not None and not self._due_ms(item.message)
            (limited if held_back else free).append(item)
        return free, limited, later

    async def _store_limited(self, queue: Queue, items: Sequence[Item], refusals: list[Refusal]) -> None:
        """Store what there is room for. That is counted, and written on the condition that nothing was stored since."""
        left = list(items)
        try:
            async with self._room.turn(queue.name):
                held = await self._held(left, {queue.name: queue})
                for item in left:
                    if item.at in held:
                        _refuse_earlier(item, held[item.at], refusals)
                left = [item for item in left if item.at not in held]
                for attempt in range(_ROUNDS):
                    if not left:
                        return
                    room, seq = await self._room.left(queue)
                    for item in left[room:]:
                        text = f"Queue {queue.name!r} holds {queue.spec.max_ready} messages that are ready, which is its max_ready."
                        refusals.append(Refusal(item.at, QueueFull(text, item.message)))
                    left = left[:room]
                    if left:
                        # In the end without the condition: a limit passed by a few is better than a queue that takes nothing.
                        after = seq if attempt < _ROUNDS - 1 else None
                        left = await self._try(left, {queue.name: queue}, refusals, after=after)
                    if left:
                        await asyncio.sleep(random.uniform(0, _SHORT))  # no secret
            _refuse(left, "others store in its queue all the time; try again.", refusals)
        except BrokerUnavailable as error:
            _refuse(left, str(error), refusals)

    async def _try(
        self, items: Sequence[Item], queues: Mapping[str, Queue], refusals: list[Refusal], after: int | None = None
    ) -> list[Item]:
        """One try. Returns the items that have to be tried again.

        Args:
            items: What is to be stored.
            queues: Where.
            refusals: Takes what is refused for good.
            after: The last sequence of the one stream that it goes to; nothing may have been stored there since.
        """
        again: list[Item] = [item for item in items if item.message.queue not in queues]
        items = [item for item in items if item.message.queue in queues] if again else items
        due = [self._due_ms(item.message) for item in items]
        if any(not queue.keyed for queue in queues.values()):
            items, due, later = await self._look_before(items, due, queues, refusals)
            again += later
        if not items:
            return again
        reply = self._link.reply_to()
        frames = [
            self._frame(
                item, queues[item.message.queue], due_ms, b"%s.%d" % (reply, place), None if after is None else after + place
            )
            for place, (item, due_ms) in enumerate(zip(items, due, strict=True))
        ]
        answers, answered = await self._link.exchange(reply, frames, stores=True)
        if not answers and all(answered):
            return again
        taken: list[Item] = []
        for place, item in enumerate(items):
            message = item.message
            marked = item._replace(mark=item.mark or b"%s.%d" % (reply, place))
            if not answered[place]:
                text = f"Message {message.id!r} may be stored or not: the NATS server gave no answer."
                refusals.append(Refusal(item.at, EnqueueUnknown(text, message, safe_to_repeat=True)))
            elif place in answers:
                told = problem(answers[place])
                if told.err_code in WRONG_SEQUENCE:
                    taken.append(marked)
                elif told.err_code == OVERTAKEN:
                    again.append(marked)
                elif told.code == 503 and not told.err_code:
                    self._queues.doubt([message.queue])
                    again.append(marked)
                else:
                    text = f"Message {message.id!r} is not stored. {explain(told)}"
                    refusals.append(Refusal(item.at, EnqueueFailed(text, message)))
        try:
            return again + await self._judge(taken, queues, refusals)
        except Vanished:
            return again + taken
        except BrokerUnavailable as error:
            for item in taken:
                text = f"Message {item.message.id!r} may be stored or not: {error}"
                refusals.append(Refusal(item.at, EnqueueUnknown(text, item.message, safe_to_repeat=True)))
            return again

    def _due_ms(self, message: Message) -> int:
        """When it is due; 0 = now."""
        if message.delay_ms <= 0 and message.eta_ms <= 0:
            return 0
        now_ms = self._time.now_ms()
        due_ms = now_ms + message.delay_ms if message.delay_ms > 0 else message.eta_ms
        return due_ms if due_ms > now_ms + record.EARLY_MS else 0

    def _frame(self, item: Item, queue: Queue, due_ms: int, reply: bytes, after: int | None) -> bytes:
        message, subjects = item.message, queue.there
        target = subjects.level(message.priority, message.id)
        if subjects.keyed:
            headers = record.expects(0 if item.over is None else item.over.seq, subjects.anywhere(message.id))
        else:
            headers = record.expects(0)
        if after is not None:
            headers += record.follows(after)
        if message.generation:
            headers += record.generation(message)
        if not due_ms:
            return record.publish(target, reply, headers, message.body, item.mark)
        headers += record.due(message, due_ms)
        if subjects.keyed:
            headers += record.schedule(due_ms, target)
        return record.publish(subjects.keyed_place(SCHEDULED, message.id, due_ms), reply, headers, message.body, item.mark)

    async def _look_before(
        self, items: Sequence[Item], due: Sequence[int], queues: Mapping[str, Queue], refusals: list[Refusal]
    ) -> tuple[list[Item], list[int], list[Item]]:
        """Where the server cannot look at all places by itself: leave out what is there, and set alarms for what is due later.

        Returns what can be written, when it is due, and what has to wait for its namesake in the same batch.
        """
        held = await self._held([item for item in items if not queues[item.message.queue].keyed], queues)
        found: list[tuple[Item, int]] = []
        later: list[Item] = []
        ids: set[tuple[str, str]] = set()
        for item, due_ms in zip(items, due, strict=True):
            there = held.get(item.at)
            key = item.message.queue, item.message.id
            if key in ids:
                later.append(item)
                continue
            ids.add(key)
            if there is None or (item.over is not None and there.seq == item.over.seq):
                found.append((item, due_ms))
            else:
                _refuse_earlier(item, there, refusals)
        alarms = [(queues[i.message.queue].there, i.message.id, ms) for i, ms in found if ms and not queues[i.message.queue].keyed]
        if alarms:
            await self._alarms.set(alarms)
        return [item for item, _ in found], [due_ms for _, due_ms in found], later

    async def _held(self, items: Sequence[Item], queues: Mapping[str, Queue]) -> dict[int, Stored]:
        """What each id has in its queue already, by the index of the item."""
        found: dict[int, Stored] = {}
        by_queue: dict[str, list[Item]] = {}
        for item in items:
            by_queue.setdefault(item.message.queue, []).append(item)
        for name, some in by_queue.items():
            queue = queues[name]
            subjects = queue.there
            wanted: list[tuple[Item, bytes]] = []
            for item in some:
                places = [subjects.anywhere(item.message.id)] if queue.keyed else subjects.each_place(item.message.id)
                wanted += [(item, place) for place in places]
            got = await self._api.get(
                queue.stream, [{"last_by_subj": place.decode()} for _, place in wanted], exact=queue.replicas > 1
            )
            for (item, _), stored in zip(wanted, got, strict=True):
                if stored is not None and (item.at not in found or found[item.at].seq < stored.seq):
                    found[item.at] = stored
        return found

    async def _judge(self, items: Sequence[Item], queues: Mapping[str, Queue], refusals: list[Refusal]) -> list[Item]:
        """Something of these ids was there already. Returns those of which nothing is there any more: they are tried again."""
        if not items:
            return []
        held = await self._held(items, queues)
        again: list[Item] = []
        for item in items:
            there = held.get(item.at)
            if there is None or (item.over is not None and there.seq == item.over.seq):
                again.append(item)
            else:
                _refuse_earlier(item, there, refusals)
        return again


def _refuse(items: Sequence[Item], why: str, refusals: list[Refusal]) -> None:
    """These are certainly not stored."""
    for item in items:
        text = f"Message {item.message.id!r} for queue {item.message.queue!r} is not stored: {why}"
        refusals.append(Refusal(item.at, EnqueueFailed(text, item.message)))


def _refuse_earlier(item: Item, there: Stored, refusals: list[Refusal]) -> None:
    """Stored at the same or a later generation counts as done; at an earlier one it is in the way."""
    message = item.message
    generation = record.number(there.headers, b"cd-g")
    if generation < message.generation:
        error: CrossdockError = EnqueueFailed(
            f"Queue {message.queue!r} holds message {message.id!r} at generation {generation}; generation {message.generation} has to wait "
            "until that one has ended.",
            message,
        )
        refusals.append(Refusal(item.at, error))
