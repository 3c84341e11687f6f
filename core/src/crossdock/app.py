"""App: the registry of a program's tasks, and the way to its broker."""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast, overload

import msgspec

from crossdock import codec, names
from crossdock.batching import MAX_ITEMS
from crossdock.blocking import private_loop
from crossdock.clock import SystemClock
from crossdock.config import Settings, load_settings, require_url
from crossdock.errors import (
    BrokerError,
    EnqueueError,
    EnqueueFailed,
    EnqueueManyError,
    EnqueueUnknown,
    InvalidArguments,
    InvalidTask,
    MessageTooLarge,
    Undecodable,
)
from crossdock.events import Event, EventName, Events, Observer
from crossdock.ids import IdSource
from crossdock.middleware import EnqueueNext, Middleware, check_middleware, compose_enqueue
from crossdock.plugins import create_broker
from crossdock.producer import Producer, Producers, chunks, not_stored
from crossdock.queues import Queue
from crossdock.retry import RetryPolicy, check_policy
from crossdock.spi import Broker, BrokerEvent, Clock, Connected, Message, Priority, Unblocked
from crossdock.task import AsyncTask, Handle, Outgoing, SyncTask, Task, check_headers, is_async_function

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from crossdock.testing import Testing

P = ParamSpec("P")
R = TypeVar("R")
F = TypeVar("F", bound=Observer)

_log = logging.getLogger("crossdock.broker")


class TaskDecorator(Protocol):
    """What `app.task(...)` with settings returns."""

    # An async function is a Callable[P, R] too; the first that fits is taken.
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


class Environment(msgspec.Struct):
    """Where an App takes time, randomness, ids and its broker from. Tests put another one in."""

    clock: Clock
    rng: random.Random
    new_id: Callable[[], str]
    make_broker: Callable[[], Broker]
    producers: Producers


