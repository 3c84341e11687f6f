"""The suite as pytest sees it: one test per scenario."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from crossdock_conformance.names import PROPERTY
from crossdock_conformance.outcome import Outcome, Verdict
from crossdock_conformance.report import describe
from crossdock_conformance.running import run
from crossdock_conformance.scenario import Scenario, all_scenarios
from crossdock_conformance.target import Target


@pytest.mark.crossdock_conformance
@pytest.mark.parametrize("scenario", [pytest.param(scenario, id=scenario.id) for scenario in all_scenarios()])
def test_promise(scenario: Scenario, crossdock_target: Target, record_property: Callable[[str, Any], None]) -> None:
    """The backend keeps this promise, or refuses as it declares."""
    began = time.monotonic()
    verdict, note = Verdict.FAILED, ""
    try:
        verdict, note = run(scenario, crossdock_target)
    except BaseException as error:
        note = str(error).partition("\n")[0] or type(error).__name__
        raise
    finally:
        outcome = Outcome(scenario.id, scenario.group, scenario.promise, verdict, time.monotonic() - began, note)
        record_property(PROPERTY, msgspec.to_builtins((describe(crossdock_target), outcome)))
    if verdict is Verdict.NOT_RUN:
        pytest.skip(note)
