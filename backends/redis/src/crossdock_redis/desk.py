"""Desk: deliveries of the queues of one route. What has ended and what is wanted next go to the server together, in one script.

One request is under way at a time, and is sent until it is answered, for as long as it takes: its endings may have been taken already,
and the leases that it asked for may have been given. Callers do not wait for that long; each is told in time what is not known yet.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import msgspec

from crossdock.errors import (
    BrokerClosed,
    BrokerError,
    CrossdockError,
    LeaseLost,
    SettleUnknown,
)
from crossdock.spi import Ack, Clock, Dead, Delivery, Nack, Refusal, Settlement
from crossdock.spi import Lane as LaneOfQueue
from crossdock_redis import keys, record, replies, scripts
from crossdock_redis.lane import Lane, NoAnswer
from crossdock_redis.limits import BATCH, BATCH_BYTES, LONGEST_MS, MARGIN, objection
from crossdock_redis.link import Command, LinkRefused
from crossdock_redis.replies import ServerError

_encode: Final = msgspec.msgpack.Encoder().encode
_NO_LANES: Final = _encode([])

_MANY: Final = 32
"""Lanes that a look names and asks one by one, and sees to, without thinking of the cost."""
_TEND: Final = 0.1
"""Seconds for which a look at more lanes than that need not see to those that it hardly asks for anything."""

Woken = Sequence[tuple[str, int]]
"""Queues and levels whose tokens were taken."""


class _IdleLanes(NamedTuple):
    """Lanes that a look tells apart, as the script wants them."""

    lanes: Sequence[LaneOfQueue]
    queues: Mapping[str, int]
    """The places of their queues among the script's keys, from 1."""
    lists: Sequence[str]
    """The lists of what is READY in them."""
    packed: bytes
    """Queue and level of each."""


_NO_IDLE_LANES: Final = _IdleLanes([], {}, (), _NO_LANES)


class Receipt:
    """What a delivery is settled by. Means something only to the desk that made it."""

    __slots__ = ("batch", "desk", "ending", "item", "lost", "queue")

    def __init__(self, desk: Desk, queue: str, batch: str) -> None:
        self.desk = desk
        self.queue = queue
        self.batch = batch
        self.ending: object = None
        self.item: _Item | None = None
        self.lost = False


class _Item:
    """One ending on its way, and who waits for its outcome."""

    __slots__ = ("calls", "receipt", "settlement")

    def __init__(self, settlement: Settlement, receipt: Receipt) -> None:
        self.settlement = settlement
        self.receipt = receipt
        self.calls: list[tuple[_Call, int]] = []


class _Call:
    """One call of `settle`."""

    __slots__ = ("future", "left", "refusals")

    def __init__(self) -> None:
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left: set[int] = set()
        self.refusals: list[Refusal] = []

    def done(self, index: int, error: CrossdockError | None) -> None:
        self.left.discard(index)
        if error is not None:
            self.refusals.append(Refusal(index, error))
        if not self.left and not self.future.done():
            self.future.set_result(None)


class Ask:
    """One look for messages."""

    __slots__ = ("future", "lanes", "limit", "passes", "tends", "woken")

    def __init__(self, lanes: Sequence[LaneOfQueue], limit: int, woken: Woken, passes: int, *, tends: bool) -> None:
        self.lanes = lanes
        self.limit = limit
        self.woken = woken
        self.passes = passes
        self.tends = tends
        """Whether it sees to what is due, or leased for too long, in every queue."""
        self.future: asyncio.Future[tuple[list[Delivery], float]] = asyncio.get_running_loop().create_future()


class Request:
    """What goes to the server in one script."""

    def __init__(self, ask: Ask | None, woken: Woken) -> None:
        self.ask = ask
        self.woken = woken
        self.queues: dict[str, int] = {}
        self.order: list[_Item] = []
        self.stores = False
        """Whether there is more in it than acks, so that replicas must have it, too."""
        self.token = ""
        self.begun = 0.0

    def number(self, queue: str) -> int:
        """The place of a queue among the script's keys, from 1."""
        return self.queues.setdefault(queue, len(self.queues) + 1)


