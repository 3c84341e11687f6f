"""Our own embedded backends under the whole suite, in virtual time."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossdock_conformance import Target, test_promise

__all__ = ["test_promise"]

pytestmark = pytest.mark.timeout(240)  # ten thousand messages one by one take long on a machine that does much else


@pytest.fixture(params=["memory", "sqlite"])
def crossdock_target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A store of its own for each scenario."""
    return Target("memory://conformance" if request.param == "memory" else f"sqlite:///{tmp_path}/store.db")
