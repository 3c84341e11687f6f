"""Life-cycle events: told after the fact, and harmless."""

from __future__ import annotations

import logging
from typing import Any, get_args

import pytest

from crossdock import App, Event, EventName, Reject, RetryLater, RetryPolicy, Snooze
from crossdock.clock import VirtualClock
from crossdock.errors import ConfigurationError
from crossdock.events import Events


def test_an_event_nobody_observes_is_not_wanted() -> None:
    """One set look-up tells publishers not to build it."""
    events = Events()
    assert events.wanted == set()
    events.subscribe("task_started", print)
    assert events.wanted == {"task_started"}
    events.publish(Event(name="task_retried", at_ms=1))


def test_observers_are_told_in_order() -> None:
    """Everyone who subscribed to a name is told, and only of that name."""
    events, told = Events(), []
    events.subscribe("task_started", lambda event: told.append((1, event.id)))
    events.subscribe("task_started", lambda event: told.append((2, event.id)))
    events.subscribe("task_retried", lambda event: told.append((3, event.id)))
    events.publish(Event(name="task_started", at_ms=5, id="a"))
    assert told == [(1, "a"), (2, "a")]


def test_an_observer_that_fails_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    """The others are still told."""
    events, told = Events(), []

    def bad(event: Event) -> None:
        raise RuntimeError("observer bug")

    events.subscribe("task_started", bad)
    events.subscribe("task_started", told.append)
    events.publish(Event(name="task_started", at_ms=5))
    assert len(told) == 1
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("crossdock.events", logging.ERROR)
    assert "an observer of task_started failed" in caplog.text
    assert "observer bug" in caplog.text


def test_an_unknown_event_is_refused() -> None:
    """The text lists those there are."""
    with pytest.raises(ConfigurationError, match="there is no event 'task_finished'; there are: task_enqueued, task_started"):
        App("memory://").on("task_finished")(print)  # type: ignore[arg-type]


def test_an_asynchronous_observer_is_refused() -> None:
    """Nobody would await it, so it would silently do nothing."""

    async def observe(event: Event) -> None: ...

    with pytest.raises(ConfigurationError, match="an observer of task_started must be a plain function"):
        App("memory://").on("task_started")(observe)


def test_the_decorator_returns_the_function() -> None:
    """It can be used on, also for a second event."""
    app = App("memory://")

    def observe(event: Event) -> None: ...

    assert app.on("task_started")(app.on("task_retried")(observe)) is observe


@pytest.mark.asyncio
async def test_the_events_of_a_life() -> None:
    """Enqueued, started, and how each attempt ended, with task, id, attempt, time and what each adds."""
    app = App("memory://", retry=RetryPolicy.fixed(2, 60.0))
    told: list[Event] = []
    for name in get_args(EventName):
        app.on(name)(told.append)

    @app.task(name="job")
    async def job(how: str) -> None:
        seen = sum(1 for event in told if event.name == "task_started" and event.id == how)
        if how == "fail" or (how == "late" and seen == 1):
            raise RetryLater(30) if how == "late" else ValueError("no")
        if how == "reject":
            raise Reject("never")
        if how == "snooze" and seen == 1:
            raise Snooze(5)

    async with app.testing() as t:
        start = t.clock.time_ms()
        for how in ("fine", "fail", "reject", "snooze", "late"):
            await job.options(id=how).enqueue(how)
        await job.options(id="expired", delay=10, expires=1).enqueue("fine")
        await t.advance(hours=1)

    def of(id: str) -> list[tuple[Any, ...]]:
        return [(e.name, e.attempt, e.detail, e.seconds, (e.at_ms - start) / 1000) for e in told if e.id == id]

    assert of("fine") == [("task_enqueued", 0, "", 0, 0), ("task_started", 1, "", 0, 0), ("task_succeeded", 1, "", 0, 0)]
    assert of("fail")[1:] == [
        ("task_started", 1, "", 0, 0),
        ("task_retried", 1, "ValueError", 60, 0),
        ("task_started", 2, "", 0, 60),
        ("task_dead_lettered", 2, "attempts_exhausted", 0, 60),
    ]
    assert of("reject")[2:] == [("task_dead_lettered", 1, "rejected", 0, 0)]
    assert of("snooze")[2:] == [
        ("task_snoozed", 1, "", 5, 0),
        ("task_started", 1, "", 0, 5),
        ("task_succeeded", 1, "", 0, 5),
    ]
    assert of("late")[2:3] == [("task_retried", 1, "crossdock.outcome.RetryLater", 30, 0)]
    assert of("expired")[1:] == [("task_expired", 1, "dead_letter", 0, 10), ("task_dead_lettered", 1, "expired", 0, 10)]
    assert {event.queue for event in told} == {"default"}
    assert {event.task for event in told} == {"job"}


@pytest.mark.asyncio
async def test_a_failing_observer_fails_no_task() -> None:
    """Neither the enqueue nor the execution notices."""
    app = App("memory://", clock=VirtualClock())
    ran = []

    @app.task
    async def job() -> None:
        ran.append(1)

    def bad(event: Event) -> None:
        raise RuntimeError("observer bug")

    for name in ("task_enqueued", "task_started", "task_succeeded"):
        app.on(name)(bad)  # type: ignore[arg-type]
    async with app.testing() as t:
        await job.enqueue()
        await t.run_until_idle()
        assert not t.dead_letters()
    assert ran == [1]