class App:
    """A program's tasks and its broker.

    Args:
        url: Broker URL, e.g. `sqlite:///shop.db`; None: `$CROSSDOCK_URL`, else the file. Needed at the first enqueue, not here.
        namespace: Isolates everything in the broker; None: `$CROSSDOCK_NAMESPACE`, else the file, else `default`.
        queues: Settings of queues; those not listed have the file's, else the defaults.
        middleware: Wraps enqueues and executions; the first is outermost.
        retry: Policy where neither call, task nor queue states one. Default: `RetryPolicy.exponential()`.
        clock: Source of time, for tests.
        rng: Source of randomness, for tests.
        new_id: Source of message ids. Default: UUID version 7.
        directory: Where the search for `crossdock.toml` or `[tool.crossdock]` starts. Default: the working directory.

    Raises:
        ConfigurationError: A setting is wrong; the text says where it stands.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        namespace: str | None = None,
        queues: Iterable[Queue] = (),
        middleware: Iterable[Middleware] = (),
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        rng: random.Random | None = None,
        new_id: Callable[[], str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.settings: Settings = load_settings(url=url, namespace=namespace, queues=tuple(queues), directory=directory)
        self.middleware = check_middleware(middleware)
        check_policy(retry)
        self.retry = retry or RetryPolicy.exponential()
        self.events = Events()
        clock = clock or SystemClock()
        self.environment = Environment(
            clock,
            rng or random.Random(),
            new_id or IdSource(clock),
            self._make_configured_broker,
            Producers(self._make_producer),
        )
        self._tasks: dict[str, Task[Any, Any]] = {}
        self.tasks = MappingProxyType(self._tasks)
        """Registered tasks by name; read-only."""
        self._queues = {queue.name: queue for queue in self.settings.queues}
        self._enqueue_chain = compose_enqueue(self.middleware, self._store_changed)

    # --- registering ---

    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
    @overload
    def task(
        self,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        priority: int = Priority.NORMAL,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        expires: float | None = None,
    ) -> TaskDecorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        queue: str = "default",
        priority: int = Priority.NORMAL,
        retry: RetryPolicy | None = None,
        timeout: float | None = None,
        expires: float | None = None,
    ) -> Any:
        """Register a function as a task; use it as a decorator, with or without settings.

        Args:
            function: `async def`, or plain `def`, which runs in a thread.
            name: How messages name it, up to 255 bytes. Default: module and qualified name.
            queue: Where its messages wait.
            priority: A `Priority`, or 0 to 9, rounded down to a level.
            retry: When it runs again after a failure. Default: the queue's, else the App's policy.
            timeout: Seconds one execution may take, then it is cancelled. Default: the queue's, else none.
            expires: Seconds after the enqueue at which it becomes useless. Default: never.

        Raises:
            InvalidTask: The function cannot be a task, or the name is taken.
            ConfigurationError: A setting is out of its range.
        """
        if function is None:
            return functools.partial(
                self.task, name=name, queue=queue, priority=priority, retry=retry, timeout=timeout, expires=expires
            )
        kind = cast("type[Task[Any, Any]]", AsyncTask if is_async_function(function) else SyncTask)
        task = kind(self, function, name=name, queue=queue, priority=priority, retry=retry, timeout=timeout, expires=expires)
        taken = self._tasks.get(task.name)
        if taken is not None:
            where = f"{taken.function.__module__}.{taken.function.__qualname__}"
            raise InvalidTask(f"there is already a task {task.name!r} ({where}): give one of them another name=")
        self._tasks[task.name] = task
        return task

    def on(self, event: EventName) -> Callable[[F], F]:
        """Observe a life-cycle event: a decorator for a function that takes an `Event`. It is called after the fact,
        where the event happens (a worker's loop, a producer), should return quickly, and cannot fail a task.

        Raises:
            ConfigurationError: There is no such event.
        """

        def register(observer: F) -> F:
            self.events.subscribe(event, observer)
            return observer

        return register

    # --- enqueuing ---

    async def enqueue(self, outgoing: Outgoing) -> Handle[Any]:
        """Store one message made by `Task.message`. Raises as `Task.enqueue` does."""
        await (self._enqueue_chain or self._store)(outgoing)
        return Handle(outgoing.id, outgoing.queue, outgoing.task)

    def enqueue_sync(self, outgoing: Outgoing) -> Handle[Any]:
        """As `enqueue`, from code without a running event loop, in any thread. Raises `SyncInAsyncContext` otherwise."""
        return private_loop.run(self.enqueue(outgoing), "await enqueue(...) instead of enqueue_sync(...)")

    async def enqueue_many(self, messages: Iterable[Outgoing]) -> Sequence[Handle[Any]]:
        """Store many messages, in chunks of at most 1,000; each chunk is one step for the broker, unless middleware delays some.

        Returns:
            Their handles, in order.

        Raises:
            InvalidArguments, MessageTooLarge: An item cannot be sent at all; it is named, and nothing was stored.
            EnqueueManyError: Some were not stored, or may not be; lists which. Chunks after a failed one are still tried.
            BrokerUnavailable: Nothing was attempted.
        """
        outgoing = list(messages)
        for number, item in enumerate(cast("list[object]", outgoing)):
            if not isinstance(item, Outgoing):
                raise InvalidArguments(f"item {number} is of type {type(item).__name__}: pass what task.message(...) returns")
        if self._enqueue_chain is not None:
            await self._store_each(outgoing, self._enqueue_chain)
        else:
            await self._store_many(outgoing)
        return [Handle(each.id, each.queue, each.task) for each in outgoing]

    def enqueue_many_sync(self, messages: Iterable[Outgoing]) -> Sequence[Handle[Any]]:
        """As `enqueue_many`, from code without a running event loop, in any thread. Raises `SyncInAsyncContext` otherwise."""
        return private_loop.run(self.enqueue_many(messages), "await enqueue_many(...) instead of enqueue_many_sync(...)")

    async def close(self) -> None:
        """Close this event loop's connection to the broker. Idempotent; a later enqueue opens a new one."""
        await self.environment.producers.close()

    def close_sync(self) -> None:
        """Close the connection that the sync twins share, if any of them was used."""
        if private_loop.started:
            private_loop.run(self.close(), "await close() instead of close_sync()")

    async def __aenter__(self) -> Self:
        await self.environment.producers.here()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # --- looking ---

    def queue(self, name: str) -> Queue:
        """Settings of a queue; the defaults if it is not listed. Raises `InvalidName`."""
        found = self._queues.get(name)
        if found is None:
            found = self._queues[name] = Queue(name)
        return found

    def queue_names(self) -> list[str]:
        """Every queue that the settings or the tasks name, in the order in which they do."""
        return list(
            dict.fromkeys([*(queue.name for queue in self.settings.queues), *(task.queue for task in self._tasks.values())])
        )

    def testing(self) -> Testing:
        """Return an asynchronous context in which this App runs on a memory broker with a virtual clock; see `crossdock.testing`."""
        from crossdock.testing import Testing  # the only way from core to a backend, and only in tests

        return Testing(self)

    def now_ms(self) -> int:
        """This App's clock, in milliseconds since the Unix epoch."""
        return self.environment.clock.time_ms()

    def new_id(self) -> str:
        """A new message id."""
        return self.environment.new_id()

    def require_url(self) -> str:
        """The broker URL, with its secrets. Raises `ConfigurationError` telling the ways to give one."""
        return require_url(self.settings)

    def make_broker(self) -> Broker:
        """An unopened Broker for this App's URL and namespace. Raises `ConfigurationError`."""
        return self.environment.make_broker()

    def enter_environment(
        self, clock: Clock, rng: random.Random, new_id: Callable[[], str], make_broker: Callable[[], Broker]
    ) -> Environment:
        """Take time, randomness, ids and brokers from elsewhere from now on: for `crossdock.testing`.

        Returns:
            The environment there was, for `leave_environment`.
        """
        outside = self.environment
        self.environment = Environment(clock, rng, new_id, make_broker, Producers(self._make_producer))
        return outside

    def leave_environment(self, outside: Environment) -> None:
        """Go back to an environment that `enter_environment` returned."""
        self.environment = outside

    # --- inside ---

    def _make_configured_broker(self) -> Broker:
        return create_broker(
            self.require_url(), namespace=self.settings.namespace, clock=self.environment.clock, report=self._report
        )

    def _make_producer(self) -> Producer:
        return Producer(self.make_broker(), [queue.spec() for queue in self.settings.queues])

    def _report(self, event: BrokerEvent) -> None:
        _log_broker_event(event)
        if "broker_event" in self.events.wanted:
            self.events.publish(Event(name="broker_event", at_ms=self.now_ms(), detail=repr(event)))

    async def _store(self, outgoing: Outgoing) -> None:
        message = self._to_message(outgoing)
        producer = await self.environment.producers.here()
        await producer.enqueue(message)
        outgoing.stored = True
        self._enqueued(outgoing)

    async def _store_changed(self, outgoing: Outgoing) -> None:
        """As `_store`, after middleware, which may have put anything there."""
        names.check_id(outgoing.id)
        names.check_queue(outgoing.queue)
        outgoing.priority = names.check_priority(outgoing.priority)
        outgoing.headers = check_headers(outgoing.headers)
        await self._store(outgoing)

    async def _store_each(self, outgoing: Sequence[Outgoing], chain: EnqueueNext) -> None:
        """Send each through the middleware; group commit makes batches of what comes out."""
        stored: list[str] = []
        failed: list[EnqueueFailed] = []
        unknown: list[EnqueueUnknown] = []
        for start in range(0, len(outgoing), MAX_ITEMS):
            chunk = outgoing[start : start + MAX_ITEMS]
            outcomes = await asyncio.gather(*(chain(each) for each in chunk), return_exceptions=True)
            unattempted = [error for error in outcomes if isinstance(error, BrokerError) and not isinstance(error, EnqueueError)]
            if start == 0 and len(unattempted) == len(chunk) > 0:
                raise unattempted[0]
            for each, outcome in zip(chunk, outcomes, strict=True):
                if outcome is None:
                    stored.append(each.id)
                elif isinstance(outcome, EnqueueFailed):
                    failed.append(outcome)
                elif isinstance(outcome, EnqueueUnknown):
                    unknown.append(outcome)
                elif not isinstance(outcome, Exception):
                    raise outcome
                elif each.stored:
                    _log.error("middleware failed after message %s was stored", each.id, exc_info=outcome)
                    stored.append(each.id)
                else:
                    failed.append(not_stored(each.to_message(self.now_ms()), outcome))
        if failed or unknown:
            raise EnqueueManyError(stored, failed, unknown)

    async def _store_many(self, outgoing: Sequence[Outgoing]) -> None:
        messages = [self._to_message(each) for each in outgoing]
        producer = await self.environment.producers.here()
        stored: list[str] = []
        failed: list[EnqueueFailed] = []
        unknown: list[EnqueueUnknown] = []
        for chunk in chunks(messages):
            try:
                await producer.enqueue_many(chunk)
            except EnqueueManyError as error:
                stored += error.stored
                failed += error.failed
                unknown += error.unknown
            except BrokerError as error:  # nothing was attempted, and later chunks would fare no better
                done = len(stored) + len(failed) + len(unknown)
                if not done:
                    raise
                failed += [not_stored(message, error) for message in messages[done:]]
                break
            else:
                stored += [message.id for message in chunk]
        if self.events.wanted:
            there = set(stored)
            for each in outgoing:
                if each.id in there:
                    self._enqueued(each)
        if failed or unknown:
            raise EnqueueManyError(stored, failed, unknown)

    def _to_message(self, outgoing: Outgoing) -> Message:
        message = outgoing.to_message(self.now_ms())
        try:
            codec.check_limits(message.body, enqueued=True)
        except Undecodable as error:
            raise MessageTooLarge(
                f"message {outgoing.id}, a call of {outgoing.task!r}, is too large, {error}: "
                "store large data elsewhere and pass its address",
                message,
            ) from None
        return message

    def _enqueued(self, outgoing: Outgoing) -> None:
        if "task_enqueued" in self.events.wanted:
            self.events.publish(
                Event(name="task_enqueued", at_ms=self.now_ms(), task=outgoing.task, id=outgoing.id, queue=outgoing.queue)
            )


def _log_broker_event(event: BrokerEvent) -> None:
    quiet = isinstance(event, Connected | Unblocked)
    _log.log(logging.INFO if quiet else logging.WARNING, "broker: %s", event)
