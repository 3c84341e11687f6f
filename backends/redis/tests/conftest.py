"""The servers that the tests of the backend share, for every version of Redis and Valkey that is found.

A test that takes `source`, or a fixture that does, runs once for each version; a kind that is not found is skipped by name. Where
CROSSDOCK_REQUIRE names Redis or Valkey, it runs once for each of its entries instead, and fails where there is no such server:
`redis:7.0,valkey` is that version, installed if CROSSDOCK_TEST_INSTALL allows it, and whichever Valkey is found first.
The modules of this folder import each other by name.

A shared topology that a test leaves otherwise than it was (a node down or frozen, another master, a slot elsewhere) is replaced by a
new one for the next test. Its data stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import topologies

from crossdock_conformance.servers import ServerNotFound, required, start_server
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.fixtures import skip_or_fail
from crossdock_conformance.servers.keeper import process_table
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.versions import matches

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
    """Give `source` one value for each version that is found or required, and one for a kind of which there is none."""
    if "source" in metafunc.fixturenames:
        values = [value for kind in KINDS for value in _values(kind)]
        metafunc.parametrize("source", values, indirect=True, scope="session")


def _values(kind: str) -> list[Any]:
    found = topologies.programs(kind)
    entries = [entry.partition(":") for entry in sorted(required())]
    if any(name in KINDS for name, _, _ in entries):
        wanted = [version for name, _, version in entries if name == kind]
        return [
            _value(kind, version, [source for source in found if not version or matches(source.version, version)])
            for version in wanted
        ]
    return [pytest.param(source, id=f"{kind}-{source.version}") for source in found] or [_value(kind, "", [])]


def _value(kind: str, version: str, found: list[BinarySource]) -> Any:
    if found:
        return pytest.param(found[0], id=f"{kind}-{found[0].version}")
    return pytest.param((kind, version or None), id=f"{kind}-{version}" if version else kind)


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> BinarySource:
    """A program to start servers from, version by version."""
    if isinstance(request.param, BinarySource):
        return request.param
    kind, version = request.param
    try:
        start_server(kind, version=version).close()  # which may install it
    except ServerNotFound as error:
        skip_or_fail(error, request.config)
    if found := topologies.programs(kind, version):
        return found[0]
    pytest.skip(f"the only {kind} {version or ''} server is a container, or given by its URL")


@pytest.fixture(scope="session")
def a_source(request: pytest.FixtureRequest) -> BinarySource:
    """A program to start servers from, where its version does not matter."""
    found = [source for kind in KINDS for source in topologies.programs(kind)]
    if not found:
        try:
            start_server(KINDS[0]).close()
        except ServerNotFound as error:
            skip_or_fail(error, request.config)
        found = topologies.programs(KINDS[0])
    return found[-1]


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
