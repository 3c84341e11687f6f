"""Tasks: registering, options, names, and that nothing shared is changed by them."""

from __future__ import annotations

import asyncio
import datetime
import functools
import inspect
import math
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crossdock import App, Handle, Outgoing, Priority, RetryPolicy, codec
from crossdock.clock import VirtualClock
from crossdock.errors import ConfigurationError, InvalidArguments, InvalidName, InvalidTask
from crossdock.retry import Backoff
from crossdock.task import AsyncTask, SyncTask, default_name

NOW_MS = 1_767_225_600_000
NOW = datetime.datetime.fromtimestamp(NOW_MS / 1000, datetime.UTC)


@pytest.fixture
def app() -> App:
    """An App whose time stands still."""
    return App("memory://", clock=VirtualClock(NOW_MS))


async def pay(order: str, cents: int = 0) -> str:
    """Take the money."""
    return f"{order}:{cents}"


def resize(path: str) -> int:
    """Make it smaller."""
    return len(path)


# --- registering ----------------------------------------------------------------------------------


def test_a_task_is_its_function_too(app: App) -> None:
    """Calling it runs it here and now; async stays async, and it looks like the function."""
    paid, resized = app.task(pay), app.task(resize)
    assert isinstance(paid, AsyncTask)
    assert isinstance(resized, SyncTask)
    assert (paid.is_async, resized.is_async) == (True, False)
    assert asyncio.run(paid("o-1", cents=5)) == "o-1:5"
    assert resized("abc") == 3
    assert (paid.__name__, paid.__doc__, paid.__module__) == ("pay", "Take the money.", __name__)
    assert inspect.signature(paid) == inspect.signature(pay)
    assert repr(paid) == f"<AsyncTask {__name__ + '.pay'!r} on queue 'default'>"


@pytest.mark.asyncio
async def test_an_async_function_below_a_plain_decorator_is_async(app: App) -> None:
    """Such a wrapper is a plain function that returns a coroutine, which somebody has to await."""
    ran: list[str] = []

    def timed(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return wrapper

    @app.task
    @timed
    async def job(name: str) -> None:
        ran.append(name)

    assert isinstance(job, AsyncTask)
    async with app.testing() as t:
        await job.enqueue("a")
        await t.run_until_idle()
        assert not t.dead_letters()
    assert ran == ["a"]


def test_settings_of_the_decorator(app: App) -> None:
    """What the decorator is given holds for every message of the task."""
    policy = RetryPolicy.fixed(3)
    task = app.task(name="shop.pay", queue="money", priority=7, retry=policy, timeout=30, expires=60)(pay)
    assert app.tasks["shop.pay"] is task
    assert (task.name, task.queue, task.priority, task.retry, task.timeout) == ("shop.pay", "money", Priority.HIGH, policy, 30.0)
    outgoing = task.message("o-1")
    assert (outgoing.task, outgoing.queue, outgoing.priority) == ("shop.pay", "money", Priority.HIGH)
    assert outgoing.expires_ms == NOW_MS + 60_000
    assert app.queue_names() == ["money"]


def test_the_registry_is_read_only(app: App) -> None:
    """Tasks come only by decoration."""
    with pytest.raises(TypeError):
        app.tasks["x"] = app.task(pay)  # type: ignore[index]


def test_two_tasks_of_one_name_are_refused(app: App) -> None:
    """The text says where the first one is, and the first one stays."""
    first = app.task(name="pay")(pay)
    with pytest.raises(InvalidTask, match=rf"there is already a task 'pay' \({__name__}.pay\): give one of them another name="):
        app.task(name="pay")(resize)
    assert app.tasks["pay"] is first


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"name": ""}, "'' is not a valid task name"),
    ({"name": "a\nb"}, "is not a valid task name"),
    ({"name": 5}, "5 is not a valid task name"),
    ({"queue": "my queue"}, "'my queue' is not a valid queue name"),
    ({"queue": None}, "None is not a valid queue name"),
    ({"priority": 10}, "10 is not a valid priority"),
    ({"priority": "high"}, "'high' is not a valid priority"),
    ({"timeout": 0}, "timeout must be a number of seconds from 0.001 to"),
    ({"timeout": -1}, "timeout must be a number of seconds from 0.001 to"),
    ({"timeout": "30"}, "timeout must be a number of seconds from 0.001 to"),
    ({"timeout": math.nan}, "timeout must be a number of seconds from 0.001 to"),
    ({"expires": math.inf}, "expires must be a number of seconds from 0.001 to"),
    ({"expires": 10**400}, "expires must be a number of seconds from 0.001 to"),
    ({"retry": 3}, "retry must be a RetryPolicy such as RetryPolicy.fixed(max_attempts=3), not 3"),
    ({"retry": RetryPolicy.fixed}, "retry must be a RetryPolicy such as"),
]


