"""Measures crossdock's own cost on the embedded brokers: `nox -s bench`, or `python core/benchmarks/run.py [--tasks N] [--json FILE]`.

Rates are per second; each figure is the median of `--repeat` runs. The machine's other load shows: compare within one run, as ratios.
The comparison with other task queues is a separate harness, because each needs an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

HERE = Path(__file__).resolve().parent
CONCURRENCY = 100
CAP = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def load_app(url: str) -> Any:
    """Import `app.py` anew, for one broker."""
    os.environ["CROSSDOCK_URL"] = url
    from crossdock.loading import load_app

    sys.modules.pop("app", None)
    return load_app(f"{HERE / 'app.py'}:app")


# --- enqueue ---


async def enqueue_rates(app: Any, count: int) -> dict[str, float]:
    """One by one, a hundred at a time, and in bulk."""
    noop = app.tasks["noop"]
    await noop.enqueue(0, 0, "hello")
    rates = {}

    async def one_by_one(n: int) -> None:
        for i in range(n):
            await noop.enqueue(i, i + 1, "hello")

    async def concurrently(n: int) -> None:
        for i in range(0, n, 100):
            await asyncio.gather(*[noop.enqueue(i, i + 1, "hello") for _ in range(100)])

    async def in_bulk(n: int) -> None:
        await app.enqueue_many([noop.message(i, i + 1, "hello") for i in range(n)])

    for name, step, n in (
        ("enqueue one by one /s", one_by_one, count // 10),
        ("enqueue, 100 concurrent /s", concurrently, count),
        ("enqueue_many /s", in_bulk, count),
    ):
        began = time.perf_counter()
        await step(n)
        rates[name] = n / (time.perf_counter() - began)
    await app.close()
    return rates


# --- the memory broker, in this process ---


async def memory_figures(count: int) -> dict[str, float]:
    """Enqueue and drain in one process: what core costs on every backend."""
    from crossdock import Worker, WorkerOptions
    from crossdock.backends import memory

    app = load_app("memory://bench")
    figures = await enqueue_rates(app, count)
    memory.forget("bench")
    for name, task in (("drain, 1 process /s", "noop"), ("10 ms I/O at 100 /s", "sleep10")):
        n = count if task == "noop" else count // 5
        await app.enqueue_many([app.tasks[task].message(i, i + 1, "hello") for i in range(n)])
        await app.close()
        gc.collect()
        began, cpu = time.perf_counter(), time.process_time()
        await Worker(app, WorkerOptions(burst=True, concurrency=CONCURRENCY)).run()
        figures[name] = n / (time.perf_counter() - began)
        if task == "noop":
            figures["worker CPU us per task"] = (time.process_time() - cpu) / n * 1e6
    memory.forget("bench")
    return figures


# --- SQLite, with real worker processes ---


class Drain:
    """Worker processes on one file, and what they count."""

    def __init__(self, folder: Path, url: str, processes: int) -> None:
        self.folder = folder
        self.hits = folder / "hits"
        self.hits.mkdir()
        script = "import sys, msgspec; from crossdock import supervisor, WorkerOptions\n"
        script += (
            f"sys.exit(supervisor.run({str(HERE / 'app.py') + ':app'!r}, WorkerOptions(concurrency={CONCURRENCY}), {processes}))"
        )
        environment = {**os.environ, "CROSSDOCK_URL": url, "BENCH_HITS": str(self.hits)}
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL
        )

    def counted(self) -> tuple[int, float, float]:
        """Executions, time of the first, time of the last."""
        rows = [struct.unpack("ddd", raw) for file in self.hits.glob("hits-*") if len(raw := file.read_bytes()) == 24]
        rows = [row for row in rows if row[0]]
        return (
            sum(int(row[0]) for row in rows),
            min((row[1] for row in rows), default=0.0),
            max((row[2] for row in rows), default=0.0),
        )

    def until(self, count: int) -> tuple[int, float, float]:
        """Return when so many were executed."""
        end = time.monotonic() + CAP
        while (got := self.counted())[0] < count:
            if time.monotonic() > end or self.process.poll() is not None:
                raise SystemExit(f"only {got[0]} of {count} were executed:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.01)
        return got

    def usage(self) -> tuple[float, float]:
        """CPU seconds and resident MB of the process and its children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        cpu = rss = 0.0
        for pid in [str(self.process.pid), *children]:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / TICKS
            rss += int(fields[21]) * PAGE / 1e6
        return cpu, rss

    def stop(self) -> None:
        """End the processes."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(CAP)
        self.log.close()


async def sqlite_figures(count: int, options: str) -> dict[str, float]:
    """Enqueue, drain with one and two processes, I/O-bound tasks, pick-up latency, idle cost."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="crossdock-bench-") as name:
        folder = Path(name)

        def url(part: str) -> str:
            (folder / part).mkdir(exist_ok=True)
            return f"sqlite:///{folder / part / 'tasks.db'}{options}"

        figures |= await enqueue_rates(load_app(url("enqueue")), count)
        for processes in (1, 2):
            part = f"drain{processes}"
            app = load_app(url(part))
            await app.enqueue_many([app.tasks["noop"].message(i, i + 1, "hello") for i in range(count)])
            await app.close()
            figures |= drain(folder / part, url(part), processes, count)
        app = load_app(url("io"))
        await app.enqueue_many([app.tasks["sleep10"].message(i, i + 1, "hello") for i in range(count // 3)])
        await app.close()
        io = drain(folder / "io", url("io"), 1, count // 3)
        figures["10 ms I/O at 100 /s"] = io["drain, 1 process /s"]
        figures |= await latency(folder / "latency", url("latency"))
    return figures


def drain(folder: Path, url: str, processes: int, count: int) -> dict[str, float]:
    """Work a backlog off."""
    run = Drain(folder, url, processes)
    run.until(1)
    cpu, _ = run.usage()
    before = run.counted()[0]
    total, first, last = run.until(count)
    after, rss = run.usage()
    run.stop()
    figures = {f"drain, {processes} process{'es' if processes > 1 else ''} /s": (total - 1) / (last - first)}
    if processes == 1:
        figures["worker CPU s per 10k"] = (after - cpu) / max(1, total - before) * 1e4
        figures["worker RSS MB"] = rss
    return figures


async def latency(folder: Path, url: str) -> dict[str, float]:
    """From the call of enqueue to the handler's first line, at 100/s into an idle worker; then CPU of the idle worker."""
    run = Drain(folder, url, 1)
    app = load_app(url)
    await app.tasks["latency"].enqueue(0.0)
    run.until(1)
    sent = time.time()
    for _ in range(500):
        sent += 0.01
        await app.tasks["latency"].enqueue(time.time())
        await asyncio.sleep(max(0.0, sent - time.time()))
    await app.close()
    run.until(501)
    cpu, _ = run.usage()
    began = time.monotonic()
    await asyncio.sleep(10.0)
    idle = (run.usage()[0] - cpu) / (time.monotonic() - began)
    run.stop()
    times = sorted(float(line) * 1e3 for file in run.hits.glob("lat-*") for line in file.read_text().split())
    share: Callable[[float], float] = lambda part: times[min(len(times) - 1, int(len(times) * part))]  # noqa: E731
    return {
        "pick-up p50 ms": share(0.5),
        "pick-up p95 ms": share(0.95),
        "pick-up p99 ms": share(0.99),
        "idle worker, % of a core": idle * 100,
    }


# --- layers ---


def layers() -> dict[str, float]:
    """Microseconds per task of each part of core, alone and in a tight loop."""
    from crossdock import codec

    app = load_app("memory://layers")
    noop = app.tasks["noop"]
    outgoing = noop.message(1, 2, "hello")
    body = outgoing.to_message(1).body
    envelope = codec.decode(body)

    async def tasks(n: int) -> None:
        async def nothing() -> None: ...

        for _ in range(n // 100):
            await asyncio.gather(*[asyncio.create_task(nothing()) for _ in range(100)])

    def cost(step: Callable[[], object], n: int = 20_000) -> float:
        began = time.perf_counter()
        for _ in range(n):
            step()
        return (time.perf_counter() - began) / n * 1e6

    began = time.perf_counter()
    asyncio.run(tasks(20_000))
    per_task = (time.perf_counter() - began) / 20_000 * 1e6
    return {
        "bind, validate, id (message)": cost(lambda: noop.message(1, 2, "hello")),
        "encode envelope": cost(lambda: outgoing.to_message(1)),
        "check limits, decode envelope": cost(lambda: codec.decode(body)),
        "decode arguments": cost(lambda: noop.payload.decode(envelope.args, json=False)),
        "asyncio task, 100 in flight": per_task,
    }


# --- report ---


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=30_000, help="tasks per measurement (default 30,000)")
    parser.add_argument("--repeat", type=int, default=3, help="runs per figure (default 3)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for title, measure in (
        ("layers, us per task", lambda: layers()),
        ("memory, one process", lambda: asyncio.run(memory_figures(chosen.tasks))),
        ("SQLite, durability=full", lambda: asyncio.run(sqlite_figures(chosen.tasks, ""))),
        ("SQLite, durability=relaxed", lambda: asyncio.run(sqlite_figures(chosen.tasks, "?durability=relaxed"))),
    ):
        runs = [measure() for _ in range(chosen.repeat)]
        results[title] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"\n{title}")
        for name, figure in results[title].items():
            print(f"  {name:32} {figure:>12,.2f}" if figure < 1000 else f"  {name:32} {figure:>12,.0f}", flush=True)
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.format(json.dumps(results).encode()))


if __name__ == "__main__":
    main()
