"""(id, generation) is stored once; `max_ready` is exact."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crossdock.errors import EnqueueFailed, QueueFull
from crossdock.spi import Ack, Broker, Nack, QueueSpec, State

pytestmark = pytest.mark.asyncio


async def put_in(state: State, broker: Broker, lab: Any, generation: int) -> None:
    """Bring the message "m" into a state."""
    await broker.enqueue([lab.message("m", generation=generation, delay_ms=60_000 if state is State.SCHEDULED else 0)])
    if state is State.LEASED:
        await lab.take_one(broker)
    if state is State.DEAD:
        await broker.settle([lab.dead(await lab.take_one(broker))])


@pytest.mark.parametrize("state", State)
async def test_stored_again_counts_as_done(broker: Broker, lab: Any, state: State) -> None:
    """In any state, the same or an earlier generation of a stored id changes nothing; a later one is refused."""
    await put_in(state, broker, lab, generation=5)
    (before,) = await lab.entries(broker, state)
    again = [lab.message("m", generation=generation, body=b"other") for generation in (5, 0)]
    assert not await broker.enqueue(again)
    assert lab.errors(await broker.enqueue([lab.message("m", generation=6), lab.message("free")])) == {0: EnqueueFailed}
    assert (await lab.where(broker))[state][0] == "m"
    assert next(entry for entry in await lab.entries(broker, state) if entry.message.id == "m") == before


async def test_twice_in_one_batch(broker: Broker, lab: Any) -> None:
    """Of two messages with one id in a batch the first is stored."""
    assert not await broker.enqueue([lab.message("m", body=b"1"), lab.message("m", body=b"2")])
    assert (await lab.take_one(broker)).message.body == b"1"


async def test_at_once_from_many(broker: Broker, lab: Any) -> None:
    """Stored by several Brokers at the same time, an id is stored once."""
    brokers = [broker, *[await lab.open() for _ in range(3)]]
    results = await asyncio.gather(*(each.enqueue([lab.message("m")]) for each in brokers))
    assert not any(results)
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_ids_are_unique_per_queue_only(broker: Broker, lab: Any) -> None:
    """The same id in another queue is another message."""
    await broker.enqueue([lab.message("m", "q"), lab.message("m", "q2")])
    await broker.settle([Ack(await lab.take_one(broker))])
    assert (await lab.take_one(broker, "q2")).message.id == "m"


async def test_ids_differ_by_case(broker: Broker, lab: Any) -> None:
    """Ids and queue names that differ in case or punctuation only are different."""
    await broker.enqueue([lab.message(id) for id in ("a-b", "a_b", "A-b", "A_B")])
    await broker.enqueue([lab.message("x", "Q"), lab.message("x", "q-1"), lab.message("x", "q_1")])
    assert len(await lab.take(broker)) == 4
    assert [len(await lab.take(broker, queue=queue)) for queue in ("Q", "q-1", "q_1")] == [1, 1, 1]


async def test_retry_keeps_the_id_taken(broker: Broker, lab: Any) -> None:
    """After a retry the earlier generation counts as stored, so a repeated enqueue does not double the task."""
    original = lab.message("m")
    await broker.enqueue([original])
    await broker.settle([lab.retry(await lab.take_one(broker))])
    assert not await broker.enqueue([original])
    assert (await lab.take_one(broker)).message.generation == 1
    assert await lab.where(broker) == {State.LEASED: ["m"]}


# --- max_ready ---


async def test_full_queue_refuses(broker: Broker, lab: Any) -> None:
    """Beyond `max_ready` READY messages, of whatever level, an enqueue is refused: exactly, also within a batch."""
    await broker.declare([QueueSpec("q", max_ready=3)])
    assert lab.errors(await broker.enqueue([lab.message() for _ in range(5)])) == {3: QueueFull, 4: QueueFull}
    assert (await lab.stats(broker)).ready == 3
    await lab.take(broker, limit=2)
    assert lab.errors(await broker.enqueue([lab.message() for _ in range(3)])) == {2: QueueFull}


async def test_full_queue_refuses_concurrent_enqueues_exactly(broker: Broker, lab: Any) -> None:
    """Many Brokers that enqueue at once do not overfill the queue."""
    await broker.declare([QueueSpec("q", max_ready=10)])
    brokers = [broker, *[await lab.open() for _ in range(3)]]
    for each in brokers[1:]:
        await each.declare([QueueSpec("q", max_ready=10)])
    results = await asyncio.gather(*(each.enqueue([lab.message()]) for each in brokers for _ in range(5)))
    assert sum(not refusals for refusals in results) == (await lab.stats(broker)).ready == 10


async def test_full_queue_still_takes(broker: Broker, lab: Any) -> None:
    """Full, a queue accepts what is stored already, what is due later, what comes back, and replays."""
    await lab.bury(broker, lab.message("dead"))
    await broker.declare([QueueSpec("q", max_ready=1)])
    await broker.enqueue([lab.message("a")])
    a = await lab.take_one(broker)
    await broker.enqueue([lab.message("b")])
    b = await lab.take_one(broker)
    await broker.enqueue([lab.message("c")])
    assert not await broker.enqueue([lab.message("c"), lab.message("later", delay_ms=1000)])
    assert not await broker.settle([Nack(a), lab.retry(b)])
    assert (await lab.stats(broker)).ready == 3
    await lab.advance(1)
    assert lab.errors(await broker.enqueue([lab.message()])) == {0: QueueFull}
    assert sorted(delivery.message.id for delivery in await lab.take(broker)) == ["a", "b", "c", "later"]


async def test_limit_can_be_changed(broker: Broker, lab: Any) -> None:
    """The last declaration wins; a lower limit removes nothing that is stored."""
    await broker.declare([QueueSpec("q", max_ready=2)])
    await broker.declare([QueueSpec("q")])
    assert not await broker.enqueue([lab.message() for _ in range(5)])
    await broker.declare([QueueSpec("q", max_ready=4)])
    assert lab.errors(await broker.enqueue([lab.message()])) == {0: QueueFull}
    assert (await lab.stats(broker)).ready == 5
