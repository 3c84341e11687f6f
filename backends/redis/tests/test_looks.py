"""Looks: what a receive finds behind removed messages, in many queues, and behind a limit with much that is due."""

from __future__ import annotations

import time
from typing import Any

import pytest
from topologies import Node, configured
from traffic import lanes_of, message, new_namespace, opened, until

from crossdock.errors import QueueFull
from crossdock.spi import LEVELS, Ack, Lane, QueueSpec, State

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]

REMOVED = 3_000
"""More than one script passes over."""


@pytest.fixture(scope="module")
def server(a_source: Any) -> Any:
    """One server for these tests."""
    with configured(a_source) as node:
        yield node


async def test_what_waits_behind_removed_messages_comes_soon(server: Node) -> None:
    """Removed messages stay in the list of what is ready until they come to its head; however many they are, what is behind them is
    counted, and delivered to a receiver that waits."""
    async with opened(server.url, new_namespace()) as broker:
        ids = [f"gone-{number}" for number in range(REMOVED)]
        assert await broker.enqueue([*map(message, ids), message("stays")]) == []
        assert await broker.remove("q", State.READY, ids) == []
        deliveries = await broker.receive(lanes_of("q"), 1, 10)
        assert [each.message.id for each in deliveries] == ["stays"]
        assert await broker.settle(list(map(Ack, deliveries))) == []
        assert await broker.enqueue([*map(message, ids), message("stays")]) == []
        assert await broker.remove("q", State.READY, ids) == []
        [stats] = await broker.stats(["q"])
        assert (stats.ready, stats.leased) == (1, 0)


async def test_what_falls_due_in_many_queues_is_delivered_in_time(server: Node) -> None:
    """A receiver that waits on so many queues that it does not see to all of them in each look still gets what falls due in any."""
    queues = [f"q{number}" for number in range(20)]
    async with opened(server.url, new_namespace()) as broker:
        await broker.declare([QueueSpec(queue) for queue in queues])
        lanes = [Lane(queue, level, 1) for level in LEVELS for queue in queues]
        assert await broker.receive(lanes, 10, 0) == []
        for queue in (queues[0], queues[-1]):
            stored = time.monotonic()
            assert await broker.enqueue([message("late", queue=queue, delay_ms=300)]) == []
            deliveries = await broker.receive(lanes, 10, 10)
            assert [(each.message.id, each.message.queue) for each in deliveries] == [("late", queue)]
            assert 0.25 <= time.monotonic() - stored <= 0.3 + broker.capabilities.delay_lateness + 0.5
            assert await broker.settle(list(map(Ack, deliveries))) == []


async def test_what_is_due_counts_towards_the_limit(server: Node) -> None:
    """However much fell due while nobody received, a full queue takes no more, and one script does not work it all off."""
    async with opened(server.url, new_namespace()) as broker:
        assert await broker.enqueue([message(f"m{number}", delay_ms=1) for number in range(REMOVED)]) == []
        await broker.declare([QueueSpec("q", max_ready=REMOVED)])
        stored = time.monotonic()
        await until(lambda: time.monotonic() > stored + 0.05, "all of it was due")
        [refusal] = await broker.enqueue([message("more")])
        assert isinstance(refusal.error, QueueFull)
