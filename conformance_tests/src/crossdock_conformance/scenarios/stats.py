"""Figures: right in every state, after every move, while others look on; asking for them changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.spi import LEVELS, Ack, Broker, Nack, Priority, QueueSpec, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import BY_ID, DELAY, LIST_QUEUES, Need, listing, scenario

_READ = 0.002
"""Seconds that get lost where clocks are read in milliseconds."""


@scenario()
async def each_state_is_counted_apart(broker: Broker, lab: Lab) -> None:
    """Each message is counted once, in the state that it is in; a figure that the server cannot tell is None."""
    await lab.bury(broker, *lab.messages(6, queue="long"))
    await lab.enqueue(broker, *lab.messages(5, queue="long"))
    await lab.take_exactly(broker, 5, "long")
    delays = DELAY.declared(lab.capabilities)
    if delays:
        await lab.enqueue(broker, *lab.messages(4, queue="long", delay_ms=60_000))
    await lab.enqueue(broker, *lab.messages(3, queue="long"))

    async def check() -> None:
        stats = await lab.stats(broker, "long")
        assert stats.queue == "long"
        assert stats.ready == 3
        assert stats.scheduled in (4 if delays else 0, None)
        assert stats.leased in (5, None)
        assert stats.dead in (6, None)
        assert stats.dead_dropped in (0, None)

    await lab.eventually(check)


@scenario()
async def every_level_is_counted(broker: Broker, lab: Lab) -> None:
    """READY messages are counted whatever their level."""
    for index, level in enumerate(LEVELS):
        await lab.enqueue(broker, *lab.messages(index + 1, priority=level))

    async def check() -> None:
        assert (await lab.stats(broker)).ready == 10

    await lab.eventually(check)


@scenario()
async def figures_follow_every_move(broker: Broker, lab: Lab) -> None:
    """However a message gets from one state to another, it is counted where it is and nowhere else."""
    queue = "long"
    message = lab.message("m", queue)
    await lab.enqueue(broker, message)
    await lab.holds(broker, {State.READY: ["m"]}, queue)
    delivery = await lab.take_one(broker, queue)
    await lab.holds(broker, {State.LEASED: ["m"]}, queue)
    lab.nothing_refused(await broker.extend([delivery]))
    await lab.holds(broker, {State.LEASED: ["m"]}, queue)
    await lab.settle(broker, Nack(delivery))
    await lab.holds(broker, {State.READY: ["m"]}, queue)
    await lab.settle(broker, lab.retry(await lab.take_one(broker, queue)))
    await lab.holds(broker, {State.READY: ["m"]}, queue)
    delivery = await lab.take_one(broker, queue)
    await lab.settle(broker, lab.dead(delivery))
    await lab.holds(broker, {State.DEAD: ["m"]}, queue)
    await lab.replay(broker, lab.revived(delivery.message), queue=queue)
    await lab.holds(broker, {State.READY: ["m"]}, queue)
    await lab.settle(broker, Ack(await lab.take_one(broker, queue)))
    await lab.holds(broker, {}, queue)


@scenario(needs=[DELAY])
async def figures_follow_what_is_delayed(broker: Broker, lab: Lab) -> None:
    """What is enqueued, given back or retried for later is counted as SCHEDULED, and as READY or LEASED when its time has come."""
    await lab.enqueue(broker, *(lab.message(id) for id in "ab"))
    a, b = await lab.take_exactly(broker, 2)
    await lab.settle(broker, Nack(a, 60.0), lab.retry(b, 60.0))
    await lab.enqueue(broker, lab.message("c", delay_ms=60_000))
    await lab.holds(broker, {State.SCHEDULED: ["a", "b", "c"]}, in_order=False)
    before = lab.clock.monotonic()
    await lab.enqueue(broker, lab.message("soon", "other", delay_ms=round(lab.moment * 1000)))
    after = lab.clock.monotonic()
    await lab.comes(broker, before + lab.moment - lab.early, after + lab.moment + lab.lateness, "other")
    await lab.holds(broker, {State.LEASED: ["soon"]}, "other")


@scenario()
async def figures_follow_lost_leases(broker: Broker, lab: Lab) -> None:
    """After a lease has been lost and its message delivered again, there is one LEASED message."""
    await lab.enqueue(broker, lab.message("m"))
    await lab.take_one(broker)
    await lab.lease_over()
    await lab.take_one(broker)
    await lab.holds(broker, {State.LEASED: ["m"]})


@scenario()
async def named_queues_are_answered_in_order(broker: Broker, lab: Lab) -> None:
    """Named queues are answered in the order of their names in the call; one that does not exist has zeros."""
    await lab.enqueue(broker, lab.message(queue="a"), lab.message(queue="b"), lab.message(queue="b"))

    async def check() -> None:
        answers = await broker.stats(["b", "unknown", "a"])
        assert [(stats.queue, stats.ready) for stats in answers] == [("b", 2), ("unknown", 0), ("a", 1)]
        unknown = answers[1]
        for figure in (unknown.scheduled, unknown.leased, unknown.dead, unknown.oldest_ready_age, unknown.dead_dropped):
            assert figure in (0, None)

    await lab.eventually(check)


@scenario(needs=[LIST_QUEUES])
async def all_queues_are_named(broker: Broker, lab: Lab) -> None:
    """Without names every queue of the namespace is answered, by name, to whoever asks: the declared, the used, the emptied."""
    other = await lab.open(queues=[])
    names = {stats.queue for stats in await other.stats()}
    assert names <= {"q"}, f"in a new namespace there are {sorted(names)}"
    await lab.declare(broker, QueueSpec("declared"))
    await lab.enqueue(broker, lab.message(queue="used"), lab.message(queue="emptied"), lab.message(queue="Used"))
    await lab.settle(broker, Ack(await lab.take_one(broker, "emptied")))

    async def check() -> None:
        listed = [(stats.queue, stats.ready) for stats in await other.stats()]
        assert listed == [("Used", 1), ("declared", 0), ("emptied", 0), ("q", 0), ("used", 1)]

    await lab.eventually(check)


@scenario(needs=[LIST_QUEUES])
async def looking_makes_no_queue(broker: Broker, lab: Lab) -> None:
    """No queue comes into being by being counted, listed, searched, purged or received from."""
    await broker.stats()
    await broker.stats(["unknown"])
    assert not await broker.receive(lab.lanes("unknown"), 1, 0)
    for state in lab.capabilities.listable:
        assert not await lab.entries(broker, state, "unknown")
        if BY_ID.declared(lab.capabilities):
            assert not (await broker.peek("unknown", state, ids=["x"])).entries
    for state in lab.capabilities.removable:
        assert len(await broker.remove("unknown", state, ["x"])) == 1
    for state in lab.capabilities.purgeable:
        assert await broker.purge("unknown", state) == 0
    assert len(await broker.replay("unknown", [lab.revived(lab.message("x", "unknown"))])) == 1
    assert [stats.queue for stats in await broker.stats()] == ["q"]


@scenario()
async def age_of_the_oldest(broker: Broker, lab: Lab) -> None:
    """`oldest_ready_age` is the age of the oldest READY message, whatever its level, and 0.0 if there is none."""
    if (await lab.stats(broker)).oldest_ready_age is None:
        raise NotRun("it does not tell the age of the oldest message")
    assert (await lab.stats(broker)).oldest_ready_age == 0.0
    stored: dict[str, tuple[float, float]] = {}
    for level in (Priority.LOW, Priority.HIGH):
        before = lab.clock.monotonic()
        await lab.enqueue(broker, lab.message(level.name, priority=level))
        stored[level.name] = before, lab.clock.monotonic()
        await lab.pass_time(lab.moment / 2)

    async def check(id: str) -> None:
        before, after = stored[id]
        asked = lab.clock.monotonic()
        age = (await lab.stats(broker)).oldest_ready_age
        assert age is not None
        error = lab.early + _READ
        assert asked - after - error <= age <= lab.clock.monotonic() - before + error

    await lab.eventually(lambda: check("LOW"))
    await lab.settle(broker, *map(Ack, await lab.take_exactly(broker, 1, lanes=lab.lanes("q")[-1:])))
    await lab.eventually(lambda: check("HIGH"))
    await lab.settle(broker, Ack(await lab.take_one(broker)))

    async def check_none() -> None:
        assert (await lab.stats(broker)).oldest_ready_age == 0.0

    await lab.eventually(check_none)


@scenario(needs=[DELAY])
async def age_counts_from_the_due_time(broker: Broker, lab: Lab) -> None:
    """What was SCHEDULED has been READY since its time came, not since it was enqueued."""
    wait = lab.moment / 2
    before = lab.clock.monotonic()
    await lab.enqueue(broker, lab.message("m", delay_ms=round(wait * 1000)))
    after = lab.clock.monotonic()
    if (await lab.stats(broker)).oldest_ready_age is None:
        raise NotRun("it does not tell the age of the oldest message")
    await lab.pass_time(wait * 2 + lab.lateness)

    async def check() -> None:
        asked = lab.clock.monotonic()
        stats = await lab.stats(broker)
        age = stats.oldest_ready_age
        assert stats.ready == 1
        assert age is not None
        error = lab.early + _READ
        assert asked - after - wait - lab.lateness - error <= age <= lab.clock.monotonic() - before - wait + error

    await lab.eventually(check)


def _lists(state: State) -> Sequence[Need]:
    return (listing(state),)


@scenario(state=State, needs=_lists)
async def figures_are_right_while_others_look(broker: Broker, lab: Lab, state: State) -> None:
    """While somebody lists a state, what is listed is counted as always."""
    filled = await lab.fill(broker)
    other = await lab.open()
    await other.peek("long", state, limit=2)
    await lab.holds(broker, filled, "long", in_order=False)

    async def look() -> None:
        for _ in range(20):
            await lab.entries(other, state, "long", limit=2)

    expected = [len(filled.get(each, ())) for each in (State.READY, State.SCHEDULED, State.LEASED, State.DEAD)]
    async with lab.beside(look()) as looking:
        while not looking.done():
            stats = await lab.stats(broker, "long")
            found = (stats.ready, stats.scheduled, stats.leased, stats.dead)
            assert all(figure in (count, None) for figure, count in zip(found, expected, strict=True)), f"counted as {found}"


@scenario()
async def hundred_questions_change_nothing(broker: Broker, lab: Lab) -> None:
    """After asking 100 times, order, counts and leases are as before."""
    await lab.enqueue(broker, *(lab.message(f"leased{number}", "long") for number in range(3)))
    held = await lab.take_exactly(broker, 3, "long")
    filled = await lab.fill(broker, states=(State.DEAD, State.SCHEDULED, State.READY))
    for _ in range(100):
        await broker.stats(["long", "q"])
    deliveries = await lab.take_exactly(broker, 7, "long")
    assert [(delivery.message.id, delivery.delivery_count) for delivery in deliveries] == [(id, 1) for id in filled[State.READY]]
    await lab.settle(broker, *map(Ack, (*held, *deliveries)))
    del filled[State.READY]
    await lab.holds(broker, filled, "long")


@scenario()
async def receivers_are_counted(broker: Broker, lab: Lab) -> None:
    """`consumers` is None, or counts a receive that waits."""
    other = await lab.open()

    async def check() -> None:
        consumers = (await lab.stats(other)).consumers
        assert consumers is None or consumers >= 1

    async with lab.waiting(broker, wait=3600) as receive:
        await lab.eventually(check)
        receive.cancel()
