"""Receiver: takes messages, at once where there are any, else by waiting.

A look asks the lanes that have a quota for as many messages as there is room for, all in one write; a second one goes to lanes that are
known to have more. Only when nothing is there a pull for one message stands at every lane, under an inbox of its own: the first arrival
ends all of them, and what the server had picked and not yet sent stays where it is. What comes nevertheless lies ready for the next
receive, and goes back if there is none within `KEEP`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from crossdock.errors import BrokerClosed, BrokerError
from crossdock.spi import BrokerEvent, Clock, Delivery, Lane, Message, StateLost
from crossdock_nats import record
from crossdock_nats.api import Api, Problem
from crossdock_nats.ghosts import Ghosts
from crossdock_nats.limits import margin
from crossdock_nats.link import Link
from crossdock_nats.queues import Level, Queues
from crossdock_nats.receipt import Receipt
from crossdock_nats.returning import Handed, Returning
from crossdock_nats.servertime import ServerTime

KEEP: Final = 0.02
"""Seconds for which a message that nobody asked for may lie here."""
RENEW: Final = 5.0
"""Seconds after which pulls that stand are made again: one that the server forgot costs no more than that."""
UNANSWERED: Final = 0.5
"""Seconds after which a look that got no answer is over."""
BRIEF: Final = 0.001
"""Seconds for which a look waits at lanes that are expected to be empty, where finding out without waiting is dear."""
EMPTY: Final = 0.02
"""Seconds for which a lane passes for empty after a pull stood there for nothing, where there are many."""
_MANY: Final = 64
ABSENT: Final = 1.0
"""Seconds for which a queue that is not there is not asked for, unless somebody tells that it is made."""
_PROBES: Final = 16
"""Lanes that had nothing last time and are asked again in one write, at least."""
_MANY_OUT: Final = 100_000
_FEW: Final = 8
"""Below this limit, lanes that had nothing are asked before others are: with few slots the order counts for more than the time."""
_MOST: Final = 5000
"""Messages that one look asks for, at most."""
_NS: Final = 1_000_000_000
SOON: Final = 0.5
"""Seconds from the moment at which a message was stored, in which no lease of it ends. What comes again by then had reached nobody: the
server had picked it for somebody who stopped waiting at that moment, and counts that."""


class _Again(NamedTuple):
    """A message that is not delivered for the first time."""

    level: Level
    stored_ms: int
    """When it was stored, by the server's clock."""
    times: int
    """Deliveries before this one."""
    handed: Handed


class _Ask:
    """A pull that is under way at a lane."""

    __slots__ = ("left", "level", "open")

    def __init__(self, level: Level, left: int) -> None:
        self.level = level
        self.left = left
        self.open = True


