"""What a running task can ask about itself."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import pytest

from crossdock import App, Context, Priority, RetryPolicy, current_context
from crossdock.errors import ConfigurationError


def facts(context: Context) -> dict[str, Any]:
    """All that it says."""
    names = ("id", "task", "queue", "priority", "attempt", "delivery_count", "headers", "enqueued_ms")
    return {name: getattr(context, name) for name in names}


def test_outside_a_task_there_is_none() -> None:
    """The text says where it works."""
    with pytest.raises(ConfigurationError, match="works only inside a running task; no task is running here"):
        current_context()


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_task_knows_itself(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Id, attempt, headers and all else, the same in async handlers and in threads, and anew in each attempt."""
    app = App("memory://", retry=RetryPolicy.fixed(2, 60.0))
    seen: list[dict[str, Any]] = []

    def look() -> None:
        context = current_context()
        seen.append(facts(context))
        context.log.warning("look at %s", "this")
        raise ValueError("again")

    async def look_async() -> None:
        look()

    job = app.task(name="look", queue="mail", priority=9)(look if kind == "sync" else look_async)
    async with app.testing() as t:
        start = t.clock.time_ms()
        await job.options(headers={"tenant": "blue"}, id="id-1").enqueue()
        await t.advance(minutes=2)
    first, second = seen
    assert first == {
        "id": "id-1",
        "task": "look",
        "queue": "mail",
        "priority": Priority.CRITICAL,
        "attempt": 1,
        "delivery_count": 1,
        "headers": {"tenant": "blue"},
        "enqueued_ms": start,
    }
    assert second == {**first, "attempt": 2}
    record = next(record for record in caplog.records if record.name == "crossdock.task.look")
    assert (record.getMessage(), record.levelno) == ("look at this", logging.WARNING)
    assert (record.task_id, record.task, record.attempt) == ("id-1", "look", 1)  # type: ignore[attr-defined]


@pytest.mark.asyncio
async def test_tasks_that_run_together_have_contexts_of_their_own() -> None:
    """Each sees its own, and passes it to what it starts; afterwards there is none left."""
    app = App("memory://")
    together = asyncio.Barrier(3)
    threads = threading.Barrier(3)
    seen: set[tuple[str, str]] = set()

    @app.task
    async def job(name: str) -> None:
        await together.wait()
        child = await asyncio.create_task(ask())
        in_thread = await asyncio.to_thread(lambda: current_context().id)
        seen.update({(name, current_context().id), (name, child), (name, in_thread)})

    @app.task
    def job_in_thread(name: str) -> None:
        threads.wait(10)
        seen.add((name, current_context().id))

    async def ask() -> str:
        return current_context().id

    async with app.testing() as t:
        for name in ("a", "b", "c"):
            await job.options(id=name).enqueue(name)
            await job_in_thread.options(id=f"thread-{name}").enqueue(f"thread-{name}")
        await t.run_until_idle()
        assert not t.dead_letters()
        with pytest.raises(ConfigurationError):
            current_context()
    assert seen == {(name, name) for name in ("a", "b", "c", "thread-a", "thread-b", "thread-c")}
