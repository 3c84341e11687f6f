"""A pass means something: every broken broker is found out by the scenario meant for it, and the honest one by none."""

from __future__ import annotations

import pytest

from crossdock_conformance import Scenario, all_scenarios
from crossdock_conformance.running import run
from crossdock_conformance.teeth.connection import FarAway
from crossdock_conformance.teeth.honest import Honest
from crossdock_conformance.teeth.trials import BROKEN, Broken, meant_for, target_of

ALONE = [(Honest, each) for each in all_scenarios() if each.group not in ("model", "processes")]
AFAR = [(FarAway, each) for each in all_scenarios() if each.group in ("delivery", "restarts", "lifecycle")]


@pytest.mark.parametrize("accused", BROKEN, ids=lambda accused: accused.name)
def test_broken_broker_is_found_out(accused: Broken) -> None:
    """At least one case of the scenario meant for it fails."""
    grounds: list[str] = []
    for scenario in meant_for(accused):
        try:
            run(scenario, target_of(accused.kind, patience=2.0))
        except Exception as error:
            grounds.append(str(error))
    assert grounds, f"{accused.name} got away: {accused.fault}"


@pytest.mark.parametrize(
    ("kind", "scenario"), [pytest.param(*each, id=f"{each[0].__name__}-{each[1].id}") for each in ALONE + AFAR]
)
def test_honest_broker_is_not(kind: type[Honest], scenario: Scenario) -> None:
    """What the broken ones are made from keeps every promise, so that it is their one fault which is found."""
    run(scenario, target_of(kind))
