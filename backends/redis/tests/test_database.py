"""What is in the server's database: what `keys` says, in one place each, and nothing when tasks have ended."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from typing import Any

import pytest
from topologies import Node, configured
from traffic import lanes_of, message, new_namespace, opened, until

from crossdock.spi import LEVELS, Ack, Dead, DeadLetter, Delivery, Nack, Priority, QueueSpec, Reason, Replay, State
from crossdock_redis import keys, record
from crossdock_redis.desk import Receipt

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]

TYPES = {
    "b": "hash",
    "r": "list",
    "s": "zset",
    "d": "zset",
    "l": "set",
    "g": "set",
    "x": "zset",
    "gh": "hash",
    "q": "hash",
    "w": "list",
    "m": "string",
    "u": "list",
}
"""Of each key, by its name without level, batch or lane."""


@pytest.fixture(scope="module")
def _node(a_source: Any) -> Any:
    with configured(a_source) as node:
        yield node


@pytest.fixture
def server(_node: Node) -> Node:
    """An empty server."""
    _node.call("FLUSHALL")
    return _node


def names(server: Node, prefix: str) -> set[str]:
    """The keys of a queue, without their prefix and without those that expire by themselves."""
    found = {key.decode().removeprefix(prefix) for key in server.call("KEYS", "*") if key.decode().startswith(prefix)}
    return {name for name in found if not re.fullmatch(r"[mu][A-Za-z0-9]{6}", name)}


def dead(delivery: Delivery) -> Dead:
    """A letter for it."""
    return Dead(delivery, DeadLetter(delivery.message, Reason.REJECTED, time.time_ns() // 1_000_000))


async def test_what_is_stored_is_where_the_documentation_says(server: Node) -> None:
    """A queue with messages in every state: each id is in the place of its state and in no other, each key has its type, and a value
    can be read by its description."""
    namespace = new_namespace()
    prefix = keys.prefix(namespace, "q")
    async with opened(server.url, namespace) as broker:
        await broker.declare([QueueSpec("q", lease=60)])
        for level in LEVELS:
            assert (
                await broker.enqueue([message(f"first-{level}", priority=level), message(f"ready-{level}", priority=level)]) == []
            )
        assert await broker.enqueue([message("scheduled", delay_ms=60_000)]) == []
        deliveries = await broker.receive(lanes_of("q", quota=1), 4, 5)
        assert {each.message.id for each in deliveries} == {f"first-{level}" for level in LEVELS}
        assert await broker.settle([dead(deliveries[0])]) == []
        assert await broker.remove("q", State.READY, ["ready-9"]) == []
        for number in (0, 3, 6):
            assert server.call("LRANGE", f"{prefix}r{number}", 0, -1) == [b"ready-%d" % number]
        assert server.call("ZRANGE", f"{prefix}s", 0, -1) == [b"3scheduled"]
        assert server.call("ZRANGE", f"{prefix}d", 0, -1) == [deliveries[0].message.id.encode()]
        leased = {each.message.id.encode() for each in deliveries[1:]}
        [batch] = server.call("ZRANGE", f"{prefix}x", 0, -1)
        assert set(server.call("SMEMBERS", f"{prefix}l")) == leased == set(server.call("SMEMBERS", f"{prefix}g{batch.decode()}"))
        assert server.call("HGETALL", f"{prefix}gh") == [b"ready-9", b"9"] and server.call("LRANGE", f"{prefix}r9", 0, -1) == [
            b"ready-9"
        ]
        stored = set(server.call("HKEYS", f"{prefix}b"))
        assert stored == {*leased, b"ready-0", b"ready-3", b"ready-6", b"scheduled", b"first-9"}
        value = server.call("HGET", f"{prefix}b", "ready-6")
        assert record.unpack("ready-6", "q", value)[0].priority is Priority.HIGH
        assert server.call("HGET", f"{prefix}q", "lease_ms") == b"60000"
        assert server.call("SMEMBERS", keys.registry(namespace)) == [b"q"]
        for key in server.call("KEYS", "*"):
            name = key.decode()
            if name != keys.registry(namespace):
                kind = re.sub(r"(?<=^[rw])\d$|(?<=^[gmu])(?!h$).+$", "", name.removeprefix(prefix))
                assert server.call("TYPE", key.decode()).decode() == TYPES[kind], name


async def test_nothing_is_left_when_tasks_have_ended(source: Any, use: Any) -> None:
    """Messages that were acked, retried, given back, died and were replayed, purged, removed, expired from a dead worker, leave nothing
    but the queue's own settings and its name."""
    server: Node = use(configured(source))
    namespace = new_namespace()
    prefix = keys.prefix(namespace, "q")
    async with opened(server.url, namespace) as broker:
        await broker.declare([QueueSpec("q", lease=0.3)])
        assert await broker.enqueue([message(f"m{number}", priority=LEVELS[number % 4]) for number in range(100)]) == []
        assert await broker.enqueue([message(f"s{number}", delay_ms=20) for number in range(10)]) == []
        async with opened(server.url, namespace) as mortal:
            assert len(await mortal.receive(lanes_of("q", quota=5), 20, 5)) == 20  # and never settled
        assert await broker.remove("q", State.READY, ["m60", "m61", "nobody"])
        ended, kinds = set[str](), 0
        deadline = time.monotonic() + 20
        while len(ended) < 108:
            assert time.monotonic() < deadline
            for delivery in await broker.receive(lanes_of("q", quota=7), 30, 1):
                kinds += 1
                again = message(delivery.message.id, priority=delivery.message.priority, generation=delivery.message.generation + 1)
                ending = (Ack(delivery), Nack(delivery), Nack(delivery, 0.02), Nack(delivery, 0.01, again), dead(delivery))[
                    kinds % 5
                ]
                await broker.extend([delivery])
                assert await broker.settle([ending]) == []
                if isinstance(ending, Ack):
                    ended.add(delivery.message.id)
                elif isinstance(ending, Dead):
                    assert await broker.replay("q", [Replay(delivery.message.id, again)]) == []
        assert names(server, prefix) <= {"q", "w9", "w6", "w3", "w0"}
        assert server.call("HLEN", f"{prefix}q") <= 10
        for key in server.call("KEYS", f"{prefix}[mu]*"):
            assert 0 < int(server.call("PTTL", key.decode())) <= 60_000
        await broker.erase(["q"])
        assert not names(server, prefix)
        assert server.call("EXISTS", keys.registry(namespace)) == 0


