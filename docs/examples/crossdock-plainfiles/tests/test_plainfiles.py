"""The promises of `crossdock.spi`, one test each."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossdock_conformance import Target, test_promise

__all__ = ["test_promise"]


@pytest.fixture
def crossdock_target(tmp_path: Path) -> Target:
    """What is tested: a new folder, in which nothing must be left but the mark that it is ours."""
    return Target(f"plainfiles:///{tmp_path}", residue=lambda: map(str, tmp_path.rglob("*")))
