"""Stats and peek change nothing and lose nothing; remove and purge touch only what they name."""

from __future__ import annotations

import re
from typing import Any

import pytest

from crossdock.errors import NotFound, UnsupportedCapability
from crossdock.spi import Ack, Broker, Priority, QueueSpec, QueueStats, State

pytestmark = pytest.mark.asyncio


async def populate(broker: Broker, lab: Any) -> None:
    """Bring seven messages into each state of the queue."""
    await lab.bury(broker, *[lab.message(f"dead{number}") for number in range(7)])
    await broker.enqueue([lab.message(f"leased{number}") for number in range(7)])
    await lab.take(broker)
    await broker.enqueue([lab.message(f"scheduled{number}", delay_ms=1000 * (number + 1)) for number in range(7)])
    await broker.enqueue([lab.message(f"ready{number}") for number in range(7)])


async def test_stats_count_every_state(broker: Broker, lab: Any) -> None:
    """Each message is counted in exactly one state."""
    await populate(broker, lab)
    stats = await lab.stats(broker)
    assert (stats.queue, stats.ready, stats.scheduled, stats.leased, stats.dead) == ("q", 7, 7, 7, 7)
    assert stats.dead_dropped in (0, None)


async def test_stats_follow_the_clock(broker: Broker, lab: Any) -> None:
    """After a due time or a lease has passed a receive gets the message, and the figures say so at the latest then."""
    await broker.enqueue([lab.message("due", delay_ms=1000), lab.message("held")])
    await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    assert len(await lab.take(broker)) == 2
    stats = await lab.stats(broker)
    assert (stats.ready, stats.scheduled, stats.leased) == (0, 0, 2)


async def test_stats_of_named_queues(broker: Broker, lab: Any) -> None:
    """Named queues are answered in their order; an unknown one has zeros and does not come into being by that."""
    await broker.enqueue([lab.message(queue="a"), lab.message(queue="b"), lab.message(queue="b")])
    answers = await broker.stats(["b", "unknown", "a"])
    assert [(stats.queue, stats.ready) for stats in answers] == [("b", 2), ("unknown", 0), ("a", 1)]
    assert (answers[1].scheduled, answers[1].leased, answers[1].dead, answers[1].oldest_ready_age) == (0, 0, 0, 0.0)
    await broker.peek("unknown", State.READY)
    await broker.purge("unknown", State.READY)
    await broker.remove("unknown", State.READY, ["x"])
    assert "unknown" not in [stats.queue for stats in await broker.stats()]


async def test_stats_of_all_queues(broker: Broker, lab: Any) -> None:
    """Without names every queue is listed by name: the declared, the used, the emptied."""
    assert not await broker.stats()
    await broker.declare([QueueSpec("declared")])
    await broker.enqueue([lab.message(queue="used"), lab.message(queue="emptied")])
    await broker.settle([Ack(await lab.take_one(broker, "emptied"))])
    other = await lab.open()
    listed = await other.stats()
    assert [(stats.queue, stats.ready) for stats in listed] == [("declared", 0), ("emptied", 0), ("used", 1)]
    assert all(isinstance(stats, QueueStats) for stats in listed)


async def test_oldest_ready_age(broker: Broker, lab: Any) -> None:
    """The age is that of the oldest READY message, whatever its level, and counts from its due time."""
    assert (await lab.stats(broker)).oldest_ready_age == 0.0
    await broker.enqueue([lab.message("low", priority=Priority.LOW), lab.message("later", delay_ms=20_000)])
    await lab.advance(10)
    await broker.enqueue([lab.message("high", priority=Priority.HIGH)])
    await lab.advance(15)
    assert (await lab.stats(broker)).oldest_ready_age == pytest.approx(25, abs=0.1)
    await broker.settle([Ack((await broker.receive(lab.lanes("q")[3:], 1, 0))[0])])
    assert (await lab.stats(broker)).oldest_ready_age == pytest.approx(15, abs=0.1)
    await broker.remove("q", State.READY, ["high"])
    assert (await lab.stats(broker)).oldest_ready_age == pytest.approx(5, abs=0.1)


# --- peek ---


@pytest.mark.parametrize("state", State)
async def test_peek_lists_each_state_in_order(broker: Broker, lab: Any, state: State) -> None:
    """A state is listed whole, in order, whatever the size of the pages, and however often."""
    await populate(broker, lab)
    expected = [f"{state.value}{number}" for number in range(7)]
    for limit in (1, 3, 6, 7, 1000):
        entries = await lab.entries(broker, state, limit=limit)
        assert [entry.message.id for entry in entries] == expected
        assert {entry.state for entry in entries} == {state}
    page = await broker.peek("q", state, limit=7)
    assert page.next is None


async def test_peek_ready_order_is_delivery_order(broker: Broker, lab: Any) -> None:
    """READY messages are listed by level, then in the order in which they will be delivered."""
    levels = [Priority.LOW, Priority.CRITICAL, Priority.NORMAL, Priority.HIGH]
    await broker.enqueue([lab.message(priority=level) for _ in range(3) for level in levels])
    listed = await lab.ids(broker, State.READY)
    assert listed == [entry.message.id for entry in await lab.entries(broker, State.READY, limit=2)]
    assert listed == [delivery.message.id for delivery in await lab.take(broker)]


async def test_peek_leased_order_is_lease_order(broker: Broker, lab: Any) -> None:
    """LEASED messages are listed by the end of their leases, which extending moves."""
    await broker.enqueue([lab.message(id) for id in "abc"])
    first, *_ = [(await lab.take(broker, limit=1), await lab.advance(1))[0] for _ in range(3)]
    await broker.extend(first)
    assert await lab.ids(broker, State.LEASED) == ["b", "c", "a"]


