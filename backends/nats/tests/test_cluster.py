"""Three servers that are one cluster, and streams on all of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator

import flow
import nodes
import pytest

from crossdock.errors import BrokerUnavailable
from crossdock.spi import Broker, BrokerEvent, Delivery, Disconnected, Nack, State, Survives
from crossdock_conformance.servers.finding import BinarySource

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster(a_source: BinarySource) -> Iterator[nodes.Cluster]:
    """A cluster of the newest version."""
    servers = nodes.Cluster(a_source)
    yield servers
    servers.close()


async def _until_it_works(broker: Broker) -> None:
    """Return when the cluster makes streams."""

    async def works() -> bool:
        try:
            await broker.stats(["q"])
        except BrokerUnavailable:
            return False
        return True

    for _ in range(200):
        if await works():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the cluster does not come up")


async def test_replicated_streams_outlive_their_leader(cluster: nodes.Cluster) -> None:
    """While tasks flow, the server that leads the stream is killed, twice: what was stored comes, and work goes on without it."""
    url = f"{cluster.url}?replicas=3&timeout=3"
    events: list[BrokerEvent] = []
    async with (
        flow.opened(url, events, lease=5.0, namespace="flow") as worker,
        flow.opened(url, lease=5.0, namespace="flow") as producer,
    ):
        assert worker.capabilities.survives >= {Survives.POWER, Survives.NODE}
        await _until_it_works(worker)
        heard: Counter[str] = Counter()
        stored: set[str] = set()
        over = False

        async def work() -> None:
            while not over:
                try:
                    taken = await worker.receive(flow.LANES, 20, 0.5)
                except BrokerUnavailable:
                    continue
                again, done = taken[:1], taken[1:]
                await _settle(worker, [Nack(each) for each in again if heard[each.message.id] == 0])
                heard.update(each.message.id for each in taken)
                await flow.ack_for_good(worker, [*done, *(each for each in again if heard[each.message.id] > 1)])

        async def produce() -> None:
            number = 0
            while not over:
                batch = flow.messages(5, f"b{number}-")
                await flow.enqueue_for_good(producer, batch)
                stored.update(each.id for each in batch)
                number += 1
                await asyncio.sleep(0.01)

        running = [asyncio.ensure_future(work()), asyncio.ensure_future(produce())]
        for _ in range(2):
            goal = len(stored) + 200
            await flow.until(lambda goal=goal: len(stored) >= goal, "messages could be stored")  # type: ignore[misc]
            leader = cluster.named(await _leader(cluster, "CD=flow=q"))
            await asyncio.to_thread(leader.kill)
            goal = len(stored) + 100
            await flow.until(lambda goal=goal: len(stored) >= goal, "messages could be stored without it")  # type: ignore[misc]
            await asyncio.to_thread(leader.start)
        over = True
        await asyncio.wait(running)
        for task in running:
            task.result()
        while stored - heard.keys():
            taken = await flow.take(worker, 1)
            heard.update(each.message.id for each in taken)
            await flow.ack_for_good(worker, taken)
        assert not any("gave no sign" in event.reason for event in events if isinstance(event, Disconnected))


async def _settle(broker: Broker, endings: list[Nack]) -> None:
    if endings:
        try:
            await broker.settle(endings)
        except BrokerUnavailable:
            return  # it comes again when its lease is over


async def _leader(cluster: nodes.Cluster, stream: str) -> str:
    for node in cluster.nodes:
        if node.running:
            async with flow.client(node.url) as driver:
                info = await flow.api(driver, f"STREAM.INFO.{stream}")
                if leader := info.get("cluster", {}).get("leader"):
                    return str(leader)
    raise AssertionError(f"nobody leads {stream}")


async def test_without_a_quorum(cluster: nodes.Cluster) -> None:
    """While two of three servers are down nothing is said to be stored, and the error says why; when they are back, all goes on, and what
    was stored is there."""
    url = f"{cluster.url}?replicas=3&timeout=3"
    async with flow.opened(url, lease=5.0, namespace="quorum") as broker:
        await _until_it_works(broker)
        await flow.enqueue_for_good(broker, flow.messages(20))
        await flow.take(broker, 5)
        # The one that leads is among them: else it would take the server that is left ten seconds to notice.
        leader = cluster.named(await _leader(cluster, "CD=quorum=q"))
        down = [leader, next(node for node in cluster.nodes if node is not leader)]
        for node in down:
            await asyncio.to_thread(node.kill)
        said = ""
        end = time.monotonic() + flow.PATIENCE
        number = 0
        while "no quorum" not in said:
            assert time.monotonic() < end, f"all that is said without a quorum is {said!r}"
            try:
                [refusal] = await broker.enqueue(flow.messages(1, f"without{number}-"))
                said = str(refusal.error)
            except BrokerUnavailable as error:
                said = str(error)
            number += 1
        for node in down:
            await asyncio.to_thread(node.start)
        heard: set[str] = set()
        while not {f"m{number}" for number in range(20)} <= heard:
            taken = await flow.take(broker, 1)
            heard.update(each.message.id for each in taken)
            await flow.ack_for_good(broker, taken)


async def test_every_verb_on_replicas(cluster: nodes.Cluster) -> None:
    """Leases that are lost, retries, dead letters, replays, delays, removals and figures are the same on three servers."""
    url = f"{cluster.url}?replicas=3&timeout=3"
    async with flow.opened(url, lease=2.0, namespace="verbs") as broker:
        await _until_it_works(broker)
        await flow.enqueue_for_good(broker, flow.messages(20))
        await flow.enqueue_for_good(broker, flow.messages(20))  # again: once
        taken: list[Delivery] = await flow.take(broker, 20)
        assert not await broker.settle([Nack(each) for each in taken[:5]])
        assert not await broker.settle([Nack(each, 0.5) for each in taken[5:10]])
        assert not await flow.ack_for_good(broker, taken[10:15])
        for count, number in ((1, 10), (2, 5)):
            again = await flow.take(broker, number)
            assert [each.delivery_count for each in again] == [count] * number
            assert not await flow.ack_for_good(broker, again)
        [stats] = await broker.stats(["q"])
        assert (stats.ready, stats.scheduled, stats.leased, stats.dead) == (0, 0, 0, 0)
        await flow.enqueue_for_good(broker, flow.messages(3, "gone"))
        assert not await broker.remove("q", State.READY, ["gone1"])
        assert [entry.message.id for entry in (await broker.peek("q", State.READY)).entries] == ["gone0", "gone2"]
