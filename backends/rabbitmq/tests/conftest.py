"""The servers that the tests of the backend share, one for each version of RabbitMQ that is found.

A test that takes `source`, or a fixture that does, runs once for each version; see `crossdock_conformance.servers.sources`.
A node takes some seconds to start, so one serves all tests of a process, and whoever stops it finds it running the next time.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from rabbitmq_nodes import Certificates, TlsNode

from crossdock_conformance.servers import sources
from crossdock_conformance.servers.finding import BinarySource

collect_ignore_glob = ["test_slow_*.py"]  # unless one is named on the command line


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `source` one value for each version that is found or required."""
    sources.parametrize(metafunc, "rabbitmq")


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> BinarySource:
    """A program to start servers from, version by version."""
    return sources.source_of(request)


@pytest.fixture(scope="session")
def _shared(source: BinarySource) -> Iterator[TlsNode]:
    with tempfile.TemporaryDirectory() as folder, TlsNode(source, Certificates(Path(folder))) as node:
        node.start()
        yield node


@pytest.fixture
def server(_shared: TlsNode) -> TlsNode:
    """A node, running, with TLS on a port of its own; its data are what other tests left."""
    if _shared.running:
        _shared.resume()
    else:
        _shared.start()
    return _shared
