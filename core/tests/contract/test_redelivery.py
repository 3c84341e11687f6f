"""Leases: who holds one is left alone, who lost one is refused, and what nobody holds comes again."""

from __future__ import annotations

from typing import Any

import pytest

from crossdock.errors import LeaseLost
from crossdock.spi import Ack, Broker, Delivery, Nack, Priority, QueueSpec, State

pytestmark = pytest.mark.asyncio


async def test_expired_lease_is_delivered_again(broker: Broker, lab: Any) -> None:
    """A message whose holder is silent comes again, the same, with its count raised by one each time."""
    message = lab.message()
    await broker.enqueue([message])
    for count in (1, 2, 3):
        delivery = await lab.take_one(broker)
        assert (delivery.message, delivery.delivery_count) == (message, count)
        await lab.advance(29.9)
        assert await lab.take(broker) == []
        await lab.advance(broker.capabilities.takeover - 29.9)


async def test_expiry_does_not_spare_a_live_holder(broker: Broker, lab: Any) -> None:
    """A lease ends for a Broker that is open and busy, too, and the message goes to whoever asks."""
    await broker.enqueue([lab.message("m"), lab.message("other", priority=Priority.LOW)])
    held = (await lab.take(broker, limit=1))[0]
    await lab.advance(broker.capabilities.takeover)
    other = await lab.open()
    assert [delivery.message.id for delivery in await lab.take(other, limit=1)] == ["m"]
    assert lab.errors(await broker.settle([Ack(held)])) == {0: LeaseLost}


async def test_late_settlements_are_refused(broker: Broker, lab: Any) -> None:
    """Once somebody else has the message, no settlement of the old delivery changes anything, before or after the new one ends."""
    await broker.enqueue([lab.message("m")])
    late = await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    new = await lab.take_one(broker)
    everything = [Ack(late), Nack(late), Nack(late, 5.0), lab.retry(late), lab.dead(late)]
    assert set(lab.errors(await broker.settle(everything))) == set(range(5))
    assert lab.errors(await broker.extend([late])) == {0: LeaseLost}
    assert await lab.where(broker) == {State.LEASED: ["m"]}
    assert not await broker.settle([lab.retry(new)])
    assert set(lab.errors(await broker.settle(everything))) == set(range(5))
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_late_settlement_that_nobody_overtook(broker: Broker, lab: Any) -> None:
    """Between expiry and takeover a late Ack is either done or refused; it is never half of both."""
    await broker.enqueue([lab.message("m")])
    late = await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    if lab.errors(await broker.settle([Ack(late)])):
        assert (await lab.take_one(broker)).delivery_count == 2
    else:
        assert await lab.where(broker) == {}


@pytest.mark.parametrize("taken_over", [True, False])
async def test_late_settlement_of_what_was_removed(broker: Broker, lab: Any, taken_over: bool) -> None:
    """A message removed after its lease expired is gone for its late holder, too."""
    await broker.enqueue([lab.message("m")])
    late = await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    if taken_over:
        await broker.settle([Nack(await lab.take_one(broker))])
    elif State.READY not in await lab.where(broker):
        return  # this broker notices the expiry only when somebody receives
    assert not await broker.remove("q", State.READY, ["m"])
    assert set(lab.errors(await broker.settle([lab.retry(late), lab.dead(late), Ack(late)])).values()) == {LeaseLost}
    assert lab.errors(await broker.extend([late])) == {0: LeaseLost}
    assert await lab.where(broker) == {}


