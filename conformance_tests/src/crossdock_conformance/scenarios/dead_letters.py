"""Dead letters: kept whole, listed in order of dying, brought back to life, kept for as long as was asked."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from crossdock.errors import EnqueueFailed, MessageTooLarge, NotFound, QueueHeld
from crossdock.spi import (
    MAX_STORY_BYTES,
    Ack,
    Broker,
    Cursor,
    DeadLetter,
    Page,
    Priority,
    QueueSpec,
    Reason,
    Replay,
    State,
)
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import BY_ID, DEDUPLICATION, DELAY, listing, purging, removing, scenario

# --- kept ---


@scenario(needs=[listing(State.DEAD)])
async def letters_come_back_whole(broker: Broker, lab: Lab) -> None:
    """A letter comes back with every field as it was written: its message, any text, a story of 16 KiB."""
    await lab.enqueue(broker, lab.message("m", priority=Priority.HIGH, body=bytes(range(256)), generation=7))
    delivery = await lab.take_one(broker)
    dead = lab.dead(
        delivery,
        died_ms=lab.clock.time_ms() - 1,
        task="☂" * 85,
        error_type="a.B.<locals>.Ünfug\u200b",
        fingerprint="f" * 64,
        story=bytes(range(256)) * (MAX_STORY_BYTES // 256),
    )
    await lab.settle(broker, dead)
    (entry,) = await lab.entries(broker, State.DEAD)
    assert entry.letter == dead.letter
    assert (entry.message, entry.state) == (delivery.message, State.DEAD)
    assert entry.delivery_count in (1, None)


@scenario(needs=[listing(State.DEAD)])
async def letters_may_be_bare(broker: Broker, lab: Lab) -> None:
    """A letter may say nothing but when and why, for each of the reasons there are."""
    letters: list[DeadLetter] = []
    for reason in Reason:
        await lab.enqueue(broker, lab.message())
        delivery = await lab.take_one(broker)
        died_ms = lab.clock.time_ms() + len(letters)
        bare = {"reason": reason, "died_ms": died_ms, "task": "", "error_type": "", "fingerprint": "", "story": b""}
        dead = lab.dead(delivery, **bare)
        await lab.settle(broker, dead)
        letters.append(dead.letter)
    assert [entry.letter for entry in await lab.entries(broker, State.DEAD)] == letters


@scenario()
async def the_dead_are_not_delivered(broker: Broker, lab: Lab) -> None:
    """A dead letter is never delivered again, also when the lease that it was held under is over."""
    await lab.bury(broker, lab.message("m"))
    assert not await lab.take(broker)
    await lab.lease_over()
    assert not await lab.take(broker)
    await lab.holds(broker, {State.DEAD: ["m"]})


@scenario(needs=[listing(State.DEAD)])
async def listed_in_order_of_dying(broker: Broker, lab: Lab) -> None:
    """Dead letters are listed in the order in which they died, whatever the order in which they were enqueued."""
    now = lab.clock.time_ms()
    await lab.enqueue(broker, *(lab.message(id, "long") for id in "abcdef"))
    deliveries = {delivery.message.id: delivery for delivery in await lab.take_exactly(broker, 6, "long")}
    for index, id in enumerate("dbfaec"):
        await lab.settle(broker, lab.dead(deliveries[id], died_ms=now + index))
    assert await lab.ids(broker, State.DEAD, "long") == list("dbfaec")


@scenario(needs=[listing(State.DEAD)])
async def listed_by_time_of_death_then_id(broker: Broker, lab: Lab) -> None:
    """The order is that of `died_ms`, and of ids among equals, also where a letter arrives later than a younger one."""
    now = lab.clock.time_ms()
    for id, died_ms in (("c", now), ("late", now + 5), ("a", now), ("early", now - 5), ("b", now)):
        await lab.bury(broker, lab.message(id), died_ms=died_ms)
    assert await lab.ids(broker, State.DEAD) == ["early", "a", "b", "c", "late"]


@scenario(needs=[listing(State.DEAD)])
async def hundred_listings_change_nothing(broker: Broker, lab: Lab) -> None:
    """After 100 listings every letter is there, in its place, as it was."""
    filled = await lab.fill(broker, 20, "q", [State.DEAD])
    before = await lab.entries(broker, State.DEAD)
    assert [entry.message.id for entry in before] == filled[State.DEAD]
    for _ in range(100):
        assert await lab.entries(broker, State.DEAD, limit=7) == before
    await lab.holds(broker, filled)
    await lab.replay(broker, *(lab.revived(entry.message) for entry in before))
    taken = await lab.take_exactly(broker, 20)
    assert {(delivery.message.id, delivery.delivery_count) for delivery in taken} == {(id, 1) for id in filled[State.DEAD]}


@scenario(needs=[listing(State.DEAD), removing(State.DEAD)])
async def paging_while_entries_come_and_go(broker: Broker, lab: Lab) -> None:
    """While others die, are replayed and are removed between two pages, every letter that stays is listed exactly once, in order."""
    names = [f"{number:02}" for number in range(24)]
    await lab.bury(broker, *map(lab.message, names), died_ms=lab.clock.time_ms())
    leaving = {name for number, name in enumerate(names) if number % 3}
    listed: list[str] = []
    after: Cursor | None = None
    for page_number in range(100):
        page = await broker.peek("q", State.DEAD, after=after, limit=3)
        listed += [entry.message.id for entry in page.entries]
        after = page.next
        if after is None:
            break
        if leaving:
            # Behind the cursor, ahead of it, and where it points.
            gone = leaving & {min(leaving), max(leaving), *listed[-1:]}
            leaving -= gone
            replayed, *removed = sorted(gone)
            await lab.replay(broker, lab.revived(lab.message(replayed), queue="elsewhere"))
            lab.nothing_refused(await broker.remove("q", State.DEAD, removed))
            await lab.bury(broker, lab.message(f"new{page_number:02}"), died_ms=lab.clock.time_ms() + 1 + page_number)
    assert after is None, "a listing of 24 letters did not end after 100 pages"
    assert [id for id in listed if id in names[::3]] == names[::3]
    assert max(Counter(listed).values()) == 1


@scenario(needs=[listing(State.DEAD), BY_ID])
async def found_by_id(broker: Broker, lab: Lab) -> None:
    """Letters are found by their ids, whole, however many there are; ids of what is not dead find nothing."""
    await lab.fill(broker, 10, "q", [State.DEAD, State.READY])
    everything = {entry.message.id: entry for entry in await lab.entries(broker, State.DEAD)}
    asked = ["dead7", "dead0", "nobody", "ready0", "dead3"]
    page = await broker.peek("q", State.DEAD, ids=asked, limit=1)
    assert {entry.message.id: entry for entry in page.entries} == {id: everything[id] for id in ("dead0", "dead3", "dead7")}
    assert page.next is None


@scenario(needs=[listing(State.DEAD)])
async def two_may_list_at_once(broker: Broker, lab: Lab) -> None:
    """Of two who list the same letters at the same time each sees all of them, or is told `QueueHeld`; one of them does see them."""
    filled = await lab.fill(broker, 7, "q", [State.DEAD])
    other = await lab.open()
    await lab.ids(broker, State.DEAD)
    for _ in range(5):
        answers: Sequence[Page | BaseException] = await asyncio.gather(
            *(each.peek("q", State.DEAD) for each in (broker, other)), return_exceptions=True
        )
        pages = [answer for answer in answers if not isinstance(answer, QueueHeld)]
        assert pages, "two callers kept each other out"
        for page in pages:
            assert isinstance(page, Page), f"a listing raised {page!r}"
            assert [entry.message.id for entry in page.entries] == filled[State.DEAD]
    await lab.holds(broker, filled)


# --- brought back to life ---


@scenario(count={"one": 1, "some": 3, "all": 7})
async def replayed(broker: Broker, lab: Lab, count: int) -> None:
    """What is replayed is READY with a count of 1, its letter is gone, and the other letters stay."""
    filled = await lab.fill(broker, 7, "q", [State.DEAD])
    chosen = filled[State.DEAD][7 - count :]
    await lab.replay(broker, *(lab.revived(lab.message(id)) for id in chosen))
    await lab.holds(broker, {State.READY: chosen, State.DEAD: filled[State.DEAD][: 7 - count]}, in_order=False)
    for delivery in await lab.take_exactly(broker, count):
        chosen.remove(delivery.message.id)
        assert (delivery.message.generation, delivery.delivery_count) == (1, 1)
    assert not chosen


@scenario(
    changes={
        "body": {"body": b"fixed"},
        "empty body": {"body": b""},
        "priority": {"priority": Priority.CRITICAL},
        "queue": {"queue": "another"},
        "everything": {"body": b"x" * 100_000, "priority": Priority.LOW, "queue": "another", "generation": 40},
    }
)
async def replayed_as_given(broker: Broker, lab: Lab, changes: dict[str, Any]) -> None:
    """A replay stores the message that it is given, which may differ in body, level and queue from the dead one."""
    message = lab.message("m", priority=Priority.HIGH, generation=3)
    await lab.bury(broker, message)
    order = lab.revived(message, **changes)
    await lab.replay(broker, order)
    delivery = await lab.take_one(broker, order.message.queue)
    assert (delivery.message, delivery.delivery_count) == (order.message, 1)
    await lab.settle(broker, Ack(delivery))
    await lab.holds(broker, {})
    await lab.holds(broker, {}, order.message.queue)


@scenario(due={"delay": "delay_ms", "eta": "eta_ms"}, needs=[DELAY])
async def replayed_for_later(broker: Broker, lab: Lab, due: str) -> None:
    """A replay may be due later; until then it is SCHEDULED."""
    soon, late = lab.message("soon"), lab.message("late")
    await lab.bury(broker, soon, late)
    before = lab.clock.monotonic()
    start_ms = 0 if due == "delay_ms" else lab.clock.time_ms()
    soon_ms = start_ms + round(lab.moment * 1000)
    await lab.replay(broker, lab.revived(late, **{due: start_ms + 60_000}), lab.revived(soon, **{due: soon_ms}))
    after = lab.clock.monotonic()
    delivery = await lab.comes(broker, before + lab.moment - lab.early, after + lab.moment + lab.lateness)
    assert (delivery.message.id, delivery.message.generation) == ("soon", 1)
    await lab.settle(broker, Ack(delivery))
    await lab.holds(broker, {State.SCHEDULED: ["late"]})


@scenario()
async def a_former_life_is_not_counted(broker: Broker, lab: Lab) -> None:
    """The count of a replayed message starts at 1, though its former life had lost a lease."""
    message = lab.message("m")
    await lab.enqueue(broker, message)
    await lab.take_one(broker)
    await lab.lease_over()
    delivery = await lab.take_one(broker)
    assert delivery.delivery_count == 2
    await lab.settle(broker, lab.dead(delivery))
    await lab.replay(broker, lab.revived(message))
    assert (await lab.take_one(broker)).delivery_count == 1


@scenario()
async def a_full_queue_takes_replays(broker: Broker, lab: Lab) -> None:
    """`max_ready` does not hold back a replay, neither in its own queue nor in another one."""
    messages = lab.messages(2)
    await lab.bury(broker, *messages)
    await lab.declare(broker, *(QueueSpec(name, lease=lab.lease, max_ready=0) for name in ("q", "full")))
    await lab.replay(broker, lab.revived(messages[0]), lab.revived(messages[1], queue="full"))
    assert (await lab.take_one(broker)).message.id == messages[0].id
    assert (await lab.take_one(broker, "full")).message.id == messages[1].id


@scenario()
async def replay_wakes_a_waiting_receive(broker: Broker, lab: Lab) -> None:
    """A waiting receive gets what somebody else replays."""
    message = lab.message("m")
    await lab.bury(broker, message)
    other = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.replay(other, lab.revived(message))
    assert [delivery.message.generation for delivery in receive.result()] == [1]


@scenario()
async def replay_of_what_is_not_there(broker: Broker, lab: Lab) -> None:
    """An id that is not among the dead letters is refused with `NotFound`, stores nothing, and holds up no other."""
    dead, leased, ready = lab.message("dead"), lab.message("leased", "long"), lab.message("ready")
    await lab.bury(broker, dead)
    await lab.bury(broker, lab.message("elsewhere", "long"))
    await lab.enqueue(broker, leased)
    delivery = await lab.take_one(broker, "long")
    await lab.enqueue(broker, ready)
    orders = [lab.revived(message) for message in (lab.message("nobody"), ready, dead, lab.message("elsewhere"))]
    assert lab.errors(await broker.replay("q", orders)) == {0: NotFound, 1: NotFound, 3: NotFound}
    assert lab.errors(await broker.replay("long", [lab.revived(leased)])) == {0: NotFound}
    assert lab.errors(await broker.replay("never-used", orders[:1])) == {0: NotFound}
    await lab.holds(broker, {State.READY: ["dead", "ready"]}, in_order=False)
    await lab.holds(broker, {State.LEASED: ["leased"], State.DEAD: ["elsewhere"]}, "long")
    await lab.settle(broker, Ack(delivery))


@scenario()
async def replay_again_finds_no_letter(broker: Broker, lab: Lab) -> None:
    """A replay that is repeated is told `NotFound` for what was replayed, stores it once, and does the rest."""
    message, other = lab.message("m"), lab.message("other")
    await lab.bury(broker, message, other)
    await lab.replay(broker, lab.revived(message))
    assert lab.errors(await broker.replay("q", [lab.revived(message), lab.revived(other)])) == {0: NotFound}
    await lab.holds(broker, {State.READY: ["m", "other"]})


@scenario(held={"same generation": 1, "later generation": 2}, needs=[DEDUPLICATION])
async def replay_to_where_it_is_already(broker: Broker, lab: Lab, held: int) -> None:
    """Where the target holds the id at the same or a later generation, a replay removes the letter and changes nothing else."""
    message = lab.message("m")
    await lab.bury(broker, message)
    await lab.enqueue(broker, lab.message("m", "target", generation=held, body=b"there"))
    await lab.replay(broker, lab.revived(message, queue="target"))
    await lab.holds(broker, {})
    found = [(delivery.message.body, delivery.message.generation) for delivery in await lab.take(broker, queue="target")]
    assert found == [(b"there", held)]


@scenario()
async def a_replay_too_large_keeps_the_letter(broker: Broker, lab: Lab) -> None:
    """A replay whose body is longer than `max_body` is refused with `MessageTooLarge`; the letter stays, and others are replayed."""
    message, other = lab.message("m"), lab.message("other")
    await lab.bury(broker, message, other)
    orders = [lab.revived(message, body=bytes(broker.capabilities.max_body + 1)), lab.revived(other)]
    assert lab.errors(await broker.replay("q", orders)) == {0: MessageTooLarge}
    await lab.holds(broker, {State.READY: ["other"], State.DEAD: ["m"]})


@scenario(needs=[DEDUPLICATION])
async def a_replay_out_of_date_keeps_the_letter(broker: Broker, lab: Lab) -> None:
    """Where the target holds the id at an earlier generation, a replay is refused with `EnqueueFailed` and the letter stays."""
    message = lab.message("m", generation=4)
    await lab.bury(broker, message)
    await lab.enqueue(broker, lab.message("m", "target"))
    assert lab.errors(await broker.replay("q", [lab.revived(message, queue="target")])) == {0: EnqueueFailed}
    await lab.holds(broker, {State.DEAD: ["m"]})
    assert [delivery.message.generation for delivery in await lab.take(broker, queue="target")] == [0]


@scenario(turns=range(8))
async def cut_replays_are_completed_by_a_repeat(broker: Broker, lab: Lab, turns: int) -> None:
    """Cancelled at any moment, a replay has done each of its items or not; repeated, nothing is lost, and nothing doubled where
    (id, generation) is stored once."""
    messages = lab.messages(20)
    await lab.bury(broker, *messages)
    await lab.declare(broker, QueueSpec("target", lease=lab.lease))
    orders = [lab.revived(message, queue=("q", "target")[index % 2]) for index, message in enumerate(messages)]
    cut = asyncio.ensure_future(broker.replay("q", orders))
    await lab.turns(turns)
    cut.cancel()
    await asyncio.wait([cut])
    await _complete(broker, lab, orders)


@scenario()
async def replays_cut_half_way_are_completed_by_a_repeat(broker: Broker, lab: Lab) -> None:
    """A replay that is cut off when the first of its messages has arrived is completed by a repeat: nothing is lost, nothing doubled."""
    messages = lab.messages(100)
    await lab.bury(broker, *messages)
    await lab.declare(broker, QueueSpec("target", lease=lab.lease))
    other = await lab.open()
    orders = [lab.revived(message, queue="target") for message in messages]

    async def arriving() -> bool:
        return (await lab.stats(other, "target")).ready > 0

    cut = asyncio.ensure_future(broker.replay("q", orders))
    try:
        await lab.until(arriving, "a replayed message arrived")
    finally:
        cut.cancel()
        await asyncio.wait([cut])
    await _complete(broker, lab, orders)


@scenario()
async def nowhere_at_no_moment(broker: Broker, lab: Lab) -> None:
    """While messages are replayed, whoever looks finds each of them, as a dead letter or where it went."""
    messages = lab.messages(100)
    await lab.bury(broker, *messages)
    await lab.declare(broker, QueueSpec("target", lease=lab.lease))
    other = await lab.open()
    if (await lab.stats(other)).dead is None:
        raise NotRun("it does not count dead letters")
    async with lab.beside(lab.replay(broker, *(lab.revived(message, queue="target") for message in messages))) as replay:
        while True:
            done = replay.done()
            dead = (await lab.stats(other)).dead  # first, so that what moves meanwhile is seen twice and not never
            found = (dead or 0) + (await lab.stats(other, "target")).ready
            assert dead is None or found >= 100, f"of 100 messages {100 - found} were nowhere"
            if done:
                break


async def _complete(broker: Broker, lab: Lab, orders: Sequence[Replay]) -> None:
    """Repeat a replay that was cut, and find each of its messages where it was to go."""
    for refusal in await broker.replay("q", orders):
        assert isinstance(refusal.error, NotFound), f"a repeated replay was refused with {refusal.error!r}"
    for target in sorted({order.message.queue for order in orders}):
        expected = [order.id for order in orders if order.message.queue == target]
        if DEDUPLICATION.declared(lab.capabilities):
            await lab.holds(broker, {State.READY: expected}, target, in_order=False)
        found: set[tuple[str, int]] = set()
        while batch := await lab.take(broker, queue=target):
            found.update((delivery.message.id, delivery.message.generation) for delivery in batch)
            await lab.settle(broker, *map(Ack, batch))
        assert found == {(id, 1) for id in expected}
        await lab.holds(broker, {}, target)


@scenario(needs=[listing(State.DEAD)])
async def a_message_may_die_often(broker: Broker, lab: Lab) -> None:
    """A message may die and be replayed many times, and there is always one of it, a generation older."""
    await lab.enqueue(broker, lab.message("m"))
    for generation in range(5):
        await lab.settle(broker, lab.dead(await lab.take_one(broker)))
        (entry,) = await lab.entries(broker, State.DEAD)
        assert entry.message.generation == generation
        await lab.replay(broker, lab.revived(entry.message))
    await lab.holds(broker, {State.READY: ["m"]})


# --- retention ---


@scenario(kept=[0, 1, 3])
async def retention_by_count(broker: Broker, lab: Lab, kept: int) -> None:
    """Beyond `dead_max_count` the letters that died first are dropped, and counted."""
    await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_count=kept))
    now = lab.clock.time_ms()
    for index, id in enumerate("abcde"):
        await lab.bury(broker, lab.message(id), died_ms=now + index)
    await lab.holds(broker, {State.DEAD: list("abcde")[5 - kept :]})
    assert (await lab.stats(broker)).dead_dropped in (5 - kept, None)


@scenario()
async def retention_by_age(broker: Broker, lab: Lab) -> None:
    """A letter older than `dead_max_age` is gone at the next look, and counted; a younger one stays."""
    age = lab.moment
    await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_age=age))
    await lab.bury(broker, lab.message("a"))
    await lab.pass_time(age * 0.6)
    died = lab.clock.monotonic()
    await lab.bury(broker, lab.message("b"))
    await lab.pass_time(age * 0.4 + lab.early)
    stats = await lab.stats(broker)
    too_slow = lab.clock.monotonic() - died > age - lab.early
    assert stats.dead in (1, None) or too_slow
    assert stats.dead_dropped in (1, None) or too_slow
    await lab.pass_time(age)
    await lab.holds(broker, {})
    assert (await lab.stats(broker)).dead_dropped in (2, None)


@scenario(needs=[DEDUPLICATION])
async def retention_frees_the_id(broker: Broker, lab: Lab) -> None:
    """Retention is applied when the next message dies, though nobody looks: the id of what it drops is free then."""
    await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_count=1))
    now = lab.clock.time_ms()
    await lab.bury(broker, lab.message("a"), died_ms=now)
    assert lab.errors(await broker.enqueue([lab.message("a", generation=1)])) == {0: EnqueueFailed}
    await lab.bury(broker, lab.message("b"), died_ms=now + 1)
    await lab.enqueue(broker, lab.message("a", generation=1))
    assert (await lab.take_one(broker)).message.generation == 1


@scenario()
async def without_retention_letters_stay(broker: Broker, lab: Lab) -> None:
    """Nothing is dropped that was not asked for, however old; retention that is declared later holds for the letters there are."""
    now = lab.clock.time_ms()
    for index, id in enumerate("abcde"):
        await lab.bury(broker, lab.message(id), died_ms=now + index)
    if lab.virtual:
        await lab.pass_time(10 * 365 * 24 * 3600)
    await lab.holds(broker, {State.DEAD: list("abcde")})
    await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_count=3))
    await lab.holds(broker, {State.DEAD: list("cde")})
    assert (await lab.stats(broker)).dead_dropped in (2, None)
    await lab.declare(broker, QueueSpec("q", lease=lab.lease))
    await lab.bury(broker, lab.message("f"), died_ms=now + 10)
    await lab.holds(broker, {State.DEAD: list("cdef")})


@scenario()
async def retention_is_of_one_queue(broker: Broker, lab: Lab) -> None:
    """The retention of one queue drops no letter of another."""
    await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_count=1))
    now = lab.clock.time_ms()
    for index, id in enumerate("abc"):
        await lab.bury(broker, lab.message(id, "q2"), died_ms=now + index)
        await lab.bury(broker, lab.message(id), died_ms=now + index)
    await lab.holds(broker, {State.DEAD: ["c"]})
    await lab.holds(broker, {State.DEAD: ["a", "b", "c"]}, "q2")
    assert (await lab.stats(broker, "q2")).dead_dropped in (0, None)


@scenario(needs=[removing(State.DEAD), purging(State.DEAD)])
async def only_retention_is_counted(broker: Broker, lab: Lab) -> None:
    """Letters that are removed, replayed or purged are not counted as dropped."""
    await lab.bury(broker, *(lab.message(id) for id in "abcd"))
    lab.nothing_refused(await broker.remove("q", State.DEAD, ["a"]))
    assert await broker.purge("never-used", State.DEAD) == 0
    await lab.replay(broker, lab.revived(lab.message("b")))
    assert await broker.purge("q", State.DEAD) == 2
    await lab.holds(broker, {State.READY: ["b"]})
    assert (await lab.stats(broker)).dead_dropped in (0, None)
