"""A million tasks scheduled far ahead, and the work beside them."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from bench import FAR, Bench, Load, Row, Table, fill
from observed import Calls
from places import part
from workers import Workers, quantile

DUE = 2_000
"""Tasks that become due at known times."""
DUE_EVERY = 0.005
"""Seconds between them."""
LEAD = 3.0
"""Seconds from their enqueue to the first."""
IDLE = 10.0
"""Seconds for which an idle worker is watched."""
QUEUE = "default"
"""Where all of it happens."""


async def scheduled(bench: Bench) -> Table:
    """1,000,000 scheduled: rate, memory, time of scripts while others are drained, lateness of 2,000 that are due, idle worker"""
    load = Load({QUEUE: 1})
    rows: list[Row] = []

    def note(name: str, figure: float) -> None:
        rows.append({"what": name, "figure": figure})

    def note_calls(phase: str, observed: list[Calls]) -> None:
        [calls] = observed
        note(f"{phase}: script calls", calls.number)
        note(f"{phase}: mean ms of a call", calls.mean_ms)
        for script, longest in calls.longest_ms.items():
            note(f"{phase}: longest ms, {script}", longest)
        note(f"{phase}: calls above 2 ms", calls.above_2_ms)

    async with part(bench.url, "scheduled") as app:
        memory = bench.server.memory()
        seconds = await fill(app, bench.tasks, load, delay=FAR)
        note("scheduled /s", bench.tasks / seconds)
        note("memory of each, bytes", (bench.server.memory() - memory) / bench.tasks)

        with bench.server.calls() as enqueueing:
            await fill(app, bench.sample, load)
        note_calls("enqueue", enqueueing)
        with bench.server.calls() as draining, Workers() as workers:
            note("drain /s", workers.until(bench.sample).rate)
        note_calls("drain", draining)

        with bench.server.calls() as idling, Workers() as workers:
            await _one(app, workers)
            cpu, began = workers.usage().cpu, time.monotonic()
            await asyncio.sleep(IDLE)
            note("idle worker, % of a core", (workers.usage().cpu - cpu) / (time.monotonic() - began) * 100)
        note_calls("idle", idling)

        with bench.server.calls() as due, Workers() as workers:
            await _one(app, workers)
            late = await _lateness(app, workers)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0), ("earliest", 0.0)):
            note(f"lateness {name} ms", quantile(late, share))
        note_calls("due", due)
    return Table(f"{bench.tasks:,} scheduled", rows)


async def _one(app: Any, workers: Workers) -> None:
    """Wait until the worker works. Its start is not what is measured."""
    await app.tasks["latency"].enqueue(0.0)
    workers.until(1)


async def _lateness(app: Any, workers: Workers) -> list[float]:
    first = time.time() + LEAD
    latency = app.tasks["latency"]
    dues = [round(first + number * DUE_EVERY, 3) for number in range(DUE)]
    await app.enqueue_many(
        [latency.options(eta=datetime.fromtimestamp(0, UTC) + timedelta(seconds=due)).message(due) for due in dues]
    )
    await asyncio.sleep(max(0.0, dues[0] - time.time()))  # from here on there is one every few milliseconds
    workers.until(1 + DUE)
    return workers.latencies()