async def test_late_settlement_cannot_touch_a_namesake(broker: Broker, lab: Any) -> None:
    """An old receipt means nothing to a message enqueued later under the same id."""
    message = lab.message("m")
    await broker.enqueue([message])
    late = await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    await broker.settle([Ack(await lab.take_one(broker))])
    await broker.enqueue([message])
    assert lab.errors(await broker.settle([Ack(late)])) == {0: LeaseLost}
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_extended_lease_lives_on(broker: Broker, lab: Any) -> None:
    """Extended in time, a delivery is held as long as one likes; each extension runs for the queue's lease from then."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    for _ in range(10):
        await lab.advance(25)
        assert not await broker.extend([delivery])
        assert await lab.take(broker) == []
    await lab.advance(broker.capabilities.takeover)
    assert (await lab.take_one(broker)).delivery_count == 2


async def test_extension_saves_only_what_it_names(broker: Broker, lab: Any) -> None:
    """Items of an extension are independent: the settled one is refused, the others go on."""
    await broker.enqueue([lab.message(id) for id in "abc"])
    a, b, c = await lab.take(broker)
    await broker.settle([Ack(b)])
    await lab.advance(20)
    assert lab.errors(await broker.extend([a, b])) == {1: LeaseLost}
    await lab.advance(broker.capabilities.takeover - 20)
    assert [delivery.message.id for delivery in await lab.take(broker)] == ["c"]
    assert not await broker.settle([Ack(a)])
    assert lab.errors(await broker.settle([Ack(c)])) == {0: LeaseLost}


async def test_expiry_wakes_a_waiting_receive(broker: Broker, lab: Any) -> None:
    """A receive that waits gets a dead worker's message when its lease is over, within the takeover time."""
    await broker.enqueue([lab.message("m")])
    other = await lab.open()
    await lab.take_one(other)
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.advance(broker.capabilities.takeover)
    assert [(delivery.message.id, delivery.delivery_count) for delivery in receive.result()] == [("m", 2)]


@pytest.mark.parametrize("lease", [30.0, 5.0], ids=["same-lease", "shorter-lease"])
async def test_waiting_receive_follows_extensions(broker: Broker, lab: Any, lease: float) -> None:
    """A receive that waits while a lease is extended gets the message when the extended lease is over, be that later or sooner."""
    await broker.enqueue([lab.message("m")])
    other = await lab.open()
    delivery = await lab.take_one(other)
    sweep = broker.capabilities.takeover - QueueSpec("default").lease
    async with lab.waiting(broker, wait=3600) as receive:
        await lab.advance(20)
        await other.declare([QueueSpec("q", lease=lease)])
        await other.extend([delivery])
        await lab.advance(lease - 0.1)
        await lab.turns()
        assert not receive.done()
        await lab.advance(0.1 + sweep)
    assert [delivery.delivery_count for delivery in receive.result()] == [2]


async def test_leases_are_the_queues_own(broker: Broker, lab: Any) -> None:
    """Each queue has the lease it declared, for receiving and for extending; a new declaration counts from then on."""
    await broker.declare([QueueSpec("short", lease=2.0), QueueSpec("long", lease=600.0)])
    await broker.enqueue([lab.message("s", "short"), lab.message("l", "long")])
    short, long = await lab.take_one(broker, "short"), await lab.take_one(broker, "long")
    now = lab.clock.monotonic()
    assert now < short.lease_until <= now + 2 < now + 400 < long.lease_until <= now + 600
    sweep = broker.capabilities.takeover - QueueSpec("default").lease
    await broker.declare([QueueSpec("short", lease=100.0)])
    await lab.advance(1)
    await broker.extend([short])
    await lab.advance(90)
    assert await lab.take(broker, queue="short") == []
    await lab.advance(10 + sweep)
    assert (await lab.take_one(broker, "short")).delivery_count == 2
    assert await lab.take(broker, queue="long") == []


async def test_shorter_lease_overtakes_longer_ones(broker: Broker, lab: Any) -> None:
    """After the lease was shortened, what is received then expires before what was received earlier."""
    sweep = broker.capabilities.takeover - QueueSpec("default").lease
    await broker.declare([QueueSpec("q", lease=600.0)])
    await broker.enqueue([lab.message("long")])
    await lab.take_one(broker)
    await broker.declare([QueueSpec("q", lease=5.0)])
    await broker.enqueue([lab.message("short")])
    await lab.take_one(broker)
    await lab.advance(5 + sweep)
    assert [delivery.message.id for delivery in await lab.take(broker)] == ["short"]


async def test_every_redelivery_has_its_own_receipt(broker: Broker, lab: Any) -> None:
    """No receipt is ever given out twice."""
    await broker.enqueue([lab.message() for _ in range(10)])
    seen: list[Delivery] = []
    for _ in range(3):
        seen += (batch := await lab.take(broker))
        await broker.settle([Nack(delivery) for delivery in batch[:5]])
        await lab.advance(broker.capabilities.takeover)
    assert len({delivery.receipt for delivery in seen}) == 30
