"""What type checkers know of tasks: never run, only checked, by mypy and pyright, both strict.

A wrong line carries an ignore; both checkers are told to complain about an ignore that is not needed.
"""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, assert_type

from crossdock import App, AsyncTask, Handle, Options, Outgoing, Priority, Queue, RetryPolicy, SyncTask, Task

app = App("memory://", queues=[Queue("emails", weight=2)])


@app.task
async def send_email(to: str, subject: str = "hello", *, copies: int = 1) -> str:
    return f"{to} {subject} {copies}"


@app.task(queue="emails", retry=RetryPolicy.exponential(max_attempts=5), timeout=30.0, priority=Priority.HIGH)
async def send_later(to: str, subject: str) -> str:
    return f"{to} {subject}"


@app.task
def resize(path: str, width: int = 800) -> int:
    return len(path) * width


@app.task(name="shop.report")
def report() -> None: ...


def decorated_tasks_keep_their_signatures() -> None:
    """With and without settings, async and sync."""
    as_async: AsyncTask[..., str] = send_email
    with_settings: AsyncTask[[str, str], str] = send_later
    as_sync: SyncTask[..., int] = resize
    with_name: SyncTask[[], None] = report
    either: Sequence[Task[..., Any]] = [as_async, with_settings, as_sync, with_name]
    assert either


async def calls_run_here() -> None:
    """Calling a task is calling its function."""
    assert_type(await send_email("a", "b", copies=2), str)
    assert_type(await send_later("a", subject="b"), str)
    assert_type(resize("a", width=5), int)
    coroutine: Coroutine[Any, Any, str] = send_email("a")
    coroutine.close()
    report()

    await send_email()  # type: ignore[call-arg]
    await send_email(5)  # type: ignore[arg-type]
    await send_email("a", "b", 3)  # type: ignore[call-arg]
    resize("a", widht=5)  # type: ignore[call-arg]
    resize("a", "b")  # type: ignore[arg-type]


async def enqueuing_is_typed_by_the_function() -> None:
    """Arguments as for the call; the handle knows what the result will be."""
    assert_type(await send_email.enqueue("a", subject="x"), Handle[str])
    assert_type(await send_email.enqueue("a", copies=3), Handle[str])
    assert_type(await send_later.enqueue("a", "x"), Handle[str])
    assert_type(await resize.enqueue("a", 5), Handle[int])
    assert_type(await report.enqueue(), Handle[None])
    handle = await send_email.enqueue("a")
    assert_type(handle.id, str)

    await send_email.enqueue()  # type: ignore[call-arg]
    await send_email.enqueue(5)  # type: ignore[arg-type]
    await send_email.enqueue("a", subjct="x")  # type: ignore[call-arg]
    await send_email.enqueue("a", copies="3")  # type: ignore[arg-type]
    await report.enqueue("a")  # type: ignore[call-arg]
    handle.id = "b"  # type: ignore[misc]


def the_sync_twin_is_typed_the_same() -> None:
    """It returns the handle itself."""
    assert_type(send_email.enqueue_sync("a", subject="x"), Handle[str])
    assert_type(resize.enqueue_sync("a", width=5), Handle[int])
    assert_type(app.enqueue_sync(resize.message("a")), Handle[Any])
    assert_type(app.enqueue_many_sync([resize.message("a")]), Sequence[Handle[Any]])

    send_email.enqueue_sync(5)  # type: ignore[arg-type]
    resize.enqueue_sync()  # type: ignore[call-arg]


async def messages_are_typed_the_same() -> None:
    """They are bound where they are made; any iterable of them goes."""
    assert_type(send_email.message("a", copies=2), Outgoing)
    assert_type(await app.enqueue_many(send_email.message("a", subject=str(i)) for i in range(10)), Sequence[Handle[Any]])
    assert_type(await app.enqueue(send_email.message("a")), Handle[Any])

    send_email.message(5)  # type: ignore[arg-type]
    await app.enqueue_many(["a"])  # type: ignore[list-item]


async def options_are_typed_and_keep_the_task() -> None:
    """Each option has its type, a misspelt one is found, and the result is the same kind of task."""
    urgent = send_email.options(delay=60, priority=Priority.HIGH, headers={"a": "b"}, id="order-1", queue="emails", timeout=5)
    assert_type(await urgent.enqueue("a", subject="x"), Handle[str])
    assert_type(await urgent("a"), str)
    assert_type(resize.options(eta=datetime.now(UTC), expires=5.0)("a"), int)
    assert_type(
        await send_later.options(expires=datetime.now(UTC)).options(retry=RetryPolicy.fixed(3)).enqueue("a", "b"), Handle[str]
    )
    options: Options = {"delay": 5, "priority": 3}
    assert_type(await send_later.options(**options).enqueue("a", "b"), Handle[str])

    await urgent.enqueue(5)  # type: ignore[arg-type]
    send_email.options(dealy=5)  # type: ignore[call-arg]
    send_email.options(delay="5")  # type: ignore[arg-type]
    send_email.options(eta=5.0)  # type: ignore[arg-type]
    send_email.options(headers={"a": 1})  # type: ignore[dict-item]
    send_email.options(retry=3)  # type: ignore[arg-type]


def settings_of_the_decorator_are_typed() -> None:
    """A misspelt or mistyped setting is found."""

    @app.task(timeuot=5)  # type: ignore[call-overload, untyped-decorator]
    def misspelt() -> None: ...

    @app.task(queue=5)  # type: ignore[call-overload, untyped-decorator]
    def mistyped() -> None: ...

    app.task("emails")  # type: ignore[call-overload]
    assert misspelt is not mistyped
