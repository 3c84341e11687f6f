"""Lane: one level of one queue, as it is consumed: a channel, at most one consumer on it, and what that brought.

A channel of its own, because deliveries of one level end nearly in the order in which they came: most acks go as one. And because what
closes a channel (a consumer that held a delivery too long, an operator) then hits one level only.

One consumer, because two on one queue take turns, and messages would overtake each other. To change a window the consumer is replaced,
which no message that was delivered notices. Before RabbitMQ 4.3, cancelling a consumer while acks are on their way counts a hand-over for
messages that nobody ever saw; so acks are held back until the server has nothing on its way to us.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final

from crossdock.spi import Message, Priority
from crossdock_rabbitmq import record, wire
from crossdock_rabbitmq.link import Link

_QUIET_WITHIN: Final = 5.0
"""Seconds for what is on its way to come, before a consumer is replaced all the same."""
_QUIET_POLL: Final = 0.001
"""Seconds between two looks for that."""
_PATIENCE: Final = 20.0
"""Seconds for the server to do what a lane asks, such as finding a queue's leader."""


class LaneLost(Exception):
    """The lane's channel is no more."""


class State(IntEnum):
    """What became of a message that was handed over to us."""

    BUFFERED = 0
    """It was not returned by a receive yet."""
    LEASED = 1
    """A receive returned it."""
    SETTLING = 2
    """Its settlement is being stored."""
    SETTLED = 3
    LOST = 4
    """It is not ours any more."""


class Held:
    """A message that was handed over, and so the receipt of its delivery."""

    __slots__ = ("at", "count", "ending", "epoch", "idle", "lane", "message", "owner", "settling", "state", "tag", "until")

    def __init__(self, lane: Lane, tag: int, message: Message, count: int, at: float) -> None:
        self.lane = lane
        self.owner = lane.owner
        self.tag = tag
        self.message = message
        self.count = count  # of deliveries, this one included
        self.at = at
        self.until = 0.0
        self.epoch = lane.epoch
        self.idle = lane.idle
        self.state = State.BUFFERED
        self.ending: object = None
        self.settling: asyncio.Future[None] | None = None


class _Asked:
    """What was asked in one write, and how many answers to it have not come yet."""

    def __init__(self, missing: int, answered: asyncio.Future[None]) -> None:
        self.missing = missing
        self.answered = answered


