"""Open, close, declare, capabilities: a Broker that is not open does nothing, and a closed one leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final

from crossdock.errors import BrokerClosed
from crossdock.spi import (
    API_VERSION,
    Ack,
    Blocked,
    Broker,
    BrokerEvent,
    Capabilities,
    ClockSkew,
    Connected,
    Delivery,
    Disconnected,
    Lane,
    Nack,
    Priority,
    QueueSpec,
    Replay,
    State,
    StateLost,
    Support,
    SupportsErase,
    Survives,
    Unblocked,
)
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DELAY, scenario

_VERBS: Final[dict[str, Callable[[Broker, Lab, Delivery], Awaitable[object]]]] = {
    "declare": lambda broker, lab, delivery: broker.declare([QueueSpec("q")]),
    "enqueue": lambda broker, lab, delivery: broker.enqueue([lab.message()]),
    "enqueue nothing": lambda broker, lab, delivery: broker.enqueue([]),
    "receive": lambda broker, lab, delivery: broker.receive([Lane("q", Priority.NORMAL, 1)], 1, 0),
    "receive and wait": lambda broker, lab, delivery: broker.receive([Lane("q", Priority.NORMAL, 1)], 1, 3600),
    "extend": lambda broker, lab, delivery: broker.extend([delivery]),
    "settle": lambda broker, lab, delivery: broker.settle([Ack(delivery)]),
    "stats": lambda broker, lab, delivery: broker.stats(),
    "stats by name": lambda broker, lab, delivery: broker.stats(["q"]),
    "peek": lambda broker, lab, delivery: broker.peek("q", State.READY),
    "remove": lambda broker, lab, delivery: broker.remove("q", State.READY, ["m"]),
    "replay": lambda broker, lab, delivery: broker.replay("q", [Replay("m", lab.message())]),
    "purge": lambda broker, lab, delivery: broker.purge("q", State.READY),
    "erase": lambda broker, lab, delivery: _eraser(broker).erase(["q"]),
}


def _eraser(broker: Broker) -> SupportsErase:
    if not isinstance(broker, SupportsErase):
        raise NotRun("the Broker brings no `erase`")
    return broker


# --- not open --------------------------------------------------------------------------------------


@scenario(verb=_VERBS)
async def nothing_is_done_before_open_and_after_close(
    broker: Broker, lab: Lab, verb: Callable[[Broker, Lab, Delivery], Awaitable[object]]
) -> None:
    """Before `open` and after `close` every verb raises `BrokerClosed` at once, and does nothing."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    fresh = lab.build()
    await _is_refused(lab, verb(fresh, lab, delivery))
    await fresh.open()
    await fresh.close()
    await _is_refused(lab, verb(fresh, lab, delivery))
    await lab.holds(broker, {State.LEASED: ["m"]})


async def _is_refused(lab: Lab, verb: Awaitable[object]) -> None:
    (outcome,) = await asyncio.gather(asyncio.wait_for(verb, lab.patience), return_exceptions=True)
    if isinstance(outcome, NotRun):
        raise outcome
    assert isinstance(outcome, BrokerClosed), f"a Broker that is not open came up with {outcome!r}"
    assert len(str(outcome).split()) > 2, f"BrokerClosed says only {str(outcome)!r}"


async def _ends(lab: Lab, *acts: Awaitable[object]) -> None:
    """Open or close, and fail if that hangs."""
    tasks = [asyncio.ensure_future(act) for act in acts]
    _, hanging = await asyncio.wait(tasks, timeout=lab.patience)
    for task in hanging:
        task.cancel()
    assert not hanging, "open() or close() hangs"
    for task in tasks:
        task.result()


# --- open and close --------------------------------------------------------------------------------


@scenario()
async def open_and_close_any_number_of_times(lab: Lab) -> None:
    """Opening twice, closing twice, closing before opening and opening again are all fine, and never hang."""
    broker = lab.build()
    for act in (broker.close, broker.open, broker.open):
        await _ends(lab, act())
    await lab.enqueue(broker, lab.message("m"))
    for act in (broker.close, broker.close, broker.open):
        await _ends(lab, act())
    assert (await lab.take_one(broker)).message.id == "m"


