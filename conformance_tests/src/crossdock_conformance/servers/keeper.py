"""Runs the processes of one server so that they, and its folder, never outlive the test process.

A script of its own, on the standard library alone, started as `python -I -S keeper.py PARENT FOLDER [COMMAND...]`. It ends when
it is told to or when its parent died, however it died; then it kills every process below it and removes FOLDER (if one is named).
If it was not told to, it also runs COMMAND (if any).

Why a process and not a parent-death signal: that signal is sent when the *thread* that started the server ends, is lost at every
exec of a set-uid program, and does not reach what a server starts itself, such as RabbitMQ's epmd, which leaves its group and
session. All of them stay below this process, which on Linux adopts orphans.

    stdin    one line of JSON per command: {"run": argv, "env": {...}, "cwd": path, "log": path} or {"end": true}
    stdout   one line of JSON per event: {"pid": n} after "run"; {"exit": status} when that process and all below are gone
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

PARENT_CHECK = 0.5
"""Seconds between looks whether the parent lives: a forked child of it may hold our standard input open."""

KILL_LIMIT = 10.0
"""Seconds until we stop waiting for killed processes: one that hangs in the kernel must not hold the rest."""


class Process(NamedTuple):
    """One line of the process table."""

    parent: int
    state: str
    """As `ps` writes it: R, S, D, T (stopped), Z (ended, not yet reaped), ..."""


def process_table() -> dict[int, Process]:
    """Every process of this machine by its id."""
    return dict(_from_proc() if os.path.exists("/proc/self/stat") else _from_ps())


def _from_proc() -> Iterator[tuple[int, Process]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    # The command's name stands in brackets and may contain any character.
                    state, parent = file.read().rpartition(b")")[2].split()[:2]
            except (OSError, ValueError):  # it ended meanwhile
                continue
            yield int(name), Process(int(parent), state.decode())


def _from_ps() -> Iterator[tuple[int, Process]]:
    import subprocess

    command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="]
    for line in subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines():
        pid, parent, state = line.split()[:3]
        yield int(pid), Process(int(parent), state[:1])


def descendants(root: int, table: Mapping[int, Process] | None = None) -> list[int]:
    """The processes below `root`, parents first; those that ended and wait to be reaped are left out."""
    table = process_table() if table is None else table
    children: dict[int, list[int]] = {}
    for pid, process in table.items():
        children.setdefault(process.parent, []).append(pid)
    found = [root]
    for pid in found:
        found += children.get(pid, ())
    return [pid for pid in found[1:] if table[pid].state != "Z"]


def send(signal_number: int, pids: list[int]) -> None:
    """Send a signal to those that still live."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal_number)


# --- the script ------------------------------------------------------------------------------------


class Keeper:
    """The one server of this process."""

    def __init__(self, parent: int, folder: str, at_end: list[str]) -> None:
        self.parent = parent
        self.folder = folder
        self.at_end = at_end
        self.main = 0  # the process that "run" started; 0 if none runs
        self.wake, self.woken = os.pipe()

    def keep(self) -> None:
        """Do as told until the end."""
        os.set_blocking(self.woken, False)
        signal.set_wakeup_fd(self.woken)
        signal.signal(signal.SIGCHLD, noted)
        signal.signal(signal.SIGTERM, leave)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        told = False
        try:
            while os.getppid() == self.parent:
                readable, _, _ = select.select([0, self.wake], [], [], PARENT_CHECK)
                if self.wake in readable:
                    os.read(self.wake, 1024)
                self.reap()
                if 0 in readable:
                    line = read_line()
                    command: dict[str, Any] = json.loads(line or "{}")
                    if "run" not in command:
                        told = "end" in command
                        break
                    self.run(command["run"], command["env"], command["cwd"], command["log"])
        finally:
            kill_all()
            if self.folder:
                remove(self.folder)
            if self.at_end and not told:
                os.execvp(self.at_end[0], self.at_end)

    def run(self, argv: list[str], env: dict[str, str], cwd: str, log: str) -> None:
        """Start a process in a session of its own, its output appended to the log."""
        self.main = os.fork()
        if self.main == 0:
            try:
                os.setsid()
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                    signal.signal(number, signal.SIG_DFL)  # else what we, or Python, ignore stays ignored there
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(output, 1)
                os.dup2(output, 2)
                os.chdir(cwd)
                os.execvpe(argv[0], argv, {**os.environ, **env})
            except OSError as error:
                os.write(2, f"{argv[0]}: {error}\n".encode())
            finally:
                os._exit(127)
        tell({"pid": self.main})

    def reap(self) -> None:
        """Collect ended processes; once the main one is among them, end all others before saying so."""
        for pid, status in ended():
            if pid == self.main:
                kill_all()
                self.main = 0
                tell({"exit": os.waitstatus_to_exitcode(status)})


def noted(signal_number: int, frame: FrameType | None) -> None:
    """Takes a signal that only has to wake us."""


def leave(signal_number: int, frame: FrameType | None) -> None:
    """Takes a signal that ends us, in order."""
    sys.exit()


def adopt_orphans() -> None:
    """Become the parent of every process below us whose own parent ends. Linux only; elsewhere such processes are lost."""
    if sys.platform == "linux":
        import ctypes

        pr_set_child_subreaper = 36
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def ended() -> Iterator[tuple[int, int]]:
    """Collect what ended: process id and wait status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, status


def kill_all() -> None:
    """Kill everything below us, again until nothing is left: it may fork meanwhile.

    Nothing is left when we have no children, as orphans become ours. The process table cannot tell: it shows a process as ended
    while some of its threads still are on their way.
    """
    limit = time.monotonic() + KILL_LIMIT
    while has_children() and time.monotonic() < limit:
        send(signal.SIGKILL, descendants(os.getpid()))
        for _ in ended():
            pass
        time.sleep(0.002)


def has_children() -> bool:
    """Whether anything is left to collect."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def remove(folder: str) -> None:
    """Remove a folder with all in it."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def read_line() -> bytes:
    """One line of standard input; empty at its end."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)  # never more than one line: the parent waits for each answer
        if not part:
            return b""
        line += part
    return line


def tell(event: dict[str, int]) -> None:
    """Write one event, if the parent still listens."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    adopt_orphans()
    Keeper(int(sys.argv[1]), sys.argv[2], sys.argv[3:]).keep()
