"""How fast the verbs of the SQLite backend are, without core on top of them.

    python core/benchmarks/bench_sqlite_broker.py [PART ...] [--folder FOLDER]

Parts: single, batches, cycle, depth, queues, workers, pickup, idle; all of them if none is named. Everything runs with durability=full
on a file in FOLDER (default: the current one; it must be on a disk, not in memory) and takes about three minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import resource
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from crossdock.clock import SystemClock
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, Delivery, Lane, Message, Priority

BODY = os.urandom(250)
"""About what an envelope of a small task weighs."""
SECONDS = 2.0
"""How long each rate is measured."""

_numbers = itertools.count()


def messages(count: int, queues: int = 1) -> list[Message]:
    """Make messages whose ids sort by time, as core's do."""
    made = itertools.islice(_numbers, count)
    return [Message(f"{os.getpid():08d}{number:016d}", f"q{number % queues}", Priority.NORMAL, BODY) for number in made]


def lanes(queues: int = 1) -> list[Lane]:
    """Every level of every queue, with quotas as core makes them for a hundred slots."""
    share = {level: max(1, quota // queues) for level, quota in zip(LEVELS, (46, 31, 15, 8), strict=True)}
    return [Lane(f"q{number}", level, share[level]) for number in range(queues) for level in LEVELS]


async def opened(folder: Path) -> Broker:
    """Open a Broker on the folder's store."""
    broker = create_broker(f"sqlite:///{folder}/bench.db", clock=SystemClock())
    await broker.open()
    return broker


async def rate(step: Callable[[], Awaitable[int]], seconds: float = SECONDS) -> float:
    """Repeat a step and return how many messages it moved per second."""
    moved, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        moved += await step()
    return moved / elapsed


async def store(broker: Broker, count: int, queues: int = 1) -> int:
    """Enqueue one batch."""
    assert not await broker.enqueue(messages(count, queues))
    return count


async def fill(broker: Broker, count: int, queues: int = 1) -> None:
    """Enqueue many."""
    for _ in range(0, count, 1000):
        await store(broker, min(count, 1000), queues)


async def drain(broker: Broker, queues: int = 1, seconds: float = SECONDS, limit: int = 100) -> float:
    """Receive and settle, one batch being settled while the next is received; returns messages per second."""
    wanted = lanes(queues)
    settling: asyncio.Task[None] | None = None

    async def settle(deliveries: Sequence[Delivery]) -> None:
        assert not await broker.settle([Ack(delivery) for delivery in deliveries])

    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        deliveries = await broker.receive(wanted, limit, 0)
        if settling is not None:
            await settling
        if not deliveries:
            break
        settling = asyncio.ensure_future(settle(deliveries))
        done += len(deliveries)
    if settling is not None:
        await settling
    return done / (time.perf_counter() - start)


def bare(folder: Path) -> float:
    """One-row transactions by the sqlite3 module alone: the pace of the disk."""
    connection = sqlite3.connect(folder / "bare.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("CREATE TABLE bare (key INTEGER PRIMARY KEY, body BLOB)")
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO bare (body) VALUES (?)", (BODY,))
        connection.execute("COMMIT")
        done += 1
    elapsed = time.perf_counter() - start
    connection.close()
    return done / elapsed


# --- parts ---


async def single(folder: Path) -> None:
    """One by one, against the bare disk, taken in turn."""
    broker = await opened(folder)
    rounds = [(bare(Path(tempfile.mkdtemp(dir=folder))), await rate(partial(store, broker, 1))) for _ in range(3)]
    alone, ours = (statistics.median(values) for values in zip(*rounds, strict=True))
    await broker.close()
    print(f"enqueue, 1 at a time        {ours:10,.0f}/s   bare INSERT {alone:,.0f}/s: {ours / alone:.0%}")

    async def concurrently() -> int:
        await asyncio.gather(*(store(broker, 1) for _ in range(100)))
        return 100

    await broker.open()
    print(f"enqueue, 100 calls at once  {await rate(concurrently):10,.0f}/s")
    await broker.close()


async def batches(folder: Path) -> None:
    """Batches of several sizes."""
    broker = await opened(folder)
    for count in (10, 100, 1000):
        print(f"enqueue, batches of {count:<4}    {await rate(partial(store, broker, count)):10,.0f}/s")
    await broker.close()


async def cycle(folder: Path) -> None:
    """Receive a hundred while the hundred before are settled."""
    broker = await opened(folder)
    for limit in (10, 100, 500):
        await fill(broker, 400_000 if limit > 10 else 100_000)
        print(f"receive and settle, {limit:<4}    {await drain(broker, limit=limit):10,.0f}/s")
    await broker.close()
    print(f"                  log left behind at most {_log_size(folder) / 1e6:.1f} MB")


async def depth(folder: Path) -> None:
    """Does it cost more with a million stored?"""
    for count in (1_000, 100_000, 1_000_000):
        place = Path(tempfile.mkdtemp(dir=folder))
        broker = await opened(place)
        await fill(broker, count)
        one, many = await rate(partial(store, broker, 1), 1), await rate(partial(store, broker, 1000), 1)
        drained = await drain(broker, seconds=1)
        start = time.perf_counter()
        await broker.stats()
        stats_ms = (time.perf_counter() - start) * 1e3
        log_mb = _log_size(place) / 1e6
        await broker.close()
        print(
            f"with {count:9,} stored: enqueue 1 {one:7,.0f}/s, 1000 {many:9,.0f}/s, "
            f"receive and settle 100 {drained:8,.0f}/s, stats {stats_ms:.2f} ms, log {log_mb:.1f} MB"
        )


async def queues(folder: Path) -> None:
    """Does it cost more with 200 queues?"""
    for count in (1, 200):
        broker = await opened(Path(tempfile.mkdtemp(dir=folder)))
        stored = await rate(partial(store, broker, 1000, count))
        drained = await drain(broker, count)
        await broker.close()
        print(f"with {count:3} queues: enqueue 1000 {stored:9,.0f}/s, receive and settle 100 {drained:8,.0f}/s")


def _worker(folder: Path, count: int, barrier: Any, done: Any) -> None:
    async def work() -> float:
        broker = await opened(folder)
        barrier.wait()
        drained = await drain(broker, seconds=SECONDS)
        await broker.close()
        return drained

    done.put(asyncio.run(work()))


async def workers(folder: Path) -> None:
    """Are two processes slower than one?"""
    spawn = multiprocessing.get_context("spawn")
    for count in (1, 2):
        place = Path(tempfile.mkdtemp(dir=folder))
        broker = await opened(place)
        await fill(broker, 500_000)
        await broker.close()
        barrier, done = spawn.Barrier(count), spawn.Queue()
        processes = [spawn.Process(target=_worker, args=(place, count, barrier, done)) for _ in range(count)]
        for process in processes:
            process.start()
        total = sum([done.get() for _ in processes])
        for process in processes:
            process.join()
        print(f"{count} worker process(es): receive and settle 100 {total:10,.0f}/s together")


def _producer(folder: Path, count: int, interval: float) -> None:
    async def produce() -> None:
        broker = await opened(folder)
        start = time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, start + number * interval - time.monotonic()))
            message = Message(f"p{number:08d}", "q0", Priority.NORMAL, str(time.monotonic_ns()).encode())
            assert not await broker.enqueue([message])
        await broker.close()

    asyncio.run(produce())


async def pickup(folder: Path) -> None:
    """From the call of enqueue in one process to the delivery in another."""
    for rate, count in ((100, 500), (0.4, 8)):
        place = Path(tempfile.mkdtemp(dir=folder))
        broker = await opened(place)
        producer = multiprocessing.get_context("spawn").Process(target=_producer, args=(place, count, 1 / rate))
        producer.start()
        waits: list[float] = []
        while len(waits) < count:
            deliveries = await broker.receive(lanes(), 100, 30)
            now = time.monotonic_ns()
            waits += [(now - int(delivery.message.body)) / 1e6 for delivery in deliveries]
            await broker.settle([Ack(delivery) for delivery in deliveries])
        producer.join()
        await broker.close()
        waits.sort()
        print(
            f"pick-up at {rate:5}/s: p50 {statistics.median(waits):.2f} ms, p95 {waits[int(count * 0.95)]:.2f} ms, "
            f"p99 {waits[int(count * 0.99)]:.2f} ms, worst {waits[-1]:.2f} ms"
        )


async def idle(folder: Path) -> None:
    """What a waiting receive costs when nothing comes."""
    broker = await opened(folder)
    await broker.receive(lanes(), 100, 0)
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    await broker.receive(lanes(), 100, 30)
    after, elapsed = resource.getrusage(resource.RUSAGE_SELF), time.monotonic() - start
    await broker.close()
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"idle for {elapsed:.0f} s: {used / elapsed:.2%} of a core")


def _log_size(folder: Path) -> int:
    return max((path.stat().st_size for path in folder.glob("*-wal")), default=0)


PARTS = (single, batches, cycle, depth, queues, workers, pickup, idle)


def main() -> None:
    """Run the parts that were asked for."""
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    print(f"SQLite {sqlite3.sqlite_version}, {os.cpu_count()} cores, body {len(BODY)} bytes")
    for part in PARTS:
        if not options.parts or part.__name__ in options.parts:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                asyncio.run(part(Path(folder)))


if __name__ == "__main__":
    main()
