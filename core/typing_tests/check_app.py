"""What type checkers know of an App, its observers, middleware, policies and context: never run, only checked."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, assert_type

from crossdock import (
    App,
    Context,
    EnqueueNext,
    Event,
    Handle,
    Middleware,
    Outgoing,
    Priority,
    Queue,
    Reject,
    RetryLater,
    RetryPolicy,
    RunNext,
    Snooze,
    Worker,
    WorkerOptions,
    WorkerReport,
    current_context,
)
from crossdock.spi import DeadLetter
from crossdock.testing import Testing


class Traces(Middleware):
    """Overrides both methods as documented."""

    async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
        outgoing.headers["trace"] = "1"
        await call_next(outgoing)

    async def run(self, context: Context, call_next: RunNext) -> Any:
        context.log.info("attempt %d of %s", context.attempt, context.task)
        return await call_next(context)


app = App(
    "memory://",
    namespace="shop",
    queues=[Queue("emails", weight=2, priorities="strict", retry=RetryPolicy.linear(3, 5))],
    middleware=[Traces()],
    retry=RetryPolicy.fixed(3, 10),
)
App("memory://", middleware=[Traces])  # type: ignore[list-item]
App("memory://", retry=3)  # type: ignore[arg-type]
Queue("emails", priorities="loose")  # type: ignore[arg-type]


@app.on("task_started")
def started(event: Event) -> None:
    assert_type(event.id, str)
    assert_type(event.seconds, float)


@app.on("task_retried")
@app.on("task_dead_lettered")
def failed(event: Event) -> int:
    return event.attempt


assert_type(failed(Event(name="task_retried", at_ms=1)), int)


@app.on("task_finished")  # type: ignore[arg-type]
def misspelt(event: Event) -> None: ...


@app.on("task_started")  # type: ignore[type-var]
def wrong(event: str) -> None: ...


@app.task
async def handler(name: str) -> str:
    context = current_context()
    assert_type(context, Context)
    assert_type(context.attempt, int)
    assert_type(context.priority, Priority)
    assert_type(context.headers, Mapping[str, str])
    assert_type(context.log, logging.LoggerAdapter[logging.Logger])
    context.attempt = 2  # type: ignore[misc]
    if context.delivery_count > 1:
        raise Snooze(delay=60)
    if not name:
        raise Reject("no name")
    raise RetryLater(delay=10)


async def life() -> None:
    """Contexts, closing and testing."""
    async with app as same:
        assert_type(same, App)
        assert_type(await handler.enqueue("a"), Handle[str])
    await app.close()
    app.close_sync()
    async with app.testing() as t:
        assert_type(t, Testing)
        assert_type(await t.run_until_idle(), int)
        assert_type(await t.advance(hours=1, minutes=2), int)
        assert_type(t.dead_letters(), Sequence[DeadLetter])
        await t.advance(5)  # type: ignore[call-arg]
    worker = Worker(app, WorkerOptions(concurrency=10, queues={"emails": 2}))
    assert_type(await worker.run(), WorkerReport)
    WorkerOptions(concurency=10)  # type: ignore[call-arg]


def policies() -> None:
    """Their arguments, and what a function of one's own gets."""

    def decide(attempt: int, error: BaseException) -> float | None:
        return attempt * 2.0 if isinstance(error, OSError) else None

    assert_type(RetryPolicy.call(decide, no_retry_on=(ValueError,)), RetryPolicy)
    RetryPolicy.fixed(3, 1.5, retry_on=(OSError, TimeoutError), give_up_after=60)
    RetryPolicy.call(lambda attempt: 5.0)  # type: ignore[arg-type, misc]
    RetryPolicy.fixed(retry_on=["ValueError"])  # type: ignore[arg-type]
    RetryPolicy.exponential(min_backof=2)  # type: ignore[call-arg]
