"""What becomes of connections: cut, half-open, refused, to several hosts; and of queues that are not as they should be."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import aiormq
import pytest
from proxies import Proxy

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, ConfigurationError
from crossdock.plugins import create_broker
from crossdock.spi import (
    LEVELS,
    Ack,
    Broker,
    BrokerEvent,
    Connected,
    Disconnected,
    Lane,
    Message,
    Priority,
    QueueSpec,
    SupportsErase,
)
from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

LANES = [Lane("q", level, 0) for level in LEVELS]


@asynccontextmanager
async def opened(url: str, namespace: str, events: list[BrokerEvent] | None = None) -> AsyncGenerator[Broker]:
    """An open Broker with a queue `q`."""
    broker = create_broker(url, namespace=namespace, clock=SystemClock(), report=(events if events is not None else []).append)
    await broker.open()
    try:
        await broker.declare([QueueSpec("q")])
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def namespace(server: Server) -> AsyncGenerator[str]:
    """A new namespace, whose queue `q` is erased in the end."""
    name = f"t{secrets.token_hex(8)}"
    yield name
    async with opened(server.url, name) as eraser:
        assert isinstance(eraser, SupportsErase)
        await eraser.erase(["q"])


async def test_forty_cuts_leave_nobody_deaf(server: Server) -> None:
    """While its connections are cut forty times in a row, nothing confirmed is lost, and the same worker goes on."""
    with Proxy(server.url + "?timeout=4") as proxy:
        async with namespace(server) as name, opened(proxy.url, name) as worker, opened(proxy.url, name) as producer:
            stored: set[str] = set()
            came: set[str] = set()

            async def work() -> None:
                while True:
                    try:
                        deliveries = await worker.receive(LANES, 10, 5)
                    except BrokerUnavailable:  # the cuts come more quickly than its connection is made again
                        continue
                    came.update(delivery.message.id for delivery in deliveries)
                    await worker.settle(list(map(Ack, deliveries)))

            async def produce(cycle: int) -> None:
                message = Message(f"{cycle}-{secrets.token_hex(4)}", "q", Priority.NORMAL, b"")
                if not await producer.enqueue([message]):
                    stored.add(message.id)

            working = asyncio.ensure_future(work())
            try:
                for cycle in range(40):
                    proxy.cut()
                    count = len(stored)
                    deadline = time.monotonic() + 15
                    while len(stored) == count:
                        await produce(cycle)
                        assert time.monotonic() < deadline, f"nothing could be stored after cut {cycle}"
                deadline = time.monotonic() + 15
                while not stored <= came:
                    if working.done():
                        working.result()
                    assert time.monotonic() < deadline, f"lost or deaf: {sorted(stored - came)}"
                    await asyncio.sleep(0.01)
            finally:
                working.cancel()
                await asyncio.wait([working])


async def test_a_half_open_connection_is_noticed(server: Server) -> None:
    """A connection on which nothing comes any more is given up after two to three heartbeats, and another one is made."""
    events: list[BrokerEvent] = []
    with Proxy(server.url + "?timeout=4&heartbeat=1") as proxy:
        async with namespace(server) as name, opened(proxy.url, name, events) as broker:
            events.clear()
            proxy.stall()
            began = time.monotonic()
            while not any(isinstance(event, Connected) for event in events):
                assert time.monotonic() < began + 15, "nobody noticed"
                await asyncio.sleep(0.01)
            assert isinstance(events[0], Disconnected)
            assert not await broker.enqueue([Message("m", "q", Priority.NORMAL, b"")])


async def test_the_next_host_is_tried(server: Server) -> None:
    """Where the first host of the URL does not answer, the next one is taken."""
    credentials, _, host = server.url.removeprefix("amqp://").rstrip("/").rpartition("@")
    async with namespace(server) as name, opened(f"amqp://{credentials}@127.0.0.1:1,{host}/", name) as broker:
        assert not await broker.enqueue([Message("m", "q", Priority.NORMAL, b"")])


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda url: url.replace("guest:guest", "guest:wrong"), "password"), (lambda url: url + "no-such-host", "virtual host")],
    ids=["password", "virtual host"],
)
async def test_who_is_not_let_in_is_told_why(server: Server, change: object, said: str) -> None:
    """A wrong password and a virtual host that is not there are told apart, in a sentence without the secret."""
    assert callable(change)
    broker = create_broker(change(server.url), namespace="t", clock=SystemClock(), report=lambda event: None)
    with pytest.raises(BrokerUnavailable, match=said) as caught:
        await broker.open()
    assert "wrong" not in str(caught.value).replace("wrong password", "")
    await broker.close()


async def test_a_queue_with_other_arguments_is_left_alone(server: Server) -> None:
    """A queue that is there with other arguments is reported, with the argument and what to do, and is not touched."""
    async with namespace(server) as name:
        connection = await aiormq.connect(server.url)
        channel = await connection.channel()
        await channel.queue_declare(f"cd.{name}.q.q.p9", durable=True)
        with pytest.raises(ConfigurationError, match="with other arguments: x-"):
            async with opened(server.url, name):
                pass
        await channel.queue_delete(f"cd.{name}.q.q.p9")
        await connection.close()


async def test_classic_queues_count_losses(server: Server) -> None:
    """On classic queues, where the server does not count, a delivery that was lost with its connection comes with a higher count."""
    url = server.url + "?queue_type=classic"
    name = f"t{secrets.token_hex(8)}"
    with Proxy(url) as proxy:
        async with opened(proxy.url, name) as broker:
            assert not await broker.enqueue([Message("m", "q", Priority.NORMAL, b"x")])
            for count in (1, 2, 3):
                (delivery,) = await broker.receive(LANES, 1, 30)
                while delivery.delivery_count < count:  # the copy before, whose ack the cut took along
                    assert not await broker.settle([Ack(delivery)])
                    (delivery,) = await broker.receive(LANES, 1, 30)
                assert (delivery.message.id, delivery.delivery_count) == ("m", count)
                proxy.cut()
            assert isinstance(broker, SupportsErase)
            deadline = time.monotonic() + 15
            while True:
                try:
                    await broker.erase(["q"])
                    break
                except BrokerUnavailable:
                    assert time.monotonic() < deadline
