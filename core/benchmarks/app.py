"""The program that `run.py` measures. Its tasks count in shared memory: about a microsecond each.

Environment: CROSSDOCK_URL, BENCH_HITS (folder).
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import time
from pathlib import Path

from crossdock import App

app = App()
_FORMAT = struct.Struct("ddd")  # executions, wall-clock time of the first, of the last


class Hits:
    """Counts executions of this process where `run.py` can read it."""

    def __init__(self) -> None:
        path = Path(os.environ["BENCH_HITS"]) / f"hits-{os.getpid()}"
        path.write_bytes(bytes(_FORMAT.size))
        with path.open("r+b") as file:
            self._view = memoryview(mmap.mmap(file.fileno(), _FORMAT.size)).cast("d")
        self._count = 0
        self.latencies = path.with_name(f"lat-{os.getpid()}")

    def hit(self) -> None:
        """Count one execution."""
        now = time.time()
        self._count += 1
        if self._count == 1:
            self._view[1] = now
        self._view[2] = now
        self._view[0] = self._count


hits = Hits() if "BENCH_HITS" in os.environ else None


def hit() -> None:
    """Count one execution, if somebody counts."""
    if hits is not None:
        hits.hit()


@app.task(name="noop")
async def noop(a: int, b: int, s: str) -> None:
    """Do nothing."""
    hit()


@app.task(name="sleep10")
async def sleep10(a: int, b: int, s: str) -> None:
    """Wait as an I/O-bound task does."""
    await asyncio.sleep(0.01)
    hit()


@app.task(name="latency")
async def latency(sent: float) -> None:
    """Note how long ago the enqueue began."""
    late = time.time() - sent
    hit()
    if hits is not None and sent:
        with hits.latencies.open("a") as file:
            file.write(f"{late}\n")
