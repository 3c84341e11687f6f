"""What a run says: the table, the JSON, the Markdown, the command and its exit codes, under pytest and under xdist."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crossdock_conformance import SUITE_VERSION, Outcome, Target, Verdict
from crossdock_conformance.report import Report, as_json, as_markdown, as_text, collect, describe
from crossdock_conformance.scenario import all_scenarios
from crossdock_conformance.sentences import as_page
from crossdock_conformance.teeth.trials import BROKEN

DEADLINE = 120.0


def outcome(id: str, verdict: Verdict, note: str = "") -> Outcome:
    """One line of a report."""
    return Outcome(id, id.partition(".")[0], "A promise.", verdict, 0.1, note)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """One with every verdict."""
    outcomes = [
        outcome("delivery.a", Verdict.PASSED),
        outcome("delivery.b", Verdict.FAILED, "2 is not 1"),
        outcome("dead_letters.c", Verdict.REFUSED, "not declared: lists"),
        outcome("dead_letters.d", Verdict.NOT_RUN, "nobody said how"),
        outcome("dead_letters.e", Verdict.NOT_RUN, "nobody said how"),
    ]
    return Report(target=describe(Target(f"sqlite:///{tmp_path}/a.db")), outcomes=outcomes)


def test_text_says_everything(report: Report) -> None:
    """The table counts by group; what failed and what was not run is named with its reason."""
    text = as_text(report)
    assert f"suite {SUITE_VERSION}" in text
    assert next(line for line in text.splitlines() if "dead letters" in line).split() == ["dead", "letters", "1", "2"]
    assert "FAILED delivery.b: 2 is not 1" in text
    assert "Not run, as nobody said how: dead_letters.d, dead_letters.e" in text


def test_json_comes_back(report: Report) -> None:
    """The file holds the versions, the target's capabilities and every outcome."""
    (again,) = msgspec.json.decode(as_json([report]), type=list[Report])
    assert again == report
    assert (again.suite_version, again.api_version, again.passed) == (SUITE_VERSION, 1, False)
    assert again.target.capabilities["server"] == "SQLite"


def test_markdown_is_one_table(report: Report) -> None:
    """One column per target, a row for each capability, no row broken by what is in it."""
    lines = as_markdown([report, report]).splitlines()[2:]
    assert {line.count(" | ") for line in lines} == {2}
    assert any(line.startswith("| delay lateness | 0.25 s") for line in lines)
    assert "| scenarios failed | 1 | 1 |" in lines


def test_outcomes_are_put_together_by_target(report: Report) -> None:
    """Stores of their own for each scenario are one target; another server is another one."""
    plain: Any = msgspec.to_builtins(report)
    elsewhere = {**plain["target"], "url": "sqlite:///elsewhere"}
    other = {**plain["target"], "server": "Other"}
    found = collect([(plain["target"], plain["outcomes"][0]), (elsewhere, plain["outcomes"][1]), (other, plain["outcomes"][2])])
    assert [len(each.outcomes) for each in found] == [2, 1]


def test_secrets_stay_secret() -> None:
    """A password in the URL is in no report."""
    target = Target("memory://x", real_time=True)
    assert "hunter2" not in str(describe(Target("memory://x?x=1", create=lambda settings: target.make_broker("n", settings.clock))))


def test_page_of_promises_has_every_scenario() -> None:
    """Each scenario is on the page, with its sentence, once."""
    page = as_page(all_scenarios())
    for each in all_scenarios():
        assert page.count(f"`{each.group}.{each.name}`\n") + page.endswith(f"`{each.group}.{each.name}`") >= 1
        assert each.promise in page


