"""Random programs against a plain model of the interface; see `crossdock_conformance.model`."""

from __future__ import annotations

from crossdock_conformance.model import try_programs
from crossdock_conformance.scenario import DEDUPLICATION, DELAY, scenario
from crossdock_conformance.target import Target

SECONDS = 8.0
"""Real seconds for which programs are tried; a faster backend is tried with more."""


@scenario(
    needs=[DELAY, DEDUPLICATION],
    seconds=300,  # finding the shortest failing program takes its time
)
def random_programs_follow_the_model(target: Target) -> None:
    """Whatever two Brokers, time and crashes do in whatever order, nothing is lost, doubled, early, or settled by who lost it."""
    may_fail = not (DELAY.declared(target.capabilities) and DEDUPLICATION.declared(target.capabilities))
    assert try_programs(target, seconds=SECONDS, shrink=not may_fail) > 0
