"""Listings: each state whole and in order, page by page, by id; looking changes nothing."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from crossdock.errors import ConfigurationError
from crossdock.spi import Ack, Broker, Cursor, Delivery, Nack, Priority, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import BY_ID, DELAY, Need, listing, scenario

_LONG = 60_000
"""Milliseconds after which nothing becomes due while a scenario runs."""


def _lists(state: State, **_: object) -> Sequence[Need]:
    return (listing(state),)


def _lists_by_id(state: State) -> Sequence[Need]:
    return BY_ID, listing(state)


async def _put(broker: Broker, lab: Lab, state: State, ids: Sequence[str], queue: str = "long") -> list[Delivery]:
    """Bring messages into a state, in this order and behind those that are there; returns the deliveries of LEASED ones."""
    if state is State.DEAD:
        await lab.bury(broker, *(lab.message(id, queue) for id in ids))
    else:
        delay_ms = _LONG if state is State.SCHEDULED else 0
        await lab.enqueue(broker, *(lab.message(id, queue, delay_ms=delay_ms) for id in ids))
    return await lab.take_exactly(broker, len(ids), queue) if state is State.LEASED else []


# --- whole and in order ---


@scenario(state=State, needs=_lists)
async def a_state_is_listed_whole(broker: Broker, lab: Lab, state: State) -> None:
    """A listing shows every message of the state and no other, whatever the size of its pages; the last page says that it is."""
    await lab.ids(broker, state)
    filled = await lab.fill(broker)
    for limit in (1, 3, 6, 7, 1000):
        entries = await lab.entries(broker, state, "long", limit)
        found = [entry.message.id for entry in entries]
        assert (sorted(found) if state is State.LEASED else found) == filled[state]  # their leases end at the same time
        assert {entry.state for entry in entries} == {state}
        assert {entry.letter is None for entry in entries} == {state is not State.DEAD}
    assert (await broker.peek("long", state, limit=7)).next is None


@scenario(state=State, needs=_lists)
async def entries_show_every_byte(broker: Broker, lab: Lab, state: State) -> None:
    """An entry carries the message as it was enqueued; a SCHEDULED one its due time, if the backend keeps it."""
    await lab.ids(broker, state)
    message = lab.message("A-z_9", "long", Priority.CRITICAL, body=bytes(range(256)), generation=3)
    if state is State.SCHEDULED:
        message = msgspec.structs.replace(message, eta_ms=lab.clock.time_ms() + _LONG)
    await lab.enqueue(broker, message)
    if state in (State.LEASED, State.DEAD):
        delivery = await lab.take_one(broker, "long")
        if state is State.DEAD:
            await lab.settle(broker, lab.dead(delivery))
    (entry,) = await lab.entries(broker, state, "long")
    shown = entry.message
    if shown.eta_ms:
        assert abs(shown.eta_ms - message.eta_ms) <= (lab.capabilities.delay_resolution + lab.early) * 1000
    assert msgspec.structs.replace(shown, eta_ms=message.eta_ms) == message


@scenario(needs=[listing(State.READY)])
async def ready_in_order_of_delivery(broker: Broker, lab: Lab) -> None:
    """READY messages are listed by level, most urgent first, and within a level as they will be delivered."""
    levels = [Priority.LOW, Priority.CRITICAL, Priority.NORMAL, Priority.HIGH]
    await lab.enqueue(broker, *(lab.message(priority=level) for _ in range(3) for level in levels))
    first = await lab.take_exactly(broker, 5)
    await lab.settle(broker, Nack(first[0]), lab.retry(first[1]), Ack(first[2]), Nack(first[4]), Nack(first[3]))
    entries = await lab.entries(broker, State.READY)
    assert [entry.message.priority for entry in entries] == sorted((entry.message.priority for entry in entries), reverse=True)
    assert entries == await lab.entries(broker, State.READY, limit=2)
    assert [entry.message.id for entry in entries] == [delivery.message.id for delivery in await lab.take_exactly(broker, 11)]


@scenario(needs=[listing(State.SCHEDULED), DELAY])
async def scheduled_by_due_time(broker: Broker, lab: Lab) -> None:
    """SCHEDULED messages are listed by due time, whatever their level and whenever they were stored, also those given back."""
    await lab.ids(broker, State.SCHEDULED)
    now = lab.clock.time_ms()
    for id, seconds, priority in (("c", 70, Priority.LOW), ("a", 60, Priority.NORMAL), ("d", 75, Priority.CRITICAL)):
        await lab.enqueue(broker, lab.message(id, "long", priority, eta_ms=now + seconds * 1000))
    await lab.enqueue(broker, lab.message("b", "long"))
    await lab.settle(broker, Nack(await lab.take_one(broker, "long"), 65.0))
    await lab.enqueue(broker, lab.message("e", "long", delay_ms=80_000))
    assert await lab.ids(broker, State.SCHEDULED, "long") == ["a", "b", "c", "d", "e"]
    assert [entry.message.id for entry in await lab.entries(broker, State.SCHEDULED, "long", limit=2)] == ["a", "b", "c", "d", "e"]


@scenario(needs=[listing(State.LEASED)])
async def leased_by_end_of_lease(broker: Broker, lab: Lab) -> None:
    """LEASED messages are listed by the end of their leases, which extending moves."""
    deliveries: list[Delivery] = []
    for id in "abc":
        await lab.enqueue(broker, lab.message(id, "long"))
        deliveries.append(await lab.take_one(broker, "long"))
        await lab.pass_time(0.1)
    assert await lab.ids(broker, State.LEASED, "long") == ["a", "b", "c"]
    lab.nothing_refused(await broker.extend(deliveries[:1]))
    assert await lab.ids(broker, State.LEASED, "long") == ["b", "c", "a"]


@scenario(needs=[listing(State.LEASED)])
async def entries_show_delivery_counts(broker: Broker, lab: Lab) -> None:
    """An entry tells how often its message was delivered since it was stored, or None."""
    await lab.ids(broker, State.LEASED)
    await lab.enqueue(broker, lab.message("m"))
    await lab.take_one(broker)
    await lab.lease_over()
    delivery = await lab.take_one(broker)
    (entry,) = await lab.entries(broker, State.LEASED)
    assert entry.delivery_count in (2, None)
    await lab.settle(broker, lab.retry(delivery))
    await lab.take_one(broker)
    (entry,) = await lab.entries(broker, State.LEASED)
    assert entry.delivery_count in (1, None)


@scenario(state=State, needs=_lists)
async def a_queue_that_is_not_there_is_empty(broker: Broker, lab: Lab, state: State) -> None:
    """A listing of a queue that nobody ever used is empty and no error."""
    page = await broker.peek("never-used", state)
    assert (list(page.entries), page.next) == ([], None)


@scenario(state=State, needs=_lists)
async def hundred_listings_change_nothing(broker: Broker, lab: Lab, state: State) -> None:
    """After 100 listings, order, counts and leases are as before."""
    await lab.ids(broker, state)
    await lab.enqueue(broker, *(lab.message(f"leased{number}", "long") for number in range(7)))
    held = await lab.take_exactly(broker, 7, "long")
    filled = await lab.fill(broker, states=(State.DEAD, State.SCHEDULED, State.READY))
    before = await lab.entries(broker, state, "long")
    assert len(before) == 7
    for _ in range(100):
        assert await lab.entries(broker, state, "long", limit=3) == before
    deliveries = await lab.take_exactly(broker, 7, "long")
    assert [(delivery.message.id, delivery.delivery_count) for delivery in deliveries] == [(id, 1) for id in filled[State.READY]]
    await lab.settle(broker, *map(Ack, (*held, *deliveries)))
    del filled[State.READY]
    await lab.holds(broker, filled, "long")


# --- by id ---


@scenario(state=State, needs=_lists_by_id)
async def by_id(broker: Broker, lab: Lab, state: State) -> None:
    """Only the ids that are asked for are shown, and only those in that state."""
    await broker.peek("q", state, ids=["nobody"])
    await lab.fill(broker)
    ids = [f"{state.value}{number}" for number in (5, 1, 3)]
    others = [f"{other.value}0" for other in State if other is not state]
    page = await broker.peek("long", state, ids=[*ids, "nobody", *others])
    assert sorted(entry.message.id for entry in page.entries) == sorted(ids)
    assert {entry.state for entry in page.entries} == {state}
    assert not (await broker.peek("long", state, ids=["nobody", *others])).entries
    assert not (await broker.peek("q", state, ids=ids)).entries


@scenario(needs=[BY_ID, listing(State.READY)])
async def by_id_limit_and_cursor_do_not_count(broker: Broker, lab: Lab) -> None:
    """Asked for by id, all are shown in one page, whatever `limit` and `after` say."""
    messages = lab.messages(150)
    ids = [message.id for message in messages]
    await broker.peek("q", State.READY, ids=ids)
    await lab.enqueue(broker, *messages)
    after = (await broker.peek("q", State.READY, limit=100)).next
    assert after is not None
    for page in (
        await broker.peek("q", State.READY, ids=ids),
        await broker.peek("q", State.READY, ids=ids, limit=1),
        await broker.peek("q", State.READY, ids=ids, after=after),
    ):
        assert sorted(entry.message.id for entry in page.entries) == sorted(ids)
        assert page.next is None


# --- pages and cursors ---


@scenario(needs=[listing(State.READY)])
async def the_longest_page(broker: Broker, lab: Lab) -> None:
    """A page may have 1,000 entries; what is beyond comes with the next."""
    messages = lab.messages(1001)
    await lab.enqueue(broker, *messages[:500])
    await lab.enqueue(broker, *messages[500:])
    assert await lab.ids(broker, State.READY) == [message.id for message in messages]
    page = await broker.peek("q", State.READY, limit=1000)
    assert page.next is not None
    rest = await broker.peek("q", State.READY, after=page.next, limit=1000)
    assert len(page.entries) + len(rest.entries) == 1001
    assert rest.next is None


@scenario(state=State, needs=_lists)
async def cursors_stay_right(broker: Broker, lab: Lab, state: State) -> None:
    """While messages come and go, also the one that the cursor names, each that stays is listed exactly once."""
    await lab.ids(broker, state)
    if state in (State.READY, State.SCHEDULED, State.DEAD) and state not in lab.capabilities.removable:
        raise NotRun(f"it does not remove {state.value} messages")
    names = [f"{number:02}" for number in range(20)]
    deliveries = {delivery.message.id: delivery for delivery in await _put(broker, lab, state, names)}
    leaving = {name for number, name in enumerate(names) if number % 4}
    listed: list[str] = []
    after: Cursor | None = None
    for number in range(100):
        page = await broker.peek("long", state, after=after, limit=3)
        listed += [entry.message.id for entry in page.entries]
        after = page.next
        if after is None:
            break
        assert re.fullmatch(r"[A-Za-z0-9._~-]+", after), f"the cursor {after!r} cannot be put into a URL as it is"
        gone = leaving & {min(leaving, default=""), max(leaving, default=""), *listed[-1:]}  # behind, ahead, and where it points
        leaving -= gone
        if state is State.LEASED:
            await lab.settle(broker, *(Ack(deliveries[id]) for id in gone))
        else:
            lab.nothing_refused(await broker.remove("long", state, sorted(gone)))
            if state is State.READY:  # ahead of all others, too
                await lab.enqueue(broker, lab.message(f"urgent{number}", "long", Priority.CRITICAL))
        if number < 10:
            await _put(broker, lab, state, [f"new{number}"])
    assert after is None, "a listing of 20 messages did not end after 100 pages"
    assert sorted(id for id in listed if id in names[::4]) == names[::4]
    assert max(Counter(listed).values()) == 1


@scenario(state=[State.SCHEDULED, State.LEASED, State.DEAD], needs=_lists)
async def equal_times_are_no_trouble(broker: Broker, lab: Lab, state: State) -> None:
    """Of messages that are due, die or lose their leases at the same time, none is skipped or repeated where a page ends."""
    await lab.ids(broker, state)
    now = lab.clock.time_ms()
    messages = lab.messages(10, queue="long", eta_ms=now + _LONG if state is State.SCHEDULED else 0)
    if state is State.DEAD:
        await lab.bury(broker, *messages, died_ms=now)
    else:
        await lab.enqueue(broker, *messages)
    if state is State.LEASED:
        await lab.take_exactly(broker, 10, "long")
    listed = await lab.ids(broker, state, "long")
    assert sorted(listed) == sorted(message.id for message in messages)
    for limit in (1, 3, 4):
        assert [entry.message.id for entry in await lab.entries(broker, state, "long", limit)] == listed


@scenario(state=State, needs=_lists)
async def what_is_no_cursor_is_refused(broker: Broker, lab: Lab, state: State) -> None:
    """`after` that is no cursor is refused with `ConfigurationError`, also where there is nothing to list."""
    await lab.ids(broker, state)
    await _put(broker, lab, state, ["m"])
    for text in ("", "nonsense", "1", "größer ☂", "0" * 1000):
        for queue in ("long", "never-used"):
            await lab.raises(ConfigurationError, broker.peek(queue, state, after=Cursor(text)))


@scenario(state=State, other=["state", "queue"], needs=_lists)
async def cursors_of_other_listings_are_refused(broker: Broker, lab: Lab, state: State, other: str) -> None:
    """The cursor of another state or queue is refused with `ConfigurationError`, and so makes no listing skip anything."""
    await lab.ids(broker, state)
    await lab.fill(broker, 3)
    if other == "queue":
        await lab.fill(broker, 3, "elsewhere", [state])
        cursors = [(await broker.peek("elsewhere", state, limit=1)).next]
    else:
        states = lab.capabilities.listable - {state}
        cursors = [(await broker.peek("long", each, limit=1)).next for each in states]
    for cursor in cursors:
        assert cursor is not None, "a page of one of three messages is not the last"
        await lab.raises(ConfigurationError, broker.peek("long", state, after=cursor))
