"""Servers that take no writes, cannot be used at all, or are no Redis: what happens then, and what is told."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from topologies import Cluster, Node, SentinelSet, configured
from traffic import lanes_of, message, new_namespace, opened, until

from crossdock.errors import BrokerUnavailable, ConfigurationError, EnqueueFailed
from crossdock.spi import Ack, Blocked, Dead, DeadLetter, Nack, QueueSpec, Reason, State, Unblocked
from crossdock_redis import facts
from crossdock_redis.address import parse

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]


# --- a server that takes no writes for now ---------------------------------------------------------------


async def test_a_full_memory(source: Any, use: Any) -> None:
    """With maxmemory reached, enqueues are certainly not stored and say why, once reported as Blocked. Receiving, extending, every
    ending, looking and repairing go on, also for a worker that starts now; they make room, and that is told as well."""
    server: Node = use(configured(source))
    events: list[Any] = []
    async with opened(server.url, "t1", events.append) as broker:
        await broker.declare([QueueSpec("q")])
        assert await broker.enqueue([message(f"m{number}", body=b"x" * 10_000) for number in range(60)]) == []
        [early] = await broker.receive(lanes_of("q", quota=1), 1, 5)
        server.call("CONFIG", "SET", "maxmemory", "1")
        for _ in range(2):
            [refusal] = await broker.enqueue([message("late")])
            assert type(refusal.error) is EnqueueFailed
            assert "it has used its maxmemory: raise that, or work the queues off" in str(refusal.error)
        assert [type(event) for event in events[1:]] == [Blocked]
        async with opened(server.url, "t1") as worker:
            await worker.declare([QueueSpec("q")])
            assert not await worker.receive(lanes_of("empty", quota=1), 1, 0.3)
            deliveries = await worker.receive(lanes_of("q", quota=40), 40, 5)
            assert len(deliveries) == 40
            assert await worker.extend(deliveries) == []
            assert await worker.extend(deliveries[:3]) == []
            assert await worker.extend(deliveries[:3]) == []
            first, second, third, fourth, *rest = deliveries
            letter = DeadLetter(third.message, Reason.REJECTED, 1)
            endings = [
                Nack(first),
                Nack(second, 60, message(second.message.id, generation=1)),
                Dead(third, letter),
                Nack(fourth, 60),
            ]
            for ending in endings:
                assert await worker.settle([ending]) == []
            assert await worker.settle([Ack(delivery) for delivery in rest]) == []
            [stats] = await worker.stats()
            assert (stats.ready, stats.scheduled, stats.leased, stats.dead) == (20, 2, 1, 1)
            assert await worker.remove("q", State.READY, ["m50"]) == []
            assert await worker.purge("q", State.READY) == 19
        assert await broker.settle([Ack(early)]) == []
        server.call("CONFIG", "SET", "maxmemory", "0")
        assert await broker.enqueue([message("late")]) == []
    assert [type(event) for event in events[1:]] == [Blocked, Unblocked]


async def test_too_few_replicas_for_the_server(source: Any, use: Any) -> None:
    """min-replicas-to-write without replicas: told at open, and each enqueue is certainly not stored."""
    server = use(configured(source, "min-replicas-to-write 1"))
    events: list[Any] = []
    async with opened(server.url, report=events.append) as broker:
        assert [type(event) for event in events[1:]] == [Blocked]
        assert "min-replicas-to-write" in events[-1].reason
        [refusal] = await broker.enqueue([message("a")])
        assert type(refusal.error) is EnqueueFailed
        assert "min-replicas-to-write" in str(refusal.error)
        server.call("CONFIG", "SET", "min-replicas-to-write", "0")
        assert await broker.enqueue([message("a")]) == []
        assert type(events[-1]) is Unblocked


async def test_too_many_clients(a_source: Any, use: Any) -> None:
    """A server that has no place for one more says so at open; one that was open before goes on."""
    server = use(configured(a_source))
    async with opened(server.url, timeout=2) as broker:
        assert await broker.enqueue([message("a")]) == []
        server.call("CONFIG", "SET", "maxclients", "1")
        with pytest.raises(BrokerUnavailable, match="maxclients"):
            async with opened(server.url, timeout=2):
                pass
        assert await broker.enqueue([message("b")]) == []


# --- servers that cannot be used -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru", "noeviction"])
async def test_policies_for_a_full_memory(source: Any, use: Any, policy: str) -> None:
    """What would delete queued messages is refused when the Broker is opened; what would delete less is told."""
    server = use(configured(source, "maxmemory 100mb", f"maxmemory-policy {policy}"))
    if policy == "allkeys-lru":
        with pytest.raises(ConfigurationError, match=r"maxmemory-policy allkeys-lru.*delete queued messages.*noeviction"):
            async with opened(server.url):
                pass
        server.call("CONFIG", "SET", "maxmemory", "0")
    async with opened(server.url) as broker:
        assert ("Set noeviction" in broker.capabilities.durability_note) == (policy != "noeviction")


async def test_the_wrong_kind_of_url(cluster: Cluster, sentinels: SentinelSet, use: Any, source: Any) -> None:
    """A node of a Cluster, a Sentinel and a single server, each by the scheme of another: the sentence names the right one."""
    single = use(configured(source))
    wrong = {
        f"redis://{cluster.nodes[0].address}": (ConfigurationError, r"node of a Cluster: write redis\+cluster://"),
        f"redis://{sentinels.sentinels[0].address}": (ConfigurationError, r"is a Sentinel: write redis\+sentinel://"),
        f"redis+cluster://{single.address}": (BrokerUnavailable, "cluster support disabled"),
        f"redis+sentinel://{single.address}/shop": (BrokerUnavailable, "unknown command"),
    }
    for url, (kind, words) in wrong.items():
        with pytest.raises(kind, match=words):
            async with opened(url, timeout=2):
                pass


async def test_a_server_that_is_no_redis() -> None:
    """An HTTP server, and one that accepts and says nothing."""

    there: set[asyncio.BaseTransport] = set()

    class Silent(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            there.add(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            there.discard(self.transport)

    class Http(Silent):
        def data_received(self, data: bytes) -> None:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    kinds: list[tuple[type[Silent], str]] = [(Http, "does not speak Redis' protocol"), (Silent, r"no answer within 0\.5 s")]
    for kind, words in kinds:
        async with await asyncio.get_running_loop().create_server(kind, "127.0.0.1", 0) as other:
            port = other.sockets[0].getsockname()[1]
            with pytest.raises(BrokerUnavailable, match=words):
                async with opened(f"redis://127.0.0.1:{port}", timeout=0.5):
                    pass
            await until(lambda: not there, "every connection is closed")


async def test_nobody_there() -> None:
    """No server, no socket, no such host: where, in a sentence, and no secret."""
    for url, words in (
        ("redis://u:s3cret@127.0.0.1:1", r"nobody listens at 127\.0\.0\.1:1"),
        ("unix://u:s3cret@/no/such.sock", "nobody listens at the socket /no/such.sock"),
        ("redis://:s3cret@no-such-host.invalid", r"'no-such-host\.invalid' leads to no address"),
        ("redis+cluster://:s3cret@127.0.0.1:1", r"no node tells who has which slots: nobody listens at 127\.0\.0\.1:1"),
    ):
        with pytest.raises(BrokerUnavailable, match=words) as caught:
            async with opened(url, timeout=5):
                pass
        assert "s3cret" not in str(caught.value)


async def test_a_server_that_is_too_old() -> None:
    """The sentence names the version that is there and the one that is needed."""
    told = facts.Facts("Redis", "6.0.16", 0, 0.0)
    with pytest.raises(ConfigurationError, match=r"is Redis 6\.0\.16; crossdock needs 6\.2 or later"):
        facts.check(told, parse("redis://host", {}))


async def test_a_database_that_is_not_there(a_source: Any, use: Any) -> None:
    """The server's own words are shown; one that is there is a world of its own."""
    server: Node = use(configured(a_source))
    with pytest.raises(BrokerUnavailable, match="DB index is out of range"):
        async with opened(f"redis://{server.address}/99"):
            pass
    namespace = new_namespace()
    async with opened(f"redis://{server.address}/3", namespace) as third, opened(server.url, namespace) as zeroth:
        assert await third.enqueue([message("a")]) == []
        assert not await zeroth.stats()
        assert [stats.ready for stats in await third.stats()] == [1]
