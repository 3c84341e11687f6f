"""The command as a whole: help, errors, environment variables, pipes and terminals."""

from __future__ import annotations

import os
import pty
import re
import resource
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer.main

from crossdock_cli.main import cli

COMMAND = [sys.executable, "-m", "crossdock_cli"]


def leaves(command: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Every command below a group, with its words."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [leaf for name, below in command.commands.items() for leaf in leaves(below, (*path, name))]


LEAVES = leaves(typer.main.get_command(cli))


# --- help -----------------------------------------------------------------------------------------


def test_the_commands() -> None:
    """All of them, and `ls` wherever there is `list`."""
    assert sorted(" ".join(path) for path, _ in LEAVES) == [
        "backend doctor",
        "backend list",
        "backend ls",
        "dlq discard",
        "dlq list",
        "dlq ls",
        "dlq replay",
        "dlq show",
        "queue list",
        "queue ls",
        "queue purge",
        "queue show",
        "task enqueue",
        "worker run",
    ]


@pytest.mark.parametrize("path", [path for path, _ in LEAVES], ids=" ".join)
def test_every_option_has_an_environment_variable(run: Any, path: tuple[str, ...]) -> None:
    """Shown by --help, and named CROSSDOCK_...; so does every option have a help text."""
    options = re.split(r"\n  (?=-)", run(*path, "--help").out.split("Options:")[1])[1:]
    assert options
    for option in (" ".join(text.split()) for text in options if "--help" not in text):
        assert re.search(r"[.)] \[.*env var: CROSSDOCK_[A-Z_]+[;\]]", option), option


@pytest.mark.parametrize("path", [path for path, _ in LEAVES if path[0] != "worker"], ids=" ".join)
def test_every_command_has_json(path: tuple[str, ...]) -> None:
    """And its help says what shape it has."""
    command = dict(LEAVES)[path]
    assert any("--json" in parameter.opts for parameter in command.params)
    assert "With --json" in command.help


@pytest.mark.parametrize("path", [("queue", "purge"), ("dlq", "replay"), ("dlq", "discard"), ("task", "enqueue")], ids=" ".join)
def test_what_changes_something_can_be_tried(path: tuple[str, ...]) -> None:
    """By --dry-run."""
    assert any("--dry-run" in parameter.opts for parameter in dict(LEAVES)[path].params)


@pytest.mark.parametrize("group", ["", "queue"])
def test_help_is_quick_and_imports_nothing_heavy(group: str) -> None:
    """Under 400 ms, the interpreter's start included; rich is not imported, nor core or asyncio unless a plugin may add commands.

    Processor time is measured: help waits for nothing, and other work on the machine must not fail it.
    """
    code = "import sys, crossdock_cli.main as m\n"
    code += f"try: m.main([*{group.split()}, '--help'])\nexcept SystemExit: print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = set(result.stdout.splitlines()[-1].split())
    core = {"crossdock", "asyncio", "msgspec", "pluggy"} if group or not entry_points(group="crossdock.plugins") else set[str]()
    assert imported & {*core, "rich.table", "rich.console", "pytest"} == set()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_version(run: Any) -> None:
    """Of the command and of core."""
    result = run("--version")
    assert re.fullmatch(r"crossdock [0-9.]+ \(core [0-9.]+\)\n", result.out)
    assert result.code == 0


@pytest.mark.parametrize("arguments", [(), ("queue",), ("dlq",)])
def test_a_group_alone_shows_its_help(run: Any, arguments: tuple[str, ...]) -> None:
    """Wrong use, with what there is."""
    result = run(*arguments)
    assert result.code == 2
    assert "Commands:" in result.out


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["que"], 2, "No such command 'que'"),
        (["queue", "lst"], 2, "No such command 'lst'"),
        (["queue", "list", "--jsno"], 2, "No such option: --jsno"),
        (["queue", "show"], 2, "Missing argument 'QUEUE'"),
        (["queue", "list", "--url", "redsi://u:secret@h"], 2, "no installed backend serves redsi:// URLs: did you mean redis://"),
        (["queue", "list", "--url", "shop.db"], 2, "the broker URL has no scheme"),
        (["queue", "list", "--namespace", "a b"], 2, "'a b' is not a valid namespace: use 1 to 63 characters"),
        (["queue", "list", "--url", "memory://x?some=secret"], 2, "takes no options"),
        (["dlq", "list", "--queue", "nowhere"], 1, "there is no queue 'nowhere' in this namespace; there are: none"),
        (["dlq", "list", "--reason", "rejcted"], 2, "there is no reason 'rejcted'; did you mean 'rejected'?"),
        (["dlq", "list", "--reason", "zz"], 2, "there are: attempts_exhausted, rejected, expired"),
        (["dlq", "list", "--since", "yesterday"], 2, "Invalid value for '--since': 'yesterday' is no instant"),
        (["dlq", "show", "a b"], 2, "'a b' is not a valid id"),
        (["dlq", "show", "zz"], 1, "there is no dead letter 'zz'"),
        (["dlq", "replay", "x", "--to", "a b"], 2, "'a b' is not a valid queue name"),
        (["dlq", "replay", "x", "--set", "to"], 2, "Invalid value for '--set': 'to' is no assignment"),
        (["dlq", "list", "--limit", "-1"], 2, "--limit"),
    ],
)
def test_mistakes_are_one_sentence(run: Any, url: str, arguments: list[str], code: int, said: str) -> None:
    """On standard error, with exit code 2 for wrong use and 1 for what is not there; never a traceback or a secret."""
    result = run(*arguments)
    assert (result.code, result.out) == (code, "")
    first, *others = result.err.splitlines()
    assert first.startswith("error: ")
    assert said in first
    assert all(other.endswith("--help` tells more") for other in others)
    assert "secret" not in result.err


