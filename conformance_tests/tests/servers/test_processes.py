"""No process and no file of a server outlives the test process, however that ends and whatever the server started itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crossdock_conformance.servers import ServerFailed, find_servers
from crossdock_conformance.servers.keeper import Process, descendants, process_table
from crossdock_conformance.servers.processes import Processes

# Starts a child in its group, and one that leaves group, session and parent, as a daemon does; then waits.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    print("daemon", os.getpid(), flush=True)
    time.sleep(600)
print("ready", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Processes]:
    """A running process with a child and a daemon."""
    folder = tmp_path / "kept"
    folder.mkdir()
    processes = Processes(folder)
    log = tmp_path / "log"
    try:
        processes.run([sys.executable, "-c", FAMILY], {}, tmp_path, log)
        wait_until(lambda: log.exists() and log.read_text().count("\n") == 2)
        yield processes
    finally:
        processes.end()


def family_of(processes: Processes) -> list[int]:
    return descendants(processes._keeper.pid)


def test_kill_reaches_all(family: Processes) -> None:
    """Killed are the process, its children and the daemons it left behind; then nothing runs, and another can be started."""
    members = family_of(family)
    assert len(members) == 3
    family.kill()
    assert not family.running
    assert family.exit_status == -signal.SIGKILL
    assert not any(map(lives, members))
    family.kill()  # again does nothing


def test_the_rest_ends_with_the_first(family: Processes) -> None:
    """When the started process ends in order, what it left behind is ended before it counts as gone."""
    members = family_of(family)
    family.terminate()
    assert family.wait(10)
    assert family.exit_status == -signal.SIGTERM
    assert not any(map(lives, members))


def test_pause_reaches_all(family: Processes) -> None:
    """Paused are all of them when pause returns; resume lets all run again."""
    members = family_of(family)
    family.pause()
    table = process_table()
    assert {table[pid].state for pid in members} == {"T"}
    family.resume()
    wait_until(lambda: "T" not in {process_table()[pid].state for pid in members})


def test_what_is_paused_can_be_killed(family: Processes) -> None:
    """Kill needs no resume."""
    members = family_of(family)
    family.pause()
    family.kill()
    assert not any(map(lives, members))


def test_end_removes_the_folder(family: Processes, tmp_path: Path) -> None:
    """End kills all, removes the folder and ends the keeper; again does nothing."""
    members = family_of(family)
    family.end()
    assert not any(map(lives, members))
    assert not (tmp_path / "kept").exists()
    assert family._keeper.returncode == 0
    family.end()
    assert not family.running


def test_signals_to_groups_do_not_reach_it(family: Processes) -> None:
    """The keeper and what it runs are in sessions of their own: neither an interrupt from the terminal, meant for the tests, nor
    a signal that a server sends to all its group ends the wrong one."""
    assert family.pid is not None
    assert len({os.getsid(0), os.getsid(family._keeper.pid), os.getsid(family.pid)}) == 3


def test_a_keeper_that_is_told_to_end_by_a_signal(family: Processes, tmp_path: Path) -> None:
    """SIGTERM to the keeper ends all in order too, and we notice."""
    members = family_of(family)
    os.kill(family._keeper.pid, signal.SIGTERM)
    family._keeper.wait(10)
    assert not any(map(lives, members))
    assert not (tmp_path / "kept").exists()
    with pytest.raises(ServerFailed, match="the process that keeps this server has ended"):
        _ = family.running
    assert not family.running
    with pytest.raises(ServerFailed, match="has ended"):
        family.run(["true"], {}, tmp_path, tmp_path / "log")


def test_the_command_at_the_end(tmp_path: Path) -> None:
    """It is run only if we are gone without ending the keeper ourselves."""
    for name in ("told", "gone"):
        processes = Processes(None, at_end=["touch", str(tmp_path / name)])
        if name == "gone":
            assert processes._keeper.stdin is not None
            processes._keeper.stdin.close()
            processes._keeper.wait(10)
        processes.end()
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]


def test_what_cannot_be_started(tmp_path: Path) -> None:
    """A program that is not there has ended at once, and the log says why."""
    processes = Processes(None)
    try:
        processes.run([str(tmp_path / "nothing")], {}, tmp_path, tmp_path / "log")
        assert processes.wait(10)
        assert processes.exit_status == 127
        assert "nothing: [Errno 2] No such file" in (tmp_path / "log").read_text()
    finally:
        processes.end()


def test_the_environment_is_ours_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is started has our environment with the changes, no input, and the default answer to broken pipes."""
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("CHANGED", "before")
    processes = Processes(None)
    program = "import os, signal, sys; print(os.environ['KEPT'], os.environ['CHANGED'], sys.stdin.read() == '')"
    shell = f'trap "" TERM; "{sys.executable}" -c "{program}"; grep SigIgn /proc/self/status'
    try:
        processes.run(["sh", "-c", shell], {"CHANGED": "after"}, tmp_path, tmp_path / "log")
        assert processes.wait(10)
    finally:
        processes.end()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "kept after True"
    if sys.platform == "linux":
        mask = int(lines[1].split()[1], 16)
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ)
        assert [number for number in numbers if mask >> (number - 1) & 1] == [signal.SIGTERM]  # which the shell itself has chosen


