"""The suite against a backend with a real server behind a socket: its scenarios of restarts, and all others in real time.

`CROSSDOCK_REMOTE_GROUPS=all` runs every group, `=delivery,redelivery` these; without it only `restarts` is run, which no embedded
backend can be put to.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crossdock_conformance import Scenario, Target, all_scenarios, promises

sys.path.insert(0, str(Path(__file__).with_name("remote")))  # there it is installed, as pip would have done it

from crossdock_remote.control import serving

GROUPS = os.environ.get("CROSSDOCK_REMOTE_GROUPS", "restarts").split(",")
SCENARIOS = [scenario for scenario in all_scenarios() if scenario.group in GROUPS or GROUPS == ["all"]]


@pytest.fixture(scope="module")
def crossdock_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """One server for all scenarios."""
    with serving(tmp_path_factory.mktemp("remote")) as target:
        yield target


@pytest.mark.parametrize("scenario", [pytest.param(scenario, id=scenario.id) for scenario in SCENARIOS])
def test_promise(scenario: Scenario, crossdock_target: Target, record_property: Callable[[str, Any], None]) -> None:
    """The remote backend keeps this promise."""
    assert crossdock_target.server is not None
    crossdock_target.server.start()  # should the scenario before have left it down
    promises.test_promise(scenario, crossdock_target, record_property)