@pytest.mark.parametrize(("settings", "said"), BAD_SETTINGS, ids=lambda part: ascii(part)[:40])
def test_bad_settings_are_refused_at_decoration(app: App, settings: dict[str, Any], said: str) -> None:
    """Each with its own sentence, and no task is registered."""
    with pytest.raises(ConfigurationError) as caught:
        app.task(**settings)(pay)
    assert said in str(caught.value)
    assert not app.tasks


def test_what_is_no_function_is_refused(app: App) -> None:
    """Also the slip of giving the queue where the function goes."""
    with pytest.raises(InvalidTask, match="it is not a plain function"):
        app.task("emails")  # type: ignore[call-overload]


# --- names ----------------------------------------------------------------------------------------


def test_the_default_name_is_module_and_qualified_name() -> None:
    """Nested functions bear the place they are in."""

    def inner() -> None: ...

    assert default_name(pay) == f"{__name__}.pay"
    assert default_name(inner) == f"{__name__}.test_the_default_name_is_module_and_qualified_name.<locals>.inner"


PROGRAM = """
from crossdock import App

app = App("memory://")


@app.task
def job() -> None: ...


if __name__ == "__main__":
    print(*app.tasks)
"""


@pytest.mark.parametrize("how", [["shop.py"], ["-m", "shop"], ["-m", "store"], ["-m", "store.shop"]], ids=" ".join)
def test_a_script_names_its_tasks_as_a_worker_does(tmp_path: Path, how: list[str]) -> None:
    """`__main__` is resolved: python shop.py enqueues what a worker on shop.py or the module knows."""
    (tmp_path / "shop.py").write_text(PROGRAM)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "__init__.py").write_text("")
    (tmp_path / "store" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "store" / "shop.py").write_text(PROGRAM)
    ran = subprocess.run([sys.executable, *how], capture_output=True, text=True, cwd=tmp_path, check=True)
    name = how[-1].removesuffix(".py")
    assert ran.stdout.split() == [f"{name}.job"]
    if name == "shop":
        assert list(runpy.run_path(str(tmp_path / "shop.py"), run_name="shop")["app"].tasks) == ["shop.job"]


# --- messages -------------------------------------------------------------------------------------


def test_a_message_is_validated_and_not_sent(app: App) -> None:
    """It carries the encoded arguments, an id of its own and the task's settings."""
    task = app.task(pay)
    first, second = task.message("o-1", cents=3), task.message("o-1")
    assert msgspec.msgpack.decode(first.arguments) == {"order": "o-1", "cents": 3}
    assert first.id != second.id
    assert (first.eta_ms, first.delay_ms, first.expires_ms, first.timeout, first.retry, first.headers) == (0, 0, 0, None, None, {})
    with pytest.raises(InvalidArguments, match="'order'"):
        task.message()  # type: ignore[call-arg]
    with pytest.raises(InvalidArguments, match="parameter 'cents'"):
        task.message("o-1", cents="3")  # type: ignore[arg-type]


def test_a_message_becomes_an_envelope(app: App) -> None:
    """Everything an Outgoing says stands in the message or its body."""
    task = app.task(name="pay", queue="money", priority=9)(pay)
    options: dict[str, Any] = {
        "expires": 60,
        "timeout": 2.5,
        "retry": RetryPolicy.linear(3, 1.5),
        "headers": {"a": "b"},
        "delay": 1.5,
    }
    outgoing = task.options(id="my-id", **options).message("o-1")
    message = outgoing.to_message(NOW_MS)
    envelope = codec.decode(message.body)
    assert (message.id, message.queue, message.priority, message.eta_ms, message.delay_ms) == ("my-id", "money", 9, 0, 1500)
    assert (message.generation, envelope.version, envelope.task, envelope.enqueued_ms) == (0, 1, "pay", NOW_MS)
    assert (envelope.expires_ms, envelope.timeout, envelope.headers) == (NOW_MS + 60_000, 2.5, {"a": "b"})
    assert envelope.retry == Backoff("linear", 3, 1.5, 300.0)
    assert codec.arguments(message.body) == {"order": "o-1"}


