"""Queues on a Redis Cluster: one slot each, many spread; masters that die, slots that move. `test_conformance.py` runs the suite there."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from topologies import Cluster, Node, wait_until
from traffic import Traffic, lanes_of, message, new_namespace, opened

from crossdock.errors import BrokerError, BrokerUnavailable, LeaseLost
from crossdock.spi import Ack, Delivery, QueueSpec
from crossdock_redis import keys

pytestmark = [pytest.mark.timeout(240), pytest.mark.asyncio]

QUEUES = [f"q{number}" for number in range(30)]


def keys_by_node(cluster: Cluster, namespace: str) -> dict[Node, list[str]]:
    """The keys of a namespace on each node."""
    return {node: [key.decode() for key in node.call("KEYS", f"cd:{{{namespace}:*")] for node in cluster.nodes}


async def test_queues_are_spread_and_each_is_in_one_place(cluster: Cluster) -> None:
    """Thirty queues live on all three nodes, each with all its keys on one; a worker on all of them gets everything once."""
    namespace = new_namespace()
    async with opened(cluster.url, namespace) as broker:
        await broker.declare([QueueSpec(queue) for queue in QUEUES])
        assert await broker.enqueue([message(f"{queue}-{number}", queue) for number in range(5) for queue in QUEUES]) == []
        place = Counter[Node]()
        for node, found in keys_by_node(cluster, namespace).items():
            queues = {key[key.index(":", 4) + 1 : key.index("}")] for key in found}
            for queue in queues:
                assert cluster.owner(keys.slot(keys.prefix(namespace, queue))) is node
            place[node] = len(queues)
        print({str(node): count for node, count in place.items()})
        assert sum(place.values()) == len(QUEUES)
        assert len(place) == 3 and min(place.values()) >= 3
        taken: Counter[str] = Counter()
        while deliveries := await broker.receive(lanes_of(*QUEUES, quota=1), 40, 0.5):
            assert len(deliveries) <= 40
            taken.update(delivery.message.id for delivery in deliveries)
            assert await broker.settle([Ack(delivery) for delivery in deliveries]) == []
        assert set(taken.values()) == {1} and len(taken) == 150
        assert {stats.queue for stats in await broker.stats()} == set(QUEUES)


async def test_what_is_over_is_taken_in_the_order_of_the_lanes(cluster: Cluster) -> None:
    """Beyond the quotas a receive takes from the first lane that has something, however the queues are spread; no more than asked for."""
    async with opened(cluster.url) as broker:
        for queue in QUEUES[:6]:
            assert await broker.enqueue([message(f"{queue}-{number}", queue) for number in range(10)]) == []
        ids = [delivery.message.id for delivery in await broker.receive(lanes_of(*QUEUES[:6], quota=0), 25, 5)]
        assert ids == [f"{queue}-{number}" for queue in QUEUES[:3] for number in range(10)][:25]
        stats = await broker.stats(QUEUES[:6])
        assert [each.ready for each in stats] == [0, 0, 5, 10, 10, 10]
        assert [each.leased for each in stats] == [10, 10, 5, 0, 0, 0]


async def test_a_slot_that_moves_loses_nothing(source: Any, cluster: Cluster) -> None:
    """While a queue's slot is moved key by key to another node, and back, a producer and a worker wait a moment and go on there."""
    async with Traffic(f"{cluster.url}?timeout=5") as traffic:
        await traffic.flows()
        slot = keys.slot(keys.prefix(traffic.namespace, "q"))
        home = cluster.owner(slot)
        away = next(node for node in cluster.nodes if node is not home)
        for target in (away, home):
            migration = cluster.migration(slot, to=target)
            await asyncio.to_thread(migration.begin)
            while await asyncio.to_thread(migration.move, 1):
                await asyncio.sleep(0.05)  # so that scripts run between the steps
            await asyncio.to_thread(migration.finish)
            assert cluster.owner(slot) is target
            await traffic.flows()
        lost = await traffic.ends()
        print(traffic.said())
    assert not lost
    assert not traffic.run_after_ack
    assert max(traffic.acked.values()) == 1
    assert not traffic.refused


async def test_a_queue_is_whole_while_its_slot_moves(cluster: Cluster) -> None:
    """In the middle of a move nothing half-done can be seen: calls are not served until it ends, and then all is there."""
    namespace = new_namespace()
    async with opened(cluster.url, namespace, timeout=1) as broker:
        await broker.declare([QueueSpec("q")])
        await broker.enqueue([message("a"), message("b")])
        [leased] = await broker.receive(lanes_of("q", quota=1), 1, 5)
        slot = keys.slot(keys.prefix(namespace, "q"))
        home = cluster.owner(slot)
        migration = cluster.migration(slot, to=next(node for node in cluster.nodes if node is not home))
        migration.begin()
        assert migration.move(2) == 2
        verbs: list[Callable[[], Awaitable[Any]]] = [
            lambda: broker.stats(["q"]),
            lambda: broker.receive(lanes_of("q", quota=1), 1, 0.1),
            lambda: broker.enqueue([message("c")]),
        ]
        for verb in verbs:
            with pytest.raises(BrokerUnavailable):
                await verb()
        while migration.move():
            pass
        migration.finish()
        deadline = time.monotonic() + 10
        while True:  # what was asked in the middle is asked again up to a second later
            try:
                assert await broker.settle([Ack(leased)]) == []
                break
            except BrokerUnavailable:
                assert time.monotonic() < deadline
        [rest] = await broker.receive(lanes_of("q", quota=5), 5, 5)
        assert (rest.message.id, rest.delivery_count) == ("b", 1)
        [stats] = await broker.stats(["q"])
        assert (stats.ready, stats.leased) == (0, 1)
        cluster.migrate(slot, to=home)


