"""A cluster of three real nodes: one may be lost at any moment, whichever it is; two may not, and that is said.

It takes two minutes, most of it for starts of nodes: name this file to run it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest
from rabbitmq_nodes import Cluster
from rabbitmq_traffic import Traffic, make_broker, message, until

from crossdock_conformance.servers.finding import BinarySource
from crossdock_rabbitmq import names

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]


@pytest.fixture(scope="session")
def _cluster(source: BinarySource) -> Iterator[Cluster]:
    with Cluster(source) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: Cluster) -> Cluster:
    """Three nodes, running; their data are what other tests left."""
    for node in _cluster.nodes:
        node.start()
    return _cluster


async def test_one_node_of_three_may_be_lost(cluster: Cluster) -> None:
    """The node that leads the queue is killed while tasks flow, and then the two others in turn: all that was confirmed is done."""
    async with Traffic(f"{cluster.url}?timeout=5") as traffic:
        await traffic.flows()
        queue = names.ready(traffic.namespace, "q", message("").priority)
        leader = await asyncio.to_thread(cluster.leader, queue)
        for node in (leader, *(node for node in cluster.nodes if node is not leader)):
            await asyncio.to_thread(node.kill)
            await traffic.flows()
            await asyncio.to_thread(node.start)
            await traffic.flows()
        lost = await traffic.ends()
        print(traffic.said())
        assert not lost, traffic.said()


async def test_two_nodes_of_three_may_not(cluster: Cluster) -> None:
    """Without a majority nothing is stored, and the error says why. When the nodes are back work goes on, and nothing is lost."""
    async with Traffic(f"{cluster.url}?timeout=3") as traffic:
        await traffic.flows()
        for node in cluster.nodes[1:]:
            await asyncio.to_thread(node.kill)
        url = f"amqp://guest:guest@{cluster.nodes[0].address}/?timeout=2"
        broker = make_broker(url, traffic.namespace)
        await broker.open()
        try:
            refusals = await broker.enqueue([message("m")])
            print([str(refusal.error) for refusal in refusals])
            assert len(refusals) == 1
            assert re.search(r"no confirm came within 2 s|too few of its nodes are there", str(refusals[0].error))
        finally:
            await broker.close()
        before = len(traffic.confirmed)
        await until(lambda: len(traffic.unknown | traffic.refused) > 20, "the producer is told")
        assert len(traffic.confirmed) == before, "confirmed without a majority"
        print(traffic.said())
        for node in cluster.nodes[1:]:
            await asyncio.to_thread(node.start)
        await traffic.flows()
        lost = await traffic.ends()
        print(traffic.said())
        assert not lost, traffic.said()
