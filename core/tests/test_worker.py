"""The worker on the memory broker, in real time: executing, timing out, losing leases, stopping."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import itertools
import threading
import time
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from crossdock import App, Middleware, Priority, Queue, Reject, RetryPolicy, Worker, WorkerOptions, current_context, executor
from crossdock.backends import memory
from crossdock.errors import BrokerUnavailable, ConfigurationError, LeaseLost
from crossdock.letters import read_story
from crossdock.spi import Broker, DeadLetter, Delivery, Lane, Reason, Refusal, Settlement, State

_numbers = itertools.count(1)
DEADLINE = 20.0

RunningWorker = Callable[..., AbstractAsyncContextManager[Worker]]


@pytest.fixture
def url() -> Iterator[str]:
    """A memory broker that no other test shares."""
    name = f"worker-test-{next(_numbers)}"
    yield f"memory://{name}"
    memory.forget(name)


@contextlib.asynccontextmanager
async def working(app: App, **options: Any) -> AsyncIterator[Worker]:
    """A worker that runs during the block and is stopped after it."""
    worker = Worker(app, WorkerOptions(**options))
    run = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await asyncio.wait_for(run, DEADLINE)
        await app.close()


async def work_off(app: App, **options: Any) -> Any:
    """Run a burst worker until nothing is ready."""
    try:
        return await asyncio.wait_for(Worker(app, WorkerOptions(burst=True, **options)).run(), DEADLINE)
    finally:
        await app.close()


async def until(fact: Callable[[], bool]) -> None:
    """Return when `fact` holds; fail after a deadline."""
    async with asyncio.timeout(DEADLINE):
        while not fact():
            await asyncio.sleep(0.002)


async def look(app: App, queue: str = "default") -> tuple[Any, list[DeadLetter]]:
    """Stats and dead letters of a queue."""
    broker = app.make_broker()
    await broker.open()
    try:
        (stats,) = await broker.stats([queue])
        page = await broker.peek(queue, State.DEAD)
        return stats, [entry.letter for entry in page.entries if entry.letter]
    finally:
        await broker.close()


class WrappedBroker(Broker):
    """Passes everything on; tests override single verbs."""

    def __init__(self, inner: Broker) -> None:
        self.inner = inner

    async def open(self) -> None:
        await self.inner.open()
        self.capabilities = self.inner.capabilities

    async def close(self) -> None:
        await self.inner.close()

    async def declare(self, queues: Any) -> None:
        await self.inner.declare(queues)

    async def enqueue(self, messages: Any) -> Sequence[Refusal]:
        return await self.inner.enqueue(messages)

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return await self.inner.receive(lanes, limit, wait)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        return await self.inner.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return await self.inner.settle(settlements)

    async def stats(self, queues: Any = None) -> Any:
        return await self.inner.stats(queues)

    async def peek(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.peek(*args, **kwargs)

    async def remove(self, *args: Any) -> Any:
        return await self.inner.remove(*args)

    async def replay(self, *args: Any) -> Any:
        return await self.inner.replay(*args)

    async def purge(self, *args: Any) -> int:
        return await self.inner.purge(*args)


def wrap(app: App, wrapper: type[WrappedBroker]) -> list[WrappedBroker]:
    """Make every broker of the App a wrapped one; return the list that collects them."""
    made: list[WrappedBroker] = []
    inner = app.environment.make_broker

    def make() -> Broker:
        made.append(wrapper(inner()))
        return made[-1]

    app.environment.make_broker = make
    return made


# --- executing ---


@pytest.mark.asyncio
async def test_a_task_that_ended_leaves_nothing_to_the_garbage_collector(url: str) -> None:
    """What a handler put into its context is gone with it, however it ended; else a busy worker would grow and collect all the time."""
    app, kept = App(url), contextvars.ContextVar[object]("kept")
    left: list[weakref.ref[object]] = []

    class Kept: ...

    @app.task(retry=RetryPolicy.fixed(max_attempts=1))
    async def handler(fail: bool) -> None:
        mine = Kept()
        kept.set(mine)
        left.append(weakref.ref(mine))
        if fail:
            raise ValueError("no")

    gc.collect()
    gc.disable()
    try:
        for number in range(20):
            await handler.enqueue(number % 2 == 0)
        await work_off(app)
        assert len(left) == 20
        assert [ref for ref in left if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.asyncio
async def test_async_and_sync_handlers_run_once_each(url: str) -> None:
    """An async handler runs in the worker's loop, a sync one in a thread, and both are settled."""
    app, home = App(url), threading.get_ident()
    seen: list[tuple[str, int, bool]] = []

    @app.task
    async def in_loop(x: int) -> None:
        seen.append(("async", x, threading.get_ident() == home))

    @app.task
    def in_thread(x: int) -> None:
        seen.append((f"sync {current_context().id != ''}", x, threading.get_ident() == home))

    await in_loop.enqueue(1)
    await in_thread.enqueue(2)
    report = await work_off(app)

    assert sorted(seen) == [("async", 1, True), ("sync True", 2, False)]
    stats, letters = await look(app)
    assert (report.executed, stats.ready, stats.leased, letters) == (2, 0, 0, [])


