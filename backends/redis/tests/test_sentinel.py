"""A failover by Sentinels while a producer and a worker are at it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from topologies import Replicated, SentinelSet
from traffic import Traffic, lanes_of, message, new_namespace, opened

from crossdock.errors import BrokerUnavailable, EnqueueFailed
from crossdock.spi import Ack, BrokerEvent, Connected, Disconnected

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio]


@pytest.mark.parametrize("wait_replicas", [0, 1])
async def test_a_killed_master(source: Any, sentinels: SentinelSet, wait_replicas: int) -> None:
    """The master is killed: producer and worker go on with the new one. What had been confirmed by a replica is all there; without
    that, some of the last moment may be missing."""
    async with Traffic(f"{sentinels.url}?timeout=5&wait_replicas={wait_replicas}&wait_timeout=1") as traffic:
        await traffic.flows()
        old = sentinels.kill_master()
        await asyncio.to_thread(sentinels.wait_for_another_master, old)
        await traffic.flows(20)
        lost = await traffic.ends()
        print(f"wait_replicas={wait_replicas}: {len(lost)} confirmed ones lost; {traffic.said()}")
    assert not lost or not wait_replicas
    assert len(lost) < 100
    assert max(traffic.slowest.values()) < 7


async def test_a_failover_without_a_death(source: Any, sentinels: SentinelSet) -> None:
    """SENTINEL FAILOVER: the old master lives on as a replica and refuses what it is sent (READONLY), which leads to the new one."""
    events: list[BrokerEvent] = []
    async with Traffic(f"{sentinels.url}?timeout=5&wait_replicas=1&wait_timeout=1", report=events.append) as traffic:
        await traffic.flows()
        new = await asyncio.to_thread(sentinels.failover)
        await traffic.flows(20)
        assert int(new.info("keyspace")["db0"].partition("keys=")[2].partition(",")[0]) > 0
        lost = await traffic.ends()
        print(traffic.said())
    assert not lost
    kinds = [type(event) for event in events]
    assert Disconnected in kinds
    assert kinds[-1] is Connected or kinds.count(Connected) >= kinds.count(Disconnected)


async def test_an_idle_worker_is_not_deaf_after_a_failover(a_source: Any, sentinels: SentinelSet) -> None:
    """A worker that waits through the failover gets what is enqueued afterwards."""
    namespace = new_namespace()
    async with opened(sentinels.url, namespace, timeout=3) as worker:
        waiting = asyncio.create_task(worker.receive(lanes_of("q", quota=1), 1, 60))
        await asyncio.to_thread(sentinels.failover)
        async with opened(sentinels.url, namespace, timeout=3) as producer:
            assert await producer.enqueue([message("a")]) == []
        while True:
            try:
                [delivery] = await asyncio.wait_for(waiting, 10)
                break
            except BrokerUnavailable:
                waiting = asyncio.create_task(worker.receive(lanes_of("q", quota=1), 1, 60))
        assert delivery.message.id == "a"
        assert await worker.settle([Ack(delivery)]) == []


async def test_sentinels_that_are_away(sentinels: SentinelSet) -> None:
    """One that is dead and one that is frozen are no obstacle to open; with none, open says so."""
    first, second, third = sentinels.sentinels
    first.kill()
    second.pause()
    async with opened(sentinels.url, timeout=2) as broker:
        assert await broker.enqueue([message("a")]) == []
        assert "(Sentinel)" in broker.capabilities.server
    third.kill()
    with pytest.raises(BrokerUnavailable, match=r"no Sentinel names a master 'shop': nobody listens at 127\.0\.0\.1:"):
        async with opened(sentinels.url, timeout=2):
            pass


async def test_a_name_that_the_sentinels_do_not_know(sentinels: SentinelSet) -> None:
    """Open says which name."""
    with pytest.raises(
        BrokerUnavailable, match=r"no Sentinel names a master 'shoe': the Sentinel at .* knows no master of this name"
    ):
        async with opened(sentinels.url.replace("/shop", "/shoe"), timeout=2):
            pass


async def test_a_replica_by_its_own_address(replicated: Replicated) -> None:
    """Where the URL leads to a replica, open tells that it is one, and an enqueue is certainly not stored until it is made the master."""
    events: list[Any] = []
    replica = replicated.replicas[0]
    async with opened(replica.url, report=events.append, timeout=1) as broker:
        assert "is a replica of" in events[-1].reason
        [refusal] = await broker.enqueue([message("a")])
        assert isinstance(refusal.error, EnqueueFailed)
        assert "READONLY" in str(refusal.error)
        await asyncio.to_thread(replicated.promote, replica)
        assert await broker.enqueue([message("a")]) == []
        assert type(events[-1]).__name__ in ("Unblocked", "Connected")