def test_messages_from_plain_arguments(app: App) -> None:
    """Tools pass arguments by name, with options beside them."""
    task = app.task(pay)
    outgoing = task.message_from_arguments({"order": "o-1"}, {"delay": 5, "queue": "later"})
    assert (outgoing.delay_ms, outgoing.queue) == (5000, "later")
    with pytest.raises(InvalidArguments, match="unknown parameter `ordr`"):
        task.message_from_arguments({"ordr": "o-1"})
    with pytest.raises(ConfigurationError, match="there is no option 'dealy'; there are: delay, eta, expires, headers, id,"):
        task.message_from_arguments({"order": "o-1"}, {"dealy": 5})  # type: ignore[typeddict-unknown-key]


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"delay": 0}, "delay_ms", 0),
        ({"delay": 1.5}, "delay_ms", 1500),
        ({"delay": 0.0001}, "delay_ms", 1),
        ({"delay": 100 * 366 * 86400}, "delay_ms", 100 * 366 * 86_400_000),
        ({"eta": NOW + datetime.timedelta(seconds=1)}, "eta_ms", NOW_MS + 1000),
        ({"eta": NOW + datetime.timedelta(microseconds=1)}, "eta_ms", NOW_MS + 1),
        ({"eta": NOW.astimezone(datetime.timezone(datetime.timedelta(hours=5)))}, "eta_ms", NOW_MS),
        ({"eta": datetime.datetime(1900, 1, 1, tzinfo=datetime.UTC)}, "eta_ms", 1),
        ({"expires": 0.001}, "expires_ms", NOW_MS + 1),
        ({"expires": 60}, "expires_ms", NOW_MS + 60_000),
        ({"expires": NOW}, "expires_ms", NOW_MS),
        ({"expires": datetime.datetime(1900, 1, 1, tzinfo=datetime.UTC)}, "expires_ms", 1),
        ({"priority": 8}, "priority", Priority.HIGH),
        ({"priority": Priority.LOW}, "priority", Priority.LOW),
        ({"queue": "other"}, "queue", "other"),
        ({"id": "order-1"}, "id", "order-1"),
        ({"timeout": 5}, "timeout", 5.0),
        ({"headers": {"a": "b"}}, "headers", {"a": "b"}),
        ({"retry": RetryPolicy.fixed(2, 3)}, "retry", Backoff("fixed", 2, 3, 3)),
    ],
    ids=lambda part: ascii(part)[:50],
)
def test_options(app: App, options: Any, field: str, value: object) -> None:
    """Each option in its unit; instants and delays are rounded up, so that nothing is early."""
    assert getattr(app.task(pay).options(**options).message("o-1"), field) == value


LONG_HEADERS = {"a": "x" * 8192}
BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"delay": -1}, "delay must be a number of seconds from 0 to 3162240000 (100 years), not -1"),
    ({"delay": math.nan}, "delay must be a number of seconds"),
    ({"delay": math.inf}, "delay must be a number of seconds"),
    ({"delay": True}, "delay must be a number of seconds"),
    ({"delay": "5"}, "delay must be a number of seconds"),
    ({"delay": 1e10}, "delay must be a number of seconds"),
    ({"eta": 5}, "eta must be a datetime, not 5"),
    ({"eta": datetime.datetime(2026, 1, 1)}, "eta must have a time zone: 2026-01-01T00:00:00 does not say which moment is meant"),
    ({"delay": 1, "eta": NOW}, "delay and eta exclude each other: give one of them"),
    ({"expires": 0}, "expires must be a number of seconds from 0.001 to"),
    ({"expires": datetime.datetime(2026, 1, 1)}, "expires must have a time zone"),
    ({"priority": -1}, "-1 is not a valid priority: use an integer from 0 to 9 or a Priority"),
    ({"timeout": 0}, "timeout must be a number of seconds from 0.001 to"),
    ({"headers": {"a": 1}}, "headers must be at most 64 pairs of texts"),
    ({"headers": {1: "a"}}, "headers must be at most 64 pairs of texts"),
    ({"headers": "ab"}, "headers must be at most 64 pairs of texts"),
    ({"headers": None}, "headers must be at most 64 pairs of texts"),
    ({"headers": {str(n): "" for n in range(65)}}, "headers must be at most 64 pairs of texts"),
    ({"headers": LONG_HEADERS}, "headers are limited to 8,192 bytes in all: put data into the arguments"),
    ({"headers": {"a": "\ud800"}}, "headers must be texts that can be written as UTF-8"),
    ({"retry": 3}, "retry must be a RetryPolicy such as"),
    ({"retry": RetryPolicy.call(lambda a, e: 1)}, "the retry option of one call travels as data: functions and exception classes"),
    ({"retry": RetryPolicy.fixed(retry_on=(OSError,))}, "the retry option of one call travels as data"),
    ({"retry": RetryPolicy.fixed(no_retry_on=(OSError,))}, "the retry option of one call travels as data"),
    ({"dealy": 5}, "there is no option 'dealy'; there are: delay, eta, expires, headers, id, priority, queue, retry, timeout"),
]