@pytest.mark.asyncio
async def test_context_variables_do_not_leak_between_handlers(url: str) -> None:
    """What one handler sets in a context variable, the next one does not see, in loop and thread alike."""
    import contextvars

    app, variable, seen = App(url), contextvars.ContextVar("variable", default="clean"), []

    @app.task
    async def in_loop() -> None:
        seen.append(variable.get())
        variable.set("dirty")

    @app.task
    def in_thread() -> None:
        seen.append(variable.get())
        variable.set("dirty")

    for _ in range(3):
        await in_loop.enqueue()
        await in_thread.enqueue()
    await work_off(app, concurrency=1)

    assert seen == ["clean"] * 6


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.asyncio
async def test_concurrency_is_used_and_never_exceeded(url: str, kind: str) -> None:
    """With ten slots and thirty tasks, ten run at once, and no message is received beyond the free slots."""
    app, running, most = App(url), 0, 0
    gate, lock = threading.Event(), threading.Lock()

    def count(change: int) -> None:
        nonlocal running, most
        with lock:
            running += change
            most = max(most, running)

    if kind == "async":

        @app.task(name="wait")
        async def wait_async() -> None:
            count(+1)
            await until(gate.is_set)
            count(-1)
    else:

        @app.task(name="wait")
        def wait_sync() -> None:
            count(+1)
            gate.wait(DEADLINE)
            count(-1)

    task = app.tasks["wait"]
    await app.enqueue_many([task.message() for _ in range(30)])
    async with working(app, concurrency=10):
        await until(lambda: running == 10)
        stats, _ = await look(app)
        assert (stats.leased, stats.ready) == (10, 20)
        gate.set()
        await until(lambda: running == 0)
    assert most == 10


@pytest.mark.asyncio
async def test_long_tasks_do_not_silence_free_slots(url: str) -> None:
    """With all but one slot held by long tasks, short ones still run through the last."""
    app, gate, done = App(url), asyncio.Event(), []

    @app.task
    async def long() -> None:
        await gate.wait()

    @app.task
    async def short(x: int) -> None:
        done.append(x)

    await app.enqueue_many([long.message() for _ in range(19)])
    async with working(app, concurrency=20):
        await app.enqueue_many([short.message(x) for x in range(50)])
        await until(lambda: len(done) == 50)
        gate.set()


@pytest.mark.asyncio
async def test_queue_concurrency_limits_one_queue_and_not_the_others(url: str) -> None:
    """A queue with `concurrency=2` never has three tasks running, while another uses the remaining slots."""
    app = App(url, queues=[Queue("narrow", concurrency=2), Queue("wide")])
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    gate = asyncio.Event()

    async def hold(queue: str) -> None:
        running[queue] += 1
        most[queue] = max(most[queue], running[queue])
        await gate.wait()
        running[queue] -= 1

    @app.task(queue="narrow")
    async def narrow() -> None:
        await hold("narrow")

    @app.task(queue="wide")
    async def wide() -> None:
        await hold("wide")

    await app.enqueue_many([task.message() for task in (narrow, wide) for _ in range(12)])
    async with working(app, concurrency=10):
        await until(lambda: running == {"narrow": 2, "wide": 8})
        gate.set()
        await until(lambda: not any(running.values()))
        await until(lambda: most["narrow"] == 2)


