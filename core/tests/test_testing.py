"""Testing mode: hours in milliseconds, in order, and nothing of it left behind."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from crossdock import App, Priority, Queue, Reject, RetryPolicy, Snooze, current_context
from crossdock.backends import memory
from crossdock.clock import SystemClock, VirtualClock
from crossdock.letters import read_story
from crossdock.spi import Broker, Reason

pytestmark = pytest.mark.asyncio


async def test_a_retry_schedule_of_hours_runs_in_milliseconds() -> None:
    """Each attempt runs at its own virtual time, none early, and real time hardly passes."""
    app = App("memory://", retry=RetryPolicy.linear(6, 3600.0, 7200.0))
    began = time.process_time()
    async with app.testing() as t:
        start = t.clock.time_ms()
        ran: list[float] = []

        @app.task
        async def job() -> None:
            ran.append((t.clock.time_ms() - start) / 3_600_000)
            raise OSError(f"attempt {current_context().attempt}")

        await job.enqueue()
        assert await t.run_until_idle() == 1
        assert await t.advance(minutes=59, seconds=59.999) == 0
        assert await t.advance(seconds=0.001) == 1
        assert await t.advance(hours=7.999) == 3
        assert not t.dead_letters()
        assert await t.advance(days=1) == 1
        (letter,) = t.dead_letters()
        assert t.clock.time_ms() - start == round(1000 * (3600 + 3600 * 7.999 + 86400))
    assert ran == [0, 1, 3, 5, 7, 9]
    assert time.process_time() - began < 2
    story = read_story(letter)
    assert letter.reason is Reason.ATTEMPTS_EXHAUSTED
    assert letter.died_ms - start == 9 * 3_600_000
    assert [(failure.attempt, failure.text) for failure in story.attempts] == [(n, f"attempt {n}") for n in range(1, 7)]


async def test_delays_and_etas_run_in_order_at_their_time() -> None:
    """Whatever the order of enqueuing."""
    app = App("memory://")
    async with app.testing() as t:
        start = t.clock.time_ms()
        ran: list[tuple[str, int]] = []

        @app.task
        async def job(name: str) -> None:
            ran.append((name, t.clock.time_ms() - start))

        eta = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=start + 90_000)
        await job.options(delay=120, queue="other").enqueue("two minutes")
        await job.options(delay=180).enqueue("three minutes")
        await job.options(eta=eta).enqueue("at half past one")
        await job.options(delay=0.001).enqueue("a moment")
        await job.enqueue("now")
        assert await t.run_until_idle() == 1
        assert await t.advance(hours=1) == 4
    assert ran == [
        ("now", 0),
        ("a moment", 1),
        ("at half past one", 90_000),
        ("two minutes", 120_000),
        ("three minutes", 180_000),
    ]


@pytest.mark.parametrize(("on_expired", "letters"), [("dead_letter", 1), ("drop", 0)])
async def test_expiry(on_expired: Any, letters: int) -> None:
    """A task that waited beyond its expiry does not run; the queue's policy decides what becomes of it."""
    app = App("memory://", queues=[Queue("default", on_expired=on_expired)])

    @app.task(expires=60)
    async def job() -> None:
        raise AssertionError("it ran")

    @app.task(expires=60)
    async def in_time() -> None: ...

    async with app.testing() as t:
        await job.options(delay=60).enqueue()
        await in_time.options(delay=59.9).enqueue()
        await t.advance(minutes=2)
        assert [letter.reason for letter in t.dead_letters()] == [Reason.EXPIRED] * letters


async def test_dead_letters_of_all_queues() -> None:
    """In order of dying within each queue, and only as long as they are dead."""
    app = App("memory://", retry=RetryPolicy.fixed(1))

    @app.task
    async def job(name: str) -> None:
        raise Reject(name)

    async with app.testing() as t:
        assert t.dead_letters() == []
        for number in range(3):
            await job.options(delay=10 - number, id=f"a{number}").enqueue(f"a{number}")
            await job.options(delay=number, id=f"b{number}", queue="other").enqueue(f"b{number}")
        await t.advance(minutes=1)
        assert [letter.message.id for letter in t.dead_letters()] == ["a2", "a1", "a0", "b0", "b1", "b2"]
        assert {read_story(letter).text for letter in t.dead_letters()} == {"a0", "a1", "a2", "b0", "b1", "b2"}


async def test_more_dead_letters_than_a_page() -> None:
    """All are shown."""
    app = App("memory://")

    @app.task
    async def job() -> None:
        raise Reject

    async with app.testing() as t:
        await app.enqueue_many(job.message() for _ in range(1500))
        assert await t.run_until_idle() == 1500
        assert len({letter.message.id for letter in t.dead_letters()}) == 1500


