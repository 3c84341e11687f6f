"""Tasks that take longer than the server lets a delivery be held: what is said of it, and what it costs."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager

import pytest
from rabbitmq_nodes import control

from crossdock.clock import SystemClock
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, Delivery, Lane, Message, Priority, QueueSpec, SupportsErase
from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

WAIT = 30.0
TIMEOUT_MS = 1000
LANES = [Lane("q", level, 0) for level in LEVELS]


@pytest.fixture
def impatient(server: Server) -> Iterator[Server]:
    """The server, while it lets a delivery be held for a second only, and looks twice a second."""
    setting = "application:set_env(rabbit, {}, {})."
    change = setting.format("consumer_timeout", TIMEOUT_MS)[:-1] + "," + setting.format("channel_tick_interval", 500)
    control(server, "eval", change)
    yield server
    change = setting.format("consumer_timeout", 1_800_000)[:-1] + "," + setting.format("channel_tick_interval", 60_000)
    control(server, "eval", change)


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Broker]:
    """An open Broker with a queue `q` in a namespace of its own, erased in the end."""
    broker = create_broker(url, namespace=f"t{secrets.token_hex(8)}", clock=SystemClock(), report=lambda event: None)
    await broker.open()
    try:
        yield broker
        assert isinstance(broker, SupportsErase)
        await broker.erase(["q"])
    finally:
        await broker.close()


async def test_the_server_s_timeout_costs_one_level_and_loses_nothing(impatient: Server) -> None:
    """When the server takes a delivery away that was held too long, those of other levels are settled as if nothing had been, and that one
    and its neighbours come again; where a queue can ask for more time, it has it."""
    async with opened(impatient.url + "?consumer_timeout=1") as broker:
        await broker.declare([QueueSpec("q", lease=60)])
        short, neighbour = Message("short", "q", Priority.HIGH, b""), Message("neighbour", "q", Priority.NORMAL, b"")
        assert not await broker.enqueue([Message("long", "q", Priority.NORMAL, b""), neighbour])
        held: dict[str, Delivery] = {}
        while len(held) < 2:
            held |= {delivery.message.id: delivery for delivery in await broker.receive(LANES, 10, WAIT)}
        assert not await broker.enqueue([short])
        (held["short"],) = await broker.receive(LANES, 10, WAIT)
        if not tuple(map(int, impatient.version.split(".")[:2])) < (3, 12):
            await asyncio.sleep(3 * TIMEOUT_MS / 1000)
            assert not await broker.settle(list(map(Ack, held.values())))
            return
        again: dict[str, Delivery] = {}
        deadline = time.monotonic() + WAIT
        extended = asyncio.create_task(_keep(broker, held["short"]))
        while again.keys() < {"long", "neighbour"}:
            assert time.monotonic() < deadline, f"only {sorted(again)} came again"
            for delivery in await broker.receive(LANES, 10, 1):
                if delivery.message.id != "short":
                    again[delivery.message.id] = delivery
                    assert delivery.delivery_count > 1
                    assert not await broker.settle([Ack(delivery)])
        extended.cancel()
        await asyncio.wait([extended])
        assert [refusal.index for refusal in await broker.settle([Ack(held["long"]), Ack(held["neighbour"])])] == [0, 1]


async def _keep(broker: Broker, delivery: Delivery) -> None:
    """Be quick with a task: settle it within what the server allows."""
    await asyncio.sleep(TIMEOUT_MS / 5000)
    assert not await broker.settle([Ack(delivery)])


async def test_a_task_that_is_too_long_is_warned_of(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """A lease beyond what the server lets a delivery be held has the setting named, once for each queue; where queues can ask for more,
    nothing is said."""
    with caplog.at_level(logging.WARNING, "crossdock.broker"):
        async with opened(server.url + "?consumer_timeout=0.2") as broker:
            await broker.declare([QueueSpec("q", lease=60)])
            await broker.declare([QueueSpec("q", lease=60)])
        async with opened(server.url + "?consumer_timeout=10") as broker:
            await broker.declare([QueueSpec("q", lease=5)])
            assert not await broker.enqueue([Message("m", "q", Priority.NORMAL, b"")])
            (delivery,) = await broker.receive(LANES, 1, WAIT)
            assert not await broker.extend([delivery])
    warnings = [record.getMessage() for record in caplog.records if record.name == "crossdock.broker"]
    if tuple(map(int, server.version.split(".")[:2])) < (3, 12):
        (warning,) = warnings
        assert "consumer_timeout in its rabbitmq.conf" in warning and "leases of 60 s" in warning
    else:
        assert not warnings