class Desk:
    """Settles and receives.

    Args:
        lane: To the server of these queues; this desk's alone.
        prefix_of: The prefix of a queue's keys.
        clock: Whose monotonic seconds `Delivery.lease_until` are.
        timeout: Seconds after which a caller is told that nothing is known.
        now_ms: The server's clock, about.
        heard: Told that clock, exactly.
        unavailable: Makes the error for a server that does not answer or refuses, from a reason.
    """

    def __init__(
        self,
        lane: Lane,
        *,
        prefix_of: Callable[[str], str],
        clock: Clock,
        timeout: float,
        now_ms: Callable[[], int],
        heard: Callable[[int], None],
        unavailable: Callable[[str], BrokerError],
    ) -> None:
        self._lane = lane
        self._prefix_of = prefix_of
        self._clock = clock
        self._timeout = timeout
        self._now_ms = now_ms
        self._heard = heard
        self._unavailable = unavailable
        self._waiting: deque[_Item] = deque()
        self._ask: Ask | None = None
        self._tokens: list[tuple[str, int]] = []
        self._request: Request | None = None
        self._is_about_to_send = False
        self._idle: asyncio.Future[None] | None = None
        self._asked: float | None = None
        self._closed = False
        self._tended = -math.inf
        self._idle_lanes = _NO_IDLE_LANES

    @property
    def unanswered(self) -> float:
        """Seconds for which the server has owed an answer; 0.0 if it owes none."""
        return 0.0 if self._asked is None else self._clock.monotonic() - self._asked

    # --- settle ---

    async def settle(self, settlements: Sequence[Settlement], indexes: Sequence[int]) -> Sequence[Refusal]:
        """Settle those of a batch that are at these indexes; all are of this desk."""
        call = _Call()
        for index in indexes:
            self._take(settlements[index], call, index)
        if not call.left:
            return call.refusals
        self._start()
        timer = asyncio.get_running_loop().call_later(self._timeout, expire, call.future)
        try:
            await call.future
        except TimeoutError:
            return self._give_up(settlements, call)
        finally:
            timer.cancel()
        return call.refusals

    def _take(self, settlement: Settlement, call: _Call, index: int) -> None:
        receipt: Any = settlement.delivery.receipt
        if receipt.ending is None:
            error = _unfit(settlement)
            if error is not None:
                call.refusals.append(Refusal(index, error))
                return
            receipt.ending = _ending(settlement)
            receipt.item = item = _Item(settlement, receipt)
            self._waiting.append(item)
        elif receipt.lost or receipt.ending != _ending(settlement):
            call.refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            return
        elif receipt.item is None:
            return  # done before
        receipt.item.calls.append((call, index))
        call.left.add(index)

    def _give_up(self, settlements: Sequence[Settlement], call: _Call) -> Sequence[Refusal]:
        """Time is over: what was not sent is taken back, what was sent is not known."""
        unsent = [item for item in self._waiting if any(each is call for each, _ in item.calls)]
        for item in unsent:
            item.calls = [(each, index) for each, index in item.calls if each is not call]
            if not item.calls:
                self._waiting.remove(item)
                item.receipt.ending = item.receipt.item = None
        if len(unsent) == len(settlements):
            raise self._unavailable("no answer came in time")
        left, call.left = call.left, set()
        return call.refusals + [Refusal(index, _unknown(settlements[index], "no answer came in time.")) for index in sorted(left)]

    # --- receive ---

    async def look(self, lanes: Sequence[LaneOfQueue], limit: int) -> tuple[list[Delivery], float]:
        """Receive what there is now, and tell in how many seconds there will be more; infinity if that is not known.

        Where lanes are many, those that something is wanted of are looked at first, and all of them if that was not enough: to name
        hundreds costs more than to bring a task. Cancelling it loses nothing.

        Args:
            lanes: In order, with their quotas.
            limit: Most deliveries; a thousand at most.

        Raises:
            BrokerUnavailable, BrokerClosed
        """
        wanted = lanes
        if len(lanes) > _MANY and self._clock.monotonic() - self._tended < _TEND:
            wanted = [lane for lane in lanes if lane.quota]
        if not wanted or len(wanted) == len(lanes):
            return await self.look_once(lanes, limit)
        deliveries, pause = await self.look_once(wanted, limit, passes=1, tends=False)
        if len(deliveries) < min(limit, BATCH):
            rest = [LaneOfQueue(lane.queue, lane.priority, 0) for lane in lanes]
            try:
                more, pause = await self.look_once(rest, limit - len(deliveries))
                deliveries += more
            except BaseException as error:
                if not deliveries or not isinstance(error, BrokerError):
                    for delivery in deliveries:
                        self.give_back(delivery)
                    raise
        return deliveries, pause

    async def look_once(
        self, lanes: Sequence[LaneOfQueue], limit: int, woken: Woken = (), *, passes: int = 2, tends: bool = True
    ) -> tuple[list[Delivery], float]:
        """`look` in one request.

        Args:
            lanes: In order, with their quotas.
            limit: Most deliveries; a thousand at most.
            woken: Tokens that were taken for this look.
            passes: 1 = quotas only; 2 = then fill up to `limit`, too.
            tends: Whether to see to what is due, or leased for too long, in every queue.

        Raises:
            BrokerUnavailable, BrokerClosed
        """
        if self._closed:
            raise BrokerClosed("The Redis broker was closed while a receive waited.")
        ask = self._ask = Ask(lanes, min(limit, BATCH), woken, passes, tends=tends)
        if tends:
            self._tended = self._clock.monotonic()
        self._start(at_once=bool(woken))
        timer = asyncio.get_running_loop().call_later(self._timeout, expire, ask.future)
        try:
            return await ask.future
        except BaseException as error:
            if self._ask is ask:  # not sent yet
                self._ask = None
                self._tokens += woken
            self.leave(ask)
            if isinstance(error, TimeoutError):
                raise self._unavailable("no answer came in time") from error
            raise
        finally:
            timer.cancel()

    def leave(self, ask: Ask) -> None:
        """Whoever asked does not want it any more: what it brought, or will bring, goes back."""
        future = ask.future
        if future.done() and not future.cancelled() and future.exception() is None:  # answered just now
            for delivery in future.result()[0]:
                self.give_back(delivery)
        future.cancel()

    def hand_on(self, tokens: Woken) -> None:
        """Tokens that were taken and are of no use here: another receiver is woken, if there is anything for it."""
        self._tokens += tokens
        self._start()

    # --- the requests ---

    def _start(self, *, at_once: bool = False) -> None:
        """Send what is waiting, unless a request is under way: at once, or when those who come in this turn of the loop are there."""
        if self._request is not None:
            return
        if at_once:
            self._send()
        elif not self._is_about_to_send:
            self._is_about_to_send = True
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        self._is_about_to_send = False
        if self._request is None and (self._waiting or self._ask is not None or self._tokens):
            request = self._request = self._next()
            self._asked = self._clock.monotonic()
            make = partial(self._commands, request)
            self._lane.post(make, partial(self._own_answered, request), replicated=request.stores)

    def _commands(self, request: Request) -> Sequence[Command]:
        return [self.command(request, self._lane)]

    def _own_answered(self, request: Request, outcome: list[Any] | NoAnswer | LinkRefused) -> None:
        self._request = self._asked = None
        self.answered(request, outcome)
        self._send()
        if self._idle is not None and not self._is_busy():
            self._idle.set_result(None)
            self._idle = None

    def _is_busy(self) -> bool:
        return self._request is not None

    def answered(self, request: Request, outcome: list[Any] | NoAnswer | LinkRefused) -> None:
        """Read what came of a request, and tell everybody whom it concerns."""
        if isinstance(outcome, NoAnswer | LinkRefused):
            written = isinstance(outcome, NoAnswer) and outcome.written
            self._fail(request, self._unavailable(str(outcome)), perhaps=written)
        elif isinstance(outcome[0], ServerError):
            self._fail(request, self._unavailable(replies.explain(outcome[0])), perhaps=not replies.is_certain(outcome[0]))
        else:
            self._apply(request, outcome[0])

    def _next(self) -> Request:
        ask, self._ask = self._ask, None
        tokens, self._tokens = self._tokens, []
        request = Request(ask, [*tokens, *(ask.woken if ask else ())])
        size = 0
        waiting = self._waiting
        while waiting and len(request.order) < BATCH and size < BATCH_BYTES:
            item = waiting.popleft()
            request.order.append(item)
            if type(item.settlement) is not Ack:
                request.stores = True
                size += _size(item.settlement)
        return request

    def command(self, request: Request, lane: Lane) -> Command:
        """The request as the script's arguments, with a token of this lane; the order of its items becomes that of their numbers."""
        ask = request.ask
        number = request.number
        lanes, idle = _NO_LANES, _NO_IDLE_LANES
        if ask is not None:
            limit = ask.limit
            busy = ask.lanes
            if len(busy) > _MANY:
                idle = self._idle_of(ask.lanes)
                request.queues.update(idle.queues)
                busy = [lane for lane in busy if lane.quota != 1]
            lanes = _encode(
                [part for lane in busy for part in (number(lane.queue), int(lane.priority), max(0, min(lane.quota, limit)))]
            )
        woken = _encode([part for queue, level in request.woken for part in (number(queue), level)]) if request.woken else _NO_LANES
        groups: dict[tuple[str, str], list[_Item]] = {}
        others: list[_Item] = []
        for item in request.order:
            if type(item.settlement) is Ack:
                receipt = item.receipt
                try:
                    groups[receipt.queue, receipt.batch].append(item)
                except KeyError:
                    groups[receipt.queue, receipt.batch] = [item]
            else:
                others.append(item)
        tail: list[str | bytes | int] = []
        for (queue, batch), items in groups.items():
            tail += (number(queue), batch, len(items))
            tail += [item.settlement.delivery.message.id for item in items]
        for item in others:
            tail += (*self._other(item.settlement, number(item.receipt.queue), item.receipt.batch),)
        if others or len(groups) > 1:
            request.order = [item for items in groups.values() for item in items] + others
        prefixes = [self._prefix_of(queue) for queue in request.queues]
        request.token = lane.token()
        request.begun = self._clock.monotonic()
        return (
            "EVALSHA",
            scripts.digest("cycle"),
            len(prefixes),
            *prefixes,
            request.token,
            ask.limit if ask is not None else 0,
            lanes,
            woken,
            ask.passes if ask is not None else 0,
            int(ask is not None and ask.tends),
            len(idle.lists),
            *idle.lists,
            idle.packed,
            len(groups),
            *tail,
        )

    def _idle_of(self, lanes: Sequence[LaneOfQueue]) -> _IdleLanes:
        """Of many lanes those that are asked for one message, because most of them are idle. They are much the same from look to look."""
        apart = [lane for lane in lanes if lane.quota == 1]
        if self._idle_lanes.lanes != apart:
            queues: dict[str, int] = {}
            parts: list[int] = []
            for lane in apart:
                parts += (queues.setdefault(lane.queue, len(queues) + 1), int(lane.priority))
            lists = [keys.ready(self._prefix_of(lane.queue), lane.priority) for lane in apart]
            self._idle_lanes = _IdleLanes(apart, queues, lists, _encode(parts))
        return self._idle_lanes

    def _other(self, settlement: Settlement, queue: int, batch: str) -> tuple[str | bytes | int, ...]:
        delivery = settlement.delivery
        id = delivery.message.id
        match settlement:
            case Nack(delay=delay, replacement=replacement):
                due = max(0, round(min(delay * 1000, LONGEST_MS)))
                if replacement is None:
                    return "back", queue, batch, id, int(delivery.message.priority), due, b""
                return "retry", queue, batch, id, int(replacement.priority), due, record.pack(replacement, 0, self._now_ms())
            case Dead(letter=letter):
                value = record.pack_letter(letter, delivery.delivery_count, self._now_ms())
                return "dead", queue, batch, id, int(letter.message.priority), letter.died_ms, value
            case Ack():
                raise AssertionError("acks go in groups")

    def _apply(self, request: Request, reply: list[Any]) -> None:
        refused, _, wait, now = reply
        batches: list[tuple[int, int, list[bytes], list[bytes | None]]] = reply[1]
        self._heard(now)
        late = set(refused)
        for number, item in enumerate(request.order):
            item.receipt.item = None
            error = None
            if number in late:
                item.receipt.lost = True
                error = lease_lost(item.settlement.delivery)
            for call, index in item.calls:
                call.done(index, error)
        names = list(request.queues)
        if request.ask is None:
            return
        deliveries: list[Delivery] = []
        for number, lease_ms, ids, values in batches:
            deliveries += self._deliveries(names[number - 1], request, lease_ms / 1000, ids, values)
        if not request.ask.future.done():
            request.ask.future.set_result((deliveries, wait / 1000 if wait >= 0 else math.inf))
            return
        for delivery in deliveries:  # whoever asked has left
            self.give_back(delivery)

    def _deliveries(
        self, queue: str, request: Request, lease: float, ids: Sequence[bytes], values: Sequence[bytes | None]
    ) -> list[Delivery]:
        until = request.begun + lease * (1 - MARGIN)
        batch = request.token
        deliveries: list[Delivery] = []
        for raw, value in zip(ids, values, strict=True):
            if value is not None:  # None: settled between a lost answer and its repeat
                message, lost = record.unpack(raw.decode(), queue, value)
                deliveries.append(Delivery(message, lost + 1, until, Receipt(self, queue, batch)))
        return deliveries

    def give_back(self, delivery: Delivery) -> None:
        """Return a delivery that nobody took, its count unchanged."""
        settlement = Nack(delivery)
        receipt: Any = delivery.receipt
        receipt.ending = _ending(settlement)
        receipt.item = item = _Item(settlement, receipt)
        self._waiting.append(item)
        self._start()

    def _fail(self, request: Request, error: CrossdockError, *, perhaps: bool) -> None:
        """There is no answer, or an error: nothing was done, or perhaps something."""
        for item in request.order:
            item.receipt.item = item.receipt.ending = None
            for call, index in item.calls:
                if perhaps:
                    call.done(index, _unknown(item.settlement, str(error)))
                elif not call.future.done():
                    call.future.set_exception(error)
        if request.ask is not None and not request.ask.future.done():
            request.ask.future.set_exception(error)

    # --- the end ---

    async def close(self) -> None:
        """Finish what is under way as far as the server lets us, and give back what nobody took."""
        self._closed = True
        if self._ask is not None and not self._ask.future.done():
            self._ask.future.set_exception(BrokerClosed("The Redis broker was closed while a receive waited."))
        self._ask = None
        if self._request is not None or self._is_about_to_send:
            self._idle = asyncio.get_running_loop().create_future()
            await asyncio.wait([self._idle], timeout=self._timeout)
        self._lane.close()
        for item in self._waiting:
            for call, index in item.calls:
                call.done(index, _unknown(item.settlement, "the Redis broker was closed before the server had answered."))


