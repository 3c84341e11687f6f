"""Task: a registered function, and everything needed to enqueue a call of it."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Coroutine, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar, cast

import msgspec

from crossdock import codec, names
from crossdock.errors import ConfigurationError
from crossdock.retry import Backoff, RetryPolicy, check_policy
from crossdock.signature import Payload, check_function
from crossdock.spi import Message, Priority

if TYPE_CHECKING:
    from typing import Self, Unpack

    from crossdock.app import App

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_DELAY = 100 * 366 * 24 * 3600.0
MAX_HEADERS = 64
MAX_HEADER_BYTES = 8 * 1024


class Options(TypedDict, total=False):
    """What a single enqueue may set. All are optional."""

    delay: float
    """Seconds until it may run, by the broker's clock. Excludes `eta`."""
    eta: datetime
    """Not before this instant; with a time zone. Excludes `delay`."""
    expires: float | datetime
    """Useless after this many seconds from now, or after this instant (with a time zone)."""
    priority: int
    """A `Priority`, or an integer from 0 to 9, rounded down to a level. Default NORMAL."""
    headers: Mapping[str, str]
    """Short texts for middleware and the handler: at most 64, 8 KiB in all."""
    id: str
    """The message's id; default: a new one. The same id again, while the first is stored, is not stored twice."""
    queue: str
    """Another queue than the task's."""
    timeout: float
    """Seconds one execution may take."""
    retry: RetryPolicy
    """One of the built-in policies, without exception classes: it travels as data."""


class Handle(msgspec.Struct, Generic[R], frozen=True):
    """What an enqueue returns: the task is stored."""

    id: str
    queue: str
    task: str


class Outgoing(msgspec.Struct):
    """A validated call on its way to the broker. Middleware may change it."""

    task: str
    arguments: bytes
    """In MessagePack; checked against the task's signature."""
    id: str
    queue: str
    priority: Priority = Priority.NORMAL
    eta_ms: int = 0
    delay_ms: int = 0
    expires_ms: int = 0
    timeout: float | None = None
    retry: Backoff | None = None
    headers: dict[str, str] = {}
    stored: bool = False
    """Set when the broker has it."""

    def to_message(self, now_ms: int) -> Message:
        """Encode it, as enqueued at `now_ms`."""
        body = codec.encode(
            codec.Envelope(
                codec.WIRE_VERSION,
                self.task,
                msgspec.Raw(self.arguments),
                now_ms,
                expires_ms=self.expires_ms,
                timeout=self.timeout,
                retry=self.retry,
                headers=self.headers,
            )
        )
        return Message(self.id, self.queue, self.priority, body, self.eta_ms, self.delay_ms)


class Task(Generic[P, R]):
    """A function registered by `App.task`. Calling it runs it here and now, as plain Python; `enqueue` sends it to a worker."""

    def __init__(
        self,
        app: App,
        function: Callable[..., Any],
        *,
        name: str | None,
        queue: str,
        priority: int,
        retry: RetryPolicy | None,
        timeout: float | None,
        expires: float | None,
    ) -> None:
        self.app = app
        self.function = function
        self.name = names.check_task(name if name is not None else default_name(function))
        self.signature = check_function(function, self.name)
        self.queue = names.check_queue(queue)
        self.priority = names.check_priority(priority)
        check_policy(retry)
        self.retry = retry
        self.timeout = check_seconds("timeout", timeout, 0.001)
        self.expires = check_seconds("expires", expires, 0.001)
        self.is_async = is_async_function(function)
        self._payload: Payload | None = None
        self._registered = self
        self._options: Options = {}
        self.__name__ = function.__name__
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self.__wrapped__ = function

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} on queue {self.queue!r}>"

    @property
    def payload(self) -> Payload:
        """Encoder and decoder of the arguments. Raises `InvalidTask` at first use if an annotation cannot travel."""
        if self._payload is None:  # copies made by `options` share the registered task's
            new = self._registered is self
            self._payload = Payload(self.function, self.signature, self.name) if new else self._registered.payload
        return self._payload

    def options(self, **options: Unpack[Options]) -> Self:
        """Return the same task with other settings for what is enqueued through it; see `Options`.

        Raises:
            ConfigurationError: A value is out of its range.
        """
        changed = copy.copy(self)
        changed._options = {**self._options, **options}
        checked = changed._outgoing(b"\x80", changed._options)  # refuse bad values here, not at the first enqueue
        if "headers" in changed._options:
            changed._options["headers"] = checked.headers  # a copy: what the caller does to its own changes nothing here
        return changed

    def message(self, *args: P.args, **kwargs: P.kwargs) -> Outgoing:
        """Bind and validate a call without sending it: for `App.enqueue_many` and `App.enqueue`.

        Raises:
            InvalidArguments: The call does not fit the signature; the text names the parameter.
        """
        return self._outgoing(self.payload.encode(args, kwargs), self._options)

    def message_from_arguments(self, arguments: Mapping[str, Any], options: Options | None = None) -> Outgoing:
        """As `message`, from plain values by name, as they come from JSON: for tools.

        Raises:
            InvalidArguments: They do not fit the signature.
            ConfigurationError: An option is out of its range.
        """
        return self._outgoing(self.payload.encode_plain(arguments), {**self._options, **(options or {})})

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Send a call to a worker. The task is stored when this returns.

        Raises:
            InvalidArguments: The call does not fit the signature. Nothing was sent.
            EnqueueFailed: It is certainly not stored (`QueueFull`, `MessageTooLarge` ...).
            EnqueueUnknown: It may be stored; the error says whether enqueuing it again is safe.
            BrokerUnavailable: Nothing was attempted.
        """
        return await self.app.enqueue(self.message(*args, **kwargs))

    def enqueue_sync(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """As `enqueue`, from code without a running event loop, in any thread.

        Raises:
            SyncInAsyncContext: An event loop is running in this thread; await `enqueue` there.
        """
        return self.app.enqueue_sync(self.message(*args, **kwargs))

    def _outgoing(self, arguments: bytes, options: Options) -> Outgoing:
        outgoing = Outgoing(self.name, arguments, "", self.queue, self.priority)
        if options or self.expires is not None:
            _apply(outgoing, options, self.app.now_ms(), self.expires)
        if not outgoing.id:
            outgoing.id = self.app.new_id()
        return outgoing


class AsyncTask(Task[P, R]):
    """A task made from an `async def` function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Run the function here: returns its coroutine."""
        coroutine: Coroutine[Any, Any, R] = self.function(*args, **kwargs)
        return coroutine


class SyncTask(Task[P, R]):
    """A task made from a plain function; a worker runs it in a thread."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function here and return its result."""
        result: R = self.function(*args, **kwargs)
        return result


