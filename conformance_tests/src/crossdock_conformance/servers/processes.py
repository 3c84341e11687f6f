"""The processes of one server, run below a keeper (`keeper.py`) that ends them when this test process dies."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossdock_conformance.servers.errors import ServerFailed
from crossdock_conformance.servers.keeper import descendants, process_table, send

POLL = 0.005
"""Seconds between looks at a fact that nobody announces."""

_KEEPER = Path(__file__).with_name("keeper.py")
_ANSWER_WITHIN = 10.0
_END_WITHIN = 20.0


class Processes:
    """Starts, signals and ends the processes of one server, one start at a time. Not for use by several threads at once.

    Args:
        folder: Removed when the processes have ended for good; None to remove nothing.
        at_end: A command to run if this test process dies without calling `end()`.
    """

    def __init__(self, folder: Path | None, at_end: Sequence[str] = ()) -> None:
        command = [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid()), str(folder or ""), *at_end]
        # A session of its own: an interrupt from the terminal is for the tests, which then end their servers in order.
        self._keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        self._unread = b""
        self.pid: int | None = None
        """The process that `run` started; None once it and all below it are gone."""
        self.exit_status: int | None = None
        """How the last one ended: its exit code, or minus the number of the signal that killed it."""

    def run(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        """Start a command with these changes to the environment, its output appended to `log`."""
        self._tell({"run": list(argv), "env": dict(env), "cwd": str(cwd), "log": str(log)})
        deadline = time.monotonic() + _ANSWER_WITHIN
        while not self._hears(deadline - time.monotonic()):
            if time.monotonic() > deadline:
                raise ServerFailed(f"the process that keeps this server does not answer within {_ANSWER_WITHIN:g} s")

    @property
    def running(self) -> bool:
        """Whether the process that `run` started, or anything below it, lives."""
        while self.pid is not None and self._hears(0):
            pass
        return self.pid is not None

    def wait(self, seconds: float) -> bool:
        """Wait until all have ended; False if they have not within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.running:
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self._hears(left)
        return True

    def terminate(self) -> None:
        """Ask the process that `run` started to end in order."""
        if self.running and self.pid is not None:
            send(signal.SIGTERM, [self.pid])

    def kill(self) -> None:
        """Kill them all at once, and return when none is left."""
        send(signal.SIGKILL, self._all())
        if not self.wait(_END_WITHIN):
            raise ServerFailed(f"processes {self._all()} live {_END_WITHIN:g} s after they were killed")

    def pause(self) -> None:
        """Stop them all from running, and return when none runs."""
        deadline = time.monotonic() + _ANSWER_WITHIN
        while True:
            table = process_table()
            active = [pid for pid in descendants(self._keeper.pid, table) if table[pid].state not in "Tt"]
            if not active:
                return
            if time.monotonic() > deadline:
                raise ServerFailed(f"processes {active} do not pause within {_ANSWER_WITHIN:g} s")
            send(signal.SIGSTOP, active)
            time.sleep(POLL)

    def resume(self) -> None:
        """Let all run again that were paused."""
        send(signal.SIGCONT, self._all())

    def end(self) -> None:
        """Kill what lives, remove the folder, end the keeper, and return when all that is done. Again is harmless."""
        if self._keeper.poll() is None:
            with contextlib.suppress(ServerFailed):  # then it is ending by itself
                self._tell({"end": True})
            try:
                self._keeper.wait(_END_WITHIN)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
        self.pid = None
        for stream in (self._keeper.stdin, self._keeper.stdout):
            if stream is not None:
                stream.close()

    def _all(self) -> list[int]:
        return descendants(self._keeper.pid)

    def _tell(self, command: Mapping[str, object]) -> None:
        assert self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(json.dumps(command).encode() + b"\n")
        except (OSError, ValueError) as error:
            raise ServerFailed("the process that keeps this server has ended") from error

    def _hears(self, seconds: float) -> bool:
        """Wait at most `seconds` for the keeper to say something, and take it in. False if it said nothing."""
        assert self._keeper.stdout is not None
        # Not select(): the tests of a task queue may well hold more than 1,024 files open.
        waiting = select.poll()
        waiting.register(self._keeper.stdout, select.POLLIN)
        if not waiting.poll(max(seconds, 0) * 1000):
            return False
        part = os.read(self._keeper.stdout.fileno(), 4096)
        if not part:
            self.pid = None
            raise ServerFailed("the process that keeps this server has ended")
        *lines, self._unread = (self._unread + part).split(b"\n")
        for event in map(json.loads, lines):
            if "exit" in event:
                self.pid, self.exit_status = None, event["exit"]
            else:
                self.pid, self.exit_status = event["pid"], None
        return True