async def test_tasks_that_enqueue_tasks() -> None:
    """Async handlers, and sync ones by the twins, enqueue into the same test."""
    app = App("memory://")
    ran: list[str] = []

    @app.task
    async def parent(depth: int) -> None:
        ran.append(f"parent {depth}")
        if depth:
            await parent.enqueue(depth - 1)
            await child.options(delay=5).enqueue(depth)

    @app.task
    def child(depth: int) -> None:
        ran.append(f"child {depth}")
        grandchild.enqueue_sync(depth)
        app.enqueue_many_sync([grandchild.message(10 * depth)])

    @app.task
    def grandchild(depth: int) -> None:
        ran.append(f"grandchild {depth}")

    async with app.testing() as t:
        await parent.enqueue(2)
        assert await t.run_until_idle() == 3
        assert ran == ["parent 2", "parent 1", "parent 0"]
        assert await t.advance(seconds=5) == 6
        assert sorted(ran[3:]) == ["child 1", "child 2", "grandchild 1", "grandchild 10", "grandchild 2", "grandchild 20"]
        assert not t.dead_letters()


async def test_priorities_and_shares_as_in_a_worker() -> None:
    """A single burst is started most urgent level first."""
    app = App("memory://")
    ran: list[int] = []

    @app.task
    async def job(priority: int) -> None:
        ran.append(priority)

    async with app.testing() as t:
        for priority in (0, 9, 3, 6):
            await job.options(priority=priority).enqueue(priority)
        await t.run_until_idle()
    assert ran == [Priority.CRITICAL, Priority.HIGH, Priority.NORMAL, Priority.LOW]


async def test_a_snoozed_task_comes_back_at_the_same_attempt() -> None:
    """As often as it likes."""
    app = App("memory://")
    seen: list[tuple[int, int]] = []

    @app.task
    async def job() -> None:
        context = current_context()
        seen.append((context.attempt, context.delivery_count))
        if len(seen) < 10:
            raise Snooze(60)

    async with app.testing() as t:
        await job.enqueue()
        assert await t.advance(hours=1) == 10
        assert not t.dead_letters()
    assert seen == [(1, 1)] * 10


async def test_two_tests_do_not_see_each_other() -> None:
    """Two contexts, of two Apps or of one after the other, share nothing, not even their clocks."""
    first, second = App("memory://"), App("memory://")
    ran: list[str] = []

    @first.task(name="job")
    async def job_of_first() -> None:
        ran.append("first")

    @second.task(name="job")
    async def job_of_second() -> None:
        ran.append("second")

    async with first.testing() as a, second.testing() as b:
        await job_of_first.enqueue()
        await job_of_first.options(delay=60).enqueue()
        assert await b.run_until_idle() == 0
        assert await b.advance(hours=1) == 0
        assert a.clock.time_ms() + 3_600_000 == b.clock.time_ms()
        assert await a.run_until_idle() == 1
    async with first.testing() as a:
        assert await a.advance(hours=1) == 0, "what was left is gone"
    assert ran == ["first"]


async def test_ids_and_jitter_repeat() -> None:
    """Two runs of one test do the same."""

    async def run() -> list[Any]:
        app = App("memory://")
        facts: list[Any] = []
        async with app.testing() as t:

            @app.task(name="job")
            async def job() -> None:
                facts.append((current_context().id, t.clock.time_ms()))
                raise ValueError

            await job.enqueue()
            await t.advance(hours=1)
        return facts

    first = await run()
    assert len(first) == 5
    assert first == await run()


async def test_afterwards_the_app_is_on_its_own_broker_again() -> None:
    """Clock, ids and broker are those from before; what was enqueued there was never touched. Also if the test failed."""
    app = App("memory://outside-of-testing")
    made: list[Broker] = []
    make = app.environment.make_broker

    def note() -> Broker:
        made.append(make())
        return made[-1]

    app.environment.make_broker = note

    @app.task
    async def job() -> None: ...

    before = await job.enqueue()

    async def failing_test() -> None:
        async with app.testing() as t:
            assert isinstance(app.environment.clock, VirtualClock)
            assert await t.run_until_idle() == 0
            await job.enqueue()
            raise RuntimeError("the test fails")

    with pytest.raises(RuntimeError, match="the test fails"):
        await failing_test()
    assert isinstance(app.environment.clock, SystemClock)
    after = await job.enqueue()
    (broker,) = made
    (stats,) = await broker.stats(["default"])
    assert stats.ready == 2
    assert before.id < after.id
    await app.close()


async def test_nothing_is_left_running() -> None:
    """No thread, no task and no store outlives the context."""
    app = App("memory://")
    stores = set(memory._stores)

    @app.task
    def job() -> None: ...

    async with app.testing() as t:
        await app.enqueue_many(job.message() for _ in range(20))
        await t.run_until_idle()
        assert any(thread.name.startswith("crossdock-handler") for thread in threading.enumerate())
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert set(memory._stores) == stores
    async with asyncio.timeout(10):
        while any(thread.name.startswith("crossdock-handler") for thread in threading.enumerate()):
            await asyncio.sleep(0.001)
