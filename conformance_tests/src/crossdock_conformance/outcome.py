"""Outcome: how a scenario ended on a target."""

from __future__ import annotations

from enum import Enum

import msgspec


class Verdict(Enum):
    """The ways a scenario may end."""

    PASSED = "passed"
    """The promise is kept."""
    REFUSED = "refused"
    """It takes something for granted that the backend declares not to have, and that showed as it should."""
    NOT_RUN = "not run"
    """It could not be tried on this target; the note says why."""
    FAILED = "failed"
    """The promise is broken, or the declaration is."""


class NotRun(Exception):
    """Raised by a scenario that finds that it cannot be tried on this target. The text says why."""


class Outcome(msgspec.Struct, frozen=True):
    """One line of a report."""

    id: str
    group: str
    promise: str
    verdict: Verdict
    seconds: float
    """Real seconds it took."""
    note: str = ""
    """For all but PASSED: what was refused, why it was not run, how it failed."""