@pytest.mark.asyncio
async def test_weights_share_one_slot(url: str) -> None:
    """On one slot, queues weighted 6 and 2 get their shares within two points while both wait."""
    app, order = App(url, queues=[Queue("critical", weight=6), Queue("default", weight=2)]), []

    @app.task(name="note")
    async def note(queue: str) -> None:
        order.append(queue)

    for queue in ("critical", "default"):
        await app.enqueue_many([note.options(queue=queue).message(queue) for _ in range(800)])
    await work_off(app, concurrency=1, queues={"critical": 6, "default": 2})

    first = order[:800]
    assert abs(first.count("critical") / len(first) - 0.75) < 0.02


@pytest.mark.asyncio
async def test_strict_takes_queues_in_order(url: str) -> None:
    """With `strict`, the second queue waits until the first is empty."""
    app, order = App(url), []

    @app.task(name="note")
    async def note(queue: str) -> None:
        order.append(queue)

    for queue in ("second", "first"):
        await app.enqueue_many([note.options(queue=queue).message(queue) for _ in range(50)])
    await work_off(app, concurrency=1, strict=True, queues={"first": 1, "second": 1})

    assert order == ["first"] * 50 + ["second"] * 50


@pytest.mark.asyncio
async def test_strict_priorities_within_a_queue(url: str) -> None:
    """In a queue with strict priorities every level waits for those above; within a level the order is kept."""
    app, order = App(url, queues=[Queue("default", priorities="strict")]), []

    @app.task
    async def note(level: int, number: int) -> None:
        order.append((level, number))

    for number in range(10):
        for level in (Priority.LOW, Priority.CRITICAL, Priority.NORMAL):
            await note.options(priority=level).enqueue(int(level), number)
    await work_off(app, concurrency=1)

    assert order == [(level, number) for level in (9, 3, 0) for number in range(10)]


# --- whatever a handler raises ---


class Unprintable(Exception):
    """An exception whose text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


NASTY = [
    asyncio.CancelledError(),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(1),
    StopAsyncIteration(),
    MemoryError(),
    TimeoutError(),
    RecursionError("deep"),
    Unprintable(),
    ExceptionGroup("several", [ValueError(1), ExceptionGroup("inner", [KeyError("x")])]),
    BaseExceptionGroup("worse", [KeyboardInterrupt()]),
    ValueError("lone surrogate \ud800"),
]


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.asyncio
async def test_handlers_may_raise_anything(url: str, kind: str) -> None:
    """Whatever a handler raises is a failure by the policy: it is dead-lettered with its story, and the worker lives on."""
    app, fine = App(url, retry=RetryPolicy.fixed(1)), []

    @app.task(name="async.fail")
    async def fail_async(number: int) -> None:
        raise NASTY[number]

    @app.task(name="sync.fail")
    def fail_sync(number: int) -> None:
        raise NASTY[number]

    @app.task
    async def succeed() -> None:
        fine.append(True)

    task = app.tasks[f"{kind}.fail"]
    for number in range(len(NASTY)):
        await app.enqueue(task.message(number))
        await succeed.enqueue()
    await work_off(app)

    _, letters = await look(app)
    assert len(fine) == len(NASTY) == len(letters)
    assert {letter.reason for letter in letters} == {Reason.ATTEMPTS_EXHAUSTED}
    assert all(read_story(letter).text and read_story(letter).attempts for letter in letters)


@pytest.mark.asyncio
async def test_a_failing_task_is_retried_and_then_dead_lettered(url: str) -> None:
    """A task that always fails runs `max_attempts` times with rising attempts and ends as one dead letter."""
    app, attempts = App(url, retry=RetryPolicy.fixed(3, delay=0.01)), []

    @app.task
    async def fail() -> None:
        attempts.append((current_context().attempt, current_context().delivery_count))
        raise ValueError("no")

    await fail.enqueue()
    async with working(app):
        await until(lambda: len(attempts) == 3)
    _, (letter,) = await look(app)
    assert attempts == [(1, 1), (2, 1), (3, 1)]
    assert (letter.reason, letter.error_type) == (Reason.ATTEMPTS_EXHAUSTED, "ValueError")
    assert [failure.attempt for failure in read_story(letter).attempts] == [1, 2, 3]


@pytest.mark.asyncio
async def test_run_middleware_wraps_async_and_sync_handlers(url: str) -> None:
    """`Middleware.run` sees results of both kinds of handlers, and what it raises counts as the handler's."""
    seen: list[Any] = []

    class Watch(Middleware):
        async def run(self, context: Any, call_next: Any) -> Any:
            if context.task == "refused":
                raise Reject("not today")
            seen.append((context.task, await call_next(context)))

    app = App(url, middleware=[Watch()])

    @app.task(name="async")
    async def a() -> int:
        return 1

    @app.task(name="sync")
    def b() -> int:
        return 2

    @app.task(name="refused")
    async def c() -> None:
        seen.append("ran")

    for task in (a, b, c):
        await task.enqueue()
    await work_off(app)

    assert sorted(seen) == [("async", 1), ("sync", 2)]
    _, (letter,) = await look(app)
    assert letter.reason is Reason.REJECTED


