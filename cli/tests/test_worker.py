"""`crossdock worker run`: what it makes of its options. (What a worker does is tested in core.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crossdock import WorkerOptions, supervisor

APP = "worker_run_program:app"


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> list[tuple[str, WorkerOptions, int]]:
    """What was started from a program in the working directory; the supervisor only notes it and returns 3."""
    (tmp_path / "worker_run_program.py").write_text(
        "from crossdock import App\napp, empty = App(), App()\n@app.task\ndef work() -> None: ..."
    )
    calls: list[tuple[str, WorkerOptions, int]] = []

    def note(reference: str, options: WorkerOptions, processes: int = 1) -> int:
        calls.append((reference, options, processes))
        return 3

    monkeypatch.setattr(supervisor, "run", note)
    return calls


def test_options_reach_the_worker(run: Any, started: Any) -> None:
    """Every option, durations in words, queues in order; the supervisor's exit code is the command's."""
    options = "-q critical=6 --queue default -q low=2 --concurrency 7 --processes 2 --strict --burst --grace 1m --lease 45s"
    result = run("worker", "run", APP, *options.split())
    queues = {"critical": 6, "default": 1, "low": 2}
    expected = WorkerOptions(queues=queues, concurrency=7, strict=True, burst=True, grace=60.0, lease=45.0)
    assert started == [(APP, expected, 2)]
    assert list(started[0][1].queues) == list(queues)
    assert (result.code, result.out) == (3, "")
    assert result.err == "crossdock: running worker_run_program:app, 7 tasks at once in each of 2 processes; Ctrl-C to stop\n"


def test_defaults(run: Any, started: Any) -> None:
    """Those of WorkerOptions."""
    assert run("worker", "run", APP).err == "crossdock: running worker_run_program:app, 100 tasks at once; Ctrl-C to stop\n"
    assert started == [(APP, WorkerOptions(), 1)]


def test_environment(run: Any, started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option can be given by its variable; the command line wins."""
    for name, value in {"QUEUE": "a=2 b", "CONCURRENCY": "5", "GRACE": "10s", "STRICT": "1", "LEASE": "2m"}.items():
        monkeypatch.setenv(f"CROSSDOCK_WORKER_RUN_{name}", value)
    run("worker", "run", APP, "--concurrency", "6")
    assert started[0][1] == WorkerOptions(queues={"a": 2, "b": 1}, concurrency=6, strict=True, grace=10.0, lease=120.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-q", "a=x"], "'a=x' is no queue with a weight: write it like critical=6"),
        (["-q", "a="], "'a=' is no queue with a weight"),
        (["-q", "a=-1"], "'a=-1' is no queue with a weight"),
        (["-q", "a=0"], "queue 'a': weight must be from 1 to 1,000"),
        (["-q", "a=" + "9" * 5000], "is no queue with a weight"),
        (["-q", "a/b=1"], "'a/b' is not a valid queue name"),
        (["-q", "a", "-q", "a=2"], "the queue 'a' is given twice"),
        (["--concurrency", "0"], "--concurrency"),
        (["--concurrency", "many"], "--concurrency"),
        (["--processes", "0"], "--processes"),
        (["--grace", "soon"], "'soon' is no duration"),
        (["--grace", "2d"], "grace must be from 0 to 86,400 seconds"),
        (["--lease", "-5"], "'-5' is no duration"),
        (["--frist"], "--frist"),
    ],
)
def test_wrong_use(run: Any, started: Any, options: list[str], said: str) -> None:
    """Exit code 2, one sentence, nothing is started."""
    result = run("worker", "run", APP, *options)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert said in result.err.splitlines()[0]
    assert started == []


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("no_such_module:app", "there is no module 'no_such_module'"),
        ("worker_run_program:ap", "did you mean worker_run_program:app?"),
        ("worker_run_program:empty", "this App has no tasks"),
    ],
)
def test_apps_that_cannot_run(run: Any, started: Any, app: str, said: str) -> None:
    """One sentence, exit code 2, and no banner that says otherwise."""
    result = run("worker", "run", app)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert said in result.err
    assert len(result.err.splitlines()) == 1
    assert started == []


def test_without_app(run: Any, started: Any) -> None:
    """The missing argument is named."""
    result = run("worker", "run")
    assert result.code == 2
    assert "APP" in result.err
