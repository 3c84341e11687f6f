"""The conformance suite of crossdock: it proves that a backend keeps the promises of `crossdock.spi`.

For the author of a backend, one test file::

    import pytest
    from crossdock_conformance import Target, test_promise

    __all__ = ["test_promise"]

    @pytest.fixture
    def crossdock_target(tmp_path):
        return Target(f"plainfiles:///{tmp_path}")

For whoever runs a broker, one command: `crossdock conformance URL`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdock_conformance.lab import Lab
    from crossdock_conformance.outcome import NotRun, Outcome, Verdict
    from crossdock_conformance.promises import test_promise
    from crossdock_conformance.report import SUITE_VERSION
    from crossdock_conformance.scenario import Need, Scenario, all_scenarios
    from crossdock_conformance.target import ServerControl, Target

__all__ = [
    "SUITE_VERSION",
    "Lab",
    "Need",
    "NotRun",
    "Outcome",
    "Scenario",
    "ServerControl",
    "Target",
    "Verdict",
    "all_scenarios",
    "test_promise",
]
__version__ = "0.1.0"

_HOMES = {
    "lab": ["Lab"],
    "outcome": ["NotRun", "Outcome", "Verdict"],
    "promises": ["test_promise"],
    "report": ["SUITE_VERSION"],
    "scenario": ["Need", "Scenario", "all_scenarios"],
    "target": ["ServerControl", "Target"],
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for: pytest loads this package in every project that has it installed."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
