"""A million tasks through one worker: does anything grow?"""

from __future__ import annotations

import asyncio
import re
import time

from bench import Bench, Load, Row, Table, fill
from places import part
from workers import Workers

BACKLOG = 20_000
"""Most tasks that are queued at a time."""
BATCH = 2_000
MEMOS = 60.0
"""Seconds for which the server remembers the last request of each connection."""
SHARES = (0.1, 0.5, 1.0)


async def million(bench: Bench) -> Table:
    """1,000,000 tasks through one worker: memory of the worker on the way, memory and keys of the server before and after"""
    load = Load({"default": 1})
    async with part(bench.url, "first") as app:  # so that the server knows the scripts
        await fill(app, BATCH, load)
        with Workers() as workers:
            workers.until(BATCH)
    before = bench.server.memory()
    keys_before = set(bench.server.key_names())
    rows: list[Row] = []

    async with part(bench.url, "million") as app:
        with Workers() as workers:
            enqueued, began = 0, time.monotonic()
            for share in SHARES:
                target = int(bench.tasks * share)
                while (executed := workers.counted().executed) < target:
                    batch = min(BATCH, bench.tasks - enqueued)
                    if batch and enqueued - executed <= BACKLOG - batch:
                        await fill(app, batch, load)
                        enqueued += batch
                    else:
                        workers.until(min(target, executed + 1))
                note = {"worker RSS MB": workers.usage().rss, "tasks /s": target / (time.monotonic() - began)}
                rows.append({"when": f"{target:,} executed", **note, **_stored(bench, before, keys_before)})
        await app.close()
        rows.append({"when": "worker ended", **_stored(bench, before, keys_before)})
        await asyncio.sleep(MEMOS + 2)
        rows.append({"when": f"{MEMOS:.0f} s later", **_stored(bench, before, keys_before)})
    return Table(f"{bench.tasks:,} tasks through one worker", rows)


def _stored(bench: Bench, before: int, keys_before: set[str]) -> Row:
    """What the server holds more than at the start."""
    keys = [re.sub(r".*:", "", key) for key in bench.server.key_names() if key not in keys_before]
    shown = " ".join(keys) if len(keys) <= 8 else f"{len(keys)}"
    return {"server, kB more": (bench.server.memory() - before) / 1e3, "keys": shown}
