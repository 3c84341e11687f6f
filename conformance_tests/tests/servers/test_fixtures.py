"""The pytest side: one server for many tests, skip or failure by CROSSDOCK_REQUIRE, and the word at the end; also under xdist."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from crossdock_conformance.servers import Server, ServerNotFound, find_servers, is_required, required
from crossdock_conformance.servers.fixtures import ServerPool
from crossdock_conformance.servers.keeper import process_table
from crossdock_conformance.servers.requirements import NotRun

FIXTURES = "crossdock_conformance.servers.fixtures"


# --- what is required -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "asked", "found", "expected"),
    [
        ("", None, (), False),
        ("redis", None, (), True),
        (" Redis , nats", None, (), True),
        ("nats", None, (), False),
        ("redis", "7.0", (), True),  # none at all
        ("redis", "7.0", ("6.2.5",), False),  # a Redis is there, and that was all that was required
        ("redis:7", "7.0", ("6.2.5",), True),
        ("redis:7.0", "7.0.15", ("6.2.5",), True),
        ("redis:7.0", "7.2", ("6.2.5",), False),
        ("redis:7.0", None, (), True),
        ("redis, redis:7", "7.0", ("6.2.5",), True),
    ],
)
def test_required(monkeypatch: pytest.MonkeyPatch, setting: str, asked: str | None, found: tuple[str, ...], expected: bool) -> None:
    """CROSSDOCK_REQUIRE names kinds, of which one version must be there, and kinds with versions."""
    monkeypatch.setenv("CROSSDOCK_REQUIRE", setting)
    assert is_required(ServerNotFound("none", "redis", asked, found)) is expected


def test_the_entries_of_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries are read without spaces and case; none are required by default."""
    monkeypatch.delenv("CROSSDOCK_REQUIRE", raising=False)
    assert required() == frozenset()
    monkeypatch.setenv("CROSSDOCK_REQUIRE", "redis, NATS,,rabbitmq:4.3 ")
    assert required() == {"redis", "nats", "rabbitmq:4.3"}


def test_not_run_keeps_each_server_once() -> None:
    """What was missed is listed once for each kind and version, whichever process missed it."""
    here, there = NotRun(), NotRun()
    here.add(ServerNotFound("no 7.0", "redis", "7.0"))
    there.add(ServerNotFound("no 7.0", "redis", "7.0"))
    there.add(ServerNotFound("none", "nats"))
    here.add_entries(there.entries())
    assert here.entries() == [("nats", "", "none"), ("redis", "7.0", "no 7.0")]


# --- the pool ---------------------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[ServerPool]:
    if not find_servers("redis"):
        pytest.skip("there is no redis server for tests")
    pool = ServerPool()
    yield pool
    pool.close()


def test_the_pool_shares_a_server(pool: ServerPool) -> None:
    """The same kind and version is the same server; close ends it."""
    server = pool.get("redis")
    assert pool.get("redis") is server
    assert server.ping()
    pool.close()
    assert not server.running


@pytest.mark.parametrize("left", ["pause", "stop", "kill"])
def test_the_pool_sets_a_server_going_again(pool: ServerPool, left: str) -> None:
    """A server that a test left paused, stopped or dead answers when the next test gets it."""
    getattr(pool.get("redis"), left)()
    assert pool.get("redis").ping()


def test_the_pool_looks_once_for_what_is_not_there() -> None:
    """A server that was not found is not searched again for each test."""
    asked: list[str] = []

    def start(kind: str, *, version: str | None = None) -> Server:
        asked.append(kind)
        raise ServerNotFound("none", kind, version)

    pool = ServerPool(start)
    for _ in range(2):
        with pytest.raises(ServerNotFound):
            pool.get("redis", "7.0")
    assert asked == ["redis"]
    pool.close()


# --- a run of pytest ---------------------------------------------------------------------------------------