@scenario()
async def open_and_close_at_the_same_time(lab: Lab) -> None:
    """Opening twice at the same time is opening once, closing likewise; closed while it opens, it can still be closed for good."""
    broker = lab.build()
    for acts in ([broker.open, broker.open, broker.open], [broker.close, broker.close], [broker.open, broker.close]):
        await _ends(lab, *(act() for act in acts))
        if broker.close not in acts:
            await lab.enqueue(broker, lab.message())
    await _ends(lab, broker.close())
    await _is_refused(lab, broker.stats(["q"]))


@scenario(turns=range(8))
async def a_cancelled_open_can_be_repeated(lab: Lab, turns: int) -> None:
    """Cancelled at any moment, `open` has opened the Broker or left nothing open; opening again completes it."""
    broker = lab.build()
    opening = asyncio.ensure_future(broker.open())
    await lab.turns(turns)
    opening.cancel()
    await _ends(lab, asyncio.wait([opening]))
    await _ends(lab, broker.open())
    await lab.enqueue(broker, lab.message("m"))
    assert (await lab.take_one(broker)).message.id == "m"


@scenario(turns=range(8))
async def a_cancelled_close_can_be_repeated(broker: Broker, lab: Lab, turns: int) -> None:
    """Cancelled at any moment, `close` can be called again, and then nothing is left open."""
    await lab.enqueue(broker, lab.message("m"))
    closing = asyncio.ensure_future(broker.close())
    await lab.turns(turns)
    closing.cancel()
    await _ends(lab, asyncio.wait([closing]))
    await _ends(lab, broker.close())
    await _is_refused(lab, broker.stats(["q"]))
    assert (await lab.take_one(await lab.open())).message.id == "m"


@scenario()
async def close_ends_whatever_goes_on(broker: Broker, lab: Lab) -> None:
    """Closed while many verbs are under way, a Broker ends each of them with its outcome or one of our errors, and hangs with none."""
    await lab.enqueue(broker, *lab.messages(40))
    deliveries = await lab.take(broker, limit=20)
    verbs = [
        asyncio.ensure_future(verb)
        for verb in (
            *(broker.enqueue([message]) for message in lab.messages(20)),
            *(broker.settle([Ack(delivery)]) for delivery in deliveries[:10]),
            broker.extend(deliveries[10:]),
            broker.receive(lab.lanes("empty"), 1, 3600),
            broker.stats(["q"]),
        )
    ]
    await lab.turns(2)
    await _ends(lab, broker.close())
    _, hanging = await asyncio.wait(verbs, timeout=lab.patience)
    for verb in hanging:
        verb.cancel()
    assert not hanging, f"{len(hanging)} verbs outlived close()"
    for verb in verbs:
        assert isinstance(error := verb.exception(), BrokerClosed | None), f"{type(error).__name__}: {error}"


@scenario()
async def close_wakes_a_waiting_receive(broker: Broker, lab: Lab) -> None:
    """A receive that waits when its Broker is closed raises `BrokerClosed`; what comes later goes to others."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await _ends(lab, broker.close())
    assert isinstance(receive.exception(), BrokerClosed)
    await lab.enqueue(other, lab.message("m"))
    assert (await lab.take_one(other)).delivery_count == 1


@scenario(turns=range(6))
async def close_during_a_hand_over_loses_nothing(broker: Broker, lab: Lab, turns: int) -> None:
    """Closed while a message is on its way to a waiting receive, that returns it or leaves it with its count unchanged."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.enqueue(other, lab.message("m"))
        await lab.turns(turns)
        await broker.close()
    if receive.exception() is None:
        assert [delivery.message.id for delivery in receive.result()] == ["m"]
        await lab.holds(other, {State.LEASED: ["m"]})
    else:
        assert (await lab.take_one(other)).delivery_count == 1


@scenario()
async def close_gives_back_what_was_not_returned(broker: Broker, lab: Lab) -> None:
    """What a broker had handed over before `receive` returned it is, after `close`, there for others with its count unchanged."""
    other = await lab.open(queues=())  # with a lease of 30 s: what it keeps does not come back by itself
    await lab.declare(broker, QueueSpec("long"))
    await lab.enqueue(broker, *lab.messages(8, queue="long"))
    (kept,) = await broker.receive(lab.lanes("long"), 1, lab.patience)
    taken = {kept.message.id}
    await broker.close()
    while len(taken) < 8:
        more = await other.receive(lab.lanes("long"), 8, 0 if lab.virtual else lab.patience)
        assert more, f"{8 - len(taken)} messages are with nobody"
        assert {delivery.delivery_count for delivery in more} == {1}
        assert not taken & {delivery.message.id for delivery in more}
        taken |= {delivery.message.id for delivery in more}


