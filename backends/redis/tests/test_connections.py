"""One server that is killed, stopped, frozen, emptied or cut off while a producer and a worker are at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from proxies import proxy_to
from topologies import Node, configured
from traffic import Traffic, lanes_of, message, opened, until

from crossdock.errors import BrokerError, BrokerUnavailable
from crossdock.spi import Ack, BrokerEvent, Connected, Disconnected, QueueSpec, State, StateLost

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]


@pytest.fixture
def server(a_source: Any, use: Any) -> Node:
    """A server of the test's own."""
    node: Node = use(configured(a_source))
    return node


async def test_forty_restarts_lose_nothing(source: Any, use: Any) -> None:
    """Killed and stopped in turn, forty times in a row: whatever was confirmed arrives, no ack is forgotten, and nobody falls silent."""
    server: Node = use(configured(source))
    async with Traffic(f"{server.url}?timeout=2") as traffic:
        for number in range(40):
            await asyncio.to_thread(server.kill if number % 2 else server.stop)
            await asyncio.to_thread(server.start)
            await traffic.flows()
        lost = await traffic.ends()
        print(traffic.said())
    assert not lost
    assert not traffic.run_after_ack
    assert max(traffic.slowest.values()) < 4


async def test_a_frozen_server_keeps_nobody_waiting(server: Node) -> None:
    """While the server is frozen every verb ends within its deadline, by one of our errors; afterwards all goes on by itself."""
    async with opened(server.url, timeout=1) as broker:
        await broker.declare([QueueSpec("q")])
        await broker.enqueue([message("a"), message("b")])
        [first, second] = await broker.receive(lanes_of("q", quota=2), 2, 5)
        verbs: list[Callable[[], Awaitable[Any]]] = [
            lambda: broker.declare([QueueSpec("q")]),
            lambda: broker.enqueue([message("c")]),
            lambda: broker.receive(lanes_of("q", quota=1), 1, 0.5),
            lambda: broker.extend([first]),
            lambda: broker.settle([Ack(first)]),
            lambda: broker.stats(),
            lambda: broker.stats(["q"]),
            lambda: broker.peek("q", State.READY),
            lambda: broker.remove("q", State.READY, ["c"]),
            lambda: broker.purge("q", State.DEAD),
            lambda: broker.replay("q", []),
        ]
        server.pause()
        for verb in verbs:
            started = time.monotonic()
            try:
                refusals = await verb()
            except BrokerError:
                pass
            else:
                assert all(isinstance(refusal.error, BrokerError) for refusal in refusals)
            assert time.monotonic() - started < 2.5, verb
        server.resume()
        assert await broker.settle([Ack(first), Ack(second)]) == []
        assert [each.ready for each in await broker.stats(["q"])] in ([0], [1])  # the enqueue that nobody knew the end of


async def test_closing_a_broker_whose_server_is_frozen(server: Node) -> None:
    """It ends within the deadline."""
    async with opened(server.url, timeout=1) as broker:
        await broker.enqueue([message("a")])
        waiting = asyncio.create_task(broker.receive(lanes_of("q", quota=1), 1, 30))
        assert await waiting
        server.pause()
        waiting = asyncio.create_task(broker.receive(lanes_of("q", quota=1), 1, 30))
        started = time.monotonic()
        await broker.close()
        assert time.monotonic() - started < 4
        with pytest.raises(BrokerError):
            await waiting
        server.resume()


@pytest.mark.parametrize("fault", ["stall", "cut"])
async def test_a_broken_way_to_the_server(server: Node, fault: str) -> None:
    """Connections that are cut, or stay open and carry nothing any more, are replaced: nothing is lost, nobody falls silent."""
    async with proxy_to(server.url).running() as proxy, Traffic(f"{proxy.url}?timeout=1") as traffic:
        for _ in range(4):
            await traffic.flows()
            getattr(proxy, fault)()
            await traffic.flows()
        lost = await traffic.ends()
        print(traffic.said())
    assert not lost
    assert not traffic.run_after_ack
    assert max(traffic.slowest.values()) < 2.5


