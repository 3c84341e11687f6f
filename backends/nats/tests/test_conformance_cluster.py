"""The whole conformance suite on a cluster of three servers, every stream on all of them. The suite may stop and freeze it as a whole.
One version is enough: what differs between versions, `test_conformance.py` sees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import nodes
import pytest

from crossdock_conformance import Target, test_promise
from crossdock_conformance.scenario import Hook, Scenario
from crossdock_conformance.servers.finding import BinarySource

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="session")
def targets(a_source: BinarySource) -> Iterator[dict[str, Target]]:
    """The cluster, and all that may be done to it: by a direct way to each server, and by one that can be cut."""
    with ExitStack() as stack:
        cluster = nodes.Cluster(a_source)
        stack.callback(cluster.close)
        proxies = [stack.enter_context(nodes.Proxy(node.url)) for node in cluster.nodes]

        def residue() -> Iterable[str]:
            return {name for name in cluster.residue() if not re.match(r"connection .*(?<!crossdock)$", name)}

        def cut() -> None:
            for proxy in proxies:
                proxy.cut()

        ways = {"plain": cluster.url, "cut": "nats://" + ",".join(proxy.url.removeprefix("nats://") for proxy in proxies)}
        yield {
            name: Target(f"{url}?replicas=3&timeout=4", server=cluster, cut=cut, residue=residue, patience=30.0)
            for name, url in ways.items()
        }


@pytest.fixture
def crossdock_target(targets: dict[str, Target], request: pytest.FixtureRequest) -> Target:
    """The way that fits; all servers run, though the scenario before may have left them down."""
    scenario: Scenario = request.getfixturevalue("scenario")
    target = targets["cut" if Hook.CUT in scenario.hooks else "plain"]
    assert isinstance(target.server, nodes.Cluster)
    if target.server.running:
        target.server.resume()
    else:
        target.server.start()
    return target
