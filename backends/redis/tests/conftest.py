"""The servers that the tests of the backend share, for every version of Redis and Valkey that is found.

A test that takes `source`, or a fixture that does, runs once for each version; see `crossdock_conformance.servers.sources`.
The modules of this folder import each other by name.

A shared topology that a test leaves otherwise than it was (a node down or frozen, another master, a slot elsewhere) is replaced by a
new one for the next test. Its data stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import topologies

from crossdock_conformance.servers import sources
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.keeper import process_table
from crossdock_conformance.servers.recipe import HOST

KINDS = ("redis", "valkey")
Topology = topologies.Group | topologies.Node
_Topology = TypeVar("_Topology", bound=Topology)
_Group = TypeVar("_Group", bound=topologies.Group)


class Use(Protocol):
    """What the fixture `use` is."""

    def __call__(self, topology: _Topology) -> _Topology: ...


class TlsServer(Protocol):
    """What the fixture `tls_server` is."""

    def __call__(self, *, host: str = HOST, client_certificates: topologies.ClientCertificates = "no") -> topologies.Node: ...


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `source` one value for each version that is found or required."""
    sources.parametrize(metafunc, *KINDS)


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> BinarySource:
    """A program to start servers from, version by version."""
    return sources.source_of(request)


@pytest.fixture(scope="session")
def a_source(pytestconfig: pytest.Config) -> BinarySource:
    """A program to start servers from, where its version does not matter."""
    return sources.newest(pytestconfig, *KINDS)


# --- topologies --------------------------------------------------------------------------------------


def end(topology: Topology) -> None:
    """Close a topology, and see to it that nothing of it is left."""
    nodes = topology.nodes if isinstance(topology, topologies.Group) else [topology]
    processes = {pid for node in nodes for pid in node.processes}
    assert processes
    topology.close()
    alive = [pid for pid, process in process_table().items() if pid in processes and process.state != "Z"]
    folders = [node.folder for node in nodes if node.folder.exists()]
    assert not alive and not folders, f"{topology} left {alive}, {folders}"


class Shared(Generic[_Group]):
    """One topology for many tests, as long as they leave it as it was made."""

    def __init__(self, make: Callable[[], _Group]) -> None:
        self._make = make
        self._current: _Group | None = None

    def get(self) -> _Group:
        """The topology, as it was made; its data are what other tests left."""
        if self._current is None or not self._current.is_as_made:
            self.end()
            self._current = self._make()
        return self._current

    def end(self) -> None:
        """Close it."""
        if self._current is not None:
            end(self._current)
            self._current = None


def _shared(make: Callable[[], _Group]) -> Iterator[Shared[_Group]]:
    shared = Shared(make)
    yield shared
    shared.end()


@pytest.fixture(scope="session")
def _replicated(source: BinarySource) -> Iterator[Shared[topologies.Replicated]]:
    yield from _shared(lambda: topologies.replicated(source))


@pytest.fixture(scope="session")
def _sentinels(source: BinarySource) -> Iterator[Shared[topologies.SentinelSet]]:
    yield from _shared(lambda: topologies.sentinel_set(source))


@pytest.fixture(scope="session")
def _cluster(source: BinarySource) -> Iterator[Shared[topologies.Cluster]]:
    yield from _shared(lambda: topologies.cluster(source))


@pytest.fixture(scope="session")
def _cluster_with_replicas(source: BinarySource) -> Iterator[Shared[topologies.Cluster]]:
    yield from _shared(lambda: topologies.cluster(source, replicas=1))


@pytest.fixture
def replicated(_replicated: Shared[topologies.Replicated]) -> topologies.Replicated:
    """A master with two replicas, shared."""
    return _replicated.get()


@pytest.fixture
def sentinels(_sentinels: Shared[topologies.SentinelSet]) -> topologies.SentinelSet:
    """A master, two replicas and three sentinels, shared."""
    return _sentinels.get()


@pytest.fixture
def cluster(_cluster: Shared[topologies.Cluster]) -> topologies.Cluster:
    """A cluster of three masters, shared."""
    return _cluster.get()


@pytest.fixture
def cluster_with_replicas(_cluster_with_replicas: Shared[topologies.Cluster]) -> topologies.Cluster:
    """A cluster of three masters with a replica each, shared."""
    return _cluster_with_replicas.get()


@pytest.fixture
def use() -> Iterator[Use]:
    """`use(with_users(source, [...]))`: a topology of the test's own, which ends with the test."""
    used: list[Topology] = []

    def add(topology: _Topology) -> _Topology:
        used.append(topology)
        return topology

    yield add
    while used:
        end(used.pop())


# --- TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> topologies.Certificates:
    """The authorities and certificates of this test run."""
    return topologies.Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def tls_server(source: BinarySource, certificates: topologies.Certificates, use: Use) -> TlsServer:
    """`tls_server(host=..., client_certificates=...)`: as `topologies.tls_server`, ends with the test; skips where there is no TLS."""

    def start(*, host: str = HOST, client_certificates: topologies.ClientCertificates = "no") -> topologies.Node:
        try:
            return use(topologies.tls_server(source, certificates, host=host, client_certificates=client_certificates))
        except topologies.NoTls as error:
            pytest.skip(str(error))

    return start