@scenario()
async def deliveries_outlive_their_broker(broker: Broker, lab: Lab) -> None:
    """Deliveries returned before a close keep their leases, run out, and come again with a higher count."""
    await lab.enqueue(broker, lab.message("m"))
    await lab.take_one(broker)
    await broker.close()
    other = await lab.open()
    await lab.holds(other, {State.LEASED: ["m"]})
    assert not await lab.take(other)
    await lab.lease_over()
    assert (await lab.take_one(other)).delivery_count == 2


@scenario()
async def everything_outlives_its_broker(broker: Broker, lab: Lab) -> None:
    """What one Broker stored another one finds, in every state."""
    expected = await lab.fill(broker, 3, "full")
    await broker.close()
    await lab.holds(await lab.open(), expected, "full")


@scenario()
async def brokers_come_and_go(broker: Broker, lab: Lab) -> None:
    """Thirty Brokers that are opened, used and closed one after the other leave nothing open and take nothing along."""
    for number in range(30):
        visitor = await lab.open()
        await lab.enqueue(visitor, lab.message(f"m{number}"))
        delivery = await lab.take_one(visitor)
        assert delivery.message.id == f"m{number}"
        await lab.settle(visitor, Ack(delivery))
        await visitor.close()
    await lab.holds(broker, {})


# --- declare ---------------------------------------------------------------------------------------


@scenario()
async def declare_keeps_messages(broker: Broker, lab: Lab) -> None:
    """Declaring again, with the same or other settings, leaves what is stored."""
    await lab.enqueue(broker, lab.message("m"))
    for spec in (QueueSpec("q"), QueueSpec("q"), QueueSpec("q", lease=5.0, max_ready=1, dead_max_age=1.0, dead_max_count=1)):
        await lab.declare(broker, spec, QueueSpec("q2"))
    await lab.holds(broker, {State.READY: ["m"]})


@scenario()
async def the_last_declaration_wins(broker: Broker, lab: Lab) -> None:
    """Of several declarations of a queue the last one holds, in one call and over several, for receives from then on."""
    await lab.declare(broker, QueueSpec("q", lease=600.0), QueueSpec("q", lease=60.0))
    for lease in (60.0, 20.0, 40.0):
        await lab.declare(broker, QueueSpec("q", lease=lease))
        await lab.enqueue(broker, lab.message())
        before = lab.clock.monotonic()
        delivery = await lab.take_one(broker)
        assert before + lease * 0.7 < delivery.lease_until <= lab.clock.monotonic() + lease


# --- two at once -----------------------------------------------------------------------------------


@scenario()
async def two_brokers_in_one_loop(broker: Broker, lab: Lab) -> None:
    """Two Brokers in one event loop each keep their own deliveries, and one goes on when the other is closed."""
    other = await lab.open()
    await lab.enqueue(broker, lab.message("a"))
    (mine,) = [await lab.take_one(broker)]
    await lab.enqueue(other, lab.message("b"))
    theirs = await lab.take_one(other)
    assert (mine.message.id, theirs.message.id) == ("a", "b")
    await other.close()
    await lab.settle(broker, Ack(mine))
    await lab.enqueue(broker, lab.message("c"))
    assert (await lab.take_one(broker)).message.id == "c"


@scenario()
async def brokers_in_loops_of_other_threads(broker: Broker, lab: Lab) -> None:
    """Brokers in event loops of different threads share queues: each message goes to one of them, and one wakes the other."""
    await lab.declare(broker, QueueSpec("other", lease=lab.lease))
    messages = lab.messages(60)
    await lab.enqueue(broker, *messages)
    taken: list[list[str]] = [[], [], []]

    async def work(number: int) -> None:
        one = lab.target.make_broker(lab.namespace, lab.clock)
        await one.open()
        await one.declare([QueueSpec("q", lease=lab.lease)])
        while deliveries := await lab.take(one, limit=5):
            taken[number] += [delivery.message.id for delivery in deliveries]
            await lab.settle(one, *map(Ack, deliveries))
        await one.enqueue([lab.message(f"woken{number}", "other")])
        await one.close()

    async with lab.waiting(broker, wait=3600, limit=1, queue="other") as receive:
        await asyncio.gather(*(asyncio.to_thread(asyncio.run, work(number)) for number in range(3)))
    assert len(receive.result()) == 1
    assert sorted(id for ids in taken for id in ids) == sorted(message.id for message in messages)


