"""Enqueue and receive: what goes in comes out, once, in order, and waiting receivers are woken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crossdock.errors import LeaseLost, MessageTooLarge
from crossdock.spi import Ack, Broker, Delivery, Lane, Nack, Priority, State

pytestmark = pytest.mark.asyncio


async def test_round_trip_keeps_every_byte(broker: Broker, lab: Any) -> None:
    """A delivery carries the message as it was enqueued, as a first delivery under a lease that runs."""
    message = lab.message("A-z_9", priority=Priority.HIGH, body=bytes(range(256)), generation=7)
    assert not await broker.enqueue([message])
    delivery = await lab.take_one(broker)
    assert delivery.message == message
    assert delivery.delivery_count == 1
    assert lab.clock.monotonic() + 20 < delivery.lease_until <= lab.clock.monotonic() + 30
    assert len({delivery.receipt}) == 1


@pytest.mark.parametrize("body", [b"", b"\x00", "größer".encode(), b"x" * 100_000], ids=["empty", "nul", "utf-8", "large"])
async def test_bodies_are_opaque(broker: Broker, lab: Any, body: bytes) -> None:
    """Any bytes come back unchanged, in deliveries and in listings."""
    await broker.enqueue([lab.message(body=body)])
    (entry,) = await lab.entries(broker, State.READY)
    assert entry.message.body == (await lab.take_one(broker)).message.body == body


async def test_body_limit(broker: Broker, lab: Any) -> None:
    """A body of `max_body` bytes is stored, a longer one refused, and it holds up no other item."""
    most = broker.capabilities.max_body
    batch = [lab.message("fits", body=bytes(most)), lab.message("big", body=bytes(most + 1)), lab.message("small")]
    assert lab.errors(await broker.enqueue(batch)) == {1: MessageTooLarge}
    assert await lab.ids(broker, State.READY) == ["fits", "small"]


async def test_empty_batches_do_nothing(broker: Broker, lab: Any) -> None:
    """Every batched verb takes an empty batch."""
    assert not await broker.enqueue([])
    assert not await broker.extend([])
    assert not await broker.settle([])
    assert not await broker.remove("q", State.READY, [])
    assert not await broker.replay("q", [])
    assert not await broker.stats([])
    await broker.declare([])


async def test_first_in_first_out(broker: Broker, lab: Any) -> None:
    """Within a level the oldest comes first, across batches in and out."""
    messages = [lab.message() for _ in range(50)]
    for start in range(0, 50, 7):
        await broker.enqueue(messages[start : start + 7])
    received: list[Delivery] = []
    while batch := await lab.take(broker, limit=8):
        received += batch
    assert [delivery.message.id for delivery in received] == [message.id for message in messages]


async def test_limit_is_kept(broker: Broker, lab: Any) -> None:
    """A receive returns at most `limit`, and at least one if there is one."""
    await broker.enqueue([lab.message() for _ in range(5)])
    assert [len(await lab.take(broker, limit=limit)) for limit in (1, 3, 3, 3)] == [1, 3, 1, 0]


async def test_delivered_to_one_receiver_only(broker: Broker, lab: Any) -> None:
    """While its lease runs, a message is delivered to nobody else, however many receive at once."""
    await broker.enqueue([lab.message() for _ in range(100)])
    others = [await lab.open() for _ in range(3)]
    taken = await asyncio.gather(*(lab.take(each, limit=40) for each in (broker, *others)))
    ids = [delivery.message.id for batch in taken for delivery in batch]
    assert len(ids) == len(set(ids)) == 100


async def test_only_the_lanes_asked_for(broker: Broker, lab: Any) -> None:
    """Other queues and other levels stay untouched."""
    await broker.enqueue([lab.message("other", queue="q2")])
    await broker.enqueue([lab.message(level.name, priority=level) for level in (Priority.LOW, Priority.HIGH)])
    (delivery,) = await broker.receive([Lane("q", Priority.HIGH, 10)], 10, 0)
    assert delivery.message.id == "HIGH"
    assert await lab.ids(broker, State.READY) == ["LOW"]
    assert await lab.ids(broker, State.READY, "q2") == ["other"]


async def test_wait_ends_with_nothing(broker: Broker, lab: Any) -> None:
    """With nothing to deliver a receive returns empty when its wait is over, not before."""
    async with lab.waiting(broker, wait=5) as receive:
        await lab.advance(4.5)
        await lab.turns()
        assert not receive.done()
        await lab.advance(0.5)
    assert list(receive.result()) == []


@pytest.mark.parametrize("same_broker", [True, False], ids=["same-broker", "another-broker"])
async def test_enqueue_wakes_a_waiting_receive(broker: Broker, lab: Any, same_broker: bool) -> None:
    """A waiting receive returns at the first message, long before its wait ends, whichever Broker stored it."""
    producer = broker if same_broker else await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await producer.enqueue([lab.message("first")])
    assert [delivery.message.id for delivery in receive.result()] == ["first"]


async def test_give_back_wakes_a_waiting_receive(broker: Broker, lab: Any) -> None:
    """What somebody gives back goes to a receiver that waits."""
    await broker.enqueue([lab.message("back")])
    delivery = await lab.take_one(broker)
    other = await lab.open()
    async with lab.waiting(other, wait=3600) as receive:
        await broker.settle([Nack(delivery)])
    assert [delivery.message.id for delivery in receive.result()] == ["back"]


async def test_two_waiting_receivers_share(broker: Broker, lab: Any) -> None:
    """Of two waiting receivers both get something if each takes one of two messages."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600, limit=1) as one, lab.waiting(other, wait=3600, limit=1) as two:
        await broker.enqueue([lab.message("a"), lab.message("b")])
    assert {delivery.message.id for receive in (one, two) for delivery in receive.result()} == {"a", "b"}


