"""Deduplication: an (id, generation) is stored once, and remembered for as long as is declared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from crossdock.errors import EnqueueFailed
from crossdock.spi import Ack, Broker, Message, Nack, QueueSpec, State, Support
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DEDUPLICATION, DELAY, Need, purging, removing, scenario

_LONGEST_WAIT = 5.0
"""Real seconds of the longest window whose end is waited for."""


def _needs(state: State, **_: object) -> Sequence[Need]:
    return (DELAY, DEDUPLICATION) if state is State.SCHEDULED else (DEDUPLICATION,)


def _needs_to_end(end: str, when: str) -> Sequence[Need]:
    others = {"removed": [removing(State.READY)], "purged": [purging(State.READY)]}
    return (*others.get(end, ()), DEDUPLICATION)


async def _put(broker: Broker, lab: Lab, state: State, generation: int) -> None:
    """Bring the message "m" into a state of a queue with long leases."""
    message = lab.message("m", "long", generation=generation, delay_ms=60_000 if state is State.SCHEDULED else 0)
    if state is State.DEAD:
        await lab.bury(broker, message)
        return
    await lab.enqueue(broker, message)
    if state is State.LEASED:
        await lab.take_one(broker, "long")


# --- while it is stored ---


@scenario(state=State, producer=["same broker", "another broker"], needs=_needs)
async def stored_again_counts_as_done(broker: Broker, lab: Lab, state: State, producer: str) -> None:
    """While a queue holds an id, in whatever state, the same and any earlier generation of it count as done and change nothing."""
    await _put(broker, lab, state, generation=5)
    looks = state in lab.capabilities.listable
    before = await lab.entries(broker, state, "long") if looks else []
    again = broker if producer == "same broker" else await lab.open()
    for generation in (5, 4, 0):
        await lab.enqueue(again, lab.message("m", "long", body=b"other", generation=generation))
    await lab.holds(broker, {state: ["m"]}, "long")
    assert not looks or await lab.entries(broker, state, "long") == before


@scenario(state=State, needs=_needs)
async def a_later_generation_is_refused(broker: Broker, lab: Lab, state: State) -> None:
    """While a queue holds an id, in whatever state, a later generation of it is refused with `EnqueueFailed`, and holds up no other."""
    await _put(broker, lab, state, generation=5)
    batch = [lab.message("m", "long", generation=6), lab.message("free", "long")]
    assert lab.errors(await broker.enqueue(batch)) == {0: EnqueueFailed}
    expected = {State.READY: ["m", "free"]} if state is State.READY else {state: ["m"], State.READY: ["free"]}
    await lab.holds(broker, expected, "long")
    assert {delivery.message.generation for delivery in await lab.take(broker, queue="long")} <= {0, 5}


@scenario(needs=[DEDUPLICATION])
async def twice_in_one_batch(broker: Broker, lab: Lab) -> None:
    """Of two messages with one id in a batch the first is stored, and the second counts as done."""
    await lab.enqueue(broker, lab.message("m", body=b"1"), lab.message("other"), lab.message("m", body=b"2"))
    assert [delivery.message.body for delivery in await lab.take(broker)] == [b"1", b"body of other"]


@scenario(needs=[DEDUPLICATION])
async def enqueued_by_many_at_once(broker: Broker, lab: Lab) -> None:
    """Enqueued by several Brokers at the same time, each of a hundred ids is stored once."""
    messages = lab.messages(100)
    brokers = [broker, *[await lab.open() for _ in range(3)]]
    await asyncio.gather(*(lab.enqueue(each, *messages) for each in brokers))
    await lab.holds(broker, {State.READY: [message.id for message in messages]}, in_order=False)


@scenario(how=["given back", "retried", "lease lost", "replayed"], needs=[DEDUPLICATION])
async def the_id_stays_taken(broker: Broker, lab: Lab, how: str) -> None:
    """However a message became READY again, all its generations so far count as stored."""
    original = lab.message("m")
    await lab.enqueue(broker, original)
    delivery = await lab.take_one(broker)
    match how:
        case "given back":
            await lab.settle(broker, Nack(delivery))
        case "retried":
            await lab.settle(broker, lab.retry(delivery))
        case "lease lost":
            await lab.lease_over()
        case _:
            await lab.settle(broker, lab.dead(delivery))
            await lab.replay(broker, lab.revived(original))
    latest = int(how in ("retried", "replayed"))
    await lab.enqueue(broker, *(lab.message("m", body=b"other", generation=generation) for generation in range(latest + 1)))
    taken = await lab.take(broker)
    assert [delivery.message.generation for delivery in taken] == [latest]
    assert taken[0].message.body != b"other"
    await lab.settle(broker, *map(Ack, taken))
    await lab.holds(broker, {})


@scenario(needs=[DEDUPLICATION])
async def remembered_as_long_as_it_is_stored(broker: Broker, lab: Lab) -> None:
    """An id stays taken as long as its message is stored, and be it a year."""
    await lab.enqueue(broker, lab.message("m"))
    await lab.pass_time(365 * 24 * 3600 if lab.virtual else lab.moment)
    await lab.enqueue(broker, lab.message("m"))
    await lab.holds(broker, {State.READY: ["m"]})


# --- what differs is another message ---


@scenario()
async def ids_are_of_one_queue(broker: Broker, lab: Lab) -> None:
    """The same id in another queue is another message."""
    await lab.enqueue(broker, lab.message("m"))
    await lab.enqueue(broker, lab.message("m", "q2"))
    await lab.enqueue(broker, lab.message("n", "q2"), lab.message("n"))
    await lab.settle(broker, *map(Ack, await lab.take_exactly(broker, 2)))
    await lab.holds(broker, {State.READY: ["m", "n"]}, "q2")
    assert {delivery.message.queue for delivery in await lab.take_exactly(broker, 2, "q2")} == {"q2"}


@scenario()
async def ids_are_told_apart_to_the_letter(broker: Broker, lab: Lab) -> None:
    """Ids that differ in case, in punctuation, or at the 64th character only, are different."""
    ids = ["a-b", "a_b", "A-b", "A_B", "-", "_", "0", "00", "1", "-1", "x" * 64, "x" * 63, "x" * 63 + "y", "null", "nan"]
    await lab.enqueue(broker, *map(lab.message, ids))
    taken = await lab.take_exactly(broker, len(ids))
    assert [(delivery.message.id, delivery.message.body) for delivery in taken] == [(id, f"body of {id}".encode()) for id in ids]
    await lab.settle(broker, *map(Ack, taken))
    await lab.holds(broker, {})


# --- when it is gone ---


@scenario()
async def the_window_is_declared(broker: Broker, lab: Lab) -> None:
    """`deduplication_window` is None where deduplication is declared unsupported, and else a number of seconds."""
    window = broker.capabilities.deduplication_window
    if broker.capabilities.deduplication.support is Support.UNSUPPORTED:
        assert window is None
    else:
        assert window is not None
        assert window >= 0.0


@scenario(
    end=["acked", "removed", "purged", "dropped"],
    when=["at once", "just inside the window"],
    needs=_needs_to_end,
)
async def remembered_for_the_window(broker: Broker, lab: Lab, end: str, when: str) -> None:
    """When a message is gone its id is free at once where the window is 0; else the same (id, generation) counts as done, and is not
    delivered, until the window is over."""
    window = lab.capabilities.deduplication_window
    assert window is not None, "an id is not remembered"
    wait = window * 0.9 if when == "just inside the window" else 0.0
    if wait > _LONGEST_WAIT and not lab.virtual:
        raise NotRun(f"its window of {window:.0f} s is too long to be waited for")
    message = lab.message("m", generation=2)
    gone = lab.clock.monotonic()
    await lab.enqueue(broker, message)
    match end:
        case "acked":
            await lab.settle(broker, Ack(await lab.take_one(broker)))
        case "removed":
            lab.nothing_refused(await broker.remove("q", State.READY, ["m"]))
        case "purged":
            assert await broker.purge("q", State.READY) == 1
        case _:
            await lab.declare(broker, QueueSpec("q", lease=lab.lease, dead_max_count=0))
            await lab.settle(broker, lab.dead(await lab.take_one(broker)))
    await lab.holds(broker, {})
    await lab.pass_time(wait)
    await lab.enqueue(broker, Message("m", "q", message.priority, b"again", generation=2))
    if window and lab.clock.monotonic() - gone > window:
        raise NotRun(f"the machine was too slow for a window of {window} s")
    found = [(delivery.message.body, delivery.delivery_count) for delivery in await lab.take(broker)]
    assert found == ([] if window else [(b"again", 1)])


@scenario()
async def another_generation_is_free_when_it_is_gone(broker: Broker, lab: Lab) -> None:
    """Once a message is gone, whatever the window, a later generation of its id is another message."""
    for generation in range(3):
        await lab.enqueue(broker, lab.message("m", generation=generation))
        delivery = await lab.take_one(broker)
        assert (delivery.message.generation, delivery.delivery_count) == (generation, 1)
        await lab.settle(broker, Ack(delivery))
    await lab.holds(broker, {})
