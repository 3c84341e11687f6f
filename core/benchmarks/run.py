"""Measures crossdock's own cost: `nox -s bench`, or `python core/benchmarks/run.py [--tasks N] [--json FILE] [--url URL]`.

By default on the embedded brokers and on a server of its own of each kind that is on this machine. Rates are per second; each figure
is the median of `--repeat` runs. The machine's other load shows: compare within one run, as ratios. The comparison with other
task queues is a separate harness, because each needs an environment of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import places
from places import load_app, part
from workers import CONCURRENCY, Workers, quantile

from crossdock.errors import CrossdockError
from crossdock.spi import LEVELS, redact

Figures = dict[str, float]


# --- enqueue ---


async def enqueue_rates(app: Any, count: int) -> Figures:
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


async def memory_figures(count: int) -> Figures:
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


# --- any other broker, with real worker processes ---


async def broker_figures(url: str, count: int) -> Figures:
    """Enqueue, drain with one and two processes, several queues and levels, I/O-bound tasks, pick-up latency, idle cost."""
    figures: Figures = {}
    async with part(url, "enqueue") as app:
        figures |= await enqueue_rates(app, count)
    for processes in (1, 2):
        async with part(url, f"drain{processes}") as app:
            await app.enqueue_many([app.tasks["noop"].message(i, i + 1, "hello") for i in range(count)])
            with Workers(processes) as workers:
                figures |= drain(
                    workers, count, f"drain, {processes} process{'es' if processes > 1 else ''} /s", costs=processes == 1
                )
    queues = {f"q{number}": 1 for number in range(4)}
    async with part(url, "lanes", [*queues]) as app:
        lanes = [app.tasks["noop"].options(queue=queue, priority=level) for level in LEVELS for queue in queues]
        await app.enqueue_many([lanes[i % len(lanes)].message(i, i + 1, "hello") for i in range(count)])
        with Workers(queues=queues) as workers:
            figures |= drain(workers, count, "drain, 4 queues x 4 levels /s")
    async with part(url, "io") as app:
        await app.enqueue_many([app.tasks["sleep10"].message(i, i + 1, "hello") for i in range(count // 3)])
        with Workers() as workers:
            figures |= drain(workers, count // 3, "10 ms I/O at 100 /s")
    async with part(url, "latency") as app:
        with Workers() as workers:
            figures |= await latency(app, workers)
    return figures


def drain(workers: Workers, count: int, name: str, *, costs: bool = False) -> Figures:
    """Work a backlog off."""
    before = workers.until(1).executed
    cpu = workers.usage().cpu
    done = workers.until(count)
    after = workers.usage()
    figures = {name: done.rate}
    if costs:
        figures["worker CPU s per 10k"] = (after.cpu - cpu) / max(1, done.executed - before) * 1e4
        figures["worker RSS MB"] = after.rss
    return figures


async def latency(app: Any, workers: Workers) -> Figures:
    """From the call of enqueue to the handler's first line, at 100/s into an idle worker; then CPU of the idle worker."""
    await app.tasks["latency"].enqueue(0.0)
    workers.until(1)
    sent = time.time()
    for _ in range(500):
        sent += 0.01
        await app.tasks["latency"].enqueue(time.time())
        await asyncio.sleep(max(0.0, sent - time.time()))
    await app.close()
    workers.until(501)
    cpu, began = workers.usage().cpu, time.monotonic()
    await asyncio.sleep(10.0)
    idle = (workers.usage().cpu - cpu) / (time.monotonic() - began)
    figures = {f"pick-up p{share} ms": quantile(workers.latencies(), share / 100) for share in (50, 95, 99)}
    return {**figures, "idle worker, % of a core": idle * 100}


# --- layers ---


def layers() -> Figures:
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


Measure = Callable[[int], Figures]  # of so many tasks


def on(place: Callable[[], AbstractContextManager[str]], count: int) -> Figures:
    """The figures of one broker."""
    with place() as url:
        return asyncio.run(broker_figures(url, count))


def embedded() -> Iterator[tuple[str, Measure]]:
    """What needs no server."""
    yield "layers, us per task", lambda _: layers()
    yield "memory, one process", lambda count: asyncio.run(memory_figures(count))
    for durability in ("full", "relaxed"):
        yield f"SQLite, durability={durability}", partial(on, partial(places.sqlite, f"?durability={durability}"))


SERVERS = {"redis": "crossdock_redis", "valkey": "crossdock_redis", "rabbitmq": "crossdock_rabbitmq", "nats": "crossdock_nats"}
"""Kinds of servers, and the package that takes them."""


def own_server(kind: str) -> Iterator[tuple[str, Measure]]:
    """A server of our own; of Redis and Valkey one without and one with an append-only file."""
    found = places.programs(kind)
    if not found:
        raise SystemExit(f"there is no {kind} on this machine")
    program = found[0]
    title = f"{program.kind} {program.version}"
    if program.kind in ("redis", "valkey"):
        for word in ("no", "yes"):
            yield f"{title}, appendonly {word}", partial(on, partial(places.redis, program, appendonly=word == "yes"))
    else:
        yield title, partial(on, partial(places.server, program))


def there(kind: str) -> bool:
    """Whether this kind can be measured here; if not, says why."""
    missing = [name for name in (SERVERS[kind], "crossdock_conformance") if not find_spec(name)]
    if missing or not places.programs(kind):
        why = f"it takes {' and '.join(missing)}" if missing else "it is not on this machine"
        print(f"\n{kind} is left out: {why}", file=sys.stderr)
        return False
    return True


def measurements(urls: list[str], servers: list[str]) -> Iterator[tuple[str, Measure]]:
    """What was asked for, by title; or all that can be measured here."""
    for url in urls:
        yield redact(url), partial(on, partial(places.given, url))
    for server in servers:
        yield from own_server(server)
    if urls or servers:
        return
    yield from embedded()
    for kind in SERVERS:
        if there(kind):
            yield from own_server(kind)


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=30_000, help="tasks per measurement (default 30,000)")
    parser.add_argument("--repeat", type=int, default=3, help="runs per figure (default 3)")
    parser.add_argument("--url", action="append", default=[], help="measure only this broker; may be repeated")
    server = f"measure only a server of our own, KIND or KIND:VERSION, of {', '.join(SERVERS)}; may be repeated"
    parser.add_argument("--server", action="append", default=[], metavar="KIND", help=server)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    chosen = parser.parse_args()
    print(f"Python {platform.python_version()}, {'uvloop' if find_spec('uvloop') else 'asyncio'} in workers, {os.cpu_count()} CPUs")
    results: dict[str, Figures] = {}
    for title, measure in measurements(chosen.url, chosen.server):
        try:
            runs = [measure(chosen.tasks) for _ in range(chosen.repeat)]
        except CrossdockError as error:
            raise SystemExit(f"{title}: {error}") from error
        results[title] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        print(f"\n{title}")
        for name, figure in results[title].items():
            print(f"  {name:32} {figure:>12,.2f}" if figure < 1000 else f"  {name:32} {figure:>12,.0f}", flush=True)
    if chosen.json:
        chosen.json.write_bytes(msgspec.json.format(msgspec.json.encode(results)))


if __name__ == "__main__":
    main()
