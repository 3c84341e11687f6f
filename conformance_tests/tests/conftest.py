"""For all tests of the suite: scenarios have time limits of their own, which are longer than that of other tests."""

from __future__ import annotations

import pytest

LIMIT = 300.0
"""Seconds for a test that runs scenarios, on a machine that does other things as well."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test here that limit, unless it states one."""
    for item in items:
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(LIMIT))
