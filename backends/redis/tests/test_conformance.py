"""The whole conformance suite, on every version of Redis and Valkey that is found, each with a server of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
import topologies

from crossdock_conformance import Target, test_promise
from crossdock_conformance.servers.finding import BinarySource

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(240)  # ten thousand messages one by one take long on a machine that does much else

EXPIRES = re.compile(r":[mu][A-Za-z0-9]{6}$")
"""Keys that the server removes by itself: what it remembers of requests, and what ends the wait of a receiver."""


@pytest.fixture(scope="session")
def target(source: BinarySource) -> Iterator[Target]:
    """One server for each version, and all that may be done to it."""
    node = topologies.configured(source)

    def residue() -> Iterable[str]:
        return {name for name in node.residue() if not EXPIRES.search(name)}

    def cut() -> None:
        node.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    yield Target(f"{node.url}?timeout=2", server=node, cut=cut, residue=residue)
    node.close()


@pytest.fixture
def crossdock_target(target: Target) -> Target:
    """Running, as the scenario before may have left it down."""
    assert isinstance(target.server, topologies.Node)
    if target.server.running:
        target.server.resume()
    else:
        target.server.start()
    return target
