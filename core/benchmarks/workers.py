"""Worker processes of `app.py`, and what they count."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

from places import APP

CONCURRENCY = 100
_PATIENCE = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Count(NamedTuple):
    """What was executed so far."""

    executed: int
    first: float
    """Wall-clock time of the first execution, in seconds."""
    last: float

    @property
    def rate(self) -> float:
        """Executions per second between the first and the last."""
        return (self.executed - 1) / (self.last - self.first)


class Usage(NamedTuple):
    """What the processes took from the machine so far."""

    cpu: float
    """Seconds."""
    rss: float
    """Resident memory in MB."""


class Workers:
    """Workers on the broker and namespace of the latest `load_app`, from here to the end of the `with` block.

    Args:
        processes: How many.
        queues: The queues that they serve and their weights; None: those that the App's tasks name.
    """

    def __init__(self, processes: int = 1, queues: Mapping[str, int] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="crossdock-bench-")
        self.hits = Path(self._folder.name)
        self._log = (self.hits / "log").open("w+b")
        options = f"WorkerOptions(concurrency={CONCURRENCY}, queues={dict(queues) if queues else None})"
        script = f"import sys\nfrom crossdock import supervisor, WorkerOptions\nsys.exit(supervisor.run({APP!r}, {options}, {processes}))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "BENCH_HITS": str(self.hits)},
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
        )

    def counted(self) -> Count:
        """What they executed so far."""
        rows = [struct.unpack("ddd", raw) for file in self.hits.glob("hits-*") if len(raw := file.read_bytes()) == 24]
        rows = [row for row in rows if row[0]]
        if not rows:
            return Count(0, 0.0, 0.0)
        counts, firsts, lasts = zip(*rows, strict=True)
        return Count(int(sum(counts)), min(firsts), max(lasts))

    def until(self, count: int) -> Count:
        """Return when so many were executed.

        Raises:
            SystemExit: The workers have ended, or have not executed anything for a minute.
        """
        before, deadline = -1, 0.0
        while (got := self.counted()).executed < count:
            if got.executed > before:
                before, deadline = got.executed, time.monotonic() + _PATIENCE
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit(f"only {got.executed:,} of {count:,} were executed:\n{(self.hits / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return got

    def usage(self) -> Usage:
        """What all processes took so far."""
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        cpu = rss = 0.0
        for pid in [str(self._process.pid), *children]:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / _TICKS
            rss += int(fields[21]) * _PAGE / 1e6
        return Usage(cpu, rss)

    def latencies(self) -> list[float]:
        """What the executions of the task `latency` noted, in ms, ascending."""
        return sorted(float(line) * 1e3 for file in self.hits.glob("lat-*") for line in file.read_text().split())

    def stop(self) -> Count:
        """End the processes in order. Returns what they executed in all."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(_PATIENCE)
        return self.counted()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.stop()
        self._log.close()
        self._folder.cleanup()


def quantile(ascending: list[float], share: float) -> float:
    """The value that this share of the values is below."""
    return ascending[min(len(ascending) - 1, int(len(ascending) * share))]