@pytest.mark.parametrize(("options", "said"), BAD_OPTIONS, ids=lambda part: ascii(part)[:50])
def test_bad_options_are_refused_where_they_are_given(app: App, options: dict[str, Any], said: str) -> None:
    """Each with its own sentence, before anything is enqueued."""
    with pytest.raises(ConfigurationError) as caught:
        app.task(pay).options(**options)
    assert said in str(caught.value)


@pytest.mark.parametrize("options", [{"queue": "a b"}, {"id": ""}, {"id": "a b"}, {"queue": None}, {"id": None}])
def test_bad_names_in_options_are_refused(app: App, options: Any) -> None:
    """With the rule they break."""
    with pytest.raises(InvalidName, match="is not a valid"):
        app.task(pay).options(**options)


def test_options_change_nothing_but_their_copy(app: App) -> None:
    """A task keeps its settings; options can be stacked, the later ones win, and a copy has its own headers."""
    task = app.task(pay)
    headers = {"a": "1"}
    once = task.options(delay=5, headers=headers, priority=9)
    twice = once.options(priority=0, queue="slow")
    headers["a"] = "changed"
    headers["b"] = "new"
    first = once.message("o-1")
    first.headers["c"] = "by middleware"
    first.queue = "elsewhere"
    for outgoing in (once.message("o-1"), twice.message("o-1")):
        assert outgoing.headers == {"a": "1"}
        assert outgoing.delay_ms == 5000
    assert (once.message("o").priority, twice.message("o").priority) == (Priority.CRITICAL, Priority.LOW)
    assert (once.message("o").queue, twice.message("o").queue) == ("default", "slow")
    plain = task.message("o-1")
    assert (plain.delay_ms, plain.priority, plain.headers, plain.queue) == (0, Priority.NORMAL, {}, "default")
    assert app.tasks[task.name] is task
    assert type(twice) is type(task)


def test_options_may_stand_beside_a_task_whose_annotations_name_later_classes(app: App) -> None:
    """A copy with options at module level does not resolve annotations earlier than the task itself."""
    task = app.task(takes_a_later_class)
    urgent = task.options(priority=9)
    globals()["LaterClass"] = msgspec.defstruct("LaterClass", [("id", str)])
    try:
        assert msgspec.msgpack.decode(urgent.message({"id": "1"}).arguments) == {"order": {"id": "1"}}
        assert urgent.payload is task.payload is task.options(delay=1).payload, "resolved once"
    finally:
        del globals()["LaterClass"]


async def takes_a_later_class(order: LaterClass) -> None: ...  # noqa: F821


def test_a_handle_is_a_plain_value() -> None:
    """It can be compared, stored and not be changed."""
    handle: Handle[int] = Handle("1", "default", "t")
    assert handle == Handle("1", "default", "t")
    with pytest.raises(AttributeError):
        handle.id = "2"  # type: ignore[misc]


def test_headers_of_two_messages_are_two_dicts() -> None:
    """The default is never shared."""
    first, second = (Outgoing("t", b"\x80", str(n), "default") for n in range(2))
    first.headers["a"] = "b"
    assert second.headers == {}