def test_the_process_table_by_ps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, ps tells the same."""
    child = subprocess.Popen(["sleep", "600"])
    try:
        by_proc = process_table()
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        try:
            by_ps = process_table()
        except FileNotFoundError:
            pytest.skip("there is no ps")
        assert by_ps[child.pid].parent == by_proc[child.pid].parent == os.getpid()
        assert child.pid in descendants(os.getpid(), by_ps)
    finally:
        child.kill()
        child.wait()


def test_descendants() -> None:
    """Below a process are its children and theirs; not those that have ended, nor anybody else's."""
    table = {1: Process(0, "S"), 2: Process(1, "S"), 3: Process(2, "R"), 4: Process(2, "Z"), 5: Process(1, "S"), 6: Process(3, "T")}
    assert descendants(2, table) == [3, 6]
    assert descendants(6, table) == []
    assert set(descendants(1, table)) == {2, 3, 5, 6}


# --- the test process dies ------------------------------------------------------------------------------

PROGRAM = """
import json, os, signal, sys
from crossdock_conformance.servers import start_server
from crossdock_conformance.servers.keeper import descendants
server = start_server(sys.argv[1])
print(json.dumps({"pids": [server._processes._keeper.pid, *descendants(os.getpid())], "folder": str(server.folder)}), flush=True)

def fork():
    child = os.fork()
    if child:
        print(child, flush=True)
    return child

"""

DEATHS = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "killed while the server is paused": "server.pause(); os.kill(os.getpid(), signal.SIGKILL)",
    "killed while the server is stopped": "server.stop(); os.kill(os.getpid(), signal.SIGKILL)",
    "terminated": "os.kill(os.getpid(), signal.SIGTERM)",
    "gone without a word": "os._exit(1)",
    "fallen by an error": "raise SystemExit(3)",
    "ended without closing": "pass",
    "killed, with a fork that became another program": (
        "fork() or os.execvp('sleep', ['sleep', '600']); os.kill(os.getpid(), signal.SIGKILL)"
    ),
    "killed, with a fork that holds all its files": "import time; fork() or time.sleep(600); os.kill(os.getpid(), signal.SIGKILL)",
    "ended, after a fork has ended": "child = os.fork()\nif child: os.waitpid(child, 0); assert server.ping()",
    "ended, after a fork has closed it": (
        "child = os.fork()\nif not child: server.close(); os._exit(server._closed)\nassert os.waitpid(child, 0)[1] == 0 and server.ping()"
    ),
}


@pytest.mark.parametrize("death", DEATHS)
def test_nothing_outlives_the_test_process(death: str, own_kind: str) -> None:
    """However the test process ends, no process and no folder is left of its server."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM + DEATHS[death], own_kind], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert program.stdout is not None
    with program, program.stdout:
        told: dict[str, Any] = json.loads(program.stdout.readline())
        assert len(told["pids"]) >= 2
        fork = int(program.stdout.readline()) if "with a fork" in death else None
        try:
            status = program.wait()  # without a limit of its own, which would be polled for
            if death.startswith("ended"):
                assert status == 0
                assert not any(map(lives, told["pids"])), "it did not wait for its server's end"
            wait_until(lambda: not any(map(lives, told["pids"])))
            wait_until(lambda: not Path(told["folder"]).exists())
            assert fork is None or lives(fork)
        finally:
            if fork is not None:
                os.kill(fork, signal.SIGKILL)


@pytest.fixture
def own_kind() -> str:
    """A kind that is here."""
    for kind in ("redis", "valkey", "nats"):
        if find_servers(kind):
            return kind
    pytest.skip("there is no redis, valkey or nats server for tests")


def wait_until(fact: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lives(pid: int) -> bool:
    """Whether it still runs; what has ended and was not reaped, as process 1 may leave it, does not."""
    process = process_table().get(pid)
    return process is not None and process.state != "Z"
