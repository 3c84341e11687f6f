"""Middleware: wraps enqueues and executions; may change, delay and refuse."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from crossdock import App, Context, EnqueueNext, Middleware, Outgoing, Priority, Reject, RetryLater, RetryPolicy, RunNext, Snooze
from crossdock.errors import ConfigurationError, EnqueueFailed, EnqueueManyError, InvalidName
from crossdock.middleware import compose_enqueue, compose_run
from crossdock.spi import Reason


async def nothing(_: Any) -> None: ...


# --- composing ------------------------------------------------------------------------------------


def test_what_is_not_overridden_costs_nothing() -> None:
    """Without an override there is no chain at all; each method makes its own."""

    class Runs(Middleware):
        async def run(self, context: Context, call_next: RunNext) -> Any:
            return await call_next(context)

    class Enqueues(Middleware):
        async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
            await call_next(outgoing)

    assert compose_run([], nothing) is None
    assert compose_enqueue([], nothing) is None
    assert compose_run([Middleware(), Enqueues()], nothing) is None
    assert compose_enqueue([Middleware(), Runs()], nothing) is None
    assert compose_run([Enqueues(), Runs()], nothing) is not None
    assert compose_enqueue([Enqueues(), Runs()], nothing) is not None


@pytest.mark.asyncio
async def test_the_base_class_passes_on() -> None:
    """Calling super() is the same as calling what comes next."""
    passed: list[Any] = []

    async def innermost(subject: Any) -> str:
        passed.append(subject)
        return "result"

    assert await Middleware().run("context", innermost) == "result"  # type: ignore[arg-type]
    await Middleware().enqueue("outgoing", innermost)  # type: ignore[arg-type]
    assert passed == ["context", "outgoing"]


@pytest.mark.parametrize("wrong", [Middleware, object(), "logging", None])
def test_what_is_no_middleware_is_refused(wrong: Any) -> None:
    """Also the class itself, the common slip."""
    with pytest.raises(ConfigurationError, match=r"middleware must be instances of crossdock.Middleware, and .* is not"):
        App("memory://", middleware=[wrong])


# --- enqueuing ------------------------------------------------------------------------------------


class Tells(Middleware):
    """Notes when it is passed, both ways."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
        self.told.append(f"{self.name} before {outgoing.task}")
        await call_next(outgoing)
        self.told.append(f"{self.name} after {outgoing.task}")

    async def run(self, context: Context, call_next: RunNext) -> Any:
        self.told.append(f"{self.name} runs {context.task}")
        try:
            result = await call_next(context)
        except BaseException as error:
            self.told.append(f"{self.name} saw {type(error).__name__}")
            raise
        self.told.append(f"{self.name} got {result}")
        return result


@pytest.mark.asyncio
async def test_the_first_listed_is_outermost() -> None:
    """For enqueues and for executions, of async and of sync handlers."""
    told: list[str] = []
    app = App("memory://", middleware=[Tells("outer", told), Middleware(), Tells("inner", told)])

    @app.task(name="async")
    async def in_loop() -> int:
        return 1

    @app.task(name="sync")
    def in_thread() -> int:
        return 2

    async with app.testing() as t:
        for task, result in ((in_loop, 1), (in_thread, 2)):
            told.clear()
            await task.enqueue()
            await t.run_until_idle()
            name = task.name
            assert told == [
                f"outer before {name}",
                f"inner before {name}",
                f"inner after {name}",
                f"outer after {name}",
                f"outer runs {name}",
                f"inner runs {name}",
                f"inner got {result}",
                f"outer got {result}",
            ]


class Changes(Middleware):
    """Moves and marks every message."""

    async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
        outgoing.queue = "elsewhere"
        outgoing.headers["trace"] = "t-1"
        outgoing.priority = 9  # type: ignore[assignment]
        outgoing.delay_ms = 60_000
        await call_next(outgoing)


@pytest.mark.asyncio
async def test_it_may_change_what_is_enqueued() -> None:
    """Queue, headers, priority and delay are taken over, by the message and by the handle."""
    seen: list[Context] = []

    class Looks(Middleware):
        async def run(self, context: Context, call_next: RunNext) -> Any:
            seen.append(context)
            return await call_next(context)

    app = App("memory://", middleware=[Changes(), Looks()])

    @app.task
    async def job() -> None: ...

    async with app.testing() as t:
        handle = await job.enqueue()
        assert handle.queue == "elsewhere"
        assert await t.run_until_idle() == 0
        assert await t.advance(minutes=1) == 1
    (context,) = seen
    assert (context.queue, context.headers, context.priority) == ("elsewhere", {"trace": "t-1"}, Priority.CRITICAL)


class Refuses(Middleware):
    """Lets nothing through whose id starts with `bad`."""

    async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
        if outgoing.id.startswith("bad"):
            raise PermissionError("not today")
        await call_next(outgoing)
        if outgoing.id.startswith("late"):
            raise PermissionError("too late")


@pytest.mark.asyncio
async def test_it_may_refuse_what_is_enqueued() -> None:
    """Its error reaches the caller, and nothing is stored."""
    app = App("memory://", middleware=[Refuses()])

    @app.task
    async def job() -> None: ...

    async with app.testing() as t:
        with pytest.raises(PermissionError, match="not today"):
            await job.options(id="bad").enqueue()
        assert await t.run_until_idle() == 0