async def test_connections_end_with_their_broker(server: Node) -> None:
    """A Broker that was used for everything and closed has no connection left."""
    async with opened(server.url) as broker:
        await broker.enqueue([message("a")])
        assert not await broker.receive(lanes_of("other", quota=1), 1, 0.2)
        [delivery] = await broker.receive(lanes_of("q", quota=1), 1, 5)
        await broker.extend([delivery])
        assert await broker.settle([Ack(delivery)]) == []
        assert await broker.stats()
        assert 1 <= len(clients(server)) <= 5
    deadline = time.monotonic() + 5
    while clients(server):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_memory_of_a_message(source: Any, use: Any) -> None:
    """Bytes of the server's memory for each waiting message with a body of 200 bytes: at most 300 beside the body, whatever the
    version; back where it was when they have ended."""
    server: Node = use(configured(source))
    count = 10_000
    async with opened(server.url) as broker:
        await run_through(broker, 1000)
        before = used(server)
        for first in range(0, count, 1000):
            batch = [message(f"{number:036}", body=b"x" * 200) for number in range(first, first + 1000)]
            assert await broker.enqueue(batch) == []
        each = (used(server) - before) / count
        print(f"{server}: {each:.0f} bytes")
        assert each < 200 + 300
        await run_through(broker, 0)
        await until(lambda: used(server) - before < 400_000, "the server's memory was back")  # it frees in the background


async def run_through(broker: Any, more: int) -> None:
    """Work everything off, after so many more."""
    assert await broker.enqueue([message(f"more{number}") for number in range(more)]) == []
    while deliveries := await broker.receive(lanes_of("q", quota=250), 1000, 0):
        assert await broker.settle([Ack(delivery) for delivery in deliveries]) == []


def used(server: Node) -> int:
    """Bytes of data, without what connections and the append-only file take for a while."""
    server.call("MEMORY", "PURGE")
    told = server.info("memory")
    return int(told["used_memory_dataset"])


def clients(server: Node) -> list[str]:
    """Our connections."""
    return [line for line in server.call("CLIENT", "LIST").decode().splitlines() if " name=crossdock " in line]


async def test_settled_deliveries_leave_nothing_behind_in_the_worker(server: Node) -> None:
    """However a delivery ends, nothing of it stays in this process: a worker's memory is as large after a million tasks as before."""
    async with opened(server.url, new_namespace()) as broker:
        assert await broker.enqueue([message(f"m{number}") for number in range(4)]) == []
        ack, back, retry, lost = await broker.receive(lanes_of("q"), 4, 5)
        again = message(retry.message.id, generation=1)
        assert await broker.settle([Ack(ack), Nack(back, 60), Nack(retry, 60, again), dead(lost)]) == []
        del ack, back, retry, lost
        gc.collect()
        assert [each for each in gc.get_objects() if isinstance(each, Receipt)] == []
