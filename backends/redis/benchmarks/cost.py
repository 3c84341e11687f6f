"""What one task costs, and what it depends on."""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from bench import FAR, Bench, Load, Row, Table, fill
from places import part
from workers import Workers

from crossdock.spi import LEVELS


async def backlog(bench: Bench) -> Table:
    """cost per task with 1,000, 10,000, 100,000 and 1,000,000 queued"""
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= bench.tasks]
    return await _compare("backlog", {f"{size:,}": partial(_cost, bench, "backlog", size) for size in sizes})


async def queues(bench: Bench) -> Table:
    """cost per task over 1, 10, 50 and 200 queues"""
    return await _by_load(
        bench, "queues", {str(number): Load({f"q{each}": 1 for each in range(number)}) for number in (1, 10, 50, 200)}
    )


async def beside(bench: Bench) -> Table:
    """cost per task with none and with 1,000,000 scheduled in the same queue"""
    cases = {f"{far:,}": partial(_cost, bench, "beside", bench.sample, beside=far) for far in (0, bench.tasks)}
    return await _compare("scheduled beside", cases)


async def processes(bench: Bench) -> Table:
    """cost per task with one and two worker processes"""
    return await _by_load(bench, "processes", {str(number): Load(processes=number) for number in (1, 2)}, samples=5)


async def payloads(bench: Bench) -> Table:
    """cost per task with payloads of 200 B, 1 kB and 10 kB"""
    return await _by_load(bench, "payload", {f"{size:,} B": Load(text="x" * size) for size in (200, 1_000, 10_000)})


async def priorities(bench: Bench) -> Table:
    """cost per task at one level and with the four mixed"""
    return await _by_load(bench, "levels", {"normal": Load(), "all four": Load(levels=LEVELS)})


async def weights(bench: Bench) -> Table:
    """cost per task in one queue and in critical=6, high=4, default=2, low=1"""
    four = Load({"critical": 6, "high": 4, "default": 2, "low": 1})
    return await _by_load(bench, "weights", {"one queue": Load(), "four weighted": four})


async def _by_load(bench: Bench, what: str, loads: Mapping[str, Load], samples: int = 1) -> Table:
    size = bench.sample * samples
    return await _compare(what, {name: partial(_cost, bench, what, size, load, sample=size) for name, load in loads.items()})


async def _compare(what: str, cases: Mapping[str, Callable[[], Awaitable[Row]]]) -> Table:
    """The costs of some cases, and how many times those of the first each of them has."""
    rows: list[Row] = []
    for name, measure in cases.items():
        row: Row = {what: name, **await measure()}
        first = rows[0] if rows else row
        times = {f"{verb}, times": float(row[f"{verb} us"]) / float(first[f"{verb} us"]) for verb in ("enqueue", "drain")}
        rows.append({**row, **times})
    return Table(f"cost per task, by {what}", rows)


async def _cost(
    bench: Bench, name: str, backlog: int, load: Load | None = None, *, beside: int = 0, sample: int | None = None
) -> Row:
    """Microseconds of a task that is enqueued as one of the last of a backlog, and of one that is executed as one of the first.

    Each round brings the backlog to its size, and starts workers that take the sample from it. What is timed is, at most, the sample;
    of workers, from the first execution on. Times are medians of the rounds; processor time is that of all rounds together.

    Args:
        bench: Where.
        name: Of the namespace.
        backlog: Tasks that are queued when the workers start.
        load: What kind of tasks; by default short ones in one queue.
        beside: Tasks that are scheduled in the same queues and do not become due.
        sample: Tasks that each rate is measured over; by default the bench's, at most the backlog.
    """
    load = load or Load()
    sample = sample or min(backlog, bench.sample)
    rounds = bench.repeat * max(1, min(5, bench.sample // backlog))  # a thousand tasks alone tell little
    enqueue_us: list[float] = []
    drain_us: list[float] = []
    enqueued = executed = 0
    storing = serving = working = 0.0
    async with part(bench.url, name) as app:
        await fill(app, beside, load, delay=FAR)
        ahead = max(1, backlog - sample)  # at least one, for the first enqueue connects
        await fill(app, ahead, load)
        missing = backlog - ahead
        for _ in range(rounds):
            before = bench.server.cpu()
            enqueue_us.append(await fill(app, missing, load) / missing * 1e6)
            storing += bench.server.cpu() - before
            enqueued += missing
            with Workers(load.processes, load.queues) as workers:
                begun = workers.until(1)
                before, worked = bench.server.cpu(), workers.usage().cpu
                done = workers.until(sample)
                serving += bench.server.cpu() - before
                working += workers.usage().cpu - worked
                drain_us.append(1e6 / done.rate)
                executed += done.executed - begun.executed
                missing = workers.stop().executed
    drained = statistics.median(drain_us)
    return {
        "enqueue us": statistics.median(enqueue_us),
        "enqueue: server us": storing / enqueued * 1e6,
        "drain us": drained,
        "drain: worker us": working / max(1, executed) * 1e6,
        "drain: server us": serving / max(1, executed) * 1e6,
        "drained /s": 1e6 / drained,
    }
