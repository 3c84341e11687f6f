"""A server that comes back and has forgotten something: after a kill, what it wrote down of streams and of consumers may not fit together.

That is made here by putting back what the files were at an earlier moment.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import flow
import nodes
import pytest

from crossdock.errors import BrokerUnavailable
from crossdock.spi import Broker, BrokerEvent, Message, Priority, StateLost
from crossdock_conformance.servers.finding import BinarySource
from crossdock_nats import topology

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

Use = Callable[[nodes.Node], nodes.Node]

_COUNT = 30


@pytest.mark.parametrize("earlier", ["obs", "msgs", "nothing"])
async def test_a_server_that_forgot_something(source: BinarySource, use: Use, tmp_path: Path, earlier: str) -> None:
    """Whether a consumer forgot acks, a stream forgot that messages are gone, or an empty stream its numbers: an idle worker gets what
    comes from then on, and in the end nothing is left that nobody gets."""
    server = use(nodes.Node(source))
    stream = server.streams / "CD=t=q"
    async with flow.opened(f"{server.url}?timeout=2", lease=1.0) as worker:
        scheduled = int(earlier != "nothing")
        if scheduled:  # so that the stream does not become empty
            await flow.enqueue_for_good(worker, [Message("stays", "q", Priority.LOW, b"", delay_ms=3_600_000)])
        await flow.enqueue_for_good(worker, flow.messages(_COUNT))
        await flow.take(worker, _COUNT)
        server.stop()
        for part in ("obs", "msgs"):
            shutil.copytree(stream / part, tmp_path / part)
        server.start()
        await _drain(worker, scheduled)
        server.stop()
        if earlier == "nothing":
            shutil.rmtree(stream / "msgs")
            (stream / "msgs").mkdir()
        else:
            shutil.rmtree(stream / earlier)
            shutil.copytree(tmp_path / earlier, stream / earlier)
        server.start()
        await flow.enqueue_for_good(worker, flow.messages(1, "fresh"))
        came: set[str] = set()
        while "fresh0" not in came:
            [delivery] = await flow.take(worker, 1)
            came.add(delivery.message.id)
            await flow.ack_for_good(worker, [delivery])
        if earlier != "msgs" or topology.Features.of(source.version).leaves_ghosts:  # newer ones do not come to that by themselves
            await _drain(worker, scheduled)


async def test_deliveries_that_a_server_forgot_are_told(source: BinarySource, use: Use, tmp_path: Path) -> None:
    """A holder learns that the server no longer knows of its deliveries, since they come again with the count that they had."""
    server = use(nodes.Node(source))
    consumers = server.streams / "CD=t=q" / "obs"
    events: list[BrokerEvent] = []
    async with flow.opened(f"{server.url}?timeout=2", events, lease=30.0) as holder:
        await flow.enqueue_for_good(holder, flow.messages(3))
        await flow.ack_for_good(holder, await flow.take(holder, 1))
        server.stop()
        shutil.copytree(consumers, tmp_path / "obs")
        server.start()
        await flow.take(holder, 2)
        server.stop()
        shutil.rmtree(consumers)
        shutil.copytree(tmp_path / "obs", consumers)
        server.start()
        end = time.monotonic() + flow.PATIENCE
        while not any(isinstance(event, StateLost) for event in events):
            assert time.monotonic() < end, f"nobody told: {events}"
            await asyncio.sleep(0.01)


async def _drain(broker: Broker, scheduled: int) -> None:
    """Take and ack until nothing is left but so much that is not due."""
    end = time.monotonic() + flow.PATIENCE
    left: tuple[int | None, ...] = ()
    while True:
        assert time.monotonic() < end, f"nobody gets what is left: {left}"
        with suppress(BrokerUnavailable):
            [stats] = await broker.stats(["q"])
            left = stats.ready, stats.leased, stats.scheduled
            if left == (0, 0, scheduled):
                return
            await flow.ack_for_good(broker, await broker.receive(flow.LANES, _COUNT, 0.2))
