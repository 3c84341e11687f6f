"""`crossdock task enqueue`."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import pytest

from crossdock import codec
from crossdock.spi import Priority, State

PROGRAM = """
from crossdock import App

app = App()

@app.task(queue="emails")
async def send_email(to: str, n: int = 1) -> None: ...

@app.task(name="shop.send")
def send() -> None: ...

@app.task(name="bills.send")
def bill() -> None: ...
"""

_numbers = itertools.count()


@pytest.fixture
def program(url: str, tmp_path: Path) -> str:
    """A program in the working directory; its module's name."""
    name = f"enqueued_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(PROGRAM)
    return name


def only(store: Any, queue: str = "emails", state: State = State.READY) -> Any:
    """The one message that is there."""
    (entry,) = store.entries(queue, state).values()
    return entry.message


def test_it_prints_the_id(run: Any, store: Any, program: str) -> None:
    """By the task's full name or its last part, with arguments by JSON and by name."""
    result = run("task", "enqueue", f"{program}:app", "send_email", "--args", '{"to": "a", "n": 2}', "--arg", "to=b")
    message = only(store)
    assert result == (0, f"{message.id}\n", "")
    assert codec.decode(message.body).task == f"{program}.send_email"
    assert codec.arguments(message.body) == {"to": "b", "n": 2}


def test_json(run: Any, store: Any, program: str) -> None:
    """The documented shape."""
    result = run("task", "enqueue", f"{program}.py", f"{program}.send_email", "--arg", "to=a", "--id", "order-1", "--json")
    assert result.json == {
        "id": "order-1",
        "queue": "emails",
        "task": f"{program}.send_email",
        "arguments": {"to": "a"},
        "dry_run": False,
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("to=5", "parameter 'to'"), ('to="5"', "5"), ("to=", ""), ("to=a=b", "a=b"), ("to={", "{"), ("to=true!", "true!")],
)
def test_values_that_are_json_are_taken_as_such(run: Any, store: Any, program: str, text: str, value: str) -> None:
    """`5` is a number, which `to` refuses; `"5"` is text, as is whatever is no JSON."""
    result = run("task", "enqueue", program, "send_email", "--arg", text)
    if result.code:
        assert value in result.err
    else:
        assert codec.arguments(only(store).body)["to"] == value


def test_options_reach_the_message(run: Any, store: Any, program: str) -> None:
    """Delay, expiry, priority and queue."""
    options = ("--delay", "10m", "--expires", "1h", "--priority", "high", "--queue", "other")
    before = time.time() * 1000
    assert run("task", "enqueue", program, "send_email", "--arg", "to=a", *options).code == 0
    message = only(store, "other", State.SCHEDULED)
    assert message.priority is Priority.HIGH
    assert message.eta_ms == pytest.approx(before + 600_000, abs=30_000)
    assert codec.decode(message.body).expires_ms == pytest.approx(before + 3_600_000, abs=30_000)


def test_instants_reach_the_message(run: Any, store: Any, program: str) -> None:
    """Absolute times, and a priority by number."""
    options = ("--eta", "2100-01-01T00:00:00Z", "--expires", "2100-01-02T00:00:00+00:00", "--priority", "9")
    assert run("task", "enqueue", program, "send_email", "--arg", "to=a", *options).code == 0
    message = only(store, state=State.SCHEDULED)
    assert (message.priority, message.eta_ms) == (Priority.CRITICAL, 4_102_444_800_000)
    assert codec.decode(message.body).expires_ms == 4_102_531_200_000


