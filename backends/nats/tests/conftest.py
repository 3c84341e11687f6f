"""The servers that the tests of the backend share, for every version of NATS that is found.

A test that takes `source`, or a fixture that does, runs once for each version; see `crossdock_conformance.servers.sources`.
The modules of this folder import each other by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import nodes

from crossdock_conformance.servers import sources
from crossdock_conformance.servers.finding import BinarySource


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `source` one value for each version that is found or required."""
    sources.parametrize(metafunc, "nats")


@pytest.fixture(scope="session")
def source(request: pytest.FixtureRequest) -> BinarySource:
    """A program to start servers from, version by version."""
    return sources.source_of(request)


@pytest.fixture(scope="session")
def a_source(pytestconfig: pytest.Config) -> BinarySource:
    """The newest program to start servers from, where an old one cannot do it."""
    return sources.newest(pytestconfig, "nats")


@pytest.fixture
def use() -> Iterator[Callable[[nodes.Node], nodes.Node]]:
    """`use(nodes.Node(source))`: a server of the test's own, which ends with the test."""
    used: list[nodes.Node] = []

    def add(node: nodes.Node) -> nodes.Node:
        used.append(node)
        return node

    yield add
    while used:
        used.pop().close()
