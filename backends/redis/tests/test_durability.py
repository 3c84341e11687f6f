"""What a stored message survives: found out at open, told by `crossdock backend doctor`, and kept by WAIT."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from typing import Any

import pytest
from topologies import Cluster, Node, Replicated, configured, wait_until
from traffic import lanes_of, message, opened

from crossdock.errors import BrokerUnavailable, EnqueueUnknown, SettleUnknown
from crossdock.spi import Ack, Dead, DeadLetter, Nack, Reason, State, Survives

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]

PROCESS, POWER, NODE = Survives.PROCESS, Survives.POWER, Survives.NODE


def doctor(url: str) -> dict[str, Any]:
    """What `crossdock backend doctor` says of a broker."""
    told = subprocess.run(
        [sys.executable, "-m", "crossdock_cli", "backend", "doctor", url, "--json"], capture_output=True, text=True
    )
    return dict(json.loads(told.stdout))


@pytest.mark.parametrize(
    ("lines", "survives", "words"),
    [
        (["appendonly no"], set[Survives](), "No append-only file.*Set appendonly yes"),
        (["appendfsync no"], {PROCESS}, "appendfsync no.*half a minute"),
        (["appendfsync everysec"], {PROCESS}, "appendfsync everysec.*last second"),
        (["appendfsync always"], {PROCESS, POWER}, "appendfsync always"),
        (["maxmemory 1gb", "maxmemory-policy volatile-ttl"], {PROCESS}, "volatile-ttl.*Set noeviction"),
    ],
)
async def test_what_the_setup_gives(source: Any, use: Any, lines: list[str], survives: set[Survives], words: str) -> None:
    """appendonly, appendfsync and maxmemory-policy are read from the server."""
    server = use(configured(source, *lines))
    async with opened(server.url) as broker:
        assert broker.capabilities.survives == survives
        assert re.search(words, broker.capabilities.durability_note)


async def test_what_replicas_give(replicated: Replicated) -> None:
    """wait_replicas of all replicas survives the loss of a node; of some, or none, or more than there are, it is told what that means."""
    for wait, survives, words in (
        (0, {PROCESS}, "wait_replicas= narrows that"),
        (1, {PROCESS}, "waits for 1 of 2 replicas.*wait_replicas=2 covers that"),
        (2, {PROCESS, NODE}, "waits for 2 of 2 replicas"),
    ):
        async with opened(replicated.url, wait_replicas=wait) as broker:
            assert broker.capabilities.survives == survives
            assert re.search(words, broker.capabilities.durability_note)


async def test_a_cluster_is_as_durable_as_its_weakest_master(cluster: Cluster) -> None:
    """One master without an append-only file is enough."""
    async with opened(cluster.url) as broker:
        assert broker.capabilities.survives == {PROCESS}
    cluster.nodes[1].call("CONFIG", "SET", "appendonly", "no")
    try:
        for namespace in ("a", "b", "c", "d", "e"):  # wherever its registry is
            async with opened(cluster.url, namespace) as broker:
                assert broker.capabilities.survives == set()
                assert "Set appendonly yes" in broker.capabilities.durability_note
    finally:
        cluster.nodes[1].call("CONFIG", "SET", "appendonly", "yes")
        await asyncio.to_thread(cluster.wait_until_it_serves)


async def test_the_doctor_tells(a_source: Any, use: Any, replicated: Replicated) -> None:
    """What a server survives, and, among the problems, what is set up wrong and what to set."""
    good, bare = use(configured(a_source)), use(configured(a_source, "appendonly no"))
    lonely, wrong = (
        use(configured(a_source, "min-replicas-to-write 1")),
        use(configured(a_source, "maxmemory 1gb", "maxmemory-policy allkeys-lru")),
    )
    told = doctor(good.url)
    assert (told["opened"], told["problems"], told["capabilities"]["survives"]) == (True, [], ["process"])
    for url, words in (
        (bare.url, "does not survive a kill of the server.*Set appendonly yes"),
        (lonely.url, "takes no messages: .*min-replicas-to-write"),
        (wrong.url, "allkeys-lru.*Set it to noeviction"),
        (replicated.replicas[0].url, "takes no messages: it is a replica of"),
        (f"{replicated.url}?wait_replicas=3", "wait_replicas=3 waits for more replicas than the 2 that are connected"),
    ):
        [problem] = doctor(url)["problems"]
        assert re.search(words, problem), problem


@pytest.mark.parametrize("protocol", [2, 3])
async def test_waiting_for_replicas(source: Any, replicated: Replicated, protocol: int) -> None:
    """With wait_replicas=2 an enqueue, a retry and a dead letter count as done only when both replicas have them. One frozen replica:
    they are unknown, and never confirmed; when it is back they are, and each is there once. Scripts that the server forgot change
    nothing in that."""
    frozen = replicated.replicas[1]
    replicated.master.call("CONFIG", "SET", "repl-ping-replica-period", 3600)  # nothing but writes is waited for
    async with opened(replicated.url, timeout=1, wait_replicas=2, wait_timeout=0.3, protocol=protocol) as broker:
        assert await broker.enqueue([message("a"), message("b"), message("c")]) == []
        for replica in replicated.replicas:
            assert replica.call("HLEN", next(iter(keys_of(replica, broker, "b")))) == 3
        [a, b, c] = await broker.receive(lanes_of("q", quota=3), 3, 5)
        replicated.master.call("SCRIPT", "FLUSH")
        await asyncio.to_thread(
            wait_until, lambda: all_acknowledged(replicated.master), "the master knows that both have everything"
        )
        frozen.pause()
        [refusal] = await broker.enqueue([message("d")])
        assert isinstance(refusal.error, EnqueueUnknown)
        assert "fewer than 2 replicas have it" in str(refusal.error)
        assert refusal.error.safe_to_repeat
        letter = DeadLetter(b.message, Reason.REJECTED, time.time_ns() // 1_000_000)
        endings = [Nack(a, 0.0, message("a", generation=1)), Dead(b, letter)]
        for ending in endings:
            assert await settled_or_unknown(broker, ending)
        frozen.resume()
        await asyncio.to_thread(replicated.wait_until_it_serves)
        assert await broker.enqueue([message("d")]) == []
        assert await broker.settle([*endings, Ack(c)]) == []
        [stats] = await broker.stats()
        assert (stats.ready, stats.leased, stats.dead) == (2, 0, 1)
        for state, id in ((State.READY, "a"), (State.READY, "d"), (State.DEAD, "b")):
            assert len((await broker.peek("q", state, ids=[id])).entries) == 1
    replicated.master.call("CONFIG", "SET", "repl-ping-replica-period", 1)


async def settled_or_unknown(broker: Any, ending: Any) -> Any:
    """The refusals of an ending that nobody can know to be done; also where an earlier one is in its way."""
    try:
        refusals = await broker.settle([ending])
    except BrokerUnavailable:
        return ["not sent"]
    assert all(isinstance(refusal.error, SettleUnknown) for refusal in refusals)
    return refusals


def all_acknowledged(master: Node) -> bool:
    """Whether the replicas have told that they have all there is."""
    told = master.info("replication")
    return all(f"offset={told['master_repl_offset']}," in told[f"slave{number}"] for number in range(2))


def keys_of(node: Node, broker: Any, name: str) -> list[str]:
    """The keys of this name in the newest namespace of a node."""
    namespace = broker._settings.namespace
    return [key.decode() for key in node.call("KEYS", f"cd:{{{namespace}:*}}:{name}")]
