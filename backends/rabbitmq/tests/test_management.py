"""What the management plugin tells, where a URL names it; and that nothing depends on it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from urllib.parse import quote

import pytest
from rabbitmq_nodes import ManagedNode
from rabbitmq_traffic import PATIENCE, erase, lanes_of, message, new_namespace, opened

from crossdock.errors import ConfigurationError
from crossdock.spi import Ack, Broker, QueueStats
from crossdock_conformance.servers import Server
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_rabbitmq import address

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]


@asynccontextmanager
async def telling(url: str, management: str) -> AsyncGenerator[Broker]:
    """A Broker whose URL names a management plugin."""
    namespace = new_namespace()
    try:
        async with opened(f"{url}?management={quote(management, safe='')}&timeout=5", namespace) as broker:
            yield broker
    finally:
        await erase(url, namespace)


async def stats(broker: Broker) -> QueueStats:
    (found,) = await broker.stats(["q"])
    return found


async def test_leased_tasks_are_counted(source: BinarySource) -> None:
    """Where the plugin answers, what is executed now is counted, and what only waits in our hands is not."""
    with ManagedNode(source) as server:
        server.start()
        async with telling(server.url, server.management) as broker:
            assert not await broker.enqueue([message(f"m{number}") for number in range(5)])
            first = await broker.receive(lanes_of("q"), 2, PATIENCE)
            held = list(first)
            while len(held) < 2:
                held += await broker.receive(lanes_of("q"), 2 - len(held), PATIENCE)
            await _until(broker, ready=3, leased=2)
            assert not await broker.settle([Ack(delivery) for delivery in held])
            await _until(broker, ready=3, leased=0)


async def _until(broker: Broker, *, ready: int, leased: int) -> None:
    """Wait for these figures, which are half a second old."""
    deadline = time.monotonic() + PATIENCE
    while ((found := await stats(broker)).ready, found.leased) != (ready, leased):
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.1)


async def test_a_plugin_that_does_not_answer_stops_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Without an answer the number of leased tasks is not known; that is logged once, without a password, and the rest is told."""
    port = server.url.rpartition(":")[2].rstrip("/")
    for management in (f"http://me:s3cret@{HOST}:1", f"http://me:s3cret@{HOST}:{port}"):  # nobody; somebody who does not speak HTTP
        caplog.clear()
        async with telling(server.url, management) as broker:
            assert not await broker.enqueue([message("m")])
            with caplog.at_level(logging.WARNING, "crossdock.broker"):
                for _ in range(2):
                    found = await stats(broker)
                    assert (found.ready, found.leased, found.dead) == (1, None, 0)
        (record,) = [record for record in caplog.records if "management" in record.getMessage()]
        assert "does not tell how many tasks are leased" in record.getMessage()
        assert "s3cret" not in record.getMessage()


@pytest.mark.parametrize("text", ["host:15672", "ftp://host", "http://", "http://host:port", "http://host/?x=1"])
async def test_what_is_no_url_is_refused(text: str) -> None:
    """The option must be the URL of a plugin."""
    with pytest.raises(ConfigurationError, match="must be a URL such as http://HOST:15672"):
        address.parse("amqp://host", {"management": text})
