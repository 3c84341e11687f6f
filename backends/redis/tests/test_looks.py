"""Looks: what a receive finds behind removed messages, in many queues, and behind a limit with much that is due."""

from __future__ import annotations

import itertools
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


def server_ms(server: Node) -> int:
    """The server's clock, in milliseconds since the Unix epoch."""
    seconds, micros = server.call("TIME")
    return int(seconds) * 1000 + int(micros) // 1000


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
        stored = server_ms(server)
        await until(lambda: server_ms(server) > stored + 1, "all of it was due")
        [refusal] = await broker.enqueue([message("more")])
        assert isinstance(refusal.error, QueueFull)


async def test_of_many_lanes_all_are_served_in_order(server: Node) -> None:
    """However many lanes there are and however few of them anything is wanted of: first the quotas, then lane by lane up to the limit."""
    queues = [f"q{number}" for number in range(20)]
    async with opened(server.url, new_namespace()) as broker:
        for again in range(3):  # not every look sees to all of them
            ids = {queue: [f"{queue}-{again}-{number}" for number in range(2)] for queue in (queues[3], queues[7], queues[-1])}
            for queue, some in ids.items():
                assert await broker.enqueue([message(id, queue=queue) for id in some]) == []
            lanes = [Lane(queue, level, int(queue == queues[7])) for level in LEVELS for queue in queues]
            deliveries = await broker.receive(lanes, 5, 0)
            assert {each.message.id for each in deliveries} == {*ids[queues[3]], *ids[queues[7]], ids[queues[-1]][0]}
            assert await broker.settle(list(map(Ack, deliveries))) == []
            [last] = await broker.receive(lanes, 5, 0)
            assert last.message.id == ids[queues[-1]][1]
            assert await broker.settle([Ack(last)]) == []


async def test_many_lanes_without_any_quota_are_served(server: Node) -> None:
    """Nothing in particular is wanted of any of many lanes: what there is comes all the same, look after look."""
    queues = [f"q{number}" for number in range(20)]
    async with opened(server.url, new_namespace()) as broker:
        assert await broker.enqueue([message(f"m{number}", queue=queues[number]) for number in range(3)]) == []
        lanes = [Lane(queue, level, 0) for level in LEVELS for queue in queues]
        for number in range(3):
            assert [each.message.id for each in await broker.receive(lanes, 1, 0)] == [f"m{number}"]


async def test_what_falls_due_beside_busy_queues_is_delivered_in_time(server: Node) -> None:
    """A worker that always finds enough in the lanes it wants most still gets what falls due in another one."""
    queues = [f"q{number}" for number in range(20)]
    async with opened(server.url, new_namespace()) as broker:
        assert await broker.enqueue([message("late", queue=queues[9], delay_ms=300)]) == []
        stored = time.monotonic()
        wanted = {queues[0]: 3, queues[9]: 1}
        lanes = [Lane(queue, level, wanted.get(queue, 0)) for level in LEVELS for queue in reversed(queues)]
        came: set[str] = set()
        for turn in itertools.count():
            assert await broker.enqueue([message(f"{turn}-{number}") for number in range(4)]) == []
            deliveries = await broker.receive([*lanes, Lane("q", LEVELS[2], 4)], 4, 0)
            assert len(deliveries) == 4
            came.update(each.message.id for each in deliveries)
            assert await broker.settle(list(map(Ack, deliveries))) == []
            if "late" in came:
                break
            assert time.monotonic() - stored < 0.3 + broker.capabilities.delay_lateness + 0.5
