"""The whole conformance suite, on every version of RabbitMQ that is found."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from proxies import Proxy
from rabbitmq_nodes import TlsNode

from crossdock_conformance import Target, test_promise
from crossdock_conformance.scenario import Hook, Scenario
from crossdock_conformance.servers import Server

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(240)  # ten thousand messages one by one take long on a machine that does much else

_LATE = 12.0
"""A node of RabbitMQ 3 that starts looks again after five seconds, for tests, at what it could send nowhere yet: once for each level."""


@pytest.fixture(scope="session")
def _targets(_shared: TlsNode) -> Iterator[tuple[Target, Target]]:
    """The node, and all that may be done to it; and the same behind a proxy, where its connections are to be cut."""
    url = f"{_shared.url}?timeout=2"
    with Proxy(url) as proxy:
        yield (
            Target(url, server=_shared, residue=_shared.residue, late_after_a_kill=_LATE, patience=30.0),
            Target(proxy.url, server=_shared, cut=proxy.cut, residue=_shared.residue, patience=30.0),
        )


@pytest.fixture
def crossdock_target(server: Server, _targets: tuple[Target, Target], scenario: Scenario) -> Target:
    """Running, as the scenario before may have left it down."""
    straight, behind_a_proxy = _targets
    return behind_a_proxy if Hook.CUT in scenario.hooks else straight
