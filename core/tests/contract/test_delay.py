"""Due times: never early, soon after, from milliseconds to years."""

from __future__ import annotations

from typing import Any

import pytest

from crossdock.spi import Ack, Broker, State

pytestmark = pytest.mark.asyncio

YEAR = 365 * 24 * 3600.0


@pytest.mark.parametrize("seconds", [0.001, 0.5, 60.0, 10 * YEAR], ids=str)
@pytest.mark.parametrize("field", ["eta_ms", "delay_ms"])
async def test_never_early(broker: Broker, lab: Any, field: str, seconds: float) -> None:
    """A message with an eta or a delay is SCHEDULED until then, and received after it."""
    seconds = min(seconds, broker.capabilities.delay_longest)
    ms = round(seconds * 1000)
    due = lab.clock.time_ms() + ms
    await broker.enqueue([lab.message("m", **{field: due if field == "eta_ms" else ms})])
    assert await lab.where(broker) == {State.SCHEDULED: ["m"]}
    lab.clock.advance(seconds - 0.001)
    assert await lab.take(broker) == []
    await lab.advance(0.001)
    delivery = await lab.take_one(broker)
    assert delivery.message.delay_ms == 0
    assert delivery.message.eta_ms in (0, due)
    assert lab.clock.time_ms() >= due


async def test_past_eta_is_ready_at_once(broker: Broker, lab: Any) -> None:
    """An eta that is now or gone makes a message READY."""
    now = lab.clock.time_ms()
    await broker.enqueue([lab.message("now", eta_ms=now), lab.message("past", eta_ms=now - 10_000), lab.message("epoch", eta_ms=1)])
    assert await lab.where(broker) == {State.READY: ["now", "past", "epoch"]}
    assert len(await lab.take(broker)) == 3


async def test_due_order(broker: Broker, lab: Any) -> None:
    """Messages fall due in the order of their times, whatever the order of storing."""
    now = lab.clock.time_ms()
    await broker.enqueue([lab.message(f"in{seconds}", eta_ms=now + seconds * 1000) for seconds in (30, 10, 40, 20)])
    assert await lab.ids(broker, State.SCHEDULED) == ["in10", "in20", "in30", "in40"]
    received: list[str] = []
    for _ in range(4):
        await lab.advance(10)
        delivery = await lab.take_one(broker)
        received.append(delivery.message.id)
        await broker.settle([Ack(delivery)])
    assert received == ["in10", "in20", "in30", "in40"]


@pytest.mark.parametrize("stored", ["before", "meanwhile"])
async def test_due_time_wakes_a_waiting_receive(broker: Broker, lab: Any, stored: str) -> None:
    """A waiting receive returns a message when it falls due, also one that was stored after the wait began."""
    message = lab.message("m", delay_ms=5000)
    if stored == "before":
        await broker.enqueue([message])
    async with lab.waiting(broker, wait=3600) as receive:
        if stored == "meanwhile":
            await broker.enqueue([message])
        await lab.advance(5 + broker.capabilities.delay_lateness)
    assert [delivery.message.id for delivery in receive.result()] == ["m"]


async def test_earlier_newcomer_wakes_a_waiting_receive(broker: Broker, lab: Any) -> None:
    """A receive that waits for one due time also sees an earlier one that comes later."""
    await broker.enqueue([lab.message("late", delay_ms=100_000)])
    async with lab.waiting(broker, wait=3600) as receive:
        await broker.enqueue([lab.message("soon", delay_ms=1000)])
        await lab.advance(1 + broker.capabilities.delay_lateness)
    assert [delivery.message.id for delivery in receive.result()] == ["soon"]


async def test_many_at_once(broker: Broker, lab: Any) -> None:
    """Thousands that fall due together are all delivered, each once."""
    await broker.enqueue([lab.message(delay_ms=1000 + number % 10) for number in range(3000)])
    await lab.advance(2)
    seen: set[str] = set()
    while batch := await lab.take(broker, limit=500):
        seen |= {delivery.message.id for delivery in batch}
        await broker.settle([Ack(delivery) for delivery in batch])
    assert len(seen) == 3000
    assert await lab.where(broker) == {}


async def test_retry_of_a_scheduled_message_counts_anew(broker: Broker, lab: Any) -> None:
    """A replacement with a delay is due by that delay alone."""
    await broker.enqueue([lab.message("m", delay_ms=1000)])
    await lab.advance(1)
    await broker.settle([lab.retry(await lab.take_one(broker), 3.0)])
    await lab.advance(2.9)
    assert await lab.take(broker) == []
    await lab.advance(0.1)
    assert (await lab.take_one(broker)).message.generation == 1