async def test_a_dead_node_holds_up_only_its_own_queues(cluster: Cluster) -> None:
    """One of three masters is frozen, then killed: the queues of the others go on without delay. Started again, it has its own back."""
    namespace = new_namespace()
    async with opened(cluster.url, namespace, timeout=4) as broker:
        await broker.declare([QueueSpec(queue) for queue in QUEUES])
        owner = {queue: cluster.owner(keys.slot(keys.prefix(namespace, queue))) for queue in QUEUES}
        victim = owner[QUEUES[0]]
        mine = [queue for queue in QUEUES if owner[queue] is victim]
        others = [queue for queue in QUEUES if owner[queue] is not victim]
        for node in cluster.nodes:  # else all stop with one that has no replica
            node.call("CONFIG", "SET", "cluster-require-full-coverage", "no")
        for fault, mend in ((victim.pause, victim.resume), (victim.kill, victim.start)):
            assert await broker.enqueue([message(f"{fault.__name__}-{queue}", queue) for queue in QUEUES]) == []
            fault()
            slowest, taken = 0.0, set[str]()
            deadline = time.monotonic() + 20
            while len(taken) < len(others):
                assert time.monotonic() < deadline, sorted(set(others) - taken)
                started = time.monotonic()
                try:
                    deliveries = await broker.receive(lanes_of(*QUEUES, quota=1), 100, 0.5)
                except BrokerUnavailable:
                    continue  # the others do not serve either, for as long as they have not made up their minds
                slowest = max(slowest, time.monotonic() - started)
                taken |= {delivery.message.queue for delivery in deliveries}
                refusals = await broker.settle([Ack(delivery) for delivery in deliveries])
                assert not refusals
            assert taken == set(others)
            assert slowest < 2.5
            mend()
            await asyncio.to_thread(cluster.wait_until_it_serves)
            deadline = time.monotonic() + 20
            while not taken >= set(mine):
                assert time.monotonic() < deadline, sorted(set(mine) - taken)
                try:
                    deliveries = await broker.receive(lanes_of(*mine, quota=1), 100, 0.5)
                except BrokerUnavailable:
                    continue
                taken |= {delivery.message.queue for delivery in deliveries}
                await broker.settle([Ack(delivery) for delivery in deliveries])


async def test_a_batch_over_nodes_of_which_one_is_frozen(cluster: Cluster) -> None:
    """What concerns the others is done, and each item of the frozen one is refused by itself; asked again later, it is done as well."""
    namespace = new_namespace()
    async with opened(cluster.url, namespace, timeout=1) as broker:
        victim = cluster.nodes[0]
        mine = {queue for queue in QUEUES if cluster.owner(keys.slot(keys.prefix(namespace, queue))) is victim}
        assert await broker.enqueue([message("a", queue) for queue in QUEUES]) == []
        deliveries: list[Delivery] = []
        while len(deliveries) < len(QUEUES):
            deliveries += await broker.receive(lanes_of(*QUEUES, quota=1), 100, 5)
        more = [message("b", queue) for queue in QUEUES]
        victim.pause()
        verbs: list[tuple[Callable[[], Awaitable[Any]], list[str]]] = [
            (lambda: broker.extend(deliveries), [each.message.queue for each in deliveries]),
            (lambda: broker.settle([Ack(each) for each in deliveries]), [each.message.queue for each in deliveries]),
            (lambda: broker.enqueue(more), QUEUES),
        ]
        for verb, queues in verbs:
            refusals = await verb()
            assert {queues[refusal.index] for refusal in refusals} == mine
            assert all(isinstance(refusal.error, BrokerError) for refusal in refusals)
            assert not any(isinstance(refusal.error, LeaseLost) for refusal in refusals)
        victim.resume()
        await asyncio.to_thread(cluster.wait_until_it_serves)
        assert await broker.settle([Ack(each) for each in deliveries]) == []
        assert await broker.enqueue(more) == []
        assert [(stats.ready, stats.leased) for stats in await broker.stats(QUEUES)] == [(1, 0)] * len(QUEUES)


@pytest.mark.parametrize("wait_replicas", [0, 1])
async def test_a_replica_takes_over(source: Any, cluster_with_replicas: Cluster, wait_replicas: int) -> None:
    """A master is killed: its replica is found and serves. With wait_replicas nothing that was confirmed is lost, and nothing is
    confirmed until there is a replica again. Later the old one is back, and takes over again without a death."""
    cluster = cluster_with_replicas
    async with Traffic(f"{cluster.url}?timeout=5&wait_replicas={wait_replicas}&wait_timeout=1") as traffic:
        await traffic.flows()
        victim = cluster.owner(keys.slot(keys.prefix(traffic.namespace, "q")))
        [replica] = cluster.replicas(victim)
        victim.kill()
        await asyncio.to_thread(wait_until, lambda: replica in cluster.masters and cluster.serves, "the replica serves", 90)
        if not wait_replicas:
            await traffic.flows(20)
        victim.start()
        await asyncio.to_thread(cluster.wait_until_it_serves)
        await traffic.flows(20)
        await asyncio.to_thread(cluster.failover, victim)
        await traffic.flows(20)
        lost = await traffic.ends()
        print(f"wait_replicas={wait_replicas}: {len(lost)} confirmed ones lost; {traffic.said()}")
    assert not lost or not wait_replicas
    assert len(lost) < 100