# --- time ---


@pytest.mark.asyncio
async def test_a_timeout_cancels_an_async_handler(url: str) -> None:
    """A handler that runs over its timeout is cancelled and counts as failed with `TaskTimeout`."""
    app, cleaned = App(url, retry=RetryPolicy.fixed(1)), []

    @app.task(timeout=0.05)
    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    await slow.enqueue()
    report = await work_off(app)

    _, (letter,) = await look(app)
    assert cleaned and report.abandoned == 0
    assert letter.error_type == "crossdock.errors.TaskTimeout"
    assert "0.05 s" in read_story(letter).text


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.asyncio
async def test_a_handler_that_ignores_its_timeout_is_abandoned(url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that does not end when cancelled is abandoned, counted and reported; its slot goes on, its late result is ignored."""
    monkeypatch.setattr(executor, "ABANDON_AFTER", 0.05)
    app, gate, told = App(url, retry=RetryPolicy.fixed(1)), threading.Event(), []
    fine = []

    @app.on("task_abandoned")
    def tell(event: Any) -> None:
        told.append(event.detail)

    @app.task(name="async", timeout=0.05)
    async def stubborn_async() -> None:
        while not gate.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    @app.task(name="sync", timeout=0.05)
    def stubborn_sync() -> None:
        gate.wait(DEADLINE)

    @app.task
    def after() -> None:
        fine.append(True)

    await app.enqueue(app.tasks[kind].message())
    async with working(app, concurrency=1) as worker:
        await until(lambda: bool(told))
        await after.enqueue()
        await until(lambda: bool(fine))
        gate.set()
    _, (letter,) = await look(app)
    assert letter.error_type == "crossdock.errors.TaskTimeout"
    assert worker.options.concurrency == 1


@pytest.mark.asyncio
async def test_leases_outlive_a_handler_that_blocks_the_loop(url: str) -> None:
    """A handler that blocks the event loop for several leases keeps its own lease and its neighbour's: both run once."""
    app, runs = App(url, queues=[Queue("default", lease=1.0)]), []

    @app.task
    async def block() -> None:
        runs.append("block")
        time.sleep(2.5)

    @app.task
    async def neighbour() -> None:
        runs.append("neighbour")
        await asyncio.sleep(0)

    await neighbour.enqueue()
    await block.enqueue()
    async with working(app, concurrency=2):
        await until(lambda: len(runs) == 2)
    await work_off(app)

    stats, _ = await look(app)
    assert sorted(runs) == ["block", "neighbour"]
    assert (stats.ready, stats.leased) == (0, 0)


@pytest.mark.asyncio
async def test_a_lost_lease_cancels_the_handler_and_settles_nothing(url: str) -> None:
    """When the broker refuses an extension, the handler is cancelled, and neither ack nor failure is sent for it."""
    app, told, settled = App(url, queues=[Queue("default", lease=1.0)]), [], []
    cancelled, tries = asyncio.Event(), []

    class Loses(WrappedBroker):
        async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
            return [Refusal(index, LeaseLost("taken over")) for index, _ in enumerate(deliveries)]

        async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
            settled.extend(settlements)
            return await super().settle(settlements)

    wrap(app, Loses)

    @app.on("lease_lost")
    def tell(event: Any) -> None:
        told.append(event.id)

    @app.task
    async def hold() -> None:
        tries.append(current_context().delivery_count)
        if len(tries) > 1:
            return
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    handle = await hold.enqueue()
    async with working(app):
        await asyncio.wait_for(cancelled.wait(), DEADLINE)
        assert settled == []
        await until(lambda: len(settled) == 1)  # the lease ran out in the broker, and the task was delivered again
    assert told == [handle.id]
    assert tries == [1, 2]


@pytest.mark.asyncio
async def test_an_extension_that_failed_is_no_lost_lease(url: str) -> None:
    """When the broker could not extend a lease and does not say that it is lost, the handler goes on and the next extension saves it."""
    app, answers = App(url, queues=[Queue("default", lease=1.0)]), [False, True]
    extended = asyncio.Event()

    class Hesitates(WrappedBroker):
        async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
            if deliveries and not answers.pop(0):
                return [Refusal(index, BrokerUnavailable("one server is away")) for index, _ in enumerate(deliveries)]
            answers.append(True)
            refusals = await super().extend(deliveries)
            extended.set()
            return refusals

    wrap(app, Hesitates)
    ended: list[int] = []

    @app.task
    async def hold() -> None:
        await extended.wait()
        ended.append(current_context().delivery_count)

    await hold.enqueue()
    async with working(app):
        await until(lambda: len(ended) == 1)
    assert ended == [1]


# --- the broker's troubles ---


@pytest.mark.asyncio
async def test_the_worker_waits_out_an_unreachable_broker(url: str) -> None:
    """While receive and settle fail, nothing is lost and the same worker goes on when the broker is back."""
    app, done = App(url), []

    class Flaky(WrappedBroker):
        failures = 4

        async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
            Flaky.failures -= 1
            if Flaky.failures > 2:
                raise BrokerUnavailable("away")
            return await super().receive(lanes, limit, wait)

        async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
            Flaky.failures -= 1
            if Flaky.failures > -2:
                raise BrokerUnavailable("away")
            return await super().settle(settlements)

    wrap(app, Flaky)

    @app.task
    async def work(x: int) -> None:
        done.append(x)

    await app.enqueue_many([work.message(x) for x in range(5)])
    async with working(app):
        await until(lambda: len(done) == 5)
    stats, _ = await look(app)
    assert (stats.ready, stats.leased) == (0, 0)
    assert sorted(done) == list(range(5))


@pytest.mark.asyncio
async def test_a_worker_whose_broker_thread_dies_does_not_look_alive(url: str) -> None:
    """An unexpected error in the broker's half ends the worker with that error instead of leaving it deaf."""
    app = App(url)

    class Broken(WrappedBroker):
        async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
            raise ZeroDivisionError("a bug in a backend")

    wrap(app, Broken)

    @app.task
    async def work() -> None: ...

    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(Worker(app).run(), DEADLINE)


@pytest.mark.asyncio
async def test_a_broker_that_cannot_be_opened_is_one_clear_error(url: str) -> None:
    """A worker whose broker is away at the start raises what `open` raised and leaves no thread."""
    app = App(url)

    class Away(WrappedBroker):
        async def open(self) -> None:
            raise BrokerUnavailable("nobody listens there")

    wrap(app, Away)

    @app.task
    async def work() -> None: ...

    with pytest.raises(BrokerUnavailable, match="nobody listens"):
        await asyncio.wait_for(Worker(app).run(), DEADLINE)
    await until(lambda: not [thread for thread in threading.enumerate() if thread.name == "crossdock-broker"])


@pytest.mark.asyncio
async def test_settlements_travel_in_batches(url: str) -> None:
    """A thousand quick tasks are settled in far fewer calls than tasks."""
    app = App(url)
    calls: list[int] = []

    class Counts(WrappedBroker):
        async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
            calls.append(len(settlements))
            return await super().settle(settlements)

    wrap(app, Counts)

    @app.task
    async def work() -> None: ...

    await app.enqueue_many([work.message() for _ in range(1000)])
    await work_off(app)

    assert sum(calls) == 1000
    assert len(calls) < 200


# --- stopping ---


@pytest.mark.asyncio
async def test_stop_lets_short_tasks_end_and_gives_long_ones_back_unspent(url: str) -> None:
    """At stop nothing more is received; a task that ends in the grace period is done, one that does not is given back as it was."""
    app, started, gate = App(url), [], asyncio.Event()

    @app.task
    async def short() -> None:
        started.append("short")
        await gate.wait()

    @app.task
    async def long() -> None:
        started.append("long")
        await asyncio.Event().wait()

    for task in (short, long, short, long):
        await task.enqueue()
    worker = Worker(app, WorkerOptions(concurrency=4, grace=0.3))
    run = asyncio.create_task(worker.run())
    await until(lambda: len(started) == 4)
    worker.stop()
    late = await short.enqueue()
    gate.set()
    report = await asyncio.wait_for(run, DEADLINE)

    broker = app.make_broker()
    await broker.open()
    page = await broker.peek("default", State.READY)
    deliveries = await broker.receive([Lane("default", Priority.NORMAL, 9)], 9, 0.0)
    await broker.close()
    await app.close()
    assert (report.executed, report.returned) == (4, 2)
    assert late.id in {entry.message.id for entry in page.entries}
    assert sorted(delivery.delivery_count for delivery in deliveries) == [1, 1, 1]
    assert {delivery.message.generation for delivery in deliveries} == {0}


@pytest.mark.asyncio
async def test_a_second_stop_ends_the_grace_period(url: str) -> None:
    """The second `stop` does not wait for the grace period."""
    app, started = App(url), asyncio.Event()

    @app.task
    async def long() -> None:
        started.set()
        await asyncio.Event().wait()

    await long.enqueue()
    worker = Worker(app, WorkerOptions(grace=3600))
    run = asyncio.create_task(worker.run())
    await asyncio.wait_for(started.wait(), DEADLINE)
    worker.stop()
    worker.stop()
    await asyncio.wait_for(run, DEADLINE)
    stats, _ = await look(app)
    await app.close()
    assert (stats.ready, stats.leased) == (1, 0)


@pytest.mark.asyncio
async def test_a_sync_handler_that_outlives_the_grace_period_is_given_back(url: str) -> None:
    """A thread cannot be stopped: its task is given back and the report says that it still runs."""
    app, started, gate = App(url), threading.Event(), threading.Event()

    @app.task
    def stubborn() -> None:
        started.set()
        gate.wait(DEADLINE)

    await stubborn.enqueue()
    worker = Worker(app, WorkerOptions(grace=0.0))
    run = asyncio.create_task(worker.run())
    await until(started.is_set)
    worker.stop()
    report = await asyncio.wait_for(run, DEADLINE)
    stats, _ = await look(app)
    gate.set()
    await app.close()
    assert (report.still_running, report.abandoned) == (1, 1)
    assert (stats.ready, stats.leased) == (1, 0)


@pytest.mark.asyncio
async def test_burst_leaves_what_is_not_due(url: str) -> None:
    """A burst worker ends when nothing is ready, and leaves scheduled tasks where they are."""
    app, done = App(url), []

    @app.task
    async def work(x: int) -> None:
        done.append(x)

    await work.enqueue(1)
    await work.options(delay=3600).enqueue(2)
    await work_off(app)

    stats, _ = await look(app)
    assert done == [1]
    assert stats.scheduled == 1


def test_bad_options_are_refused() -> None:
    """A worker refuses options out of range, an App without tasks, and an App without a broker, each with its reason."""
    for options, words in (
        ({"concurrency": 0}, "concurrency"),
        ({"grace": -1.0}, "grace"),
        ({"queues": {"default": 0}}, "weight"),
        ({"queues": {"no good": 1}}, "queue name"),
    ):
        app = App("memory://")
        app.task(name="t")(_nothing)
        with pytest.raises(ConfigurationError, match=words):
            Worker.check(app, WorkerOptions(**options))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="no tasks"):
        Worker.check(App("memory://"), WorkerOptions())


