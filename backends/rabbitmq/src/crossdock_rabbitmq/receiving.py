"""Receiving: from what the server pushes into lanes to deliveries under leases, which are ours to keep.

AMQP knows no lease: a delivery is ours for as long as its channel lives. So each has a deadline here; when that is over it goes back while
the connection lives, and whatever its late holder says is refused without a word to the server. (An ack for what went back would close the
channel, and with it lose every other delivery on it.)
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from typing import Any, Final

from crossdock.errors import BrokerClosed, BrokerUnavailable, ConfigurationError
from crossdock.spi import Delivery, Priority, QueueSpec
from crossdock.spi import Lane as Wanted
from crossdock_rabbitmq import names, windows
from crossdock_rabbitmq.connection import Connection
from crossdock_rabbitmq.lane import Held, Lane, LaneLost, State
from crossdock_rabbitmq.link import Link, LinkBroken, Refused

_SWEEP: Final = 0.1
"""Seconds between two looks at what is held."""
_MISSING: Final = 0.25
"""Seconds between two looks for a queue that is not there."""
_SLOW: Final = 2.0
"""Seconds after which a lane of which it is not known whether it has more holds up no other."""
_UNSURE: Final = 1.0
"""Seconds for which a receive that would not wait looks, at most, where that is not known."""
_AT_ONCE: Final = 16
"""How many lanes are begun or changed at the same time."""
_QUICK: Final = 3
"""After so many fetches with less than `windows.STALE` between them a lane is consumed again."""

LaneKey = tuple[str, Priority]
GiveBack = Callable[[Sequence[Held]], Coroutine[Any, Any, None]]


class Receiving:
    """The lanes of a Broker.

    Args:
        namespace: Whose queues.
        connection: The one on which is consumed.
        specs: The queues that were declared.
        now: Tells the time of leases.
        version: Of the server.
        classic: Whether queues are classic ones.
        timeout: Seconds for which a lost connection is waited for by who would not wait for a message.
        give_back: Has messages that nobody took delivered again, with their counts unchanged.
        restore: Called when a declared queue is gone: declares it again.
        unavailable: Makes the error for when there is no connection.
    """

    def __init__(
        self,
        namespace: str,
        connection: Connection,
        specs: Mapping[str, QueueSpec],
        now: Callable[[], float],
        version: Sequence[int],
        classic: bool,
        timeout: float,
        give_back: GiveBack,
        restore: Callable[[], Awaitable[None]],
        unavailable: Callable[[str], BrokerUnavailable],
    ) -> None:
        self._namespace = namespace
        self._connection = connection
        self._specs = specs
        self._now = now
        self._counts_cancelled = tuple(version) < (4, 3)
        self._classic = classic
        self._timeout = timeout
        self._give_back = give_back
        self._restore = restore
        self._unavailable = unavailable
        self._lanes: dict[LaneKey, Lane] = {}
        self._jobs: set[asyncio.Task[Any]] = set()
        self._woken: asyncio.Future[None] | None = None
        self._stirred = asyncio.Event()
        self._to_fetch: dict[Lane, int] = {}
        self._brought: deque[float] = deque(maxlen=windows.BRISK_AFTER)
        self._few = asyncio.Semaphore(_AT_ONCE)
        self._looks: dict[str, asyncio.Task[Any]] = {}
        self._resting: asyncio.TimerHandle | None = None
        self._waking: asyncio.TimerHandle | None = None
        self._most = 1
        self._receiving = 0
        self._received = 0.0
        self._settling = 0
        self._idled = 0.0
        self._seen = now()
        self._asked_for: set[Lane] = set()
        self._pulled: dict[Lane, list[float]] = {}
        self._closed = False
        self._sweeping = self._do(self._sweep())

    # --- receive ---

    async def receive(self, lanes: Sequence[Wanted], limit: int, wait: float) -> Sequence[Delivery]:
        """As `Broker.receive`."""
        now = self._now()
        deadline = now + wait
        self._most = max(self._most, limit)
        looked = False
        rested = not self._receiving and now - self._received > windows.PUT_OFF
        self._note_idleness(now)
        self._receiving += 1
        self._stirred.set()
        self._let_acks_go()
        try:
            wanted = [(self._lane(lane.queue, lane.priority), lane.quota) for lane in lanes]
            self._asked_for = {lane for lane, _ in wanted}
            if rested:
                for lane, _ in wanted:
                    lane.unsettled = now  # whether it has more is asked from now on
                await self._check_buffers([lane for lane, _ in wanted if lane.buffer])
            while True:
                if self._closed:
                    raise _closed()
                link = self._connection.link
                if link is None:
                    await self._wait_for_link(deadline)
                    continue
                self._begin(link, lanes, wanted, limit)
                self._to_fetch.clear()
                taken, unsure = self._take(link, wanted, limit)
                if taken:
                    self._brought.append(self._now())
                    return self._lease(taken)
                if self._to_fetch:
                    await asyncio.wait([self._do(self._fetch(lane, count)) for lane, count in self._to_fetch.items()])
                    continue
                if forbidden := [lane.forbidden for lane, _ in wanted if lane.forbidden]:
                    raise self._unavailable(f"this user may not consume: {forbidden[0]}")
                left = deadline - self._now()
                if left > 0:
                    await self._sleep(min(left, _MISSING) if any(lane.missing or lane.stalls for lane, _ in wanted) else left)
                elif looked and unsure and left > -_UNSURE:
                    await self._sleep(windows.PUSH)
                elif looked:
                    return ()
                else:
                    looked = True
                    await self._look([lane for lane, _ in wanted])
        finally:
            self._received = self._seen = self._now()
            self._receiving -= 1

    def _note_idleness(self, now: float) -> None:
        """Count the time until now, if nobody received in it and nobody settled."""
        if not self._receiving and not self._settling:
            self._idled += now - self._seen
            self._seen = now

    # --- acks ---

    def ack(self, acks: Mapping[Lane, list[int]], *, moved: bool = False) -> None:
        """Tell the server that deliveries are done.

        That makes room for others. So while nobody receives, it is put off for a moment: either somebody does, or the lane has to ask for
        nothing more before it is told, because what is handed over now would have to go back.

        Args:
            acks: Tags by lane.
            moved: The messages are stored elsewhere already; then nothing is put off, because they are doubled until then.
        """
        for lane, tags in acks.items():
            if self._receiving or not lane.window or self._closed:
                lane.ack(tags)
            else:
                lane.acks_put_off += tags
                if moved:
                    self._rest(lane)
                elif self._resting is None:
                    self._resting = asyncio.get_running_loop().call_later(windows.PUT_OFF, self._begin_to_rest)

    def _let_acks_go(self) -> None:
        if self._resting is not None:
            self._resting.cancel()
            self._resting = None
            for lane in self._lanes.values():
                lane.ack_what_was_put_off()

    def _begin_to_rest(self) -> None:
        self._resting = None
        for lane in self._lanes.values():
            if lane.acks_put_off and not lane.buffer:  # with something in the buffer it rests when that is stale
                self._rest(lane)

    def _rest(self, lane: Lane) -> None:
        """Ask for nothing more, and then tell what is done."""
        link = self._connection.link
        if link is not None and lane.changing is None and lane.window:
            lane.changed = self._now()
            lane.changing = self._do(self._retreat(link, lane, stale=False))
        else:
            lane.ack_what_was_put_off()

    async def _wait_for_link(self, deadline: float) -> None:
        left = deadline - self._now()
        if left > 0:
            await self._sleep(left)
            return
        try:
            await self._connection.get(self._timeout)
        except LinkBroken as error:
            if self._closed:
                raise _closed() from error
            raise self._unavailable(str(error)) from error

    def _lane(self, queue: str, priority: Priority) -> Lane:
        key = queue, priority
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(
                queue,
                priority,
                names.ready(self._namespace, queue, priority),
                self.wake,
                self._now,
                self,
                counts_cancelled=self._counts_cancelled,
                counts_redelivered=not self._classic,
            )
        return lane

    def _begin(self, link: Link, lanes: Sequence[Wanted], wanted: Sequence[tuple[Lane, int]], limit: int) -> None:
        """Have every lane consumed that is not, and look again for those that were not there."""
        idle = [
            lane
            for lane, _ in wanted
            if not lane.window and not lane.pulls and lane.changing is None and not self._is_left_alone(lane)
        ]
        if idle:
            firsts = windows.first(lanes, limit)
            pause = _MISSING * (1 + sum(lane.missing for lane in idle) / 50)
            for (lane, _), window in zip(wanted, firsts, strict=True):
                if lane in idle:
                    if lane.missing and self._now() - lane.changed < pause:
                        continue
                    lane.begun = window
                    self._change(link, lane, window)

    def _take(self, link: Link, wanted: Sequence[tuple[Lane, int]], limit: int) -> tuple[list[Held], bool]:
        """Both passes over what is there. The second begins only when what quotas still want is certainly not in the server.

        Returns:
            What was taken, and whether there may be more that it must not stand before.
        """
        taken: list[Held] = []
        coming = 0
        for lane, quota in wanted:
            short = min(quota, limit - len(taken) - coming)
            buffer = lane.buffer
            while short > 0 and buffer:
                taken.append(buffer.popleft())
                short -= 1
            if short > 0 and self._may_bring(link, lane, short):
                coming += short
        if coming:
            return taken, True
        for lane, _ in wanted:
            buffer = lane.buffer
            while buffer and len(taken) < limit:
                taken.append(buffer.popleft())
            if len(taken) == limit:
                for each, _ in wanted:
                    each.full_since = 0.0  # no window was too small
                break
            if self._may_bring(link, lane, limit - len(taken)):
                return taken, True
        return taken, False

    def _may_bring(self, link: Link, lane: Lane, need: int) -> bool:
        """Whether a lane may have more that is on its way; where only its window is too small for that, it grows."""
        if lane.missing or self._is_left_alone(lane):
            return False
        if lane.pulls:
            self._to_fetch[lane] = need
            return True
        now = self._now()
        if lane.changing is not None:
            return now - lane.changed < _SLOW
        if lane.is_full:
            if not lane.full_since:
                lane.full_since = now
            if now - lane.full_since < windows.PUSH or now - lane.changed < windows.PAUSE:
                self._wake_in(windows.PUSH)  # what is being settled just now makes room by itself
            else:
                self._change(link, lane, windows.grown(len(lane.out), need, lane.rate))
            return True
        lane.full_since = 0.0
        if lane.settled:
            return False
        lane.misses += lane.hungry
        if lane.misses > windows.MISSES and now - lane.changed >= windows.PAUSE:
            lane.misses = 0
            rate = max(lane.rate, lane.acked / _SWEEP)
            if wider := windows.faster(lane.window, self._most, len(lane.out), rate):
                self._change(link, lane, wider)
                return True
        waited = now - lane.unsettled
        if waited < windows.PUSH:
            self._wake_in(windows.PUSH)
        elif not lane.probing:
            self._do(self._probe(lane))
        return waited < _SLOW

    async def _probe(self, lane: Lane) -> None:
        with contextlib.suppress(LaneLost):
            await lane.probe()
        self.wake()

    @property
    def has_lanes(self) -> bool:
        """Whether anything was ever received here."""
        return bool(self._lanes)

    def stored(self, queue: str, priority: Priority) -> None:
        """Note that a message was stored, which may be on its way to us."""
        lane = self._lanes.get((queue, priority))
        if lane is None:
            return
        if lane.missing:
            lane.missing, lane.changed = False, 0.0
            self.wake()
        elif lane.window:
            lane.unsettle()

    def _lease(self, taken: Sequence[Held]) -> list[Delivery]:
        now = self._now()
        queue = ""
        lease = until = 0.0
        deliveries: list[Delivery] = []
        for held in taken:
            if held.lane.queue != queue:
                queue = held.lane.queue
                lease = self.lease_of(queue)
                until = now + lease - min(0.5, lease / 10)
            held.state = State.LEASED
            held.until = now + lease
            deliveries.append(Delivery(held.message, held.count, until, held))
        return deliveries

    def lease_of(self, queue: str) -> float:
        """Seconds of a lease."""
        spec = self._specs.get(queue)
        return (spec or QueueSpec(queue)).lease

    def _is_left_alone(self, lane: Lane) -> bool:
        """Whether the server gave no answer about a queue lately. To ask again costs the connection, with all that is out on it."""
        return lane.stalls > 0 and not lane.window and self._now() - lane.changed < windows.after_a_stall(lane.stalls)

    async def _look(self, lanes: Sequence[Lane]) -> None:
        """Give the server its chance to send what it has. A queue that nobody leads must not hold up the others."""
        while not any(lane.buffer for lane in lanes):
            begun = [lane.changed for lane in lanes if lane.changing is not None]
            left = max(begun, default=0.0) + self._timeout - self._now()
            if not begun or left <= 0:
                break
            await self._sleep(left)  # until one has changed, or brought something
        looks = [self._do(_quietly(lane.look())) for lane in lanes if lane.window and lane.changing is None]
        if looks:
            await asyncio.wait(looks, timeout=self._timeout)

    async def _fetch(self, lane: Lane, count: int) -> None:
        await _quietly(lane.fetch(count))
        now = self._now()
        times = self._pulled.setdefault(lane, [])
        times.append(now)
        del times[:-_QUICK]
        quick = len(times) == _QUICK and now - times[0] < windows.STALE
        if lane.emptied or quick:
            lane.pulls = False
            self._pulled.pop(lane, None)

    # --- waking ---

    def wake(self) -> None:
        """Let a receive that waits look again."""
        if self._woken is not None and not self._woken.done():
            self._woken.set_result(None)
        self._stirred.set()

    def _wake_in(self, seconds: float) -> None:
        if self._waking is None:
            self._waking = asyncio.get_running_loop().call_later(seconds, self._wake_now)

    def _wake_now(self) -> None:
        self._waking = None
        self.wake()

    async def _sleep(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        woken = self._woken = loop.create_future()
        timer = loop.call_later(min(seconds, 3600.0), _finish, woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._woken = None

    # --- changing windows ---

    def _do(self, job: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(job, name="crossdock-rabbitmq-receiving")
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        task.add_done_callback(_look_at_error)
        return task

    def _change(self, link: Link, lane: Lane, window: int) -> None:
        lane.changed = self._now()
        lane.changing = self._do(self._resize(link, lane, window))

    async def _is_there(self, link: Link, queue: str) -> bool:
        """Whether there is a queue: asked once for all its levels, of its dead letters, which are made first and deleted last."""
        look = self._looks.get(queue)
        if look is None:
            look = self._looks[queue] = self._do(link.count(names.dead(self._namespace, queue)))
            look.add_done_callback(lambda _: self._looks.pop(queue, None))
        return await asyncio.shield(look) is not None

    async def _resize(self, link: Link, lane: Lane, window: int) -> None:
        try:
            was_missing, lane.forbidden = lane.missing, ""
            if lane.queue not in self._specs and not await self._is_there(link, lane.queue):
                lane.missing = True
                return
            if was_missing and lane.queue in self._specs:
                await self._restore()
            async with self._few:
                if was_missing and await link.count(lane.name) is None:
                    return
                lane.missing = False
                await lane.resize(link, window)
        except (LinkBroken, LaneLost, Refused, BrokerUnavailable, BrokerClosed, ConfigurationError):
            if not link.lost.done():  # what the server refuses once it may grant the next time
                lane.missing = True
        finally:
            lane.changing = None
            lane.changed = self._now()
            self.wake()

    # --- what is held ---

    async def make_sure(self, receipts: Iterable[object]) -> None:
        """Before something is said of deliveries, learn whether they are still there to be told of.

        A queue that was deleted is told to its consumers only; and after this process stood still, a connection may be gone that looks
        well.
        """
        link = self._connection.link
        if link is None:
            return
        lanes = {held.lane for held in receipts if type(held) is Held and held.owner is self and held.state is State.LEASED}
        try:
            if link.silent:
                await link.ping()
            if not self._receiving:
                await self._check(link, lanes)
            else:
                await self._check(link, [lane for lane in lanes if not lane.window])
        except (LinkBroken, Refused):
            await asyncio.sleep(0)

    async def _check_buffers(self, lanes: Sequence[Lane]) -> None:
        link = self._connection.link
        if link is not None and lanes:
            with contextlib.suppress(LinkBroken, Refused):
                await self._check(link, lanes)

    async def _check(self, link: Link, lanes: Iterable[Lane]) -> None:
        """Lose what came from queues that are not there, or are there anew, which nobody consumes yet."""
        for lane in lanes:
            epoch = lane.epoch
            found = await link.count(lane.name)
            if lane.changing is None and lane.window and lane.epoch == epoch:
                if found is None or not found[1]:
                    lane.bereft(missing=found is None)
            elif found is None:
                lane.gone()

    def expire(self, held: Held) -> None:
        """Take back a delivery whose lease is over."""
        lane = held.lane
        lane.end(held, State.LOST)
        lane.put_back([held.tag], counted=True)

    async def _sweep(self) -> None:
        before = self._now()
        while True:
            if not any(lane.out or (lane.window and not self._receiving) for lane in self._lanes.values()):
                self._stirred.clear()
                await self._stirred.wait()
                before, self._idled = self._now(), 0.0
            await asyncio.sleep(_SWEEP)
            now = self._now()
            stood_still = now - before > 2 * _SWEEP  # all of us, so that nobody could receive
            self._note_idleness(now)
            passed = min(now - before, 2 * _SWEEP)
            idled, self._idled = min(self._idled, passed), 0.0
            for lane in list(self._lanes.values()):
                lane.rate, lane.acked = lane.acked / max(now - before, _SWEEP / 2), 0
                lane.idle += idled if lane in self._asked_for else passed
                self._look_after(lane, now, stood_still=stood_still)
            before = now

    def _look_after(self, lane: Lane, now: float, *, stood_still: bool) -> None:
        link = self._connection.link
        busy = self._receiving or self._settling or stood_still
        # With something in the buffer it is consumed until that is stale: only who consumes hears that the queue is deleted.
        idle = not busy and not lane.buffer and now - self._received > windows.IDLE
        over = [held for held in lane.out.values() if held.state is State.LEASED and held.until <= now]
        away = 0.0 if busy else now - self._received
        stale = lane.neglected > windows.stale_after(self._brought, away)
        if link is None or lane.changing is not None:
            return
        if lane.uncounted:
            uncounted, lane.uncounted = lane.uncounted, []
            self._do(self._give_back(uncounted))
        if over or stale or (idle and lane.window):
            if (idle and lane.window) or stale:
                lane.changed = now
                lane.changing = self._do(self._retreat(link, lane, stale=stale))
            else:
                for held in over:
                    self.expire(held)
        elif lane.window > lane.begun and not lane.out and now - max(lane.last, lane.changed) > windows.SHRINK:
            self._change(link, lane, lane.begun)

    async def _retreat(self, link: Link, lane: Lane, *, stale: bool) -> None:
        """Ask for nothing more, and then give back what nobody took and what was held too long."""
        try:
            if lane.window:
                await lane.resize(link, 0)
            lane.ack_what_was_put_off()
            now = self._now()
            if stale:
                lane.pulls = True
                back = list(lane.buffer)
                lane.buffer.clear()
                await self._give_back(back)
            for held in [held for held in lane.out.values() if held.state is State.LEASED and held.until <= now]:
                self.expire(held)
        except (LinkBroken, LaneLost):
            pass
        finally:
            lane.changing = None
            lane.changed = self._now()
            self.wake()

    # --- others ask ---

    @contextlib.contextmanager
    def settling(self) -> Generator[None]:
        """Note that somebody settles, who may receive again after that."""
        self._note_idleness(self._now())
        self._settling += 1
        try:
            yield
        finally:
            self._received = self._seen = self._now()
            self._settling -= 1

    @property
    def is_active(self) -> bool:
        """Whether a receive is under way."""
        return self._receiving > 0

    async def rest(self, lanes: Iterable[Lane]) -> None:
        """Ask for nothing more on these lanes, until the next receive."""
        link = self._connection.link
        if link is not None:
            busy = [lane for lane in lanes if lane.window and lane.changing is None]
            for lane in busy:
                lane.changed = self._now()
                lane.changing = self._do(self._retreat(link, lane, stale=False))
            if changes := [lane.changing for lane in busy if lane.changing is not None]:
                await asyncio.wait(changes)

    def waiting(self, queue: str) -> int:
        """How many messages of a queue are in our buffers."""
        return sum(len(lane.buffer) for (name, _), lane in self._lanes.items() if name == queue)

    async def empty(self, link: Link, queue: str) -> int:
        """Drop the messages of a queue that are in our buffers, after asking for no more; returns how many there were."""
        count = 0
        for (name, _), lane in self._lanes.items():
            if name != queue:
                continue
            if lane.changing is not None:
                await asyncio.wait([lane.changing])
            if lane.window:
                try:
                    await lane.resize(link, 0)
                except LaneLost:
                    continue
            dropped = list(lane.buffer)
            lane.buffer.clear()
            for held in dropped:
                lane.end(held, State.LOST)
            lane.ack([held.tag for held in dropped])
            count += len(dropped)
        return count

    async def forget(self, queue: str) -> None:
        """Lose all deliveries of a queue that is to be deleted."""
        for key in [key for key in self._lanes if key[0] == queue]:
            lane = self._lanes[key]
            if lane.changing is not None:
                await asyncio.wait([lane.changing])
            await lane.close()
            lane.missing = False

    @property
    def held(self) -> Iterable[Held]:
        """Everything that is out."""
        return itertools.chain.from_iterable(list(lane.out.values()) for lane in self._lanes.values())

    # --- the end ---

    def stop(self) -> None:
        """End every receive."""
        self._closed = True
        self.wake()

    async def close(self, leave: Callable[[Sequence[Held]], Awaitable[None]]) -> None:
        """Ask for nothing more, and leave what is out to others.

        Args:
            leave: Stores what is leased so that it comes again when the lease is over.
        """
        self.stop()
        self._let_acks_go()
        self._sweeping.cancel()
        changes = [lane.changing for lane in self._lanes.values() if lane.changing is not None]
        if changes:
            await asyncio.wait(changes, timeout=1.0)
        link = self._connection.link
        if link is not None:
            lanes = [lane for lane in self._lanes.values() if lane.window and lane.changing is None]
            if lanes:
                await asyncio.wait([self._do(_quietly(lane.resize(link, 0))) for lane in lanes], timeout=1.0)
            buffered = [held for lane in self._lanes.values() for held in (*lane.buffer, *lane.uncounted)]
            if buffered:
                await self._give_back(buffered)
            leased = [held for held in self.held if held.state is State.LEASED]
            if leased:
                await leave(leased)
        for lane in self._lanes.values():
            lane.lost("the Broker is closed")

    async def end_jobs(self) -> None:
        """Wait for all that was begun."""
        while self._jobs:
            for job in self._jobs:
                job.cancel()
            await asyncio.wait(self._jobs)


def _look_at_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


async def _quietly(call: Coroutine[Any, Any, object]) -> None:
    with contextlib.suppress(LaneLost, LinkBroken):
        await call


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _closed() -> BrokerClosed:
    return BrokerClosed("The RabbitMQ broker is not open: it was closed, or open() was not called yet.")
