"""Restarts: the server is killed, stopped, frozen, wiped or cut off and comes back; nothing stored is lost, and nobody stays deaf."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import Final, Literal, Protocol, cast, runtime_checkable

from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    CrossdockError,
    EnqueueFailed,
    EnqueueUnknown,
    LeaseLost,
    SettleUnknown,
)
from crossdock.spi import (
    Ack,
    Broker,
    Connected,
    Delivery,
    Disconnected,
    Message,
    Nack,
    QueueSpec,
    Refusal,
    Replay,
    State,
    StateLost,
)
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DEDUPLICATION, FENCING, PROCESSES, Hook, Need, scenario
from crossdock_conformance.target import ServerControl

_OUTAGE: Final = 0.3
"""Seconds for which the server is away."""
_PAUSE: Final = 0.01
"""Seconds until something that failed is tried again."""

Way = Literal["killed", "stopped", "paused"]


def _durable(way: Way) -> Sequence[Need]:
    """What a scenario takes for granted that looks for what was stored before an outage."""
    return [] if way == "paused" else [PROCESSES]


class Outages:
    """The server, as it goes and comes back, without a blocking call in the event loop."""

    def __init__(self, server: ServerControl) -> None:
        self.server = server
        self._away: Way | None = None

    async def begin(self, way: Way) -> None:
        """Let it go away."""
        self._away = way
        await asyncio.to_thread({"killed": self.server.kill, "stopped": self.server.stop, "paused": self.server.pause}[way])

    async def end(self) -> None:
        """Let it come back, if it is away; return when it serves."""
        if self._away is not None:
            await asyncio.to_thread(self.server.resume if self._away == "paused" else self.server.start)
            self._away = None

    async def restart(self, way: Way, away: float = 0.0) -> None:
        """Let it go away and come back after so many seconds."""
        await self.begin(way)
        await asyncio.sleep(away)
        await self.end()


def _cutter(lab: Lab) -> Callable[[], Awaitable[None]]:
    """What cuts every connection."""
    cut = lab.target.cut
    assert cut is not None
    return lambda: asyncio.to_thread(cut)


@asynccontextmanager
async def outages(lab: Lab) -> AsyncGenerator[tuple[Lab, Outages]]:
    """A lab in real time, and its server, which runs in the end."""
    assert lab.target.server is not None
    server = Outages(lab.target.server)
    async with lab.in_real_time() as real:
        try:
            yield real, server
        finally:
            await server.end()


# --- a stream --------------------------------------------------------------------------------------


class Stream:
    """Messages that are produced and consumed all the time, and what became of each.

    Half of them go to the queue `q` and are consumed. The others go to `kept`, where nothing is consumed until the end; these are
    enqueued again under the same id for as long as it is not known whether they are stored.
    """

    def __init__(self, lab: Lab, producer: Broker, consumer: Broker) -> None:
        self._lab = lab
        self._producer = producer
        self._consumer = consumer
        self._tasks: list[asyncio.Task[None]] = []
        self._ends = False
        self.stored: dict[str, set[str]] = {"q": set(), "kept": set()}
        self.failed: set[str] = set()
        """Certainly not stored."""
        self.unknown: set[str] = set()
        self.deliveries: defaultdict[str, list[int]] = defaultdict(list)
        """The delivery counts with which each message of `q` was delivered."""

    @property
    def length(self) -> int:
        """How many messages are certainly stored."""
        return sum(map(len, self.stored.values()))

    async def flow(self, disturb: Callable[[Stream], Awaitable[object]]) -> None:
        """Let it flow, with disturbances at one third and at two thirds, until it has ended and all is consumed."""
        producing = [asyncio.ensure_future(self._produce()) for _ in range(8)]
        self._tasks = [*producing, asyncio.ensure_future(self._consume())]
        try:
            for _ in range(2):
                await self.grow(100)
                await disturb(self)
            await self.grow(100)
            self._ends = True
            await asyncio.gather(*producing)
            await self._drain()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)

    async def grow(self, by: int) -> None:
        """Wait until so many more are stored."""
        goal = self.length + by
        await self._lab.until(lambda: self._checked_length() >= goal, "messages could be stored")

    def _checked_length(self) -> int:
        """The length; raises what ended a producer or the consumer."""
        for task in self._tasks:
            if task.done():
                task.result()
        return self.length

    async def _produce(self) -> None:
        while not self._ends:
            consumed, kept = self._lab.message(), self._lab.message(queue="kept")
            await self._store([consumed, kept])
            while kept.id in self.unknown:
                await self._store([kept])
            await asyncio.sleep(_PAUSE / 2)

    async def _store(self, batch: Sequence[Message]) -> None:
        """Enqueue, and note what came of it: what is known of a message stays known whatever happens to a repetition."""
        outcomes: dict[int, CrossdockError] = {}
        try:
            outcomes = {refusal.index: refusal.error for refusal in await self._producer.enqueue(batch)}
        except BrokerUnavailable as error:
            outcomes = dict.fromkeys(range(len(batch)), error)
            await asyncio.sleep(_PAUSE)
        for index, message in enumerate(batch):
            outcome = outcomes.get(index)
            if outcome is None:
                self.stored[message.queue].add(message.id)
                self.unknown.discard(message.id)
            elif isinstance(outcome, EnqueueUnknown):
                self.unknown.add(message.id)
            else:
                assert isinstance(outcome, EnqueueFailed | BrokerUnavailable), f"an enqueue came up with {outcome!r}"
                if message.id not in self.unknown:
                    self.failed.add(message.id)

    async def _consume(self) -> None:
        while True:
            try:
                deliveries = await self._consumer.receive(self._lab.lanes("q"), 10, 0.5)
            except BrokerUnavailable:
                await asyncio.sleep(_PAUSE)
                continue
            for delivery in deliveries:
                self.deliveries[delivery.message.id].append(delivery.delivery_count)
            await settle_for_good(self._consumer, deliveries)

    async def _drain(self) -> None:
        try:
            await self._lab.until(self._is_consumed, "all that was stored was delivered and settled")
        except AssertionError:
            await self.judge()  # which says more, if something is lost
            raise

    async def _is_consumed(self) -> bool:
        try:
            stats = await self._lab.stats(self._consumer)
        except BrokerUnavailable:
            return False
        self._checked_length()
        left = stats.ready + (stats.leased or 0)
        return left == 0 and self.stored["q"] <= self.deliveries.keys()

    async def judge(self) -> None:
        """Compare what was said with what happened."""
        lab = self._lab
        lost_state = any(isinstance(event, StateLost) for event in lab.events)
        for id, counts in self.deliveries.items():
            rising = all(later > earlier for earlier, later in pairwise(counts))
            assert rising or lost_state, f"{id} was delivered with the counts {counts}"
        kept = Counter(delivery.message.id for delivery in await lab.take(self._consumer, limit=100_000, queue="kept"))
        there = self.deliveries.keys() | kept.keys()
        assert not (lost := (self.stored["q"] | self.stored["kept"]) - there), f"stored, and lost: {sorted(lost)}"
        assert not (late := there & self.failed), f"certainly not stored, and delivered: {sorted(late)}"
        assert not (strange := there - self.stored["q"] - self.stored["kept"] - self.unknown), f"never stored: {sorted(strange)}"
        if DEDUPLICATION.declared(lab.capabilities):
            assert set(kept.values()) <= {1}, f"stored twice: {[id for id, times in kept.items() if times > 1]}"


async def settle_for_good(broker: Broker, deliveries: Sequence[Delivery]) -> list[Delivery]:
    """Ack, again and again until each is settled or lost; return the lost ones."""
    lost: list[Delivery] = []
    while deliveries:
        try:
            refusals = await broker.settle([Ack(delivery) for delivery in deliveries])
        except BrokerUnavailable:
            await asyncio.sleep(_PAUSE)
            continue
        for refusal in refusals:
            assert isinstance(refusal.error, LeaseLost | SettleUnknown), f"a settlement came up with {refusal.error!r}"
        lost += [deliveries[refusal.index] for refusal in refusals if isinstance(refusal.error, LeaseLost)]
        deliveries = [deliveries[refusal.index] for refusal in refusals if isinstance(refusal.error, SettleUnknown)]
    return lost


async def _flows(lab: Lab, disturb: Callable[[Stream], Awaitable[object]]) -> None:
    producer, consumer = await lab.open(queues=("q", "kept")), await lab.open(queues=("q", "kept"))
    stream = Stream(lab, producer, consumer)
    await stream.flow(disturb)
    await stream.judge()


@scenario(hooks=[Hook.SERVER], needs=_durable, seconds=180, way=("killed", "stopped", "paused"))
async def stream(lab: Lab, way: Way) -> None:
    """While the server goes away and comes back, twice, a stream loses nothing stored, and nothing comes that failed to be stored."""
    async with outages(lab) as (lab, server):
        await _flows(lab, lambda stream: server.restart(way, _OUTAGE))


@scenario(hooks=[Hook.CUT], seconds=120)
async def stream_over_cut_connections(lab: Lab) -> None:
    """While its connections are cut again and again, a stream loses nothing stored, and nothing comes that failed to be stored."""
    cut = _cutter(lab)

    async def cut_often(stream: Stream) -> None:
        for _ in range(10):
            await cut()
            await stream.grow(10)

    async with lab.in_real_time() as lab:
        await _flows(lab, cut_often)


@scenario(hooks=[Hook.SERVER], seconds=120)
async def failed_enqueues_never_arrive(lab: Lab) -> None:
    """What was under way when the server was killed, and was said to be certainly not stored, is not there when it is back."""
    async with outages(lab) as (lab, server):
        broker = await lab.open()
        failed: set[str] = set()
        unknown: set[str] = set()
        stored = 0
        ends = False

        async def hammer() -> None:
            nonlocal stored
            while not ends:
                message = lab.message()
                try:
                    refusals = await broker.enqueue([message])
                except BrokerUnavailable:
                    failed.add(message.id)
                    await asyncio.sleep(_PAUSE)
                    continue
                stored += not refusals
                for refusal in refusals:
                    (unknown if isinstance(refusal.error, EnqueueUnknown) else failed).add(message.id)

        def flows(before: int) -> bool:
            return stored > before + 100

        def more_than(count: int) -> bool:
            return len(failed) + len(unknown) > count

        hammers = [asyncio.ensure_future(hammer()) for _ in range(20)]
        try:
            for _ in range(3):
                await lab.until(partial(flows, stored), "a hundred messages were stored")
                before = len(failed) + len(unknown)
                await server.begin("killed")
                await lab.until(partial(more_than, before), "an enqueue without a server failed")
                await server.end()
                await lab.until(lambda: _works(broker), "the Broker worked again")
        finally:
            ends = True
            await asyncio.wait(hammers)
        arrived = {delivery.message.id for delivery in await lab.take(broker, limit=1_000_000)}
        assert not (late := arrived & failed), f"certainly not stored, and delivered: {sorted(late)}"


# --- opening, closing, waiting ---------------------------------------------------------------------


@scenario(hooks=[Hook.SERVER], way=("stopped", "paused"))
async def open_without_a_server(lab: Lab, way: Way) -> None:
    """With nobody to answer, `open` raises `BrokerUnavailable` and leaves nothing open; when the server is back, it opens."""
    async with outages(lab) as (lab, server):
        broker = lab.build()
        await server.begin(way)
        for _ in range(2 if way == "stopped" else 1):
            outcome = await _outcome(lab, broker.open())
            assert isinstance(outcome, BrokerUnavailable), f"open() without a server came up with {outcome!r}"
            assert isinstance(await _outcome(lab, broker.stats(["q"])), BrokerClosed)
        assert await _outcome(lab, broker.close()) is None
        await server.end()
        await lab.until(lambda: _opens(broker), "the Broker could be opened")
        await lab.enqueue(broker, lab.message("m"))
        assert (await lab.take_one(broker)).message.id == "m"


@scenario(hooks=[Hook.SERVER], way=("killed", "paused"))
async def close_without_a_server(lab: Lab, way: Way) -> None:
    """With nobody to answer, `close` ends all the same, again too, wakes a waiting receive, and leaves nothing open."""
    async with outages(lab) as (lab, server):
        broker = await lab.open()
        async with lab.waiting(broker, wait=3600) as receive:
            await server.begin(way)
            for _ in range(2):
                assert await _outcome(lab, broker.close()) is None
        assert isinstance(receive.exception(), BrokerClosed | BrokerUnavailable)


@scenario(hooks=[Hook.SERVER], way=("killed", "stopped"))
async def waiting_receive_outlives_the_server(lab: Lab, way: Way) -> None:
    """A receive that waits while the server is away goes on or raises `BrokerUnavailable`; then the next one gets what comes."""
    async with outages(lab) as (lab, server):
        await _waits_over(lab, lambda: server.restart(way, _OUTAGE))


@scenario(hooks=[Hook.CUT])
async def waiting_receive_outlives_its_connection(lab: Lab) -> None:
    """A receive that waits while its connection is cut goes on or raises `BrokerUnavailable`; then the next one gets what comes."""
    async with lab.in_real_time() as lab:
        await _waits_over(lab, _cutter(lab))


async def _waits_over(lab: Lab, disturb: Callable[[], Awaitable[object]]) -> None:
    broker = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        lab.events.clear()
        await disturb()
        await lab.until(lambda: any(isinstance(event, Disconnected) for event in lab.events), "the loss was reported")
        lost = next(event for event in lab.events if isinstance(event, Disconnected))
        assert lost.reason.strip(), "nothing is said of why the connection was lost"
        since = lab.events.index(lost)
        await lab.until(lambda: any(isinstance(event, Connected) for event in lab.events[since:]), "the return was reported")
        await lab.enqueue(await lab.open(), lab.message("m"))
    if (error := receive.exception()) is None:
        deliveries = receive.result()
    else:
        assert isinstance(error, BrokerUnavailable), f"the receive came up with {error!r}"
        deliveries = [await lab.take_one(broker)]
    assert [delivery.message.id for delivery in deliveries] == ["m"]
    await lab.settle(broker, *map(Ack, deliveries))


@scenario(hooks=[Hook.SERVER], seconds=180, way=("killed", "stopped"))
async def many_restarts_leave_no_deaf_receiver(lab: Lab, way: Way) -> None:
    """After each of two restarts, and after three in quick succession, a receiver that was there all along gets what comes."""
    async with outages(lab) as (lab, server):
        receiver = await lab.open()
        producer = await lab.open()
        heard: set[str] = set()

        async def listen() -> None:
            while True:
                try:
                    deliveries = await receiver.receive(lab.lanes("q"), 10, 3600)
                except BrokerUnavailable:
                    await asyncio.sleep(_PAUSE)
                    continue
                heard.update(delivery.message.id.partition("-")[0] for delivery in deliveries)
                await settle_for_good(receiver, deliveries)

        async def is_stored(id: str) -> bool:
            try:
                return not await producer.enqueue([lab.message(f"{id}-{time.monotonic_ns()}")])
            except BrokerUnavailable:
                return False

        def is_heard(id: str) -> bool:
            if listening.done():
                listening.result()
            return id in heard

        listening = asyncio.ensure_future(listen())
        try:
            for number, times in enumerate((1, 1, 3)):
                for _ in range(times):
                    await server.restart(way)
                await lab.until(partial(is_stored, f"r{number}"), "a message could be stored")
                await lab.until(partial(is_heard, f"r{number}"), "the receiver got a message")
        finally:
            listening.cancel()
            await asyncio.wait([listening])


# --- verbs and leases ------------------------------------------------------------------------------


@scenario(hooks=[Hook.SERVER], way=("stopped", "paused"))
async def verbs_without_a_server(lab: Lab, way: Way) -> None:
    """With nobody to answer, no verb hangs or pretends: each says that it did nothing, or that it does not know; and that is true."""
    async with outages(lab) as (lab, server):
        broker = await lab.open()
        await lab.bury(broker, lab.message("dead"), lab.message("doomed"))
        await lab.enqueue(broker, lab.message("held"), lab.message("kept"))
        delivery, kept = await lab.take_exactly(broker, 2)
        await server.begin(way)
        new = lab.messages(2)
        verbs: dict[str, Awaitable[object]] = {
            "enqueue": broker.enqueue(new),
            "receive": broker.receive(lab.lanes("none"), 1, 0.5),
            "extend": broker.extend([kept]),
            "settle": broker.settle([Ack(delivery)]),
            "stats": broker.stats(["q"]),
            "peek": broker.peek("q", State.DEAD),
            "remove": broker.remove("q", State.DEAD, ["doomed"]),
            "replay": broker.replay("q", [Replay("dead", lab.message("dead", generation=1))]),
            "purge": broker.purge("none", State.READY),
            "declare": broker.declare([QueueSpec("q", lease=lab.lease)]),
        }
        outcomes = dict(zip(verbs, await asyncio.gather(*(_outcome(lab, verb) for verb in verbs.values())), strict=True))
        for verb, outcome in outcomes.items():
            _check_lost(verb, way, outcome)
        failed = _failed(new, outcomes["enqueue"])
        await server.end()
        await lab.until(lambda: _works(broker), "the Broker worked again")
        await lab.enqueue(broker, lab.message("after"))
        came: set[str] = set()
        while "after" not in came:
            more = await broker.receive(lab.lanes("q"), 10, lab.patience)
            assert more, "the message that was stored last did not come"
            came |= {one.message.id for one in more}
        assert not came & failed, "they were certainly not stored, it was said, and they were"


def _failed(messages: Sequence[Message], outcome: object) -> set[str]:
    """The ids of messages of which an enqueue said that they are certainly not stored."""
    if isinstance(outcome, BaseException):
        return {message.id for message in messages}
    refusals = cast("Sequence[Refusal]", outcome)
    return {messages[refusal.index].id for refusal in refusals if isinstance(refusal.error, EnqueueFailed)}


_MAY_SUCCEED: Final[dict[Way, set[str]]] = {
    "stopped": {"receive", "declare"},  # which may wait and remember without the server
    "paused": {"receive", "declare", "extend", "settle"},  # and an ack may be lost after it was written
}


def _check_lost(verb: str, way: Way, outcome: object) -> None:
    """Fail unless a verb that got no answer says so."""
    if isinstance(outcome, BrokerUnavailable):
        return
    assert not isinstance(outcome, BaseException), f"{verb} without a server raised {outcome!r}"
    if not outcome:
        assert verb in _MAY_SUCCEED[way], f"{verb} without a server returned {outcome!r}"
        return
    assert isinstance(outcome, Sequence), f"{verb} without a server returned {outcome!r}"
    for refusal in cast("Sequence[object]", outcome):
        assert isinstance(refusal, Refusal), f"{verb} without a server returned {outcome!r}"
        expected = EnqueueUnknown | EnqueueFailed | SettleUnknown | LeaseLost
        assert isinstance(refusal.error, expected), f"{verb} without a server came up with {refusal.error!r}"


@scenario(hooks=[Hook.SERVER], needs=_durable, way=("killed", "stopped"))
async def deliveries_outlive_the_server(lab: Lab, way: Way) -> None:
    """What was held when the server went away is settled afterwards, or comes again with a higher count; never neither."""
    async with outages(lab) as (lab, server):
        await _holds_over(lab, lambda: server.restart(way))


@scenario(hooks=[Hook.CUT])
async def deliveries_outlive_their_connection(lab: Lab) -> None:
    """What was held when the connection was cut is settled afterwards, or comes again with a higher count; never neither."""
    async with lab.in_real_time() as lab:
        await _holds_over(lab, _cutter(lab))


async def _holds_over(lab: Lab, disturb: Callable[[], Awaitable[object]]) -> None:
    broker = await lab.open()
    await lab.enqueue(broker, *(lab.message(id) for id in ("settled", "forgotten", "given-back")))
    held = {delivery.message.id: delivery for delivery in await lab.take_exactly(broker, 3)}
    await lab.settle(broker, Nack(held["given-back"]))
    await disturb()
    await lab.until(lambda: _works(broker), "the Broker worked again")
    back = time.monotonic()
    lost = await settle_for_good(broker, [held["settled"]])
    heir = await lab.open()
    expected = {"given-back", "forgotten", *(delivery.message.id for delivery in lost)}
    counts: dict[str, int] = {}
    while not expected <= counts.keys():
        late = time.monotonic() - back - lab.lease - lab.sweep
        assert late < lab.patience, f"these never came again: {sorted(expected - counts.keys())}"
        deliveries = await heir.receive(lab.lanes("q"), 10, 0.5)
        counts |= {delivery.message.id: delivery.delivery_count for delivery in deliveries}
        await settle_for_good(heir, deliveries)
    lost_state = any(isinstance(event, StateLost) for event in lab.events)
    for id in counts.keys() - {"given-back"}:
        assert counts[id] > 1 or lost_state, f"{id} came again as if it had never been delivered, and no state was reported as lost"
    if FENCING.declared(lab.capabilities):
        assert lab.errors(await broker.settle([Nack(held["forgotten"])])) == {0: LeaseLost}
    while more := await lab.take(heir):  # what was given back just before may come twice, since the server forgot the first half
        assert {delivery.message.id for delivery in more} <= counts.keys()
        await settle_for_good(heir, more)
    await lab.holds(heir, {})


@runtime_checkable
class Wipes(Protocol):
    """A `ServerControl` that can also lose everything."""

    def wipe(self) -> None:
        """End it, remove all its data, and start it again at the same address."""


@scenario(hooks=[Hook.SERVER])
async def lost_state_is_declared_again(lab: Lab) -> None:
    """When the server comes back without anything it had, that is reported once, and declared queues are as they were declared."""
    async with outages(lab) as (lab, server):
        wiping = server.server
        if not isinstance(wiping, Wipes):
            raise NotRun("nobody said how to wipe the server")
        broker = await lab.open()
        await lab.enqueue(broker, lab.message("lost"), lab.message("held"))
        held = await lab.take_exactly(broker, 2)
        async with lab.waiting(broker, wait=3600) as receive:
            await asyncio.to_thread(wiping.wipe)
            await lab.until(lambda: any(isinstance(event, StateLost) for event in lab.events), "the loss was reported")
            await lab.until(lambda: _works(broker), "the Broker worked again")
            before = lab.clock.monotonic()
            await lab.enqueue(broker, lab.message("new"))
        (delivery,) = [await lab.take_one(broker)] if receive.exception() is not None else receive.result()
        assert delivery.message.id == "new"
        assert before < delivery.lease_until <= lab.clock.monotonic() + lab.lease, "the declared lease does not hold any more"
        assert lab.errors(await broker.settle(list(map(Ack, held)))) == {0: LeaseLost, 1: LeaseLost}
        assert sum(isinstance(event, StateLost) for event in lab.events) == 1


# --- shorthands ------------------------------------------------------------------------------------


async def _works(broker: Broker) -> bool:
    try:
        await broker.stats(["q"])
    except BrokerUnavailable:
        return False
    return True


async def _opens(broker: Broker) -> bool:
    try:
        await broker.open()
    except BrokerUnavailable:
        return False
    return True


async def _outcome(lab: Lab, verb: Awaitable[object]) -> object:
    """What it returned or raised; fails if it hangs."""
    task = asyncio.ensure_future(verb)
    _, hanging = await asyncio.wait([task], timeout=lab.patience)
    task.cancel()
    assert not hanging, "it hangs"
    return task.exception() or task.result()