# --- as users run it ---


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("CROSSDOCK", "PYTEST"))}
    return subprocess.run(
        command, cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`crossdock conformance`."""
    script = "from crossdock_cli.main import main; main()"
    return run([sys.executable, "-c", script, "conformance", *arguments], folder, **environment)


def test_command_ends_in_a_table(tmp_path: Path) -> None:
    """The command tests a URL, writes the files that were asked for, and exits 0 when every promise is kept."""
    (tmp_path / "conftest.py").write_text("raise RuntimeError('not of the suite')")
    done = command(tmp_path, "sqlite:///s.db", "--only", "namespaces", "--report", "r.json", "--table", "t.md")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    (found,) = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=list[Report])
    assert found.passed
    assert found.groups == ["namespaces"]
    assert f"{len(found.outcomes)}" in done.stdout
    assert "SQLite" in (tmp_path / "t.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nosuch://x"], "no installed backend serves nosuch://"),
        (["sqlite:////nosuch/folder/s.db"], "/nosuch/folder"),
        (["memory://x", "--only", "nosuch"], "the groups are"),
        (["memory://x?size=9"], "takes no options"),
        (["memory://x", "--report", "/nosuch/folder/r.json"], "/nosuch/folder/r.json' cannot be written"),
        ([], "name the broker to test"),
    ],
)
def test_command_tells_users_errors(tmp_path: Path, arguments: list[str], text: str) -> None:
    """What the user got wrong is one line, without a traceback, and exit code 2."""
    done = command(tmp_path, *arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_command_shows_its_teeth(tmp_path: Path) -> None:
    """`--teeth` names every broken broker, its fault, and the scenario that found it out; exit code 0 says that none got away."""
    done = command(tmp_path, "--teeth")
    assert (done.returncode, done.stderr) == (0, "")
    for accused in BROKEN:
        assert f"{accused.name}: {accused.fault}\n    {accused.convicted_by}" in done.stdout
    assert "NOT FOUND OUT" not in done.stdout


BROKEN_BACKEND = """
import pytest
from crossdock_conformance import Target, test_promise
from crossdock_conformance.teeth.broken import StatsOffByOne

__all__ = ["test_promise"]

@pytest.fixture
def crossdock_target():
    return Target("memory://author", create=StatsOffByOne, patience=1.0)
"""


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["alone", "xdist"])
def test_authors_file(tmp_path: Path, workers: list[str]) -> None:
    """An author's test file of a few lines runs every scenario; the table and the report are the same under xdist."""
    (tmp_path / "test_backend.py").write_text(BROKEN_BACKEND)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p no:randomly -p no:asyncio\n")
    options = ["-q", "--crossdock-report=r.json", "-k", "stats.", *workers]
    done = run([sys.executable, "-m", "pytest", *options], tmp_path)
    assert done.returncode == 1, done.stdout
    (found,) = msgspec.json.decode((tmp_path / "r.json").read_bytes(), type=list[Report])
    assert {each.group for each in found.outcomes} == {"stats"}
    assert found.count(Verdict.FAILED) >= 1
    assert found.count(Verdict.PASSED) >= 1
    assert "FAILED stats." in done.stdout


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    """Under pytest, too, before anything has run."""
    (tmp_path / "test_backend.py").write_text("from crossdock_conformance import test_promise\n")
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "--crossdock-report=/nosuch/r.json"], tmp_path)
    assert done.returncode == 4
    assert "--crossdock-report: '/nosuch/r.json' cannot be written" in done.stderr


def test_a_target_has_to_be_named(tmp_path: Path) -> None:
    """Without a fixture or a URL the suite says what is missing."""
    (tmp_path / "test_backend.py").write_text("from crossdock_conformance import test_promise\n")
    done = run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:asyncio", "-k", "empty_batches"], tmp_path)
    assert done.returncode == 1
    assert "name what to test: by --crossdock-url" in done.stdout


def test_loading_the_plugin_costs_others_nothing(tmp_path: Path) -> None:
    """A project that has the plugin installed and does not use it imports nothing of the suite."""
    (tmp_path / "test_x.py").write_text(
        textwrap.dedent(
            """
            import sys
            def test_x():
                assert not {"crossdock_conformance.lab", "crossdock.app", "hypothesis.stateful"} & set(sys.modules)
            """
        )
    )
    done = run([sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio"], tmp_path)
    assert done.returncode == 0, done.stdout