def is_async_function(function: Callable[..., Any]) -> bool:
    """Whether calling it gives a coroutine: an `async def`, also below plain decorators that use `functools.wraps`."""
    return inspect.iscoroutinefunction(inspect.unwrap(function))


def default_name(function: Callable[..., Any]) -> str:
    """Module and qualified name; `__main__` is resolved to its file, so that a script and a worker agree."""
    module = getattr(function, "__module__", None) or ""
    if module == "__main__":
        file = getattr(sys.modules.get("__main__"), "__file__", None)
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        module = spec.name.removesuffix(".__main__") if spec else Path(file).stem if file else module
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{module}.{name}"


def check_seconds(name: str, value: object, low: float) -> float | None:
    """Return a duration in seconds that is at least `low` and sane. Raises `ConfigurationError`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= LONGEST_DELAY:
        raise ConfigurationError(
            f"{name} must be a number of seconds from {low:g} to {LONGEST_DELAY:.0f} (100 years), not {value!r}"
        )
    return float(value)


def _instant_ms(name: str, value: object) -> int:
    if not isinstance(value, datetime):
        raise ConfigurationError(f"{name} must be a datetime, not {value!r}")
    if value.tzinfo is None or value.utcoffset() is None:
        raise ConfigurationError(f"{name} must have a time zone: {value.isoformat()} does not say which moment is meant")
    return max(1, math.ceil(value.timestamp() * 1000))  # 0 would mean "now" or "never"


def _apply(outgoing: Outgoing, options: Options, now_ms: int, default_expires: float | None) -> None:
    """Write options into `outgoing`. Raises `ConfigurationError` for the first bad one."""
    unknown = set(options) - Options.__optional_keys__
    if unknown:
        raise ConfigurationError(
            f"there is no option {sorted(unknown)[0]!r}; there are: {', '.join(sorted(Options.__optional_keys__))}"
        )
    if "delay" in options and "eta" in options:
        raise ConfigurationError("delay and eta exclude each other: give one of them")
    if "delay" in options:
        outgoing.delay_ms = math.ceil((check_seconds("delay", options["delay"], 0) or 0.0) * 1000)
    if "eta" in options:
        outgoing.eta_ms = _instant_ms("eta", options["eta"])
    expires = options.get("expires", default_expires)
    if isinstance(expires, datetime):
        outgoing.expires_ms = _instant_ms("expires", expires)
    elif expires is not None:
        outgoing.expires_ms = now_ms + math.ceil((check_seconds("expires", expires, 0.001) or 0.0) * 1000)
    if "priority" in options:
        outgoing.priority = names.check_priority(options["priority"])
    if "queue" in options:
        outgoing.queue = names.check_queue(options["queue"])
    if "id" in options:
        outgoing.id = names.check_id(options["id"])
    if "timeout" in options:
        outgoing.timeout = check_seconds("timeout", options["timeout"], 0.001)
    if "headers" in options:
        outgoing.headers = check_headers(options["headers"])
    policy = options.get("retry")
    if policy is not None:
        check_policy(policy)
        if policy.function is not None or policy.retry_on is not None or policy.no_retry_on:
            raise ConfigurationError(
                "the retry option of one call travels as data: functions and exception classes belong on the task"
            )
        outgoing.retry = policy.backoff


def check_headers(headers: object) -> dict[str, str]:
    """Return headers as a new dict of texts within the limits. Raises `ConfigurationError`."""
    checked = dict(cast("Mapping[object, object]", headers)) if isinstance(headers, Mapping) else {None: None}
    texts = [part for pair in checked.items() for part in pair if isinstance(part, str)]
    if len(checked) > MAX_HEADERS or len(texts) < 2 * len(checked):
        raise ConfigurationError(f"headers must be at most {MAX_HEADERS} pairs of texts")
    try:
        size = len("".join(texts).encode())
    except UnicodeEncodeError:
        raise ConfigurationError("headers must be texts that can be written as UTF-8: there is half of a surrogate pair") from None
    if size > MAX_HEADER_BYTES:
        raise ConfigurationError(f"headers are limited to {MAX_HEADER_BYTES:,} bytes in all: put data into the arguments")
    return cast("dict[str, str]", checked)
