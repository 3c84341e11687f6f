"""A server that runs from a program on this machine."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from crossdock_conformance.servers.owned import OwnedServer
from crossdock_conformance.servers.processes import Processes
from crossdock_conformance.servers.recipe import Binary, Recipe


class LocalServer(OwnedServer):
    """Made by `start_server`. It has a folder of its own for its data and its log, removed by `close()`."""

    def __init__(self, recipe: Recipe, binary: Binary, version: str, folder: Path | None = None) -> None:
        self._binary = binary
        # In a root of its own the program sees nothing that is outside.
        place = binary.root / "tmp" if binary.root else folder
        self.folder = Path(tempfile.mkdtemp(prefix=f"crossdock-{recipe.kind}-", dir=place)).resolve()
        """Holds the data, in `data`, and the log, `server.log`."""
        self._data = self.folder / "data"
        self._data.mkdir()
        self._log = self.folder / "server.log"
        self._processes = Processes(self.folder)
        super().__init__(recipe, version)  # last: from here on it may be closed

    @property
    def running(self) -> bool:
        with self._lock:
            return not self._closed and self._processes.running

    def log_tail(self, lines: int = 20) -> str:
        with contextlib.suppress(OSError):
            return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def _begin(self) -> None:
        launch = self._recipe.launch(self._binary, self._ports.numbers, self._data)
        self._processes.run(launch.argv, launch.env, self._data, self._log)

    def _end(self) -> None:
        self._processes.terminate()
        if not self._processes.wait(self._recipe.stop_within):
            self._processes.kill()
            raise self._failed(f"did not end in order within {self._recipe.stop_within:g} s, and was killed")

    def _kill(self) -> None:
        self._processes.kill()

    def _freeze(self) -> None:
        self._processes.pause()

    def _thaw(self) -> None:
        self._processes.resume()

    def _empty(self) -> None:
        shutil.rmtree(self._data)
        self._data.mkdir()

    def _dispose(self) -> None:
        self._processes.end()

    def _exit_status(self) -> int | None:
        return self._processes.exit_status
