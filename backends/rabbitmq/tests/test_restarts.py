"""The server goes and comes back, whichever way: nothing that it confirmed is lost, and nobody stays deaf."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from proxies import Proxy
from rabbitmq_nodes import control
from rabbitmq_traffic import PATIENCE, Traffic, erase, lanes_of, make_broker, message, new_namespace, opened, until

from crossdock.errors import BrokerUnavailable, LeaseLost
from crossdock.spi import Ack, BrokerEvent, Connected, Disconnected, Priority
from crossdock_conformance.servers import Server
from crossdock_conformance.servers.recipe import HOST
from crossdock_rabbitmq import names

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(300)]


async def test_restarts_lose_nothing(server: Server) -> None:
    """The server is ended in order, and killed twice, while a producer and a worker are at it: all that it confirmed is done.

    Who begins without a server is told that nobody answers, and where; the same Broker opens when the server is there.
    """
    late = make_broker(f"{server.url}?timeout=5", new_namespace())
    async with Traffic(f"{server.url}?timeout=5") as traffic:
        # In order the first time: RabbitMQ 3.10 loses a queue if it is killed within half a second of declaring it.
        for end in (server.stop, server.kill, server.kill):
            await traffic.flows()
            await asyncio.to_thread(end)
            with pytest.raises(BrokerUnavailable, match=r"nobody answers at 127\.0\.0\.1:\d+"):
                await late.open()
            await asyncio.to_thread(server.start)
        await traffic.flows()
        lost = await traffic.ends()
        assert not lost, traffic.said()
    await late.open()
    await late.close()


async def test_connections_that_the_operator_closes_are_made_again(server: Server) -> None:
    """An operator closes all connections while a producer and a worker are at it: why is told, nothing is lost, and it goes on."""
    events: list[BrokerEvent] = []
    async with Traffic(f"{server.url}?timeout=5", report=events.append) as traffic:
        await traffic.flows()
        await asyncio.to_thread(control, server, "close_all_connections", "--vhost", "/", "by_tests")
        await until(lambda: sum(isinstance(event, Disconnected) for event in events) >= 2, "both have noticed")
        await traffic.flows()
        lost = await traffic.ends()
        assert not lost, traffic.said()
    reasons = [event.reason for event in events if isinstance(event, Disconnected)]
    assert any("by_tests" in reason for reason in reasons), reasons


async def test_who_waits_on_a_half_open_connection_hears_again(server: Server) -> None:
    """A worker waits for messages, and its connection goes silent without an end: it gets what is enqueued from then on."""
    namespace = new_namespace()
    with Proxy(f"{server.url}?timeout=5&heartbeat=1") as proxy:
        async with opened(proxy.url, namespace) as worker, opened(server.url, namespace) as producer:
            waiting = asyncio.ensure_future(worker.receive(lanes_of("q", quota=1), 1, PATIENCE))
            await asyncio.sleep(0)
            await until(lambda: proxy.connections >= 2, "it is connected")
            proxy.stall()
            assert not await producer.enqueue([message("m")])
            (delivery,) = await waiting
            assert delivery.message.id == "m"
            assert not await worker.settle([Ack(delivery)])
    await erase(server.url, namespace)


async def test_a_host_that_says_nothing_is_passed_over(server: Server) -> None:
    """Of several hosts, the first lets us in and then says nothing: the second one is taken after the timeout."""
    namespace = new_namespace()
    silent = await asyncio.start_server(_say_nothing, HOST, 0)
    port = silent.sockets[0].getsockname()[1]
    login, _, host = server.url.removeprefix("amqp://").rstrip("/").rpartition("@")
    async with silent, opened(f"amqp://{login}@{HOST}:{port},{host}/?timeout=1", namespace) as broker:
        assert not await broker.enqueue([message("m")])
    await erase(server.url, namespace)


async def _say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def test_a_queue_that_does_not_answer_holds_up_no_other(server: Server) -> None:
    """One level's queue answers nothing, as when nobody leads it: the other levels are received from. When it answers it is, too."""
    namespace = new_namespace()
    events: list[BrokerEvent] = []
    async with opened(server.url, namespace) as producer:
        process = f"whereis('%2F_{names.ready(namespace, 'q', Priority.LOW)}')"
        await asyncio.to_thread(control, server, "eval", f"sys:suspend({process}).")
        async with opened(f"{server.url}?timeout=1", namespace, events.append) as worker:
            for id in ("first", "second", "third"):
                assert not await worker.receive(lanes_of("q", quota=1), 4, 0.1)
                assert not await producer.enqueue([message(id)])
                (delivery,) = await _receive(worker, 1)
                assert delivery.message.id == id
                assert not await worker.settle([Ack(delivery)])
            assert not any(isinstance(event, Disconnected) for event in events), "it was given up, with all that was out"
            await asyncio.to_thread(control, server, "eval", f"sys:resume({process}).")
            assert not await producer.enqueue([message("low", priority=Priority.LOW)])
            (delivery,) = await _receive(worker, 1)
            assert delivery.message.id == "low"
            assert not await worker.settle([Ack(delivery)])
    await erase(server.url, namespace)


@pytest.mark.parametrize("how", ["cut", "closed"])
async def test_a_settlement_never_hits_another_delivery(server: Server, how: str) -> None:
    """What was delivered on a channel that is gone cannot be settled, though other deliveries have its tags by now: those stay leased."""
    namespace = new_namespace()
    events: list[BrokerEvent] = []
    with Proxy(f"{server.url}?timeout=5") as proxy:
        async with opened(proxy.url, namespace, events.append) as worker, opened(server.url, namespace) as other:
            assert not await worker.enqueue([message(f"old{number}") for number in range(5)])
            old = await _receive(worker, 5)
            if how == "cut":
                proxy.cut()
            else:
                await asyncio.to_thread(control, server, "close_all_connections", "--vhost", "/", "by_tests")
            # Refused at once, before there is a new connection, and afterwards.
            await until(lambda: any(isinstance(event, Disconnected) for event in events), "it is noticed")
            await _refuses(worker, old)
            for delivery in await _receive(other, 5):  # done by somebody else
                assert not await other.settle([Ack(delivery)])
            await until(lambda: isinstance(events[-1], Connected), "it is connected")
            assert not await other.enqueue([message(f"new{number}") for number in range(5)])
            new = await _receive(worker, 5)
            assert {delivery.receipt.tag for delivery in new} & {delivery.receipt.tag for delivery in old}, "no tag came twice"
            await _refuses(worker, old)
            proxy.cut()
        async with opened(server.url, namespace) as heir:
            again = await _receive(heir, 5)
            assert sorted(delivery.message.id for delivery in again) == [f"new{number}" for number in range(5)]
            assert not await heir.settle([Ack(delivery) for delivery in again])
    await erase(server.url, namespace)


async def _receive(broker: Any, count: int) -> list[Any]:
    taken: list[Any] = []

    while len(taken) < count:
        came = await broker.receive(lanes_of("q", quota=count), count - len(taken), PATIENCE)
        assert came, f"only {len(taken)} of {count} came"
        taken += came
    return taken


async def _refuses(broker: Any, deliveries: list[Any]) -> None:
    refusals = await broker.settle([Ack(delivery) for delivery in deliveries])
    assert len(refusals) == len(deliveries)
    assert all(isinstance(refusal.error, LeaseLost) for refusal in refusals)
