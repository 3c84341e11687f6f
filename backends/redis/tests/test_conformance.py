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
def shared(source: BinarySource) -> Iterator[topologies.Node]:
    """One server for each version. Scenarios may stop it; the next one finds it running."""
    # With everysec the server may put off a write while its disk is busy, and a kill then loses it; with "no" every write is the system's
    # before it is answered.
    node = topologies.configured(source, "appendfsync no")
    yield node
    node.close()


@pytest.fixture
def crossdock_target(shared: topologies.Node) -> Target:
    """The server, and all that may be done to it."""
    if shared.running:
        shared.resume()
    else:
        shared.start()

    def residue() -> Iterable[str]:
        return {name for name in shared.residue() if not EXPIRES.search(name)}

    def cut() -> None:
        shared.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    return Target(f"{shared.url}?timeout=2", server=shared, cut=cut, residue=residue)
