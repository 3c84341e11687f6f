"""The whole conformance suite on a Cluster of three nodes, which the suite may stop and freeze as a whole. One version is enough: what
differs between versions, `test_conformance.py` and `test_cluster.py` see."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
import topologies

from crossdock_conformance import Target, test_promise
from crossdock_conformance.servers.finding import BinarySource

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(240)

EXPIRES = re.compile(r":[mu][A-Za-z0-9]{6}$")
"""Keys that the server removes by itself."""


@pytest.fixture(scope="session")
def one_cluster(a_source: BinarySource) -> Iterator[topologies.Cluster]:
    """Shared. Scenarios may stop it; the next one finds it running."""
    with topologies.cluster(a_source) as servers:
        yield servers


@pytest.fixture
def crossdock_target(one_cluster: topologies.Cluster) -> Target:
    """The Cluster, and all that may be done to it."""
    if not one_cluster.is_as_made:
        one_cluster.start()

    def residue() -> Iterable[str]:
        return {name for name in one_cluster.residue() if not EXPIRES.search(name)}

    def cut() -> None:
        for node in one_cluster.nodes:
            node.call("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    return Target(f"{one_cluster.url}?timeout=4", server=one_cluster, cut=cut, residue=residue)
