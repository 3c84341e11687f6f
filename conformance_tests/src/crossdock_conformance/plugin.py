"""The pytest plugin: options, the fixture that names what is tested, the table at the end. Imports nothing heavy at load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crossdock_conformance.names import PROPERTY, URL_VARIABLE

pytest_plugins = ["crossdock_conformance.servers.fixtures"]

if TYPE_CHECKING:
    from crossdock_conformance.target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suite."""
    group = parser.getgroup("crossdock", "conformance of crossdock backends")
    group.addoption("--crossdock-url", metavar="URL", help=f"broker URL to test; default: ${URL_VARIABLE}")
    group.addoption("--crossdock-real-time", action="store_true", help="use the system's clock even where time could be virtual")
    group.addoption("--crossdock-report", metavar="FILE", type=Path, help="write what was found as JSON")
    group.addoption("--crossdock-table", metavar="FILE", type=Path, help="write the capability table as Markdown")


def unwritable(file: Path) -> str:
    """Why a report cannot be written to this file, in a sentence; "" if it can."""
    if file.is_dir():
        return f"{str(file)!r} is a folder: name a file for the report"
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        return f"{str(file)!r} cannot be written: its folder does not exist, or is not yours to write to"
    return ""


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known, for strict markers; refuse files that cannot be written before anything has run."""
    for option in ("--crossdock-report", "--crossdock-table"):
        file: Path | None = config.getoption(option)
        if file is not None and (why := unwritable(file)):
            raise pytest.UsageError(f"{option}: {why}")
    config.addinivalue_line("markers", "crossdock_conformance: a scenario of crossdock's conformance suite")


@pytest.fixture
def crossdock_target(request: pytest.FixtureRequest) -> Target:
    """What the suite tests: the broker of `--crossdock-url`. A backend's own test file overrides this fixture."""
    from crossdock_conformance.target import Target

    url = request.config.getoption("--crossdock-url") or os.environ.get(URL_VARIABLE)
    if not url:
        pytest.fail("name what to test: by --crossdock-url, or by a fixture crossdock_target that returns a Target", pytrace=False)
    return _targets.setdefault(url, Target(url, real_time=bool(request.config.getoption("--crossdock-real-time"))))


_targets: dict[str, Target] = {}  # so that each is asked for its capabilities once


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a table for each target, and write the files that were asked for."""
    found = [
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == PROPERTY and report.when == "call"
    ]
    if not found:
        return
    from crossdock_conformance.report import as_json, as_markdown, as_text, collect

    reports = collect(found)
    for report in reports:
        terminalreporter.write_line("")
        terminalreporter.write(as_text(report))
    if (file := config.getoption("--crossdock-report")) is not None:
        file.write_bytes(as_json(reports))
    if (file := config.getoption("--crossdock-table")) is not None:
        file.write_text(as_markdown(reports), encoding="utf-8")
