"""The server is short of memory or disk, and takes no messages: who enqueues is told, and who works goes on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from rabbitmq_nodes import control
from rabbitmq_traffic import PATIENCE, erase, lanes_of, message, new_namespace, opened, until

from crossdock.errors import EnqueueFailed, EnqueueUnknown
from crossdock.spi import Ack, Blocked, BrokerEvent, Connected, Delivery, Disconnected, Nack, Unblocked
from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]

ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "0"), ("set_vm_memory_high_watermark", "0.4")),
    "disk": (("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "50MB")),
}
"""What raises an alarm, and what ends it."""


@asynccontextmanager
async def alarm(server: Server, kind: str) -> AsyncIterator[Callable[[], None]]:
    """While this alarm is on. It can be ended early."""
    begin, end = ALARMS[kind]
    ended = False

    def stop() -> None:
        nonlocal ended
        if not ended:
            control(server, *end)
        ended = True

    await asyncio.to_thread(control, server, *begin)
    try:
        yield stop
    finally:
        await asyncio.to_thread(stop)


@pytest.mark.parametrize("kind", ALARMS)
async def test_alarms(server: Server, kind: str) -> None:
    """Under an alarm the first enqueue is unknown, because it was written; what follows fails at once. Work goes on, and is settled.

    The end of the alarm is told, and enqueues work again. What was unknown was stored by then. No connection was lost.
    """
    namespace = new_namespace()
    events: list[BrokerEvent] = []
    async with (
        opened(f"{server.url}?timeout=2", namespace, events.append) as producer,
        opened(f"{server.url}?timeout=2", namespace, events.append) as worker,
    ):
        assert not await producer.enqueue([message(f"before{number}") for number in range(4)])
        async with alarm(server, kind) as end:
            (unknown,) = await producer.enqueue([message("written")])
            assert isinstance(unknown.error, EnqueueUnknown)
            assert any(isinstance(event, Blocked) for event in events)
            for attempt in range(3):
                began = time.monotonic()
                (failed,) = await producer.enqueue([message(f"after{attempt}")])
                assert isinstance(failed.error, EnqueueFailed)
                assert "takes no messages" in str(failed.error)
                assert kind in str(failed.error), "the server says which alarm it is"
                assert time.monotonic() - began < 1.5, "it was written, and waited for"
            came: list[Delivery] = []
            while len(came) < 4:
                came += await worker.receive(lanes_of("q", quota=4), 4 - len(came), PATIENCE)
            assert sorted(delivery.message.id for delivery in came) == [f"before{number}" for number in range(4)]
            assert not await worker.settle([Ack(delivery) for delivery in came])
            await asyncio.to_thread(end)
            await until(lambda: isinstance(events[-1], Unblocked), "the end of the alarm is told")
            assert not await producer.enqueue([message("later")])
        ids = set[str]()
        while ids != {"written", "later"}:
            again = await worker.receive(lanes_of("q", quota=4), 4, PATIENCE)
            assert again, f"only {ids} came"
            ids |= {delivery.message.id for delivery in again}
            assert not await worker.settle([Ack(delivery) for delivery in again])
    assert not any(isinstance(event, Disconnected) for event in events), events
    await erase(server.url, namespace)


async def test_a_retry_under_an_alarm_is_not_lost(server: Server) -> None:
    """A retry has to be stored, which an alarm forbids: it is refused, the delivery stays leased, and the retry works afterwards."""
    namespace = new_namespace()
    async with opened(f"{server.url}?timeout=2", namespace) as worker:
        assert not await worker.enqueue([message("m")])
        (delivery,) = await worker.receive(lanes_of("q", quota=1), 1, PATIENCE)
        retry = Nack(delivery, replacement=message("m", body=b"again"))
        async with alarm(server, "memory"):
            assert await worker.settle([retry])
            assert not await worker.extend([delivery]), "it is ours still"
        deadline = time.monotonic() + PATIENCE
        while refusals := await worker.settle([retry]):  # until the server has said that the alarm is over
            assert time.monotonic() < deadline, refusals
        bodies = set[bytes]()
        while b"again" not in bodies:
            came = await worker.receive(lanes_of("q", quota=1), 1, PATIENCE)
            assert came, "the retry is lost"
            bodies |= {each.message.body for each in came}
            assert not await worker.settle([Ack(each) for each in came])
    await erase(server.url, namespace)


async def test_a_loop_that_stands_still_keeps_its_messages(server: Server) -> None:
    """A task blocks the event loop for longer than two heartbeats: its connection is made again by itself, and the worker goes on."""
    namespace = new_namespace()
    events: list[BrokerEvent] = []
    async with opened(f"{server.url}?timeout=5&heartbeat=1", namespace, events.append) as worker:
        assert not await worker.enqueue([message("m")])
        (delivery,) = await worker.receive(lanes_of("q", quota=1), 1, PATIENCE)
        time.sleep(4.5)
        if await worker.settle([Ack(delivery)]):  # the server has taken it back meanwhile
            await until(lambda: isinstance(events[-1], Connected), "it is connected again")
            (delivery,) = await worker.receive(lanes_of("q", quota=1), 1, PATIENCE)
            assert delivery.delivery_count >= 2
            assert not await worker.settle([Ack(delivery)])
        assert not await worker.enqueue([message("n")])
        (delivery,) = await worker.receive(lanes_of("q", quota=1), 1, PATIENCE)
        assert delivery.message.id == "n"
        assert not await worker.settle([Ack(delivery)])
    await erase(server.url, namespace)
