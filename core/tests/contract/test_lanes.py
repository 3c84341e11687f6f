"""Lanes: quotas first, then what is left over, lane by lane; levels apart."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from crossdock.spi import LEVELS, Broker, Lane, Priority, State

pytestmark = pytest.mark.asyncio

CRITICAL, HIGH, NORMAL, LOW = LEVELS


async def fill(broker: Broker, lab: Any, **counts: int) -> None:
    """Enqueue so many messages in each queue."""
    await broker.enqueue([lab.message(queue=queue) for queue, count in counts.items() for _ in range(count)])


async def received(broker: Broker, lanes: list[Lane], limit: int) -> dict[str, int]:
    """Receive once and count by queue."""
    return dict(Counter(delivery.message.queue for delivery in await broker.receive(lanes, limit, 0)))


async def test_first_pass_takes_quotas(broker: Broker, lab: Any) -> None:
    """With all lanes full each gets its quota."""
    await fill(broker, lab, a=20, b=20, c=20)
    lanes = [Lane("a", NORMAL, 6), Lane("b", NORMAL, 3), Lane("c", NORMAL, 1)]
    assert await received(broker, lanes, 10) == {"a": 6, "b": 3, "c": 1}


async def test_second_pass_gives_idle_shares_in_order(broker: Broker, lab: Any) -> None:
    """What a lane cannot fill goes to the first lane, in order, that has more than its quota."""
    await fill(broker, lab, a=2, b=4, c=20)
    lanes = [Lane("a", NORMAL, 6), Lane("b", NORMAL, 3), Lane("c", NORMAL, 1)]
    assert await received(broker, lanes, 10) == {"a": 2, "b": 4, "c": 4}


async def test_quota_zero_is_a_subscription(broker: Broker, lab: Any) -> None:
    """A lane with quota 0 gets nothing while others fill the limit, and what is left over else."""
    await fill(broker, lab, a=5, b=5)
    lanes = [Lane("a", NORMAL, 0), Lane("b", NORMAL, 3)]
    assert await received(broker, lanes, 3) == {"b": 3}
    assert await received(broker, lanes, 4) == {"b": 2, "a": 2}


async def test_limit_cuts_quotas(broker: Broker, lab: Any) -> None:
    """Quotas beyond the limit are served in the order of the lanes."""
    await fill(broker, lab, a=5, b=5)
    assert await received(broker, [Lane("b", NORMAL, 4), Lane("a", NORMAL, 4)], 6) == {"b": 4, "a": 2}


async def test_levels_come_in_the_order_asked(broker: Broker, lab: Any) -> None:
    """Lanes decide which level comes first, not the level itself; within each it is first in, first out."""
    for number in (1, 2):
        await broker.enqueue([lab.message(f"{level.name}{number}", priority=level) for level in reversed(LEVELS)])
    ids = [delivery.message.id for delivery in await broker.receive([Lane("q", LOW, 0), Lane("q", CRITICAL, 0)], 3, 0)]
    assert ids == ["LOW1", "LOW2", "CRITICAL1"]
    assert [delivery.message.id for delivery in await lab.take(broker)] == ["CRITICAL2", "HIGH1", "HIGH2", "NORMAL1", "NORMAL2"]


async def test_fair_shares_between_levels(broker: Broker, lab: Any) -> None:
    """Quotas of 6 : 4 : 2 : 1 between the levels of one queue give just that."""
    await broker.enqueue([lab.message(priority=level) for level in LEVELS for _ in range(26)])
    lanes = [Lane("q", level, share) for level, share in zip(LEVELS, (6, 4, 2, 1), strict=True)]
    shares: Counter[Priority] = Counter()
    for _ in range(4):
        shares.update(delivery.message.priority for delivery in await broker.receive(lanes, 13, 0))
    assert shares == {CRITICAL: 24, HIGH: 16, NORMAL: 8, LOW: 4}


async def test_priority_survives_the_round_trip(broker: Broker, lab: Any) -> None:
    """Each level comes back as itself, in deliveries and listings."""
    await broker.enqueue([lab.message(level.name, priority=level) for level in reversed(LEVELS)])
    assert await lab.ids(broker, State.READY) == [level.name for level in LEVELS]
    assert [delivery.message.priority for delivery in await lab.take(broker)] == list(LEVELS)


async def test_wait_on_several_lanes(broker: Broker, lab: Any) -> None:
    """A receive that waits on several queues and levels is woken by any of them, and by none else."""
    lanes = [Lane("a", NORMAL, 1), Lane("b", HIGH, 0)]
    for message in (lab.message(queue="a"), lab.message(queue="b", priority=HIGH)):
        task = asyncio.ensure_future(broker.receive(lanes, 1, 3600))
        await broker.enqueue([lab.message(queue="b", priority=LOW), lab.message(queue="c")])
        await broker.enqueue([message])
        async with asyncio.timeout(10):
            assert [delivery.message.id for delivery in await task] == [message.id]
