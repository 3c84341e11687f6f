"""Threads for sync handlers: daemons, because a handler that never returns must not keep the process from ending."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]


class ThreadPool:
    """Runs jobs in up to `size` threads, started as needed and kept.

    Args:
        size: Most threads that work at once.
        name: Prefix of the threads' names.
    """

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads = 0
        self._busy = 0
        self._lock = threading.Lock()

    def submit(self, job: Job) -> None:
        """Run `job` in a thread and in a context of its own. It must not raise."""
        with self._lock:
            self._busy += 1
            if self._busy > self._threads < self._size:
                self._threads += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._jobs.put(job)

    def resize(self, change: int) -> None:
        """Allow more threads while some are stuck in jobs that count no longer, and fewer when these come back."""
        with self._lock:
            self._size += change

    def close(self) -> None:
        """Let idle threads end; busy ones end after their job."""
        with self._lock:
            threads, self._threads, self._size = self._threads, 0, 0
        for _ in range(threads):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            contextvars.Context().run(job)
            with self._lock:
                self._busy -= 1
