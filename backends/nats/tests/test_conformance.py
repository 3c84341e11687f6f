"""The whole conformance suite, on every version of NATS that is found, each with a server of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import nodes
import pytest

from crossdock_conformance import Target, test_promise
from crossdock_conformance.scenario import Hook, Scenario
from crossdock_conformance.servers.finding import BinarySource

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(300)  # ten thousand messages one by one take long on a machine that does much else


@pytest.fixture(scope="session")
def targets(source: BinarySource) -> Iterator[dict[str, Target]]:
    """One server for each version, and all that may be done to it: by a direct way, by one that can be cut, and by one on which nobody
    waits long for a server that is away."""
    node = nodes.Node(source)

    def residue() -> Iterable[str]:
        # Connections of whoever asks for the residue are not ours.
        return {name for name in node.residue() if not re.match(r"connection .*(?<!crossdock)$", name)}

    def target(url: str, timeout: int) -> Target:
        return Target(f"{url}?timeout={timeout}", server=node, cut=proxy.cut, residue=residue, patience=30.0)

    with nodes.Proxy(node.url) as proxy:
        # Through the proxy only where connections are to be cut: it costs every other scenario its time.
        yield {"plain": target(node.url, 5), "cut": target(proxy.url, 2), "away": target(node.url, 2)}
    node.close()


@pytest.fixture
def crossdock_target(targets: dict[str, Target], request: pytest.FixtureRequest) -> Target:
    """The way that fits; the server runs, though the scenario before may have left it down."""
    scenario: Scenario = request.getfixturevalue("scenario")
    target = targets["cut" if Hook.CUT in scenario.hooks else "away" if scenario.hooks else "plain"]
    assert isinstance(target.server, nodes.Node)
    if target.server.running:
        target.server.resume()
    else:
        target.server.start()
    return target
