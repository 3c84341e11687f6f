"""Shows how a backend behaves with much in it: `python core/benchmarks/growth.py --server KIND [--steps NAME ...]`.

Each step has a server of its own, with its data in a temporary folder. The machine's other load shows: read the figures as ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import places
from workers import Workers, quantile

from crossdock.errors import CrossdockError

if TYPE_CHECKING:
    from crossdock_conformance.servers import Server

Row = dict[str, str | float]

CHUNK = 2_000
"""Tasks of one `enqueue_many`."""
BACKLOG = 20_000
"""Most tasks that are queued at a time."""
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
PROCESSES = 4
QUEUES = (1, 10, 50, 200)
FAR = 30 * 86_400.0
"""Seconds of delay of what does not fall due here."""
DUE, DUE_EVERY, LEAD = 2_000, 0.005, 3.0
"""Tasks that fall due at known times, the seconds between them, and those from their enqueue to the first."""


async def flat(server: Server, tasks: int) -> Sequence[Row]:
    """all tasks through one worker: its memory, and that of the producer, on the way"""
    app = places.load_app(server.url, "flat")
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


async def queues(server: Server, tasks: int) -> Sequence[Row]:
    """a tenth of the tasks over 1, 10, 50 and 200 queues, with one worker on all of them"""
    count = tasks // 10
    rows: list[Row] = []
    for number in QUEUES:
        app = places.load_app(server.url, f"queues{number}")
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


async def processes(server: Server, tasks: int) -> Sequence[Row]:
    """a fifth of the tasks from 1 producer to 1 worker, and from 4 producers to 4 workers, all at once"""
    count = tasks // 5
    rows: list[Row] = []
    for number in (1, PROCESSES):
        app = places.load_app(server.url, f"processes{number}")
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


async def scheduled(server: Server, tasks: int) -> Sequence[Row]:
    """all tasks scheduled far ahead: lateness of 2,000 others that fall due one by one, then a restart of the server"""
    app = places.load_app(server.url, "scheduled")
    latency = app.tasks["latency"]
    began = time.monotonic()
    for start in range(0, tasks, CHUNK):
        far = app.tasks["noop"].options(delay=FAR)
        await app.enqueue_many([far.message(i, i + 1, "hello") for i in range(start, min(start + CHUNK, tasks))])
    row: Row = {"scheduled /s": tasks / (time.monotonic() - began)}
    with Workers() as workers:
        await latency.enqueue(0.0)
        await asyncio.to_thread(workers.until, 1)
        first = time.time() + LEAD
        dues = [round(first + number * DUE_EVERY, 3) for number in range(DUE)]
        await app.enqueue_many([latency.options(eta=datetime.fromtimestamp(due, UTC)).message(due) for due in dues])
        await asyncio.to_thread(workers.until, 1 + DUE)
        late = workers.latencies()
    row |= {f"late {name} ms": quantile(late, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}
    began = time.monotonic()
    server.stop()
    server.start()
    row["restart s"] = time.monotonic() - began
    await app.tasks["noop"].enqueue(1, 2, "hello")
    row["first enqueue after s"] = time.monotonic() - began
    await app.close()
    return [row]


STEPS: dict[str, Callable[[Server, int], Coroutine[Any, Any, Sequence[Row]]]] = {
    "flat": flat,
    "queues": queues,
    "processes": processes,
    "scheduled": scheduled,
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
    parser.add_argument("--server", default="redis", metavar="KIND", help="KIND or KIND:VERSION (default redis)")
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
                rows = asyncio.run(STEPS[name](server, chosen.tasks))
            except CrossdockError as error:
                raise SystemExit(str(error)) from error
            _print(f"{name}: {STEPS[name].__doc__}\n{server.kind} {server.version}, {os.cpu_count()} CPUs", rows)


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