def expire(future: asyncio.Future[Any]) -> None:
    """Time is over for whoever waits."""
    if not future.done():
        future.set_exception(TimeoutError())


def lease_lost(delivery: Delivery) -> LeaseLost:
    """The refusal of a delivery that somebody else has, or had, since."""
    message = delivery.message
    return LeaseLost(f"The lease on message {message.id!r} of queue {message.queue!r} is over; nothing was changed.")


def _unknown(settlement: Settlement, why: str) -> SettleUnknown:
    return SettleUnknown(f"Message {settlement.delivery.message.id!r} may be settled or not: {why}")


def _ending(settlement: Settlement) -> object:
    """What tells two settlements of one delivery apart. Not the settlement itself: that leads back to its receipt, and the collector of
    garbage does not see the circle."""
    match settlement:
        case Ack():
            return Ack
        case Nack(delay=delay, replacement=replacement):
            return delay, replacement
        case Dead(letter=letter):
            return letter


def _unfit(settlement: Settlement) -> CrossdockError | None:
    """Why this ending cannot be stored."""
    if isinstance(settlement, Nack):
        return objection(settlement.replacement) if settlement.replacement is not None else None
    return objection(settlement.letter.message) if isinstance(settlement, Dead) else None


def _size(settlement: Settlement) -> int:
    """Bytes that it stores."""
    if isinstance(settlement, Nack) and settlement.replacement is not None:
        return len(settlement.replacement.body)
    if isinstance(settlement, Dead):
        return len(settlement.letter.message.body) + len(settlement.letter.story)
    return 0


def group_by_batch(deliveries: Sequence[Delivery], indexes: Sequence[int]) -> Mapping[tuple[str, str], list[int]]:
    """Indexes of deliveries, by queue and batch."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index in indexes:
        receipt: Any = deliveries[index].receipt
        groups.setdefault((receipt.queue, receipt.batch), []).append(index)
    return groups
