"""The shop's folder: documents that appear whole or not at all, and a journal of what ran where.

A task may run twice (that is what at-least-once means), so whatever it does must be harmless the second time. Here that is
easy: a document depends on the order alone and is named after it, so writing it again changes nothing.
"""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any

from crossdock import Context, Middleware, RunNext


def folder() -> Path:
    """Where the shop keeps its documents: $SHOP_DIR, else `shop-data` in the working directory."""
    return Path(os.environ.get("SHOP_DIR", "shop-data"))


def write(path: Path, content: bytes) -> None:
    """Write a file so that others see it whole or not at all, even if this process is killed here."""
    # Half-written files lie in a folder of their own: nobody picks them up, not even after a kill.
    unfinished = _made(folder() / "unfinished") / f"{os.getpid()}-{threading.get_ident()}"
    unfinished.write_bytes(content)
    unfinished.replace(_made(path.parent) / path.name)


@functools.cache
def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Journal(Middleware):
    """Notes the start and the end of every execution in a file per process, `journal/PID`.

    So that one can tell afterwards, without asking crossdock, what ran twice and why.
    """

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None

    async def run(self, context: Context, call_next: RunNext) -> Any:
        """Note `start`, then `done` or the type of the error."""
        self._note("start", context)
        try:
            result = await call_next(context)
        except BaseException as error:
            self._note(type(error).__name__, context)
            raise
        self._note("done", context)
        return result

    def _note(self, what: str, context: Context) -> None:
        # One write to a file opened for appending: a kill leaves whole lines.
        line = f"{what} {context.task} {context.id} {context.attempt} {context.delivery_count}\n"
        os.write(self._descriptor(), line.encode())

    def _descriptor(self) -> int:
        pid = os.getpid()
        if self._file is None or self._file[0] != pid:  # a worker with several processes forks
            path = _made(folder() / "journal") / str(pid)
            self._file = (pid, os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644))
        return self._file[1]