@pytest.mark.parametrize("turns", range(12))
async def test_cancelled_receive_loses_nothing(broker: Broker, lab: Any, turns: int) -> None:
    """Cancelled at any moment, a receive either returned its deliveries or left the messages with their counts unchanged."""
    async with lab.waiting(broker, wait=3600) as receive:
        await broker.enqueue([lab.message("a"), lab.message("b")])
        await lab.turns(turns)
        receive.cancel()
    returned = [] if receive.cancelled() else list(receive.result())
    left = await lab.take(broker)
    assert sorted(delivery.message.id for delivery in (*returned, *left)) == ["a", "b"]
    assert {delivery.delivery_count for delivery in (*returned, *left)} == {1}


async def test_cancelled_wait_leaves_nothing(broker: Broker, lab: Any) -> None:
    """A receive that is cancelled while it waits takes nothing that comes later."""
    async with lab.waiting(broker, wait=3600) as receive:
        receive.cancel()
    assert receive.cancelled()
    await broker.enqueue([lab.message("m")])
    await lab.turns()
    assert (await lab.take_one(broker)).delivery_count == 1


@pytest.mark.parametrize("turns", range(6))
async def test_cancelled_verbs_tear_nothing(broker: Broker, lab: Any, turns: int) -> None:
    """Cancelled at any moment, an enqueue and a settle have done each of their items or not; doing it again completes them."""

    async def cut(verb: Any) -> None:
        task = asyncio.ensure_future(verb)
        await lab.turns(turns)
        task.cancel()
        await asyncio.wait([task])

    batch = [lab.message() for _ in range(5)]
    await cut(broker.enqueue(batch))
    assert not await broker.enqueue(batch)
    deliveries = await lab.take(broker)
    assert len(deliveries) == 5
    acks = [Ack(delivery) for delivery in deliveries]
    await cut(broker.settle(acks))
    assert not await broker.settle(acks)
    assert await lab.where(broker) == {}


async def test_foreign_receipts_are_refused(broker: Broker, lab: Any) -> None:
    """A receipt that this Broker never gave out settles and extends nothing, and raises nothing."""
    await broker.enqueue([lab.message("held")])
    delivery = await lab.take_one(broker)
    made_up = [Delivery(delivery.message, 1, delivery.lease_until, receipt) for receipt in (object(), "1", None, 1)]
    assert set(lab.errors(await broker.settle([Ack(each) for each in made_up])).values()) == {LeaseLost}
    assert set(lab.errors(await broker.extend(made_up)).values()) == {LeaseLost}
    assert await lab.ids(broker, State.LEASED) == ["held"]