async def test_an_idle_worker_notices_a_half_open_connection(server: Node) -> None:
    """A worker that waits for work when its connections go silent gets what is enqueued afterwards."""
    events: list[BrokerEvent] = []
    async with (
        proxy_to(server.url).running() as proxy,
        opened(server.url, "t1") as producer,
        opened(proxy.url, "t1", events.append, timeout=1) as worker,
    ):
        assert not await worker.receive(lanes_of("q", quota=1), 1, 0.3)
        proxy.stall()
        await producer.enqueue([message("a")])
        deliveries: Any = ()
        deadline = time.monotonic() + 10
        while not deliveries and time.monotonic() < deadline:
            try:
                deliveries = await worker.receive(lanes_of("q", quota=1), 1, 5)
            except BrokerUnavailable:
                continue
        assert [delivery.message.id for delivery in deliveries] == ["a"]
        assert await worker.settle([Ack(deliveries[0])]) == []
    kinds = [type(event) for event in events]
    assert kinds.index(Disconnected) < len(kinds) - 1 - kinds[::-1].index(Connected)


async def test_each_connection_may_be_killed(server: Node) -> None:
    """CLIENT KILL of any single connection is made good."""
    async with Traffic(f"{server.url}?timeout=2") as traffic:
        await traffic.flows()
        for client in connections(server):
            server.call("CLIENT", "KILL", "ID", client)
            await traffic.flows()
        lost = await traffic.ends()
    assert not lost
    assert not traffic.run_after_ack


async def test_scripts_that_are_flushed_are_loaded_again(server: Node) -> None:
    """SCRIPT FLUSH costs nothing but time."""
    async with Traffic(f"{server.url}?timeout=2") as traffic:
        for _ in range(10):
            server.call("SCRIPT", "FLUSH")
            await traffic.flows()
        lost = await traffic.ends()
    assert not lost
    assert not traffic.errors


async def test_a_server_that_is_emptied_is_told_once(server: Node) -> None:
    """FLUSHALL takes all there was; queues are declared again, that is reported once, and work goes on."""
    events: list[BrokerEvent] = []
    async with Traffic(f"{server.url}?timeout=2", report=events.append) as traffic:
        await traffic.flows()
        server.call("FLUSHALL")
        await traffic.flows()
        await until(lambda: any(isinstance(event, StateLost) for event in events), "the loss is reported")
        await traffic.flows()
    assert sum(isinstance(event, StateLost) for event in events) == 1


async def test_an_idle_worker_declares_again_what_was_emptied(server: Node) -> None:
    """Also where nobody enqueues: the queue is back with its settings."""
    events: list[BrokerEvent] = []
    async with opened(server.url, "t1", events.append) as worker:
        await worker.declare([QueueSpec("q", max_ready=1)])
        server.call("FLUSHALL")
        await until(lambda: any(isinstance(event, StateLost) for event in events), "the loss is reported")
        refusals = await worker.enqueue([message("a"), message("b")])
        assert [refusal.index for refusal in refusals] == [1]


async def test_a_server_that_loads_its_data_is_waited_for(a_source: Any, use: Any) -> None:
    """LOADING is told as what it is, and a Broker that is open goes on when it is over."""
    server: Node = use(configured(a_source, "key-load-delay 100"))
    reasons: list[str] = []
    async with opened(server.url, timeout=0.3) as broker:
        for number in range(1500):  # more than the server loads in one go
            assert await broker.enqueue([message(f"m{number}")]) == []
        server.kill()
        starting = asyncio.create_task(asyncio.to_thread(server.start))
        deadline = time.monotonic() + 20
        while True:
            try:
                [stats] = await broker.stats(["q"])
                break
            except BrokerUnavailable as error:
                reasons.append(str(error))
                assert time.monotonic() < deadline
        await starting
    assert stats.ready == 1500
    assert any("it has just started and reads its data" in reason for reason in reasons), reasons


def connections(server: Node) -> list[str]:
    """The ids of all connections that are ours."""
    lines = server.call("CLIENT", "LIST").decode().splitlines()
    told = [dict(field.partition("=")[::2] for field in line.split(" ")) for line in lines]
    return [each["id"] for each in told if each["name"] == "crossdock"]
