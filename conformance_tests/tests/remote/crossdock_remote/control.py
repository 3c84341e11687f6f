"""The server as its owner has it: started, stopped, killed, frozen, cut off and wiped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from crossdock_conformance import Target

_SERVER: Final = Path(__file__).with_name("server.py")


class RemoteServer:
    """A server on a free port of this machine, which ends with this process at the latest.

    Args:
        folder: Where it stores; must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address: tuple[str, int] = free.getsockname()
        self.url = "remote://{}:{}".format(*self._address)
        self._process: subprocess.Popen[bytes] | None = None
        self._our_life, self._alive = os.pipe()

    def start(self) -> None:
        """Start it, if it does not run; return when it serves."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", _SERVER, str(self._address[1]), self._folder / "store.db"],
                stdin=self._our_life,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
            while not self._serves():
                assert self._process.poll() is None, "the server does not start"
                time.sleep(0.01)

    def _serves(self) -> bool:
        try:
            socket.create_connection(self._address).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Kill it for good."""
        self.kill()
        os.close(self._our_life)
        os.close(self._alive)

    def stop(self) -> None:
        """Stop it gently."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if (process := self._process) is not None:
            self._process = None
            process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            process.wait()

    def pause(self) -> None:
        """Freeze it."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def cut(self) -> None:
        """Cut every connection."""
        self._signal(signal.SIGUSR1)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wipe(self) -> None:
        """End it, remove all that it stored, and start it again."""
        self.kill()
        for file in self._folder.iterdir():
            file.unlink()
        self.start()


@contextmanager
def serving(folder: Path) -> Generator[Target]:
    """A target whose server runs, and may be treated in every way."""
    server = RemoteServer(folder)
    try:
        server.start()
        yield Target(server.url, server=server, cut=server.cut)
    finally:
        server.close()
