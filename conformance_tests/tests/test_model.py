"""The state machine: it finds a fault, says so in a program that can be run again, and finds none in an honest broker."""

from __future__ import annotations

import ast
import re

import pytest

from crossdock_conformance.model import replay, try_programs
from crossdock_conformance.teeth.broken import StatsOffByOne, StoresTwice
from crossdock_conformance.teeth.honest import Honest
from crossdock_conformance.teeth.trials import target_of


@pytest.mark.parametrize("kind", [StatsOffByOne, StoresTwice])
def test_failures_can_be_run_again(kind: type[Honest]) -> None:
    """A fault that many programs meet is reported as a short one, which fails again, and passes on a broker without the fault."""
    with pytest.raises(AssertionError) as failure:
        try_programs(target_of(kind), seconds=20.0)
    text = str(failure.value)
    assert "from crossdock_conformance.model import replay" in text
    program = re.search(r"^replay\('memory://[^']*', (\[.*\])\)$", text, re.MULTILINE | re.DOTALL)
    assert program is not None, text
    steps = ast.literal_eval(program[1])
    assert 1 <= len(steps) <= 10
    with pytest.raises(AssertionError):
        replay(target_of(kind), steps)
    replay(target_of(Honest), steps)


def test_honest_broker_passes() -> None:
    """Random programs find nothing in the broker that the broken ones are made from."""
    assert try_programs(target_of(Honest), seconds=3.0) > 0
