"""Enqueue and receive: what goes in comes out, once, in order, and whoever waits is woken."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable

from crossdock.errors import LeaseLost, MessageTooLarge
from crossdock.spi import Ack, Broker, Delivery, Lane, Nack, Priority, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.scenario import DEDUPLICATION, listing, scenario


@scenario()
async def round_trip_keeps_every_byte(broker: Broker, lab: Lab) -> None:
    """A delivery carries the message as it was enqueued, as a first delivery under a lease that runs."""
    message = lab.message("A-z_9", priority=Priority.HIGH, body=bytes(range(256)), generation=7)
    await lab.enqueue(broker, message)
    before = lab.clock.monotonic()
    delivery = await lab.take_one(broker)
    assert delivery.message == message
    assert delivery.delivery_count == 1
    assert before + lab.lease / 2 < delivery.lease_until <= lab.clock.monotonic() + lab.lease
    assert len({delivery.receipt}) == 1, "a receipt is hashable"


@scenario(
    body={"empty": b"", "nul": b"\x00", "utf-8": "größer ☂".encode(), "100 kB": bytes(range(256)) * 400, "1 MB": b"x" * 1_000_000}
)
async def bodies_are_opaque(broker: Broker, lab: Lab, body: bytes) -> None:
    """Any bytes come back unchanged."""
    await lab.enqueue(broker, lab.message(body=body))
    assert (await lab.take_one(broker)).message.body == body


@scenario()
async def longest_body(broker: Broker, lab: Lab) -> None:
    """A body of `max_body` bytes is stored, a longer one refused with `MessageTooLarge`, and it holds up no other item."""
    most = broker.capabilities.max_body
    batch = [lab.message("fits", body=bytes(most)), lab.message("big", body=bytes(most + 1)), lab.message("small")]
    assert lab.errors(await broker.enqueue(batch)) == {1: MessageTooLarge}
    taken = await lab.take(broker, limit=3)
    assert {delivery.message.id: len(delivery.message.body) for delivery in taken} == {"fits": most, "small": len(b"body of small")}


@scenario()
async def empty_batches_do_nothing(broker: Broker, lab: Lab) -> None:
    """Every batched verb takes an empty batch."""
    assert not await broker.enqueue([])
    assert not await broker.extend([])
    assert not await broker.settle([])
    assert not await broker.remove("q", State.READY, [])
    assert not await broker.replay("q", [])
    assert not await broker.stats([])
    await broker.declare([])


@scenario()
async def first_in_first_out(broker: Broker, lab: Lab) -> None:
    """Within a level the oldest comes first, across batches in and out."""
    messages = lab.messages(50)
    for start in range(0, 50, 7):
        await lab.enqueue(broker, *messages[start : start + 7])
    received: list[str] = []
    while len(received) < 50:
        batch = await lab.take(broker, limit=min(8, 50 - len(received)))
        received += [delivery.message.id for delivery in batch]
        await lab.settle(broker, *map(Ack, batch))
        assert batch, "some did not come"
    assert received == [message.id for message in messages]


@scenario(count={"one": 1, "limit": 3, "limit and one": 4, "twice the limit": 6})
async def limit_is_kept(broker: Broker, lab: Lab, count: int) -> None:
    """A receive returns at least one message if there is one, and never more than `limit`."""
    limit = 3
    await lab.enqueue(broker, *lab.messages(count))
    left = count
    while left:
        got = len(await broker.receive(lab.lanes("q"), limit, lab.patience))
        assert 1 <= got <= min(limit, left)
        left -= got
    assert not await lab.take(broker)


@scenario()
async def delivered_to_one_receiver_only(broker: Broker, lab: Lab) -> None:
    """While its lease runs, a message is delivered to nobody else, however many receive at once."""
    await lab.enqueue(broker, *lab.messages(100))
    others = [await lab.open() for _ in range(3)]
    taken = await asyncio.gather(*(lab.take(each, limit=40) for each in (broker, *others)))
    ids = [delivery.message.id for batch in taken for delivery in batch]
    assert len(ids) == len(set(ids)) == 100


@scenario(seconds=120)
async def ten_thousand_to_fifty_receivers(broker: Broker, lab: Lab) -> None:
    """10,000 messages and 50 Brokers that receive and ack at the same time: each message comes to exactly one of them, once."""
    messages = lab.messages(10_000, queue="busy")  # with leases of 30 s, so that a slow machine loses none
    for start in range(0, 10_000, 1000):
        await lab.enqueue(broker, *messages[start : start + 1000])
    seen: Counter[str] = Counter()
    workers = [await lab.open() for _ in range(50)]  # which may take longer than our patience
    last = time.monotonic()

    async def work(one: Broker) -> None:
        nonlocal last
        while len(seen) < 10_000 and time.monotonic() < last + lab.patience:
            if batch := await one.receive(lab.lanes("busy"), 20, 0 if lab.virtual else 0.1):
                last = time.monotonic()
            seen.update(delivery.message.id for delivery in batch)
            await lab.settle(one, *map(Ack, batch))

    await asyncio.gather(*map(work, workers))
    missing = {message.id for message in messages}.difference(seen)
    assert not missing, f"{len(missing)} messages were never delivered"
    assert set(seen.values()) == {1}
    await lab.holds(broker, {}, "busy")


@scenario()
async def only_the_lanes_asked_for(broker: Broker, lab: Lab) -> None:
    """Other queues and other levels stay untouched."""
    await lab.enqueue(broker, lab.message("other", queue="q2"))
    await lab.enqueue(broker, *(lab.message(level.name, priority=level) for level in (Priority.LOW, Priority.HIGH)))
    (delivery,) = await lab.take(broker, lanes=[Lane("q", Priority.HIGH, 10)])
    assert delivery.message.id == "HIGH"
    await lab.holds(broker, {State.READY: ["LOW"], State.LEASED: ["HIGH"]})
    await lab.holds(broker, {State.READY: ["other"]}, "q2")


@scenario()
async def wait_ends_with_nothing(broker: Broker, lab: Lab) -> None:
    """With nothing to deliver a receive returns empty when its wait is over, not before."""
    wait = lab.moment / 2
    began = lab.clock.monotonic()
    async with lab.waiting(broker, wait=wait) as receive:
        await lab.pass_time(wait * 0.9)
        await lab.turns()
        done = receive.done()  # looked at first: on a busy machine more time may have passed than was asked for
        assert not done or lab.clock.monotonic() - began >= wait, "it returned empty before its time"
        await lab.pass_time(wait * 0.1)
    assert list(receive.result()) == []
    assert lab.clock.monotonic() - began >= wait


@scenario(producer=["same broker", "another broker"])
async def enqueue_wakes_a_waiting_receive(broker: Broker, lab: Lab, producer: str) -> None:
    """A waiting receive returns at the first message, long before its wait ends, whichever Broker stored it."""
    other = broker if producer == "same broker" else await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.enqueue(other, lab.message("first"))
    assert [delivery.message.id for delivery in receive.result()] == ["first"]


@scenario()
async def give_back_wakes_a_waiting_receive(broker: Broker, lab: Lab) -> None:
    """What somebody gives back goes to a receiver that waits."""
    await lab.enqueue(broker, lab.message("back"))
    delivery = await lab.take_one(broker)
    other = await lab.open()
    async with lab.waiting(other, wait=3600) as receive:
        await lab.settle(broker, Nack(delivery))
    assert [delivery.message.id for delivery in receive.result()] == ["back"]


@scenario()
async def two_waiting_receivers_share(broker: Broker, lab: Lab) -> None:
    """Of two waiting receivers both get something if each takes one of two messages."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600, limit=1) as one, lab.waiting(other, wait=3600, limit=1) as two:
        await lab.enqueue(broker, lab.message("a"), lab.message("b"))
    assert {delivery.message.id for receive in (one, two) for delivery in receive.result()} == {"a", "b"}