class Receiver:
    """Receives, for one Broker while it is open.

    Args:
        owner: What receipts name as theirs.
        link: The connection.
        api: JetStream on it.
        queues: Their streams and consumers.
        returning: Takes what goes back.
        ghosts: Looked for before waiting.
        clock: For leases.
        time: The server's clock.
        report: Told when the server's memory of deliveries turns out to have gaps.
        box: The part of the Broker's inbox that what is received comes to.
    """

    def __init__(
        self,
        owner: object,
        link: Link,
        api: Api,
        queues: Queues,
        returning: Returning,
        ghosts: Ghosts,
        clock: Clock,
        time: ServerTime,
        report: Callable[[BrokerEvent], None],
        box: bytes = b"p",
    ) -> None:
        self._report = report
        self._owner = owner
        self._box = link.inbox + b"." + box
        self._link = link
        self._api = api
        self._queues = queues
        self._returning = returning
        self._ghosts = ghosts
        self._monotonic = clock.monotonic
        self._time = time
        self._arrived: dict[Level, deque[tuple[Delivery, bytes]]] = {}
        self._lost: list[_Again] = []
        self._asks: dict[Level, _Ask] = {}
        self._tokens: dict[bytes, _Ask] = {}
        self._number = 0
        self._open_asks = 0
        self._looked: asyncio.Future[None] | None = None
        self._stands: asyncio.Future[None] | None = None
        self._absent: dict[str, float] = {}
        self._busy = False
        self._closing = False
        self._broken = False
        self._left: asyncio.Future[None] | None = None
        self._keeping: asyncio.TimerHandle | None = None
        self._start = len(self._box) + 1
        link.subscribe(self._box + b".*", self._on_message)

    # --- the verb ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        """As `Broker.receive`."""
        if limit < 1 or not lanes:
            return ()
        end = self._monotonic() + wait
        self._busy = True
        woken = False
        try:
            while True:
                self._check_open()
                await self._link.ready()
                levels = await self._levels(lanes)
                self._check_open()
                if not woken or self._lost:  # what ended a wait is returned at once
                    await self._look(levels, limit, thorough=wait <= 0)
                    self._check_open()
                woken = False
                if self._lost:
                    await self._take_over()
                    continue
                if taken := self._pick(levels, limit):
                    return taken
                if await self._ghosts.lay(level for level, _ in levels):
                    continue
                left = end - self._monotonic()
                if left <= 0:
                    return ()
                await self._stand([level for level, _ in levels], min(left, RENEW if len(levels) == len(lanes) else ABSENT))
                woken = bool(self._arrived)
                if self._broken:
                    self._broken = False
                    await asyncio.sleep(min(0.05, max(0.0, left)))
        finally:
            self._busy = False
            if self._left is not None:
                _finish(self._left)
            self._keep_a_moment()

    def _check_open(self) -> None:
        if self._closing:
            raise BrokerClosed("The NATS broker was closed.")

    async def _levels(self, lanes: Sequence[Lane]) -> list[tuple[Level, int]]:
        """The lanes that exist, with their quotas."""
        queues = self._queues
        found: list[tuple[Level, int]] = []
        unknown = False
        for lane in lanes:
            queue = queues.known(lane.queue)
            if queue is None or not queue.levels[lane.priority].ready:
                unknown = True
                break
            level = queue.levels[lane.priority]
            found.append((level, lane.quota))
        if not unknown:
            return found
        now = self._monotonic()
        wanted = dict.fromkeys(lane.queue for lane in lanes if self._absent.get(lane.queue, 0.0) <= now)
        there = await queues.look(wanted)
        for name in wanted:
            if name in there:
                self._absent.pop(name, None)
            else:
                self._absent[name] = now + ABSENT
        pairs = [(lane, queue) for lane in lanes if (queue := queues.known(lane.queue)) is not None]
        await queues.levels([(queue, lane.priority) for lane, queue in pairs])
        made = [(queue.levels.get(lane.priority), lane.quota) for lane, queue in pairs]
        return [(level, quota) for level, quota in made if level is not None and level.ready]

    # --- looking ---

    async def _look(self, levels: Sequence[tuple[Level, int]], limit: int, *, thorough: bool) -> None:
        """Have the messages come that a receive may return. Some may lie here already."""
        now = self._monotonic()
        many = len(levels) > _MANY and not thorough
        for level, _ in levels:
            level.pending = 0 if many and level.empty_until > now else -1
        asked: set[Level] = set()
        while wave := self._wave(levels, limit, asked):
            asked.update(level for level, _ in wave)
            await self._poll(wave, brief=self._queues.features.dear_consumers and not thorough)
        there = sum(len(self._arrived.get(level, ())) for level, _ in levels)
        if there < limit and not self._lost:
            await self._fill(levels, limit - there)

    def _wave(self, levels: Sequence[tuple[Level, int]], limit: int, asked: set[Level]) -> list[tuple[Level, int]]:
        """The lanes to ask at once, and for how many messages: those whose turn comes before what lies here fills the limit."""
        room, probes = limit, max(_PROBES, limit)
        wave: list[tuple[Level, int]] = []
        for level, quota in levels:
            lies = len(self._arrived.get(level, ()))
            room -= min(quota, lies) if quota > 0 else 0
            if room <= 0 or probes <= 0:
                break
            if quota <= lies or level in asked or level.pending == 0:
                continue
            if (
                level.empty
            ):  # it is expected to have nothing; should it have something, what comes too much waits for the next receive
                probes -= 1
                wave.append((level, min(quota - lies, room)))
            elif wave and limit < _FEW:
                break
            else:
                wave.append((level, min(quota - lies, room)))
                room -= quota - lies
        return wave

    async def _fill(self, levels: Sequence[tuple[Level, int]], room: int) -> None:
        """The second pass: what is left over goes to the first lanes that have more."""
        unknown = [level for level, _ in levels if level.pending < 0]
        if unknown:
            infos = await self._api.consumer_infos([(level.stream, level.consumer.decode()) for level in unknown])
            for level, info in zip(unknown, infos, strict=True):
                if isinstance(info, Problem):
                    self._vanished(level)
                    level.pending = 0
                else:
                    # Messages that wait for another delivery are not counted as pending.
                    level.pending = info.num_pending + (1 if info.num_ack_pending and not info.num_pending else 0)
        wave: list[tuple[Level, int]] = []
        for level, _ in levels:
            count = min(room, level.pending)
            if count > 0:
                wave.append((level, count))
                room -= count
            if room <= 0:
                break
        if wave:
            await self._poll(wave)

    async def _poll(self, wave: Sequence[tuple[Level, int]], *, brief: bool = False) -> None:
        """Pull from lanes what is there now; returns when each has answered.

        Args:
            wave: The lanes, and how many messages from each.
            brief: Wait a moment at lanes that had nothing. To answer without waiting that a lane is empty, an old server looks at every
                message of the stream behind the last position of the consumer; a pull that waits moves the position along.
        """
        frames: list[bytes] = []
        looked = self._looked = asyncio.get_running_loop().create_future()
        tokens: list[bytes] = []
        for level, count in wave:
            count = min(count, _MOST)
            self._number += 1
            token = b"%d" % self._number
            tokens.append(token)
            self._asks[level] = self._tokens[token] = _Ask(level, count)
            if brief and level.empty:
                body = b'{"batch":%d,"expires":%d}' % (count, int(BRIEF * _NS))
            else:
                body = b'{"batch":%d,"no_wait":true}' % count
            frames.append(b"PUB %s %s.%s %d\r\n%s\r\n" % (level.pull, self._box, token, len(body), body))
        self._open_asks = len(frames)
        if self._link.wire is not None:
            self._link.wire.write(b"".join(frames))
        timer = asyncio.get_running_loop().call_later(UNANSWERED, _finish, looked)
        try:
            await looked
        finally:
            timer.cancel()
            self._looked = None
            self._open_asks = 0
            for (level, _), token in zip(wave, tokens, strict=True):
                ask = self._tokens.pop(token)
                if self._asks.get(level) is ask:
                    del self._asks[level]

    # --- what comes ---

    def _on_message(self, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        if not reply:
            self._on_status(self._tokens.get(subject[self._start :]), headers)
            return
        words = reply.split(b".")
        first = 3 if len(words) == 9 else 5
        level = self._queues.by_consumer.get(words[first])
        if level is None:  # from a queue that was erased
            return
        delivered, seq, turn = int(words[first + 1]), int(words[first + 2]), int(words[first + 3])
        level.pending = int(words[first + 5])
        level.empty = False
        if turn <= level.turn:
            self._forgot(level)
        level.turn = turn
        queue = level.queue
        generation = losses = 0
        if b"\r\ncd-" in headers:
            generation, losses = record.number(headers, b"cd-g"), record.number(headers, b"cd-n")
        if delivered > 1:
            stored_ms = int(words[first + 4]) // 1_000_000
            self._lost.append(_Again(level, stored_ms, delivered - 1, Handed(subject, seq, headers, data, losses)))
        else:
            lease = queue.spec.lease
            until = self._monotonic() + lease - margin(lease)
            id = subject[level.start : len(subject) - level.end].decode()
            message = Message(id, queue.name, level.priority, data, 0, 0, generation)
            delivery = Delivery(message, losses + 1, until, Receipt(self._owner, level, seq, reply, until))
            lies = self._arrived.get(level)
            if lies is None:
                lies = self._arrived[level] = deque()
            lies.append((delivery, headers))
        ask = self._asks.get(level)
        if ask is not None:
            ask.left -= 1
            if not ask.left:
                self._answered(ask)
        if self._stands is not None:
            _finish(self._stands)
        elif not self._busy:
            self._keep_a_moment()

    def _on_status(self, ask: _Ask | None, headers: bytes) -> None:
        """A pull is over. 404 and 408 end one that did not find all it was to bring."""
        if ask is None:
            return
        if record.status(headers) in (404, 408):
            ask.level.pending = 0
            ask.level.empty = ask.level not in self._arrived
        elif record.status(headers) in (409, 503):
            self._vanished(ask.level)
        self._answered(ask)

    def _answered(self, ask: _Ask) -> None:
        if ask.open:
            ask.open = False
            self._open_asks -= 1
            if self._open_asks <= 0 and self._looked is not None:
                _finish(self._looked)

    def _vanished(self, level: Level) -> None:
        """Perhaps the consumer is gone, or its leader moves."""
        level.ready = False
        level.queue.stale = True
        self._broken = True

    def _forgot(self, level: Level) -> None:
        self._report(StateLost(f"what the server knew of the last deliveries from queue {level.queue.name!r}, and their counts"))

    async def compare(self) -> None:
        """Tell of deliveries that the server has forgotten, as one that was killed may have. Raises `BrokerUnavailable`."""
        turns = {level: level.turn for level in self._queues.by_consumer.values() if level.turn}
        if not turns:
            return
        infos = await self._api.consumer_infos([(level.stream, level.consumer.decode()) for level in turns])
        for (level, turn), info in zip(turns.items(), infos, strict=True):
            if not isinstance(info, Problem) and info.delivered.consumer_seq < turn == level.turn:
                self._forgot(level)
                level.turn = info.delivered.consumer_seq

    # --- waiting ---

    async def _stand(self, levels: Sequence[Level], seconds: float) -> None:
        """Wait until something comes to a lane, something changes, or the time is over."""
        loop = asyncio.get_running_loop()
        stands = self._stands = loop.create_future()
        if self._closing:
            _finish(stands)
        self._number += 1
        inbox = b"%s.stand%d" % (self._box, self._number)
        names = {b"%d" % index: level for index, level in enumerate(levels)}

        def take(subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
            if reply:
                self._on_message(subject, reply, headers, data)
            elif record.status(headers) in (409, 503):
                self._vanished(names[subject.rpartition(b".")[2]])
                _finish(stands)

        sid = self._link.subscribe(inbox + b".*", take)
        body = b'{"batch":1,"expires":%d}' % int((min(seconds, RENEW) + 1) * _NS)
        tail = b"%d\r\n%s\r\n" % (len(body), body)
        wire = self._link.wire

        def lost(_: object) -> None:
            _finish(stands)

        if wire is not None:
            wire.write(b"".join([b"PUB %s %s.%d %s" % (level.pull, inbox, index, tail) for index, level in enumerate(levels)]))
            wire.lost.add_done_callback(lost)
        timer = loop.call_later(seconds, _finish, stands)
        try:
            await stands
        finally:
            timer.cancel()
            self._stands = None
            if wire is not None:
                wire.lost.remove_done_callback(lost)
            loop.call_soon(self._link.unsubscribe, sid)  # whoever waited comes first
        until = self._monotonic() + EMPTY
        for level in levels:
            level.empty_until = 0.0 if self._arrived.get(level) else until

    def wake(self) -> None:
        """Something changed: whoever waits looks again."""
        self._absent.clear()
        if self._stands is not None:
            _finish(self._stands)

    # --- handing over ---

    def _pick(self, levels: Sequence[tuple[Level, int]], limit: int) -> list[Delivery]:
        """Take what lies here: quotas first, then what is left over, lane by lane."""
        arrived = self._arrived
        taken: list[Delivery] = []
        for by_quota in (True, False):
            for level, quota in levels:
                lies = arrived.get(level)
                if not lies:
                    continue
                for _ in range(min(quota if by_quota else limit, limit - len(taken), len(lies))):
                    delivery, _headers = lies.popleft()
                    receipt: Receipt = delivery.receipt  # type: ignore[assignment]
                    level.out[receipt.seq] = receipt
                    taken.append(delivery)
                if len(level.out) > _MANY_OUT:  # some were never settled
                    now = self._monotonic()
                    level.out = {seq: receipt for seq, receipt in level.out.items() if receipt.deadline > now}
                if not lies:
                    del arrived[level]
                if len(taken) == limit:
                    return taken
        return taken

    async def _take_over(self) -> None:
        lost, self._lost = self._lost, []
        if self._time.stale:
            with suppress(BrokerError):
                await self._queues.tell_time(lost[0].level.queue)
        await asyncio.shield(self._returning.give_back(self._judged(lost)))

    def _judged(self, lost: Sequence[_Again]) -> list[Handed]:
        """With the losses that there were."""
        if self._time.stale:  # better one too many
            return [each.handed._replace(losses=each.handed.losses + each.times) for each in lost]
        now_ms = self._time.now_ms()
        return [
            each.handed
            if now_ms - each.stored_ms < 1000 * min(SOON, each.level.queue.spec.lease / 2)
            else each.handed._replace(losses=each.handed.losses + each.times)
            for each in lost
        ]

    def _keep_a_moment(self) -> None:
        if (self._arrived or self._lost) and self._keeping is None and not self._closing:
            self._keeping = asyncio.get_running_loop().call_later(KEEP, self._kept)

    def _kept(self) -> None:
        self._keeping = None
        if self._busy:
            self._keep_a_moment()
        else:
            self._give_all_back()

    def _give_all_back(self) -> None:
        back, self._lost = self._judged(self._lost), []
        for lies in self._arrived.values():
            for delivery, headers in lies:
                receipt: Receipt = delivery.receipt  # type: ignore[assignment]
                subject = receipt.level.subject(delivery.message.id)
                back.append(Handed(subject, receipt.seq, headers, delivery.message.body, delivery.delivery_count - 1))
        self._arrived.clear()
        if back:
            self._returning.give_back(back)

    async def close(self) -> None:
        """End a receive that waits; what came and was not returned goes back."""
        self._closing = True
        self.wake()
        if self._looked is not None:
            _finish(self._looked)
        if self._busy:
            self._left = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._left], timeout=1.0)
        wire = self._link.wire
        if wire is not None:
            await wire.until_lost_or(wire.echo(), 1.0)
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        self._give_all_back()


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
