"""Remove, purge, erase: what is named goes for good, and nothing else does."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from crossdock.errors import BrokerClosed, EnqueueError, LeaseLost, NotFound, SettleUnknown, UnsupportedCapability
from crossdock.spi import Ack, Broker, Delivery, Message, Nack, Priority, QueueSpec, Settlement, State, SupportsErase
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DELAY, LIST_QUEUES, Need, purging, removing, scenario

_AT_REST = (State.READY, State.SCHEDULED, State.DEAD)


def _removes(state: State) -> Sequence[Need]:
    return (removing(state),)


def _purges(state: State) -> Sequence[Need]:
    return (purging(state),)


def _soon(lab: Lab) -> float:
    """Seconds after which a scenario lets messages become due: time enough to remove them before."""
    return lab.lease


async def _put(broker: Broker, lab: Lab, state: State, *messages: Message) -> None:
    """Bring messages into a state of an empty queue."""
    if state is State.DEAD:
        await lab.bury(broker, *messages)
        return
    delay_ms = round(_soon(lab) * 1000) if state is State.SCHEDULED else 0
    await lab.enqueue(broker, *(msgspec.structs.replace(message, delay_ms=delay_ms) for message in messages))
    if state is State.LEASED:
        for message in messages:
            await lab.take_one(broker, message.queue)


async def _all_refused(broker: Broker, lab: Lab, late: Sequence[Delivery]) -> None:
    """Whatever is tried with these four deliveries is refused with `LeaseLost`."""
    assert lab.errors(await broker.extend(late)) == dict.fromkeys(range(4), LeaseLost)
    settlements: list[Settlement] = [Ack(late[0]), Nack(late[1]), lab.retry(late[2]), lab.dead(late[3])]
    assert lab.errors(await broker.settle(settlements)) == dict.fromkeys(range(4), LeaseLost)


# --- remove ---


@scenario(state=State, needs=_removes)
async def removed_by_id(broker: Broker, lab: Lab, state: State) -> None:
    """Only messages in that very state are removed; each that is not there is refused with `NotFound` and holds up no other."""
    await broker.remove("long", state, ["nobody"])
    filled = await lab.fill(broker)
    first, *others, last = filled[state]
    missing = ["nobody", first, *(f"{other.value}0" for other in filled if other is not state)]
    ids = [first, *missing, last]
    assert lab.errors(await broker.remove("long", state, ids)) == dict.fromkeys(range(1, len(ids) - 1), NotFound)
    await lab.holds(broker, filled | {state: others}, "long", in_order=False)
    assert lab.errors(await broker.remove("never-used", state, others)) == dict.fromkeys(range(len(others)), NotFound)


@scenario(state=_AT_REST, needs=_removes)
async def what_was_removed_stays_away(broker: Broker, lab: Lab, state: State) -> None:
    """A removed message is not delivered, not when its time comes either, and its id is free."""
    await broker.remove("q", state, ["nobody"])
    await _put(broker, lab, state, lab.message("m"))
    lab.nothing_refused(await broker.remove("q", state, ["m"]))
    assert not await lab.take(broker)
    if state is State.SCHEDULED:
        await lab.pass_time(_soon(lab) + lab.lateness)
        assert not await lab.take(broker)
    await lab.holds(broker, {})
    await lab.enqueue(broker, lab.message("m", generation=1))
    delivery = await lab.take_one(broker)
    assert (delivery.message.generation, delivery.delivery_count) == (1, 1)


@scenario(needs=[removing(State.READY)])
async def removed_or_delivered_never_both(broker: Broker, lab: Lab) -> None:
    """Of messages that are removed and received at the same time each is either removed or delivered."""
    await broker.remove("long", State.READY, ["nobody"])
    messages = lab.messages(100, queue="long")
    await lab.enqueue(broker, *messages)
    other = await lab.open()
    removed: set[str] = set()

    async def remove() -> None:
        for start in range(0, 100, 10):
            ids = [message.id for message in messages[start : start + 10]]
            refused = lab.errors(await other.remove("long", State.READY, ids))
            assert set(refused.values()) <= {NotFound}
            removed.update(id for index, id in enumerate(ids) if index not in refused)

    async def receive() -> list[Delivery]:
        taken: list[Delivery] = []
        for _ in range(20):
            taken += await broker.receive(lab.lanes("long"), 4, 0)
        return taken

    _, taken = await asyncio.gather(remove(), receive())
    taken += await lab.take(broker, 100, "long")
    delivered = {delivery.message.id for delivery in taken}
    assert not delivered & removed, f"delivered and removed: {sorted(delivered & removed)}"
    assert delivered | removed == {message.id for message in messages}
    await lab.settle(broker, *map(Ack, taken))
    await lab.holds(broker, {}, "long")


# --- purge ---


@scenario(state=_AT_REST, needs=_purges)
async def a_purge_empties_one_state(broker: Broker, lab: Lab, state: State) -> None:
    """A purge deletes every message of one state of one queue, says how many, and touches nothing else."""
    assert await broker.purge("long", state) == 0
    filled = await lab.fill(broker)
    elsewhere = await lab.fill(broker, 2, "q2", [state])
    assert await broker.purge("long", state) == 7
    del filled[state]
    await lab.holds(broker, filled, "long", in_order=False)
    assert await broker.purge("long", state) == 0
    await lab.holds(broker, elsewhere, "q2")


@scenario(needs=[purging(State.READY)])
async def a_purge_takes_every_level(broker: Broker, lab: Lab) -> None:
    """READY messages of all levels are purged."""
    assert await broker.purge("q", State.READY) == 0
    await lab.enqueue(broker, *(lab.message(priority=level) for level in Priority for _ in range(3)))
    assert await broker.purge("q", State.READY) == 12
    assert not await lab.take(broker)


@scenario(needs=[purging(State.READY)])
async def a_purge_counts_thousands(broker: Broker, lab: Lab) -> None:
    """The number that a purge returns is exact, however many there were."""
    assert await broker.purge("q", State.READY) == 0
    for _ in range(6):
        await lab.enqueue(broker, *lab.messages(1000, body=b""))
    assert await broker.purge("q", State.READY) == 6000
    await lab.holds(broker, {})


@scenario(needs=[DELAY, purging(State.SCHEDULED)])
async def what_was_purged_stays_away(broker: Broker, lab: Lab) -> None:
    """A purged message is not delivered when its time comes, and its id is free."""
    await broker.purge("q", State.SCHEDULED)
    await _put(broker, lab, State.SCHEDULED, lab.message("a"), lab.message("b"))
    assert await broker.purge("q", State.SCHEDULED) == 2
    await lab.enqueue(broker, lab.message("a", generation=1))
    await lab.pass_time(_soon(lab) + lab.lateness)
    assert [delivery.message.generation for delivery in await lab.take(broker)] == [1]


@scenario(needs=[purging(State.READY)])
async def purged_or_delivered_never_both(broker: Broker, lab: Lab) -> None:
    """Of messages that are purged and received at the same time each is either counted as purged or delivered, and then stays."""
    assert await broker.purge("long", State.READY) == 0
    await lab.enqueue(broker, *lab.messages(500, queue="long"))
    other = await lab.open()

    async def receive() -> list[Delivery]:
        taken: list[Delivery] = []
        for _ in range(10):
            taken += await broker.receive(lab.lanes("long"), 7, 0)
        return taken

    taken, purged = await asyncio.gather(receive(), other.purge("long", State.READY))
    taken += await lab.take(broker, 100, "long")
    assert len(taken) + purged == 500
    await lab.settle(broker, *map(Ack, taken))
    await lab.holds(broker, {}, "long")


@scenario()
async def nothing_purges_what_is_leased(broker: Broker, lab: Lab) -> None:
    """A purge of LEASED is refused with `UnsupportedCapability`, and one of any other state leaves what is LEASED to its worker."""
    await lab.enqueue(broker, lab.message("m", "long"))
    delivery = await lab.take_one(broker, "long")
    assert State.LEASED not in broker.capabilities.purgeable
    error = await lab.raises(UnsupportedCapability, broker.purge("long", State.LEASED))
    assert "leased" in str(error).lower(), f"it should say what is not supported, and says {str(error)!r}"
    for state in broker.capabilities.purgeable:
        await broker.purge("long", state)
    await lab.holds(broker, {State.LEASED: ["m"]}, "long")
    await lab.settle(broker, Ack(delivery))


@scenario(needs=[purging(State.READY)])
async def a_late_settlement_revives_nothing(broker: Broker, lab: Lab) -> None:
    """Who lost the lease on a message that was purged since can settle it no more: no retry and no give-back brings it back."""
    await broker.purge("q", State.READY)
    await lab.enqueue(broker, *(lab.message(id) for id in "abcd"))
    late = await lab.take_exactly(broker, 4)
    await lab.lease_over()
    other = await lab.open()
    again = await lab.take_exactly(other, 4)
    await lab.settle(other, *map(Nack, again))
    assert await broker.purge("q", State.READY) == 4
    await _all_refused(broker, lab, late)
    await lab.holds(broker, {})
    assert not await lab.take(broker)


# --- erase ---


def _eraser(broker: Broker) -> SupportsErase:
    if not isinstance(broker, SupportsErase):
        raise NotRun("it does not erase queues")
    return broker


async def _names(broker: Broker) -> list[str]:
    """The queues of a namespace, where that can be told."""
    return [stats.queue for stats in await broker.stats()] if LIST_QUEUES.declared(broker.capabilities) else []


@scenario()
async def erased_queues_are_gone(broker: Broker, lab: Lab) -> None:
    """Of an erased queue nothing is left, whoever looks: no message in any state, no figure, not its name."""
    eraser = _eraser(broker)
    await lab.declare(broker, QueueSpec("long", dead_max_count=5))
    await lab.fill(broker)
    other = await lab.open(queues=[])

    async def all_are_counted() -> None:
        assert (await lab.stats(other, "long")).ready == 7  # but for what is in a worker's hands for a moment

    await lab.eventually(all_are_counted)
    assert "long" in await _names(other) or not LIST_QUEUES.declared(lab.capabilities)
    await eraser.erase(["long"])
    for each in (broker, other):
        assert "long" not in await _names(each)
        await lab.holds(each, {}, "long")
        stats = await lab.stats(each, "long")
        assert stats.dead_dropped in (0, None)
        assert stats.oldest_ready_age in (0.0, None)
        assert not await lab.take(each, queue="long")
        assert "long" not in await _names(each)


@scenario(state=State)
async def erased_messages_are_forgotten(broker: Broker, lab: Lab, state: State) -> None:
    """An erased message never comes back, not when its time comes either, and its id is free for any generation."""
    eraser = _eraser(broker)
    if state is State.SCHEDULED and not DELAY.declared(lab.capabilities):
        raise NotRun("it does not delay messages")
    await _put(broker, lab, state, lab.message("m", generation=5))
    await eraser.erase(["q"])
    await lab.enqueue(broker, lab.message("m", body=b"anew"))
    delivery = await lab.take_one(broker)
    assert (delivery.message.body, delivery.message.generation, delivery.delivery_count) == (b"anew", 0, 1)
    await lab.settle(broker, Ack(delivery))
    if state is State.SCHEDULED:
        await lab.pass_time(_soon(lab) + lab.lateness)
    elif state is State.LEASED:
        await lab.lease_over()
    assert not await lab.take(broker)
    await lab.holds(broker, {})


@scenario()
async def erased_settings_are_forgotten(broker: Broker, lab: Lab) -> None:
    """A queue that comes into being after its namesake was erased has default settings."""
    eraser = _eraser(broker)
    await lab.declare(broker, QueueSpec("set", lease=lab.lease / 4, max_ready=1, dead_max_count=0, dead_max_age=lab.lease / 4))
    await lab.enqueue(broker, lab.message(queue="set"))
    await eraser.erase(["set"])
    await lab.enqueue(broker, lab.message("a", "set"), lab.message("b", "set"))
    a, b = await lab.take_exactly(broker, 2, "set")
    assert a.lease_until - lab.clock.monotonic() > QueueSpec("set").lease / 2
    await lab.settle(broker, lab.dead(a), lab.dead(b))
    await lab.pass_time(lab.lease / 2)
    await lab.holds(broker, {State.DEAD: ["a", "b"]}, "set")


@scenario()
async def other_queues_are_not_erased(broker: Broker, lab: Lab) -> None:
    """Queues with other names are untouched, however similar, and queues of the same name in other namespaces."""
    eraser = _eraser(broker)
    other = await lab.open("-other")
    filled = await lab.fill(broker, 2, "a")
    names = ("A", "aa", "a-b", "a_b", "a-dead", "a-ready", "b-a")
    for name in names:
        await lab.fill(broker, 2, name)
    await lab.fill(other, 2, "a")
    await eraser.erase(["a", "b"])
    await lab.holds(broker, {}, "a")
    await lab.holds(other, filled, "a", in_order=False)
    for name in names:
        await lab.holds(broker, filled, name, in_order=False)


@scenario()
async def deliveries_of_erased_queues_are_lost(broker: Broker, lab: Lab) -> None:
    """Whoever holds a message of an erased queue has lost it; all it tries is refused with `LeaseLost`, also where the id is back."""
    eraser = _eraser(broker)
    other = await lab.open()
    messages = [lab.message(id, "long") for id in "abcd"]
    await lab.enqueue(broker, *messages)
    late = await lab.take_exactly(other, 4, "long")
    await eraser.erase(["long"])
    await _all_refused(other, lab, late)
    await lab.holds(broker, {}, "long")
    await lab.enqueue(broker, *messages)
    again = await lab.take_exactly(broker, 4, "long")
    assert {delivery.delivery_count for delivery in again} == {1}
    await _all_refused(other, lab, late)
    await lab.holds(broker, {State.LEASED: list("abcd")}, "long", in_order=False)
    await lab.settle(broker, *map(Ack, again))


@scenario(eraser=["same broker", "another broker"], producer=["same broker", "another broker"])
async def a_waiting_receive_outlives_an_erase(broker: Broker, lab: Lab, eraser: str, producer: str) -> None:
    """A receive that waits while its queue is erased does not end by it, makes no queue, and gets what is enqueued afterwards."""
    other = await lab.open(queues=[])
    erases = _eraser(broker if eraser == "same broker" else other)
    async with lab.waiting(broker, wait=3600) as receive:
        await erases.erase(["q"])
        await lab.turns()
        assert not receive.done()
        assert not await _names(other)
        await lab.enqueue(broker if producer == "same broker" else other, lab.message("m"))
    assert [(delivery.message.id, delivery.delivery_count) for delivery in receive.result()] == [("m", 1)]


@scenario()
async def nothing_can_be_erased(broker: Broker, lab: Lab) -> None:
    """To erase what is not there, nothing at all or the same twice is no error; a Broker that is not open raises `BrokerClosed`."""
    eraser = _eraser(broker)
    filled = await lab.fill(broker, 2)
    await eraser.erase([])
    await eraser.erase(["never-used", "never-used"])
    await lab.holds(broker, filled, "long", in_order=False)
    await eraser.erase(["long", "q", "long"])
    assert not await _names(broker)
    unopened = lab.build()
    await broker.close()
    for closed in (_eraser(unopened), eraser):
        for queues in ([], ["long"]):
            await lab.raises(BrokerClosed, closed.erase(queues))


@scenario()
async def thousands_are_erased(broker: Broker, lab: Lab) -> None:
    """A queue of thousands of messages disappears as a whole."""
    eraser = _eraser(broker)
    for _ in range(6):
        await lab.enqueue(broker, *lab.messages(1000, body=b"", queue="long"))
    await lab.take_exactly(broker, 1000, "long")
    await eraser.erase(["long"])
    await lab.holds(broker, {}, "long")
    assert not await lab.take(broker, queue="long")


@scenario()
async def erased_queues_come_back_empty(broker: Broker, lab: Lab) -> None:
    """Erased and used again, many times and by several Brokers that knew them before, queues keep their messages apart."""
    eraser = _eraser(broker)
    other = await lab.open(queues=[])
    for round in range(10):
        names = [f"a{round}", "b", f"c{round}"]
        for name in names:
            await lab.enqueue(other, lab.message("m", name, body=name.encode()))
            await lab.stats(broker, name)
        await eraser.erase(names)
        for name in reversed(names):
            await lab.enqueue(broker, lab.message("m", name, body=b"new " + name.encode()))
        for name in names:
            delivery = await lab.take_one(other, name)
            assert (delivery.message.queue, delivery.message.body) == (name, b"new " + name.encode())
            await lab.settle(other, Ack(delivery))
            await lab.holds(broker, {}, name)


@scenario()
async def erasing_amid_work(broker: Broker, lab: Lab) -> None:
    """While a queue is in use it may be erased again and again, and it works on: nobody sees an error but `LeaseLost`, and
    an `EnqueueError` or `SettleUnknown` of what was on its way into it."""
    eraser = _eraser(broker)
    other = await lab.open()
    over = False

    async def produce() -> None:
        while not over:
            refusals = await other.enqueue(lab.messages(20, queue="busy"))
            assert all(issubclass(error, EnqueueError) for error in lab.errors(refusals).values())

    async def consume() -> None:
        while not over:
            taken = await other.receive(lab.lanes("busy"), 15, 0)
            endings = [Nack(delivery) if index % 3 else Ack(delivery) for index, delivery in enumerate(taken)]
            assert set(lab.errors(await other.settle(endings)).values()) <= {LeaseLost, SettleUnknown}

    async with lab.beside(produce()), lab.beside(consume()):
        for _ in range(20):
            await lab.turns(20)
            await eraser.erase(["busy"])
        over = True
    await eraser.erase(["busy"])
    await lab.holds(broker, {}, "busy")
    messages = lab.messages(10, queue="busy")
    await lab.enqueue(other, *messages)
    await lab.holds(broker, {State.READY: [message.id for message in messages]}, "busy")
