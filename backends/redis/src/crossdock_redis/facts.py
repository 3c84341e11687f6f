"""Facts: what a server says of itself, and what follows for durability. Asked once, at `open`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

from crossdock.errors import ConfigurationError
from crossdock.spi import Ability, Capabilities, QueueSpec, State, Support, Survives
from crossdock_redis.address import Address
from crossdock_redis.limits import LONGEST_MS, MAX_BODY
from crossdock_redis.link import Link, LinkRefused, fields
from crossdock_redis.replies import ServerError, explain

OLDEST: Final = (6, 2)
"""The first version whose commands do: LPOP with a count, SMISMEMBER, LPOS."""
SWEEP: Final = 0.25
"""Seconds within which a waiting receiver finds what nobody told it of; see `limits.LOOK`."""

_AT_REST: Final = frozenset({State.READY, State.SCHEDULED, State.DEAD})
_NATIVE: Final = Ability(Support.NATIVE)


@dataclass(frozen=True)
class Facts:
    """What the server told."""

    product: str
    version: str
    clock_ms: int
    """The server's clock at about the moment this was asked."""
    skew: float
    """Seconds that its clock is ahead of ours."""
    info: Mapping[str, str] = field(default_factory=dict[str, str])
    """Fields of INFO; empty where we may not ask."""
    config: Mapping[str, str] = field(default_factory=dict[str, str])
    """Some settings; empty where we may not ask."""


