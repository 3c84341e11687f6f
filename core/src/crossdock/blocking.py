"""The sync twins: any thread may call, one private event loop per process does the work."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from crossdock.errors import SyncInAsyncContext
from crossdock.forks import forget_after_fork, keep_inherited

T = TypeVar("T")


class PrivateLoop:
    """An event loop in a daemon thread, started by its first use and again in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        forget_after_fork(self)

    @property
    def started(self) -> bool:
        """Whether anybody has used it in this process."""
        return self._loop is not None

    def run(self, coroutine: Coroutine[Any, Any, T], instead: str) -> T:
        """Run `coroutine` there and return its result.

        Args:
            coroutine: What to run.
            instead: What a caller inside a running loop should do.

        Raises:
            SyncInAsyncContext: An event loop is running in the calling thread and would be blocked.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            pass
        else:
            coroutine.close()
            raise SyncInAsyncContext(f"a blocking call inside a running event loop would stop it: {instead}")
        return asyncio.run_coroutine_threadsafe(coroutine, self._running_loop()).result()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="crossdock-sync", daemon=True).start()
            return self._loop

    def forget(self) -> None:
        """In a forked child: the parent's thread does not exist here."""
        keep_inherited(self._loop)
        self._lock = threading.Lock()
        self._loop = None


private_loop = PrivateLoop()
"""The one of this process."""
