"""Every arrangement of Redis and Valkey that the backend must work with, on loopback, ended with the test process.

    source = sources.programs("valkey", "8.1")[0]
    with cluster(source) as servers:
        ...servers.url...
        servers.migrate(servers.slot("key"), to=servers.nodes[2])

Each function takes the place that a server is started from, returns when all serves, and raises `ServerFailed` if it does not come
to that. Everything here blocks; where an event loop must go on meanwhile, call it through `asyncio.to_thread`. What a topology can do
is said by its class, in the modules beside this one. `conftest.py` has fixtures that share one among tests.
"""

from __future__ import annotations

from collections.abc import Sequence

from redis_cluster import Cluster, Migration
from redis_nodes import Group, Node, wait_until
from redis_replication import Replicated
from redis_security import (
    OTHER_HOST,
    Certificates,
    ClientCertificates,
    GuardedServer,
    NoTls,
    User,
    start_server_with_password,
    start_server_with_users,
    start_tls_server,
)
from redis_sentinels import SentinelSet

from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Setup

__all__ = [
    "OTHER_HOST",
    "Certificates",
    "ClientCertificates",
    "Cluster",
    "Group",
    "GuardedServer",
    "Migration",
    "NoTls",
    "Node",
    "Replicated",
    "SentinelSet",
    "User",
    "cluster",
    "configured",
    "replicated",
    "sentinel_set",
    "tls_server",
    "wait_until",
    "with_password",
    "with_users",
]


def configured(source: BinarySource, *lines: str) -> Node:
    """A server with further lines of configuration, such as "maxmemory 3mb" or "appendonly no".

    Without any it has an append-only file that the system syncs, no snapshots and no limit of memory.
    """
    return Node(source, Setup(lines=lines))


def replicated(source: BinarySource, replicas: int = 2) -> Replicated:
    """A master with replicas."""
    return Replicated(source, replicas)


def sentinel_set(source: BinarySource, replicas: int = 2) -> SentinelSet:
    """A master with replicas, called "shop" by three sentinels of which two must agree; a death is seen after 1 s."""
    return SentinelSet(source, replicas)


def cluster(source: BinarySource, nodes: int = 3, replicas: int = 0) -> Cluster:
    """A cluster of so many masters, each with so many replicas; a death is seen after 2 s."""
    return Cluster(source, nodes, replicas)


def tls_server(
    source: BinarySource, certificates: Certificates, *, host: str = HOST, client_certificates: ClientCertificates = "no"
) -> Node:
    """A server that speaks TLS only.

    Args:
        source: Where the program is.
        certificates: What its own certificate comes from, and the files for clients.
        host: The host of its certificate; by default those that it is reached by, 127.0.0.1 and localhost.
        client_certificates: Whether it wants a certificate from its clients; "optional": only a wrong one is refused.

    Raises:
        NoTls: The program was built without TLS.
    """
    return start_tls_server(source, certificates, host, client_certificates)


def with_users(source: BinarySource, users: Sequence[User]) -> GuardedServer:
    """A server on which only these users may do something; the default user is off."""
    return start_server_with_users(source, users)


def with_password(source: BinarySource, password: str) -> GuardedServer:
    """A server with `requirepass`: the default user has a password and all rights."""
    return start_server_with_password(source, password)