@pytest.mark.asyncio
async def test_enqueue_many_tells_apart_what_middleware_refused(caplog: pytest.LogCaptureFixture) -> None:
    """The others are stored; what was stored before middleware failed is not called lost."""
    app = App("memory://", middleware=[Refuses()])

    @app.task
    async def job() -> None: ...

    ids = ["a", "bad-1", "b", "late-1", "bad-2", "c"]
    async with app.testing() as t:
        with pytest.raises(EnqueueManyError) as caught:
            await app.enqueue_many(job.options(id=id).message() for id in ids)
        assert await t.run_until_idle() == 4
    error = caught.value
    assert error.stored == ["a", "b", "late-1", "c"]
    assert [failed.message.id for failed in error.failed if failed.message] == ["bad-1", "bad-2"]
    assert all(isinstance(failed, EnqueueFailed) and isinstance(failed.__cause__, PermissionError) for failed in error.failed)
    assert error.unknown == []
    assert "middleware failed after message late-1 was stored" in caplog.text


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("queue", "a b", InvalidName),
        ("id", "", InvalidName),
        ("priority", 11, ConfigurationError),
        ("headers", {"a": 1}, ConfigurationError),
        ("headers", None, ConfigurationError),
    ],
)
async def test_nonsense_from_middleware_is_refused(field: str, value: object, error: type[Exception]) -> None:
    """What it puts into a message is checked like what a caller gives, before anything is stored."""

    class Spoils(Middleware):
        async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
            setattr(outgoing, field, value)
            await call_next(outgoing)

    app = App("memory://", middleware=[Spoils()])

    @app.task
    async def job() -> None: ...

    async with app.testing() as t:
        with pytest.raises(error):
            await job.enqueue()
        assert await t.run_until_idle() == 0


# --- running --------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_it_sees_what_a_handler_raises(kind: str) -> None:
    """The handler's own error object, which then decides as usual."""
    told: list[str] = []
    app = App("memory://", middleware=[Tells("m", told)], retry=RetryPolicy.fixed(1))

    def fail() -> None:
        raise KeyboardInterrupt

    async def fail_async() -> None:
        raise KeyboardInterrupt

    job = app.task(name="job")(fail if kind == "sync" else fail_async)
    async with app.testing() as t:
        await job.enqueue()
        await t.run_until_idle()
        (letter,) = t.dead_letters()
    assert told[-2:] == ["m runs job", "m saw KeyboardInterrupt"]
    assert letter.error_type == "KeyboardInterrupt"


class Decides(Middleware):
    """Raises instead of the handler, the first time."""

    def __init__(self, error: BaseException) -> None:
        self.error: BaseException | None = error

    async def run(self, context: Context, call_next: RunNext) -> Any:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return await call_next(context)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("error", "attempts", "reason"),
    [
        (Reject("closed"), [], Reason.REJECTED),
        (RetryLater(5), [2], None),
        (Snooze(5), [1], None),
        (ValueError("own bug"), [2], None),
        (asyncio.CancelledError(), [2], None),
        (SystemExit(1), [2], None),
    ],
    ids=lambda part: type(part).__name__,
)
async def test_what_it_raises_counts_as_the_handlers(error: BaseException, attempts: list[int], reason: Reason | None) -> None:
    """Orders and errors alike; the handler does not run that time."""
    ran: list[int] = []

    class Counts(Middleware):
        async def run(self, context: Context, call_next: RunNext) -> Any:
            ran.append(context.attempt)
            return await call_next(context)

    app = App("memory://", middleware=[Decides(error), Counts()], retry=RetryPolicy.fixed(3, 5.0))

    @app.task
    def job() -> None: ...

    async with app.testing() as t:
        await job.enqueue()
        await t.run_until_idle()
        assert ran == []
        await t.advance(seconds=5)
        assert [letter.reason for letter in t.dead_letters()] == ([reason] if reason else [])
    assert ran == attempts


@pytest.mark.asyncio
async def test_it_may_answer_for_the_handler() -> None:
    """Not calling the handler and returning is a success."""

    class Skips(Middleware):
        async def run(self, context: Context, call_next: RunNext) -> Any:
            return "done elsewhere"

    app = App("memory://", middleware=[Skips()])

    @app.task
    async def job() -> None:
        raise AssertionError("it ran")

    async with app.testing() as t:
        await job.enqueue()
        assert await t.run_until_idle() == 1
        assert await t.advance(hours=1) == 0
        assert not t.dead_letters()


@pytest.mark.asyncio
async def test_a_swallowed_error_is_a_success(caplog: pytest.LogCaptureFixture) -> None:
    """Middleware decides last."""

    class Swallows(Middleware):
        async def run(self, context: Context, call_next: RunNext) -> Any:
            try:
                return await call_next(context)
            except ValueError:
                logging.getLogger("mine").warning("swallowed")

    app = App("memory://", middleware=[Swallows()])

    @app.task
    def job() -> None:
        raise ValueError("no")

    async with app.testing() as t:
        await job.enqueue()
        await t.advance(hours=1)
        assert not t.dead_letters()
    assert caplog.text.count("swallowed") == 1
