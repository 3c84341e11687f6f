"""Shows how the RabbitMQ backend behaves with much in it: `python backends/rabbitmq/benchmarks/scale.py [--steps NAME ...]`.

It starts a server of its own, with its data in a temporary folder, and ends it. Each step has a server of its own. The machine's other load
shows: read the figures as ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[3] / "core" / "benchmarks"))  # workers.py, places.py

import places
from workers import Workers

from crossdock.errors import CrossdockError

Row = dict[str, str | float]

CHUNK = 2_000
"""Tasks of one `enqueue_many`."""
BACKLOG = 20_000
"""Most tasks that are queued at a time."""
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
PROCESSES = 4


async def flat(url: str, tasks: int) -> Sequence[Row]:
    """200,000 tasks through one worker: its memory, and that of the producer, on the way"""
    app = places.load_app(url, "flat")
    rows: list[Row] = []
    enqueued, began = 0, time.monotonic()
    await _fill(app, 1, ["default"])  # a queue has to be there
    enqueued += 1
    with Workers() as workers:
        for share in SHARES:
            target = int(tasks * share)
            while (executed := workers.counted().executed) < target:
                if enqueued < tasks and enqueued - executed <= BACKLOG - CHUNK:
                    count = min(CHUNK, tasks - enqueued)
                    await _fill(app, count, ["default"])
                    enqueued += count
                else:
                    await asyncio.to_thread(workers.until, min(target, executed + 1))
            rate = target / (time.monotonic() - began)
            rows.append(
                {"executed": f"{target:,}", "worker RSS MB": workers.usage().rss, "producer RSS MB": _rss(), "tasks /s": rate}
            )
    await app.close()
    return rows


async def queues(url: str, tasks: int) -> Sequence[Row]:
    """a tenth of the tasks over 1, 10 and 50 queues, with one worker on all of them"""
    count = tasks // 10
    rows: list[Row] = []
    for number in (1, 10, 50):
        app = places.load_app(url, f"queues{number}")
        names = [f"q{each}" for each in range(number)]
        await _fill(app, number, names)  # declares them
        began = time.monotonic()
        await _fill(app, count, names)
        enqueued = count / (time.monotonic() - began)
        with Workers(1, dict.fromkeys(names, 1)) as workers:
            done = await asyncio.to_thread(workers.until, count)
            rows.append(
                {"queues": f"{number}", "enqueued /s": enqueued, "drained /s": done.rate, "worker RSS MB": workers.usage().rss}
            )
        await app.close()
    return rows


async def processes(url: str, tasks: int) -> Sequence[Row]:
    """a fifth of the tasks from 1 producer to 1 worker, and from 4 producers to 4 workers, all at once"""
    count = tasks // 5
    rows: list[Row] = []
    for number in (1, PROCESSES):
        app = places.load_app(url, f"processes{number}")
        await _fill(app, 1, ["default"])
        began = time.monotonic()
        with Workers(number) as workers:
            producers = [
                await asyncio.create_subprocess_exec(sys.executable, __file__, "--produce", str(count // number))
                for _ in range(number)
            ]
            if any([await producer.wait() for producer in producers]):
                raise SystemExit("a producer failed")
            enqueued = count / (time.monotonic() - began)
            await asyncio.to_thread(workers.until, count + 1)
            took = time.monotonic() - began
            rss = workers.usage().rss
            names = f"{number} x {number}"
            rows.append({"producers x workers": names, "enqueued /s": enqueued, "done /s": count / took, "workers RSS MB": rss})
        await app.close()
    return rows


STEPS: dict[str, Callable[[str, int], Coroutine[Any, Any, Sequence[Row]]]] = {
    "flat": flat,
    "queues": queues,
    "processes": processes,
}


async def produce(count: int) -> None:
    """Enqueue so many tasks, in a process of its own."""
    app = places.load_app(os.environ["CROSSDOCK_URL"], os.environ["CROSSDOCK_NAMESPACE"])
    await _fill(app, count, ["default"])
    await app.close()


async def _fill(app: Any, count: int, names: Sequence[str]) -> None:
    """Enqueue so many tasks, to these queues in turn."""
    turn = itertools.cycle([app.tasks["noop"].options(queue=name) for name in names])
    for start in range(0, count, CHUNK):
        await app.enqueue_many([next(turn).message(i, i + 1, "hello") for i in range(start, min(start + CHUNK, count))])


def _rss() -> float:
    """Resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Run the steps that were asked for, and print a table for each."""
    steps = "\n".join(f"  {name:11}{step.__doc__}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsteps:\n{steps}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, metavar="NAME", default=list(STEPS), help="default: all of them")
    parser.add_argument("--tasks", type=int, default=200_000, help="instead of 200,000")
    parser.add_argument("--server", default="rabbitmq", metavar="KIND", help="rabbitmq[:VERSION] (default rabbitmq)")
    parser.add_argument("--produce", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.produce:
        asyncio.run(produce(chosen.produce))
        return
    sources = places.programs(chosen.server)
    if not sources:
        raise SystemExit(f"there is no {chosen.server} on this machine; --server names another")
    for name in chosen.steps:
        with sources[0].start() as server:
            try:
                rows = asyncio.run(STEPS[name](server.url, chosen.tasks))
            except CrossdockError as error:
                raise SystemExit(str(error)) from error
            _print(f"{name}: {STEPS[name].__doc__}\nRabbitMQ {server.version}, {os.cpu_count()} CPUs", rows)


def _print(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        print("  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.1f}"


if __name__ == "__main__":
    main()