async def ask(link: Link) -> Facts:
    """Ask the server. What it does not tell is left out.

    Raises:
        LinkBroken: The connection is lost.
        LinkRefused: We may not even ask for the time.
    """
    before = time.time()
    [clock, info, config] = await link.exchange([("TIME",), ("INFO",), ("CONFIG", "GET", "appendfsync")])
    now = (before + time.time()) / 2
    told: Mapping[str, str] = {} if isinstance(info, ServerError) else fields(info)
    if isinstance(clock, ServerError):
        if _mode(told) != "sentinel":  # which has no clock to ask for, and is refused for what it is
            raise LinkRefused(explain(clock)) from clock
        clock = (now, 0)
    seconds, micros = (int(part) for part in clock)
    product = "Valkey" if "valkey_version" in told else "Redis"
    version = told.get("valkey_version") or told.get("redis_version") or "unknown"
    return Facts(product, version, seconds * 1000 + micros // 1000, seconds + micros / 1e6 - now, told, _settings(config))


def _mode(info: Mapping[str, str]) -> str | None:
    """What the server is run as: standalone, cluster or sentinel."""
    return info.get("redis_mode") or info.get("server_mode")  # Valkey has a name of its own


def _settings(answer: Any) -> Mapping[str, str]:
    if isinstance(answer, ServerError):
        return {}
    pairs = cast("dict[bytes, bytes]", answer).items() if isinstance(answer, dict) else ()
    parts: list[bytes] = [part for pair in pairs for part in pair] or list(cast("Sequence[bytes]", answer))
    words = [part.decode() for part in parts]
    return dict(zip(words[::2], words[1::2], strict=True))


def check(facts: Facts, address: Address) -> None:
    """Refuse a server that would lose work by the way it is set up.

    Raises:
        ConfigurationError: It is too old, no server of the kind that the URL says, or throws keys away when its memory is full.
    """
    if facts.version != "unknown" and tuple(int(part) for part in facts.version.split(".")[:2]) < OLDEST:
        raise ConfigurationError(
            f"{address.shown} is {facts.product} {facts.version}; crossdock needs {OLDEST[0]}.{OLDEST[1]} or later."
        )
    mode = _mode(facts.info)
    if mode == "cluster" and address.kind != "cluster":
        raise ConfigurationError(f"{address.shown} is a node of a Cluster: write redis+cluster://HOST:PORT for it.")
    if mode == "sentinel":
        raise ConfigurationError(f"{address.shown} is a Sentinel: write redis+sentinel://HOST:PORT/MASTER for it.")
    policy = facts.info.get("maxmemory_policy", "noeviction")
    if policy.startswith("allkeys") and facts.info.get("maxmemory", "0") != "0":
        raise ConfigurationError(
            f"{address.shown} has maxmemory-policy {policy}: when its memory is full it would silently delete queued messages. "
            "Set it to noeviction."
        )


def obstacle(facts: Facts, address: Address) -> str | None:
    """Why this server, as it is now, will store nothing; None where it will."""
    told = facts.info
    if told.get("role") == "slave":
        return f"it is a replica of {told.get('master_host')}:{told.get('master_port')}, and takes no writes: name the master in the URL"
    replicas = int(told.get("connected_slaves", "0"))
    if told and address.wait_replicas > replicas:
        return f"wait_replicas={address.wait_replicas} waits for more replicas than the {replicas} that are connected"
    if int(told.get("min_slaves_good_slaves", "1")) == 0:
        return "no replica is connected, and its min-replicas-to-write asks for some"
    if told.get("aof_last_write_status", "ok") != "ok":
        return "it cannot write its append-only file: look at its log, and for space on its disk"
    return None


def capabilities(facts: Facts, address: Address, others: Sequence[Facts] = ()) -> Capabilities:
    """What a Broker on this server can promise, and on the others that it is one broker with: as much as the weakest."""
    survives, note = min((durability(each, address) for each in (facts, *others)), key=lambda found: len(found[0]))
    return Capabilities(
        server=facts.product + {"sentinel": " (Sentinel)", "cluster": " Cluster"}.get(address.kind, ""),
        version=facts.version,
        survives=survives,
        durability_note=note,
        clock="broker",
        fencing=Ability(Support.NATIVE, "A settlement finds its lease, or changes nothing, in one script."),
        takeover=QueueSpec("").lease + SWEEP,
        delay=_NATIVE,
        delay_resolution=0.001,
        delay_lateness=SWEEP,
        delay_longest=LONGEST_MS / 1000,
        deduplication=_NATIVE,
        deduplication_window=0.0,
        listable=frozenset(State),
        removable=_AT_REST,
        purgeable=_AT_REST,
        by_id=_NATIVE,
        list_queues=_NATIVE,
        signals=Ability(Support.UNSUPPORTED, "The Redis broker brings no signals yet."),
        max_body=MAX_BODY,
    )


def durability(facts: Facts, address: Address) -> tuple[frozenset[Survives], str]:
    """The faults that a stored message survives, and a sentence on what that rests on."""
    if "aof_enabled" not in facts.info:
        return frozenset(), "The server does not tell how it keeps its data, so nothing is promised. Permit the user INFO."
    survives: set[Survives] = set()
    fsync = facts.config.get("appendfsync")
    if facts.info["aof_enabled"] != "1":
        note = "No append-only file: a killed server takes all with it since its last snapshot. Set appendonly yes."
    elif fsync == "always":
        survives |= {Survives.PROCESS, Survives.POWER}
        note = "Append-only file, each write synced to disk before it is answered (appendfsync always)."
    elif fsync == "no":
        survives.add(Survives.PROCESS)
        note = "Append-only file that the system syncs when it likes (appendfsync no): a power loss takes up to half a minute."
    else:
        survives.add(Survives.PROCESS)
        told = (
            "synced each second (appendfsync everysec): a power loss takes about the last second, a kill while the disk is busy up to two"
            if fsync
            else "synced as appendfsync says, which the server does not tell: a power loss may take the last half minute"
        )
        note = f"Append-only file, {told}."
    replicas = int(facts.info.get("connected_slaves", "0"))
    if address.wait_replicas:
        note += f" Each write waits for {address.wait_replicas} of {replicas} replicas (WAIT)."
        if address.wait_replicas >= max(1, replicas):
            survives.add(Survives.NODE)
        else:
            note += f" One that lacks the last writes may take over: wait_replicas={replicas} covers that."
    elif replicas or address.kind in ("sentinel", "cluster"):
        note += " Replication does not wait: a failover may lose what was stored last. wait_replicas= narrows that."
    policy = facts.info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        told = "queued messages are deleted as soon as maxmemory is set and reached"
        if policy.startswith("volatile"):
            told = "should memory become full, what is sent again after a lost connection may be done twice"
        note += f" maxmemory-policy is {policy}: {told}. Set noeviction."
    return frozenset(survives), note
