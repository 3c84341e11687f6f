"""Bytes of the server's memory that one message takes, by its state."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from bench import FAR, Bench, Row, Table

from crossdock.clock import SystemClock
from crossdock.ids import IdSource
from crossdock.plugins import create_broker
from crossdock.spi import (
    Broker,
    Dead,
    DeadLetter,
    Delivery,
    Lane,
    Message,
    Priority,
    QueueSpec,
    Reason,
    State,
    SupportsErase,
)

COUNT = 100_000
BODY = 200
STORY = 500
CHUNK = 1_000
RECEIVED = 100
QUEUE = "memory"


async def memory(bench: Bench) -> Table:
    """bytes of memory of a message that is ready, scheduled, leased or dead, of 100,000"""
    count = min(COUNT, bench.tasks)
    await _measure(bench, State.DEAD, CHUNK)  # so that the server knows the scripts
    rows: list[Row] = []
    for state in State:
        taken, left = await _measure(bench, state, count)
        rows.append({"state": state.name.lower(), "bytes each": taken / count, "left when erased, kB": left / 1e3})
    return Table(
        f"memory of {count:,} messages: body {BODY} B, story of a dead letter {STORY} B, leased in batches of {RECEIVED}", rows
    )


async def _measure(bench: Bench, state: State, count: int) -> tuple[int, int]:
    """Bytes that the server has more with so many messages in this state, and when they are erased."""
    before = bench.server.memory()
    async with _opened(bench.url) as broker:
        await broker.declare([QueueSpec(QUEUE, lease=3600.0)])
        await _bring(broker, state, count)
    taken = bench.server.memory() - before
    async with _opened(bench.url) as broker:
        if isinstance(broker, SupportsErase):
            await broker.erase([QUEUE])
    return taken, bench.server.memory() - before


@asynccontextmanager
async def _opened(url: str) -> AsyncIterator[Broker]:
    """A Broker that is closed before the server is asked, because its connections take memory too."""
    broker = create_broker(url, namespace=f"bench-{os.getpid()}-memory")
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def _bring(broker: Broker, state: State, count: int) -> None:
    """Have so many messages in this state."""
    new_id = IdSource(SystemClock())
    delay_ms = int(FAR * 1000) if state is State.SCHEDULED else 0
    for _ in range(0, count, CHUNK):
        batch = [Message(new_id(), QUEUE, Priority.NORMAL, os.urandom(BODY), delay_ms=delay_ms) for _ in range(CHUNK)]
        assert not await broker.enqueue(batch)
    if state in (State.LEASED, State.DEAD):
        for _ in range(0, count, RECEIVED):
            deliveries = await broker.receive([Lane(QUEUE, Priority.NORMAL, RECEIVED)], RECEIVED, 1.0)
            assert len(deliveries) == RECEIVED
            if state is State.DEAD:
                assert not await broker.settle([Dead(delivery, _letter(delivery)) for delivery in deliveries])


def _letter(delivery: Delivery) -> DeadLetter:
    now_ms = int(time.time() * 1000)
    return DeadLetter(
        delivery.message, Reason.ATTEMPTS_EXHAUSTED, now_ms, "noop", "builtins.ValueError", "0123456789abcdef", os.urandom(STORY)
    )
