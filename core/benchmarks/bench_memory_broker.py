"""Print how many lives (enqueue, receive, ack) the memory broker carries per second, in batches of 100."""

from __future__ import annotations

import asyncio
import time

from crossdock.backends.memory import crossdock_backend
from crossdock.clock import SystemClock
from crossdock.spi import Ack, Broker, BrokerSettings, Lane, Message, Priority

BATCH = 100
SECONDS = 2.0


async def lives_per_second(backlog: int) -> float:
    """Measure with `backlog` other messages waiting in the queue."""
    broker = crossdock_backend().create(BrokerSettings(url=f"memory://bench-{backlog}", clock=SystemClock()))
    assert isinstance(broker, Broker)
    await broker.open()
    lanes = [Lane("q", Priority.NORMAL, BATCH)]
    await broker.enqueue([Message(f"b{number}", "q", Priority.NORMAL, b"x" * 200) for number in range(backlog)])
    lives = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        await broker.enqueue([Message(f"m{number}", "q", Priority.NORMAL, b"x" * 200) for number in range(lives, lives + BATCH)])
        deliveries = await broker.receive(lanes, BATCH, 0)
        await broker.settle([Ack(delivery) for delivery in deliveries])
        lives += len(deliveries)
    await broker.close()
    return lives / elapsed


if __name__ == "__main__":
    for backlog in (0, 10_000, 100_000):
        print(f"{asyncio.run(lives_per_second(backlog)):9,.0f} lives/s with {backlog:,} messages waiting")