@scenario(turns=range(12))
async def cancelled_receive_loses_nothing(broker: Broker, lab: Lab, turns: int) -> None:
    """Cancelled at any moment, a receive either returned its deliveries or left the messages with their counts unchanged."""
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.enqueue(broker, lab.message("a"), lab.message("b"))
        await lab.turns(turns)
        receive.cancel()
    returned = [] if receive.cancelled() else list(receive.result())
    left = await lab.take(broker, limit=2 - len(returned)) if len(returned) < 2 else []
    assert sorted(delivery.message.id for delivery in (*returned, *left)) == ["a", "b"]
    assert {delivery.delivery_count for delivery in (*returned, *left)} == {1}


@scenario()
async def cancelled_wait_leaves_nothing(broker: Broker, lab: Lab) -> None:
    """A receive that is cancelled while it waits takes nothing that comes later."""
    async with lab.waiting(broker, wait=3600) as receive:
        receive.cancel()
    assert receive.cancelled()
    await lab.enqueue(broker, lab.message("m"))
    await lab.turns()
    assert (await lab.take_one(broker)).delivery_count == 1


@scenario(turns=range(6))
async def cancelled_verbs_tear_nothing(broker: Broker, lab: Lab, turns: int) -> None:
    """Cancelled at any moment, an enqueue and a settle have done each of their items or not; doing it again completes them."""

    async def cut(verb: Awaitable[object]) -> None:
        task = asyncio.ensure_future(verb)
        await lab.turns(turns)
        task.cancel()
        await asyncio.wait([task])

    batch = lab.messages(5)
    await cut(broker.enqueue(batch))
    await lab.enqueue(broker, *batch)
    deliveries = await lab.take(broker)
    assert {delivery.message.id for delivery in deliveries} == {message.id for message in batch}
    assert len(deliveries) == 5 or not DEDUPLICATION.declared(lab.capabilities)
    acks = [Ack(delivery) for delivery in deliveries]
    await cut(broker.settle(acks))
    await lab.settle(broker, *acks)
    await lab.holds(broker, {})


@scenario()
async def foreign_receipts_are_refused(broker: Broker, lab: Lab) -> None:
    """A receipt that this Broker never gave out settles and extends nothing, and raises nothing."""
    await lab.enqueue(broker, lab.message("held"))
    delivery = await lab.take_one(broker)
    made_up = [Delivery(delivery.message, 1, delivery.lease_until, receipt) for receipt in (object(), "1", None, 1)]
    assert set(lab.errors(await broker.settle([Ack(each) for each in made_up])).values()) == {LeaseLost}
    assert set(lab.errors(await broker.extend(made_up)).values()) == {LeaseLost}
    await lab.settle(broker, Ack(delivery))


@scenario(needs=[listing(State.READY)])
async def listing_shows_every_byte(broker: Broker, lab: Lab) -> None:
    """A listing carries the message as it was enqueued."""
    message = lab.message(priority=Priority.CRITICAL, body=bytes(range(256)), generation=3)
    await lab.enqueue(broker, message)
    assert [entry.message for entry in await lab.entries(broker, State.READY)] == [message]