@scenario()
async def deliveries_belong_to_their_broker(broker: Broker, lab: Lab) -> None:
    """What one Broker received can be settled by it after a second one was opened, used and closed in the same process."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    other = await lab.open()
    await lab.enqueue(other, lab.message("n"))
    await lab.settle(other, Nack(await lab.take_one(other)))
    await other.close()
    await lab.settle(broker, Ack(delivery))
    await lab.holds(broker, {State.READY: ["n"]})


# --- what it says of itself ------------------------------------------------------------------------


@scenario()
async def plugin_describes_itself(lab: Lab) -> None:
    """The plugin states a name, this API version, its schemes and a URL that begins with one of them."""
    plugin = lab.target.plugin
    if plugin is None:
        raise NotRun("Brokers are built by a function, not by an installed plugin")
    assert plugin.name.strip()
    assert plugin.api_version == API_VERSION
    assert lab.target.url.partition(":")[0] in plugin.schemes
    assert plugin.example_url.partition("://")[0] in plugin.schemes


@scenario()
async def capabilities_are_consistent(broker: Broker, lab: Lab) -> None:
    """What a Broker declares of itself makes sense, with a sentence where it says no, and the same each time it is opened."""
    declared = broker.capabilities
    assert isinstance(declared, Capabilities)
    assert declared.server.strip()
    assert declared.version.strip()
    assert declared.durability_note.strip()
    assert declared.survives <= frozenset(Survives)
    assert declared.clock in ("broker", "client")
    assert declared.takeover >= QueueSpec("q").lease
    if DELAY.declared(declared):
        assert 0 <= declared.delay_resolution <= declared.delay_lateness <= declared.delay_longest
    deduplicates = declared.deduplication.support is not Support.UNSUPPORTED
    assert deduplicates == (declared.deduplication_window is not None)
    assert declared.deduplication_window is None or declared.deduplication_window >= 0
    for states in (declared.listable, declared.removable, declared.purgeable):
        assert states <= frozenset(State)
    assert State.LEASED not in declared.removable | declared.purgeable
    assert declared.max_body >= 1_000_000
    for name in ("fencing", "delay", "deduplication", "by_id", "list_queues", "signals"):
        ability = getattr(declared, name)
        assert ability.support is Support.NATIVE or ability.note.strip(), f"{name} is {ability.support.value}, and nothing says why"
    assert (await lab.open()).capabilities == declared
    await broker.close()
    await broker.open()
    assert broker.capabilities == declared


@scenario()
async def events_are_reported_in_the_loop(broker: Broker, lab: Lab) -> None:
    """Whatever a Broker reports is one of the declared events, and is reported in its own event loop."""
    known = (Connected, Disconnected, Blocked, Unblocked, StateLost, ClockSkew)
    seen: list[tuple[BrokerEvent, object, asyncio.AbstractEventLoop | None]] = []

    def report(event: BrokerEvent) -> None:
        loop: Any = asyncio.get_running_loop() if threading.current_thread() is here else None
        seen.append((event, threading.current_thread(), loop))

    here, loop = threading.current_thread(), asyncio.get_running_loop()
    watched = lab.target.make_broker(lab.namespace, lab.clock, report)
    for _ in range(2):
        await watched.open()
        await watched.declare([QueueSpec("q", lease=lab.lease)])
        await lab.enqueue(watched, lab.message())
        await lab.settle(watched, Ack(await lab.take_one(watched)))
        await watched.close()
    await lab.turns()
    for event, thread, where in seen:
        assert isinstance(event, known), f"{event!r} is no event"
        assert (thread, where) == (here, loop), f"{event!r} was reported somewhere else"
    reasons = [event.reason for event, _, _ in seen if isinstance(event, Disconnected | Blocked)]
    assert all(reason.strip() for reason in reasons)
    await lab.holds(broker, {})