async def test_peek_changes_nothing(broker: Broker, lab: Any) -> None:
    """After any number of looks, order, counts and leases are as before."""
    await populate(broker, lab)
    for _ in range(3):
        for state in State:
            await lab.entries(broker, state, limit=2)
            await broker.peek("q", state, ids=[f"{state.value}3"])
        await broker.stats()
    deliveries = await lab.take(broker)
    assert [delivery.message.id for delivery in deliveries] == [f"ready{number}" for number in range(7)]
    assert {delivery.delivery_count for delivery in deliveries} == {1}
    await lab.advance(broker.capabilities.takeover)
    again = await lab.take(broker)
    assert {delivery.delivery_count for delivery in again if delivery.message.id.startswith("leased")} == {2}


@pytest.mark.parametrize("state", State)
async def test_peek_by_id(broker: Broker, lab: Any, state: State) -> None:
    """Only the ids asked for are shown, and only those in that state; limit and cursor do not count then."""
    await populate(broker, lab)
    ids = [f"{state.value}{number}" for number in (5, 1, 3)]
    page = await broker.peek("q", state, ids=[*ids, "nobody", "ready0" if state is not State.READY else "dead0"], limit=1)
    assert sorted(entry.message.id for entry in page.entries) == sorted(ids)
    assert page.next is None


async def test_peek_shows_delivery_counts(broker: Broker, lab: Any) -> None:
    """Entries tell the hand-overs since the message was stored, where the server can tell."""
    await broker.enqueue([lab.message("m")])
    await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    await lab.take_one(broker)
    (entry,) = await lab.entries(broker, State.LEASED)
    assert entry.delivery_count in (2, None)


@pytest.mark.parametrize("state", [State.READY, State.SCHEDULED, State.DEAD])
async def test_cursor_survives_coming_and_going(broker: Broker, lab: Any, state: State) -> None:
    """While others come and go, also the one the cursor points to, each that stays is listed exactly once."""
    await populate(broker, lab)
    name = state.value
    page = await broker.peek("q", state, limit=3)
    assert [entry.message.id for entry in page.entries] == [f"{name}{number}" for number in range(3)]
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", page.next or "")
    await broker.remove("q", state, [f"{name}{number}" for number in (0, 2, 3, 5)])
    if state is State.DEAD:
        await lab.advance(1)
        await broker.remove("q", State.READY, [f"ready{number}" for number in range(7)])
        await lab.bury(broker, lab.message("new"))
    else:
        await broker.enqueue([lab.message("new", delay_ms=60_000 if state is State.SCHEDULED else 0)])
    rest = await broker.peek("q", state, after=page.next, limit=1000)
    assert [entry.message.id for entry in rest.entries] == [f"{name}4", f"{name}6", "new"]


async def test_cursor_with_equal_keys(broker: Broker, lab: Any) -> None:
    """Entries with equal times are neither skipped nor repeated at a page's end."""
    due = lab.clock.time_ms() + 5000
    await broker.enqueue([lab.message(eta_ms=due) for _ in range(10)])
    await lab.bury(broker, *[lab.message(f"d{number}") for number in range(10)])
    for state in (State.SCHEDULED, State.DEAD):
        for limit in (1, 3, 4):
            ids = await lab.ids(broker, state)
            paged = [entry.message.id for entry in await lab.entries(broker, state, limit=limit)]
            assert len(ids) == 10
            assert paged == ids


# --- remove and purge ---


@pytest.mark.parametrize("state", [State.READY, State.SCHEDULED, State.DEAD])
async def test_remove_by_state(broker: Broker, lab: Any, state: State) -> None:
    """Only messages in that very state are removed; the others are named, one by one."""
    await populate(broker, lab)
    others = [other.value + "0" for other in State if other is not state]
    refusals = await broker.remove("q", state, [*others, f"{state.value}0", f"{state.value}6"])
    assert lab.errors(refusals) == dict.fromkeys(range(3), NotFound)
    where = await lab.where(broker)
    assert {each: len(ids) for each, ids in where.items()} == {each: 5 if each is state else 7 for each in State}


@pytest.mark.parametrize("state", [State.READY, State.SCHEDULED, State.DEAD])
async def test_purge_by_state(broker: Broker, lab: Any, state: State) -> None:
    """A purge empties one state of one queue."""
    await populate(broker, lab)
    await broker.enqueue([lab.message(queue="q2")])
    assert await broker.purge("q", state) == 7
    assert set(await lab.where(broker)) == set(State) - {state}
    assert await lab.ids(broker, State.READY, "q2")


async def test_leased_messages_are_left_alone(broker: Broker, lab: Any) -> None:
    """Nothing removes or purges what a worker holds."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    with pytest.raises(UnsupportedCapability, match=r"(?i)leased"):
        await broker.remove("q", State.LEASED, ["m"])
    with pytest.raises(UnsupportedCapability, match=r"(?i)leased"):
        await broker.purge("q", State.LEASED)
    assert not await broker.settle([Ack(delivery)])


async def test_removed_messages_stay_away(broker: Broker, lab: Any) -> None:
    """A message removed or purged before its time is not delivered at it, and its id is free."""
    await broker.enqueue([lab.message("a", delay_ms=1000), lab.message("b", delay_ms=1000), lab.message("c")])
    await broker.remove("q", State.SCHEDULED, ["a"])
    await broker.purge("q", State.SCHEDULED)
    await broker.remove("q", State.READY, ["c"])
    assert not await broker.enqueue([lab.message("a", delay_ms=5000, generation=1)])
    await lab.advance(2)
    assert await lab.take(broker) == []
    await lab.advance(3)
    assert (await lab.take_one(broker)).message.generation == 1
