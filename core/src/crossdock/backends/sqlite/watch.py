"""Linux's word that somebody writes to a file (inotify), so that a waiting receive need not ask all the time.

It comes while the transaction is still on its way to the disk, and not at all where another kernel writes (a file shared with a
virtual machine), so it does not replace asking: it says when asking often pays.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable
from typing import Final

# From <sys/inotify.h>; see inotify(7).
_IN_MODIFY: Final = 0x00000002
_IN_ONESHOT: Final = 0x80000000
_IN_NONBLOCK: Final = os.O_NONBLOCK
_IN_CLOEXEC: Final = os.O_CLOEXEC


class Watch:
    """Watches one file for one write at a time. Nothing is taken from the system before the first `arm`.

    Args:
        path: The file. It may be replaced by another one while it is not watched.
        loop: Runs `written`.
        written: Called when the file is written to, removed or replaced, once per `arm`.
    """

    def __init__(self, path: str, loop: asyncio.AbstractEventLoop, written: Callable[[], object]) -> None:
        self._path = os.fsencode(path)
        self._loop = loop
        self._written = written
        self._descriptor = -1
        self._libc: ctypes.CDLL | None = None
        self._impossible = not sys.platform.startswith("linux")

    def arm(self) -> bool:
        """Watch for the next write; any thread may call. False: it cannot be watched, here or now."""
        if self._impossible:
            return False
        try:
            if self._libc is None:
                self._libc = ctypes.CDLL(None)
            if self._descriptor < 0:
                self._descriptor = self._libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
                if self._descriptor < 0:  # the user's limit is reached: fs.inotify.max_user_instances
                    self._impossible = True
                    return False
                self._loop.call_soon_threadsafe(self._loop.add_reader, self._descriptor, self._read)
            watch: int = self._libc.inotify_add_watch(self._descriptor, self._path, _IN_MODIFY | _IN_ONESHOT)
            return watch >= 0
        except (OSError, AttributeError, RuntimeError):  # no such functions, or the loop has ended
            self._impossible = True
            return False

    def close(self) -> None:
        """Give everything back. In the loop, or when that is closed."""
        self._impossible = True
        if self._descriptor >= 0:
            if not self._loop.is_closed():
                self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._descriptor, 4096)
            self._written()
