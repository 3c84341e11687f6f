"""Shows how the Redis backend behaves with much in it: `python backends/redis/benchmarks/scale.py [--steps NAME ...] [--tasks N]`.

It starts a server of its own, with its data in a temporary folder, and ends it; or takes `--url`, a server that nobody else uses. Each
step works in a namespace of its own and erases it. The machine's other load shows: read the figures as ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec

sys.path.append(str(Path(__file__).resolve().parents[3] / "core" / "benchmarks"))  # workers.py, places.py, run.py

import cost
import places
from bench import Bench, Row, Table
from durability import aof
from endurance import million
from footprint import memory
from observed import Observed
from schedules import scheduled

from crossdock.errors import CrossdockError
from crossdock.spi import redact

STEPS: dict[str, Callable[[Bench], Coroutine[Any, Any, Table]]] = {
    "backlog": cost.backlog,
    "queues": cost.queues,
    "beside": cost.beside,
    "processes": cost.processes,
    "payloads": cost.payloads,
    "priorities": cost.priorities,
    "weights": cost.weights,
    "aof": aof,
    "scheduled": scheduled,
    "million": million,
    "memory": memory,
}


def main() -> None:
    """Run the steps that were asked for, and print a table for each."""
    chosen = _parser().parse_args()
    try:
        _run_all(chosen)
    except CrossdockError as error:
        raise SystemExit(str(error)) from error
    except OSError as error:
        raise SystemExit(f"{redact(chosen.url) if chosen.url else 'the server'} does not answer: {error}") from error


def _run_all(chosen: argparse.Namespace) -> None:
    results: dict[str, Sequence[Row]] = {}
    default = [name for name in STEPS if not (chosen.url and name == "aof")]  # which takes servers of our own
    for name in chosen.steps or default:  # each on a server that is new, so that none sees what another one left
        table, server = _run(name, chosen)
        results[name] = table.rows
        _print(table, server)
        if chosen.json:
            chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))


def _run(name: str, chosen: argparse.Namespace) -> tuple[Table, str]:
    program = None
    place = places.given(chosen.url or "")
    if not chosen.url:
        program = next(iter(places.programs(chosen.server)), None)
        if program is None:
            raise SystemExit(f"there is no {chosen.server} on this machine; --server and --url name others")
        place = places.redis(program, appendonly=chosen.appendonly == "yes")
    with place as url:
        server = Observed(url)
        try:
            bench = Bench(url, server, program, chosen.tasks, min(chosen.sample, chosen.tasks), chosen.repeat)
            return asyncio.run(STEPS[name](bench)), server.title
        finally:
            server.close()


def _parser() -> argparse.ArgumentParser:
    steps = "\n".join(f"  {name:11}{step.__doc__}" for name, step in STEPS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nsteps:\n{steps}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, metavar="NAME", help="default: all of them")
    parser.add_argument("--tasks", type=int, default=1_000_000, help="instead of a million (default 1,000,000)")
    parser.add_argument("--sample", type=int, default=20_000, help="tasks that one rate is measured over (default 20,000)")
    parser.add_argument("--repeat", type=int, default=3, help="times each cost is measured (default 3)")
    parser.add_argument("--server", default="redis", metavar="KIND", help="redis[:VERSION] or valkey[:VERSION] (default redis)")
    parser.add_argument("--appendonly", choices=("no", "yes"), default="no", help="whether our server has an AOF (default no)")
    parser.add_argument("--url", help="a server that is there, redis:// or rediss://, instead of one of our own")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    return parser


def _print(table: Table, server: str) -> None:
    columns = list(dict.fromkeys(column for row in table.rows for column in row))
    lines = [columns, *([_text(row.get(column, "")) for column in columns] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{table.title}\n{server}, {os.cpu_count()} CPUs")
    for first, *others in lines:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([f"  {first:{widths[0]}}", *cells]), flush=True)


def _text(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.2f}"


if __name__ == "__main__":
    main()