TESTS = """
import os

def test_first(server_of):
    server = server_of({kind!r})
    with open({notes!r}, "a") as notes:
        notes.write(f"{{os.getpid()}} {{server._processes._keeper.pid}} {{server.url}}\\n")
    {then}

def test_second(server_of):
    test_first(server_of)

def test_missed(server_of):
    server_of("redis", "0.1")
"""


class Run(NamedTuple):
    """An inner run of pytest."""

    status: int
    lines: list[str]
    tests: list[list[str]]
    """Of each test that got a server: its process, the server's keeper, the server's URL."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Run]:
    """Runs pytest on a file of tests that use `server_of`."""
    kind = next((kind for kind in ("redis", "valkey", "nats") if find_servers(kind)), None)
    if kind is None:
        pytest.skip("there is no redis, valkey or nats server for tests")
    for variable in ("CROSSDOCK_REQUIRE", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str, then: str = "pass") -> Run:
        notes = tmp_path / "notes"
        notes.touch()
        (tmp_path / "test_inner.py").write_text(TESTS.format(kind=kind, notes=str(notes), then=then))
        command = [sys.executable, "-m", "pytest", "-p", FIXTURES, "-p", "no:randomly", "test_inner.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        return Run(done.returncode, done.stdout.splitlines(), [line.split() for line in notes.read_text().splitlines()])

    return run


def test_a_run_names_what_did_not_run(run: Callable[..., Run]) -> None:
    """Tests share a server; one whose server is not found is skipped by its name, and the run ends with what was looked for."""
    done = run("-rs")
    assert "2 passed, 1 skipped" in done.lines[-1]
    assert any(line.endswith("there is no Redis 0.1 server for tests") for line in done.lines if line.startswith("SKIPPED"))
    assert len({url for _, _, url in done.tests}) == 1
    assert any("servers that were not found; their tests did not run" in line for line in done.lines)
    assert any(line.startswith("redis 0.1: there is no Redis 0.1 server for tests: ") for line in done.lines)
    assert not lives(done.tests[0][1])


def test_a_required_server_that_is_not_found_is_a_failure(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """With CROSSDOCK_REQUIRE the same run fails, and says what was asked."""
    monkeypatch.setenv("CROSSDOCK_REQUIRE", "redis:0.1")
    done = run()
    assert done.status == pytest.ExitCode.TESTS_FAILED
    assert "1 failed, 2 passed" in done.lines[-1]
    assert any(
        line.startswith("CROSSDOCK_REQUIRE asks for it, and there is no Redis 0.1 server for tests: ") for line in done.lines
    )


def test_each_process_of_xdist_has_its_own(run: Callable[..., Run]) -> None:
    """Two worker processes use two servers, both are ended, and what neither found is named once."""
    pytest.importorskip("xdist")
    done = run("-n", "2", "--dist", "each")
    assert "4 passed, 2 skipped" in done.lines[-1]
    assert len({pid for pid, _, _ in done.tests}) == 2
    assert len({url for _, _, url in done.tests}) == 2
    assert not any(lives(keeper) for _, keeper, _ in done.tests)
    assert len([line for line in done.lines if line.startswith("redis 0.1: there is no Redis")]) == 1


def test_a_killed_run_leaves_no_server(run: Callable[..., Run]) -> None:
    """A run of pytest that is killed by SIGKILL leaves no server."""
    done = run(then="os.kill(os.getpid(), 9)")
    assert done.status == -signal.SIGKILL
    wait_until_dead(done.tests[0][1])


def test_a_killed_worker_leaves_no_server(run: Callable[..., Run]) -> None:
    """Nor does a worker process of xdist that is killed; the run goes on."""
    pytest.importorskip("xdist")
    done = run("-n", "1", "-k", "first", then="os.kill(os.getpid(), 9)")
    assert done.status == pytest.ExitCode.TESTS_FAILED
    wait_until_dead(done.tests[0][1])


def wait_until_dead(pid: str) -> None:
    deadline = time.monotonic() + 10
    while lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lives(pid: str) -> bool:
    """Whether it still runs. A keeper ends after all that it keeps."""
    process = process_table().get(int(pid))
    return process is not None and process.state != "Z"
