"""What the tests of this folder do with Brokers, in a few words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from nats.aio.client import Client

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, LeaseLost, SettleUnknown
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, BrokerEvent, Delivery, Lane, Message, Priority, QueueSpec

PATIENCE = 60.0
"""Seconds after which something that must happen counts as not happening, on a machine that does much else."""
LANES = [Lane("q", level, 0) for level in LEVELS]


def build(url: str, events: list[BrokerEvent] | None = None, namespace: str = "t") -> Broker:
    """A Broker that is not open yet."""
    return create_broker(url, namespace=namespace, clock=SystemClock(), report=([] if events is None else events).append)


@asynccontextmanager
async def opened(
    url: str, events: list[BrokerEvent] | None = None, lease: float = 2.0, namespace: str = "t"
) -> AsyncGenerator[Broker]:
    """An open Broker, with the queue `q` declared."""
    broker = build(url, events, namespace)
    await broker.open()
    try:
        await broker.declare([QueueSpec("q", lease=lease)])
        yield broker
    finally:
        await broker.close()


def messages(count: int, prefix: str = "m", **fields: Any) -> list[Message]:
    """So many messages."""
    return [Message(f"{prefix}{number}", "q", Priority.NORMAL, b"body", **fields) for number in range(count)]


async def enqueue_for_good(broker: Broker, batch: Sequence[Message]) -> None:
    """Enqueue until all are stored."""
    end = time.monotonic() + PATIENCE
    left: list[Message] = list(batch)
    while left:
        assert time.monotonic() < end, "messages could not be stored"
        try:
            refusals = await broker.enqueue(left)
        except BrokerUnavailable:
            await asyncio.sleep(0.01)
            continue
        left = [left[index] for index in sorted(refusal.index for refusal in refusals)]


async def take(broker: Broker, count: int, lanes: Sequence[Lane] = LANES) -> list[Delivery]:
    """Receive so many messages."""
    taken: list[Delivery] = []
    end = time.monotonic() + PATIENCE
    while len(taken) < count:
        assert time.monotonic() < end, f"of {count} messages only {len(taken)} came"
        try:
            taken += await broker.receive(lanes, count - len(taken), 1.0)
        except BrokerUnavailable:
            await asyncio.sleep(0.01)
    return taken


async def ack_for_good(broker: Broker, deliveries: Iterable[Delivery]) -> list[Delivery]:
    """Ack until each is done or lost; returns the lost ones."""
    left, lost = list(deliveries), list[Delivery]()
    while left:
        try:
            refusals = await broker.settle([Ack(delivery) for delivery in left])
        except BrokerUnavailable:
            await asyncio.sleep(0.01)
            continue
        lost += [left[refusal.index] for refusal in refusals if isinstance(refusal.error, LeaseLost)]
        left = [left[refusal.index] for refusal in refusals if isinstance(refusal.error, SettleUnknown)]
    return lost


async def until(fact: Callable[[], bool], what: str) -> None:
    """Return when a fact holds."""
    end = time.monotonic() + PATIENCE
    while not fact():
        assert time.monotonic() < end, f"it took too long until {what}"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def client(url: str) -> AsyncGenerator[Client]:
    """The driver itself, to see and do what a Broker does not."""
    driver = Client()
    await driver.connect(url.partition("?")[0])
    try:
        yield driver
    finally:
        await driver.close()


async def api(driver: Client, subject: str, body: object = None) -> dict[str, Any]:
    """What JetStream answers."""
    answer = await driver.request(f"$JS.API.{subject}", msgspec.json.encode(body) if body is not None else b"", timeout=5)
    return msgspec.json.decode(answer.data, type=dict[str, Any])