def test_dry_run_sends_nothing(run: Any, store: Any, program: str) -> None:
    """It checks all the same."""
    arguments = ("task", "enqueue", program, "send_email", "--id", "x1", "--dry-run")
    result = run(*arguments, "--arg", "to=a")
    assert result == (0, f"would enqueue {program}.send_email on queue emails as x1\n", "")
    assert run(*arguments, "--arg", "to=a", "--json").json["dry_run"] is True
    assert run(*arguments).code == 1
    assert store.entries("emails", State.READY) == {}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["send_emial"], 1, r"the App has no task 'send_emial'; did you mean \w+\.send_email\?"),
        (["zzz"], 1, r"the App has no task 'zzz'; there are: bills\.send, "),
        (["send"], 1, r"several tasks end in 'send': shop\.send, bills\.send"),
        (["send_email"], 1, r"missing required parameter .*to"),
        (["send_email", "--arg", "to=a", "--arg", "m=1"], 1, r"unknown parameter .*m"),
        (["send_email", "--arg", "to=a", "--arg", "n=x"], 1, r"parameter 'n'.*Expected `int`"),
        (["send_email", "--args", "{to: a}"], 2, r"Invalid value for '--args': .* write a JSON object like"),
        (["send_email", "--args", "[1]"], 2, r"Invalid value for '--args': .*Expected `object`"),
        (["send_email", "--args", "[" * 100_000], 2, r"Invalid value for '--args'"),
        (["send_email", "--arg", "to"], 2, r"Invalid value for '--arg': 'to' is no assignment: write name=value"),
        (["send_email", "--arg", "to=a", "--arg", "to=b"], 2, r"'to' is given twice"),
        (["send_email", "--delay", "soon"], 2, r"Invalid value for '--delay': 'soon' is no duration"),
        (["send_email", "--eta", "2026-01-01T10:00"], 2, r"Invalid value for '--eta': .* has no time zone"),
        (["send_email", "--expires", "x"], 2, r"Invalid value for '--expires': 'x' is no duration"),
        (
            ["send_email", "--priority", "urgent"],
            2,
            r"Invalid value for '--priority': .* use low, normal, high, critical, or 0 to 9",
        ),
        (["send_email", "--priority", "10"], 2, r"Invalid value for '--priority'"),
        (["send_email", "--arg", "to=a", "--delay", "1m", "--eta", "2100-01-01T00:00Z"], 2, r"delay and eta exclude each other"),
        (["send_email", "--arg", "to=a", "--id", "a b"], 2, r"'a b' is not a valid id"),
        (["send_email", "--arg", "to=a", "--queue", "a/b"], 2, r"'a/b' is not a valid queue name"),
        (["send_email", "--arg", "to=" + "x" * 1_100_000], 1, r"the limit is 1,048,576"),
    ],
)
def test_mistakes_are_one_sentence(run: Any, store: Any, program: str, arguments: list[str], code: int, said: str) -> None:
    """Exit code 2 for wrong use, 1 for what the task refuses; nothing is sent."""
    result = run("task", "enqueue", program, *arguments)
    assert (result.code, result.out) == (code, "")
    first, *others = result.err.splitlines()
    assert first.startswith("error: ")
    assert re.search(said, first)
    assert others in ([], ["`crossdock task enqueue --help` tells more"])
    assert store.entries("emails", State.READY) == {}


@pytest.mark.parametrize(
    ("app", "said"),
    [
        ("no_such_module:app", "there is no module 'no_such_module'"),
        ("no_such.py", "there is no file no_such.py"),
        ("{program}:ap", "has no attribute 'ap'; did you mean {program}:app?"),
        ("{program}:send", "send is of type SyncTask, not an App"),
        ("bad.py", "importing bad.py raised ZeroDivisionError at "),
        (":", "names no App: write it as module:attribute"),
    ],
)
def test_apps_that_are_not_there(run: Any, program: str, app: str, said: str) -> None:
    """One sentence, exit code 2."""
    Path("bad.py").write_text("1 / 0")
    result = run("task", "enqueue", app.format(program=program), "send_email")
    assert (result.code, result.out) == (2, "")
    assert said.format(program=program) in result.err
    assert result.err.startswith("error: ")
    assert len(result.err.splitlines()) == 1