def test_no_url(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to give one are named; and the file is one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CROSSDOCK_URL", raising=False)
    result = run("queue", "list")
    assert result.code == 2
    assert "no broker URL: give one to App(...) or --url, in $CROSSDOCK_URL, or as `url` in crossdock.toml" in result.err
    (tmp_path / "crossdock.toml").write_text('url = "memory://from-file"')
    assert run("queue", "list").code == 0
    (tmp_path / "crossdock.toml").write_text("url = 5")
    result = run("queue", "list")
    assert result.code == 2
    assert "crossdock.toml: `url` must be a string" in result.err


def test_a_fault_of_ours_is_told_without_traceback(run: Any, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And with one if it is asked for."""
    from crossdock.backends.memory import MemoryBroker

    async def fail(self: Any, queues: Any = None) -> Any:
        raise ZeroDivisionError("by\x1b[31m zero")

    monkeypatch.setattr(MemoryBroker, "stats", fail)
    result = run("queue", "list")
    assert (result.code, result.out) == (1, "")
    assert r"error: this is a fault of crossdock or of a plugin: ZeroDivisionError: by\x1b[31m zero" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in run("--debug", "queue", "list").err
    monkeypatch.setenv("CROSSDOCK_DEBUG", "1")
    assert "Traceback" in run("queue", "list").err


def test_namespaces_are_kept_apart(run: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By option or variable."""
    store.enqueue("m1")
    assert len(run("queue", "list", "--json").json) == 1
    assert run("queue", "list", "--json", "--namespace", "other").json == []
    monkeypatch.setenv("CROSSDOCK_NAMESPACE", "other")
    assert run("queue", "list", "--json").json == []


def test_data_cannot_move_the_cursor(run: Any, store: Any) -> None:
    """A task's name, arguments and error with escape sequences are shown, not done, in every command."""
    evil = "\x1b[2J\x9b31m\u202e[red]"
    store.kill("d1", task=evil, arguments={evil: evil}, error=ValueError(f"{evil}\r\n{evil}"))
    store.enqueue("m1", task=evil)
    for command in (["dlq", "list"], ["dlq", "show", "d1"], ["queue", "show", "default"], ["dlq", "replay", "--all", "--dry-run"]):
        for json in ([], ["--json"]):
            result = run(*command, *json)
            assert result.code == 0
            assert not re.search("[\x1b\x9b\r\u202e]", result.out + result.err)
    assert r"\x1b[2J\x9b31m\u202e[red]" in run("dlq", "list").out


# --- pipes and terminals --------------------------------------------------------------------------

SEEDED = """
import sys
sys.path.insert(0, {tests!r})
from conftest import Store
from crossdock_cli.main import main
store = Store("memory://seeded")
store.kill(*[f"n{{number:05}}" for number in range({count})], error=ValueError("\\x1b[31mred" + "long " * 60))
main(sys.argv[1:])
"""
"""The command in a process of its own, with dead letters."""


def seeded(count: int) -> list[str]:
    """The start of a command line."""
    return [sys.executable, "-c", SEEDED.format(tests=str(Path(__file__).parent), count=count)]


ENVIRONMENT = {**os.environ, "CROSSDOCK_URL": "memory://seeded", "COLUMNS": "80", "TERM": "xterm-256color"}
ENVIRONMENT.pop("PYTHONUNBUFFERED", None)  # buffers are part of what is tested


@pytest.mark.parametrize("count", [1, 3000])
def test_a_closed_pipe_is_quiet(count: int) -> None:
    """`crossdock dlq list | head -0`: no traceback, whether the output fits into the buffers or not."""
    command = [*seeded(count), "dlq", "list", "--json", "--limit", "0"]
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=30)
    os.close(writer)
    assert process.stderr == ""
    assert process.returncode == 1


def on_a_terminal(command: list[str], typed: str = "") -> tuple[int, str]:
    """Run a command at a terminal of 80 columns; returns its exit code and all that appeared."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=ENVIRONMENT)
    os.close(terminal)
    os.write(controller, typed.encode())
    shown = b""
    try:
        while chunk := os.read(controller, 65536):
            shown += chunk
    except OSError:  # Linux: the other side is closed
        pass
    os.close(controller)
    return process.wait(30), shown.decode()


def test_a_terminal_gets_a_fitted_table() -> None:
    """Long texts are cut at the width, and escape sequences in data stay shown."""
    code, shown = on_a_terminal([*seeded(2), "dlq", "list"])
    assert code == 0
    bare = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert all(len(line) <= 80 for line in bare.splitlines())
    assert "…" in bare
    assert "\x1b[31mred" not in shown


def test_a_terminal_is_asked_and_sees_progress() -> None:
    """The question waits for an answer; a yes does it, with a bar meanwhile."""
    code, shown = on_a_terminal([*seeded(2500), "dlq", "discard", "--all"], "y\n")
    assert code == 0
    assert "Discard 2,500 dead letters for good? [y/N] " in shown
    assert "discarding" in shown
    assert "2,500 dead letters discarded" in shown


# --- plugins --------------------------------------------------------------------------------------


def test_a_plugin_adds_commands(tmp_path: Path) -> None:
    """And one that cannot be loaded is told beside the data and stops nothing."""
    info = tmp_path / "crossdock_extra-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crossdock-extra\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[crossdock.plugins]\nextra = extra_commands\nbroken = no_such_module\n")
    (tmp_path / "extra_commands.py").write_text(
        "import typer\nfrom crossdock.spi import hookimpl\nextra = typer.Typer()\n"
        "@extra.callback()\ndef group() -> None: ...\n"
        "@extra.command()\ndef hello() -> None:\n    print('hello')\n"
        "@hookimpl\ndef crossdock_register_commands(cli):\n    cli.add_typer(extra, name='extra')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([*COMMAND, "extra", "hello"], capture_output=True, text=True, env=environment, timeout=30)
    assert (result.returncode, result.stdout) == (0, "hello\n")
    assert "the plugin no_such_module of crossdock-extra 1.0 cannot be imported" in result.stderr


# --- everything together --------------------------------------------------------------------------

SHOP = """
from crossdock import App, Reject

app = App("sqlite:///shop.db")

@app.task(queue="emails")
async def send(to: str) -> None:
    if "@" not in to:
        raise Reject(f"{to} is no address")
    with open("outbox", "a") as outbox:
        outbox.write(to + "\\n")
"""


def test_a_life_of_a_task(tmp_path: Path) -> None:
    """Enqueue, work, look at what died, repair it, work again: each step a command of its own, on a file."""
    (tmp_path / "shop.py").write_text(SHOP)
    environment = {**os.environ, "CROSSDOCK_URL": "sqlite:///shop.db"}

    def crossdock(*arguments: str) -> str:
        result = subprocess.run([*COMMAND, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return result.stdout

    id = crossdock("task", "enqueue", "shop:app", "send", "--arg", "to=nobody").strip()
    crossdock("task", "enqueue", "shop.py", "shop.send", "--arg", "to=a@example.com")
    crossdock("worker", "run", "shop:app", "--burst")
    assert (tmp_path / "outbox").read_text() == "a@example.com\n"
    assert crossdock("dlq", "list").splitlines()[1].split()[:4] == [id, "emails", "shop.send", "rejected"]
    assert crossdock("dlq", "replay", id, "--set", "to=b@example.com") == "1 dead letter replayed\n"
    crossdock("worker", "run", "shop:app", "--burst", "--processes", "2")
    assert (tmp_path / "outbox").read_text() == "a@example.com\nb@example.com\n"
    assert crossdock("queue", "list", "--json").count('"dead": 0') == 1