class Lane:
    """One level of one queue.

    Args:
        queue: Its queue.
        priority: Its level.
        name: Of the server's queue.
        wake: Called when there is something to take, or to look at again.
        now: Tells the time of `Held.at` and `Held.until`.
        owner: By whom receipts are known.
        counts_cancelled: Whether the server counts hand-overs that a cancelled consumer did not get; RabbitMQ before 4.3.
        counts_redelivered: Whether it counts deliveries at all; classic queues do not.
    """

    def __init__(
        self,
        queue: str,
        priority: Priority,
        name: str,
        wake: Callable[[], None],
        now: Callable[[], float],
        owner: object,
        *,
        counts_cancelled: bool,
        counts_redelivered: bool,
    ) -> None:
        self.queue = queue
        self.priority = priority
        self.name = name
        self._wake = wake
        self._now = now
        self.owner = owner
        self._counts_cancelled = counts_cancelled
        self._counts_redelivered = counts_redelivered
        self._link: Link | None = None
        self._number = 0
        self._asked: deque[_Asked] = deque()
        self._consumer = ""
        self._held_acks: list[int] | None = None
        self.acks_put_off: list[int] = []
        """What is done, and is not told yet."""
        self._come = False
        self._first = 1
        self._latest = 0
        self._count = 0
        self.buffer: deque[Held] = deque()
        self.idle = 0.0
        """Seconds so far in which nobody has received from it."""
        self.uncounted: list[Held] = []
        """Redelivered by a server that does not count: to be stored again with their count before anybody gets them."""
        self.out: dict[int, Held] = {}
        """All that was handed over and not ended, by tag, which ascend."""
        self.epoch = 0
        """Number of the consumer."""
        self.used = 0
        """How many of its messages are out."""
        self.window = 0
        """How many it may have out; 0 = there is none."""
        self.begun = 0
        """The window it began with."""
        self.settled = False
        """Whether the server has sent all that it has, as far as the window allows."""
        self.unsettled = 0.0
        """Since when it may have more, with room for it."""
        self.probing = False
        self.misses = 0
        """How often a receive wanted more than was there, since the window was used up for the first time."""
        self.hungry = False
        """Whether the window was used up since it was made."""
        self.full_since = 0.0
        """Since when a receive has found the window used up; 0 = it did not."""
        self.changing: asyncio.Task[None] | None = None
        """The change of the window that is under way."""
        self.changed = 0.0
        self.last = 0.0
        """When a message came."""
        self.acked = 0
        self.rate = 0.0
        """Acks per second."""
        self.pulls = False
        """Whether messages are fetched one by one, because more was handed over than could be taken."""
        self.emptied = False
        """Whether the last fetch found nothing."""
        self.missing = False
        """Whether there was no such queue when we last looked."""
        self.forbidden = ""
        """What the server said when it did not let us consume it."""
        self.stalls = 0
        """How often in a row the server gave no answer about the queue, as when nobody leads it."""

    @property
    def is_full(self) -> bool:
        """Whether the window is used up."""
        return self.used >= self.window

    def unsettle(self) -> None:
        """Note that the server may have something for us: room was made, or something was stored."""
        if self.settled:
            self.settled = False
            self.unsettled = self._now()

    @property
    def neglected(self) -> float:
        """Seconds for which the first in the buffer has been waiting while nobody received from here."""
        if not self.buffer:
            return 0.0
        first = self.buffer[0]
        return min(self.idle - first.idle, self._now() - first.at)

    # --- what we ask ---

    async def attach(self, link: Link) -> None:
        """Have a channel on this link. Raises `LinkBroken`."""
        if self._link is not link:
            self._number = await link.channel(self._sink)
            self._link = link

    def _sink(self, number: int) -> Lane:
        return self

    async def resize(self, link: Link, window: int) -> None:
        """Have a consumer with this window, or none. Raises `LinkBroken`, `LaneLost`."""
        await self.attach(link)
        try:
            if self._consumer:
                await self._quiet()
            frames: list[bytes] = []
            if self._consumer:
                frames.append(wire.cancel(self._number, self._consumer))
                self._consumer = ""
            self.settled, self.window, self.full_since = False, 0, 0.0
            self.hungry, self.misses = False, 0
            if window:
                self.epoch += 1
                self._first = self._latest + 1
                self.used, self.window = 0, window
                self._consumer = f"crossdock-{self.epoch}"
                frames.append(wire.qos(self._number, window))
                frames.append(wire.consume(self._number, self.name, self._consumer))
            if frames:
                await self._ask(frames)
            self.stalls = 0
        finally:
            self._let_acks_go()
        if window:
            await self.probe()

    async def probe(self) -> None:
        """Learn whether the server has more for us. Raises `LaneLost`."""
        self.probing = True
        try:
            self._count = 0
            await self._ask([wire.count(self._number, self.name)])
            if not self._count:
                await self.look()  # what was taken from the queue before is there then
                self.settled = True
            self.unsettled = self._now()
        finally:
            self.probing = False

    async def _quiet(self) -> None:
        """Hold back acks, and wait until no message is on its way to us: it would be counted, or lose its place."""
        self._held_acks = []
        deadline = asyncio.get_running_loop().time() + _QUIET_WITHIN
        while asyncio.get_running_loop().time() < deadline:
            if self._used_there() >= self.window:
                return
            self._count = 0
            await self._ask([wire.count(self._number, self.name)])
            if not self._count:
                await self.look()
                return
            await asyncio.sleep(_QUIET_POLL)  # an ack is on its way that makes room for one of these

    def _used_there(self) -> int:
        """How much of the window is used up as far as the server knows: it was not told of the acks that are held back."""
        untold = itertools.chain(self.acks_put_off, self._held_acks or ())
        return self.used + sum(tag >= self._first for tag in untold)

    async def look(self) -> None:
        """Return when all that the server had sent has come. Raises `LaneLost`."""
        await self._ask([wire.qos(self._number, max(1, self.window))])

    async def fetch(self, count: int) -> None:
        """Get up to so many messages into the buffer. Each costs the server a round. Raises `LaneLost`."""
        self.emptied = False
        await self._ask([wire.get(self._number, self.name)] * count)

    async def _ask(self, frames: Sequence[bytes]) -> None:
        link = self._link
        if link is None:
            raise LaneLost("the channel is closed")
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(len(frames), answered))
        link.write(b"".join(frames))
        try:
            async with asyncio.timeout(_PATIENCE):
                await asyncio.shield(answered)
        except TimeoutError as error:
            self.stalls += 1
            link.abort("no answer came in time")
            raise LaneLost("no answer came in time") from error

    def send(self, frames: Sequence[bytes]) -> None:
        """Send what has no answer."""
        if self._link is not None:
            self._link.write(b"".join(frames))

    # --- endings ---

    def end(self, held: Held, state: State) -> None:
        """Forget what was handed over; the server is to be told by one of the following."""
        held.state = state
        if self.out.pop(held.tag, None) is not None and held.epoch == self.epoch:
            self.used -= 1

    def ack(self, tags: list[int]) -> None:
        """Tell the server that these are done: as one, as far as nothing older is out."""
        self.acked += len(tags)
        if self._held_acks is not None:
            self._held_acks += tags
            return
        if self.acks_put_off:  # one that covers them must not leave them behind
            tags = tags + self.acks_put_off
            self.acks_put_off = []
        if not self.buffer:
            self.unsettle()
        lowest_out = next(iter(self.out), 1 << 62)
        tags.sort()
        number = self._number
        frames: list[bytes] = []
        below = 0
        for tag in tags:
            if tag < lowest_out:
                below = tag
            else:
                frames.append(wire.ack(number, tag))
        if below:
            frames.append(wire.ack(number, below, multiple=True))
        self.send(frames)

    def ack_what_was_put_off(self) -> None:
        """Tell what is done."""
        tags, self.acks_put_off = self.acks_put_off, []
        if tags:
            self.ack(tags)

    def _let_acks_go(self) -> None:
        tags, self._held_acks = self._held_acks, None
        if tags:
            self.acked -= len(tags)
            self.ack(tags)

    def put_back(self, tags: Sequence[int], *, counted: bool) -> None:
        """Have the server deliver these again, as lost, which it counts, or as never handed over, which only RabbitMQ 4.3 can do."""
        frame = wire.reject if counted and not self._counts_cancelled else wire.nack
        self.send([frame(self._number, tag) for tag in tags])

    # --- the sink ---

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes, arguments: bytes) -> None:
        message, losses = record.message(header, body, self.queue, self.priority)
        held = Held(self, tag, message, losses + 1, self._now())
        self.out[tag] = held
        self._latest = tag
        self.used += 1
        if self.used >= self.window:
            self.hungry = True
        if redelivered and not self._counts_redelivered:
            held.count += 1
            self.uncounted.append(held)
        else:
            self.buffer.append(held)
        self._come = True

    def answered(self, method: bytes, arguments: bytes) -> None:
        if method == wire.GET_EMPTY:
            self.emptied = True
        elif method == wire.DECLARE_OK:
            self._count = wire.message_count(arguments)
        if self._asked:
            asked = self._asked[0]
            asked.missing -= 1
            if not asked.missing:
                self._asked.popleft()
                if not asked.answered.done():
                    asked.answered.set_result(None)

    def cancelled(self, consumer: str) -> None:
        if consumer == self._consumer:
            self.bereft(missing=True)
        else:  # one that we have just taken leave of ourselves
            self.gone(until=int(consumer.rpartition("-")[2]))

    def bereft(self, *, missing: bool) -> None:
        """The queue was deleted that we consumed, and there may be another of its name."""
        self._consumer, self.window, self.settled = "", 0, False
        self.missing = missing
        self.gone()

    def gone(self, until: int | None = None) -> None:
        """The queue was deleted: what was handed over, until a consumer's number, is nobody's any more."""
        last = self.epoch if until is None else until
        for held in [held for held in self.out.values() if held.epoch <= last]:
            self.end(held, State.LOST)
        self.buffer = deque(held for held in self.buffer if held.epoch > last)
        self.uncounted = [held for held in self.uncounted if held.epoch > last]
        if last == self.epoch:
            self.acks_put_off.clear()
            self.used = 0
        self.pulls = False
        self._wake()

    def confirmed(self, tag: int, *, multiple: bool, stored: bool) -> None:
        """Never on this channel."""

    def returned(self, key: bytes, header: bytes) -> None:
        """Never on this channel."""

    def flush(self) -> None:
        if self._come:
            self._come = False
            self.last = self.unsettled = self._now()
            self._wake()

    def lost(self, reason: str) -> None:
        self._link, self._consumer = None, ""
        self._latest = 0
        self.window = 0
        self.settled = False
        self._held_acks = None
        self.epoch += 1
        if "no queue" in reason:
            self.missing = True
        if reason.startswith("ACCESS_REFUSED"):
            self.forbidden = reason
        asked, self._asked = self._asked, deque()
        for each in asked:
            if not each.answered.done():
                each.answered.set_exception(LaneLost(reason))
                each.answered.exception()
        self.gone()

    async def close(self) -> None:
        """Close the channel; what is out goes back, and the server counts that."""
        link = self._link
        if link is not None:
            number = self._number
            self.lost("it was closed")
            await link.close_channel(number)