def _nothing() -> None: ...


@pytest.mark.asyncio
async def test_a_coroutine_from_a_sync_handler_is_a_failure(url: str) -> None:
    """A decorator that hides an `async def` makes a plain function whose coroutine nobody awaits: that must not count as success."""
    app = App(url, retry=RetryPolicy.fixed(1))

    async def hidden() -> None: ...

    @app.task
    def plain() -> Any:
        return hidden()

    await plain.enqueue()
    await work_off(app)
    _, (letter,) = await look(app)
    assert letter.error_type == "TypeError"


@pytest.mark.asyncio
async def test_a_backend_that_raises_its_own_errors_at_settle_does_not_stop_the_worker(url: str) -> None:
    """A foreign exception from `settle` is logged, the lease runs out, and other tasks go on being settled."""
    app, done = App(url, queues=[Queue("default", lease=1.0)]), []

    class Faulty(WrappedBroker):
        faults = 1

        async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
            if Faulty.faults:
                Faulty.faults -= 1
                raise ZeroDivisionError("a bug in a backend")
            return await super().settle(settlements)

    wrap(app, Faulty)

    @app.task
    async def work() -> None:
        done.append(current_context().delivery_count)

    await work.enqueue()
    async with working(app):
        await until(lambda: done == [1, 2])
    stats, _ = await look(app)
    assert (stats.ready, stats.leased) == (0, 0)
