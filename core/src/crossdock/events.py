"""Life-cycle events: observers are told what happened, after it happened. They cannot change it and cannot fail a task."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import msgspec

from crossdock.errors import ConfigurationError

EventName = Literal[
    "task_enqueued",
    "task_started",
    "task_succeeded",
    "task_retried",
    "task_snoozed",
    "task_dead_lettered",
    "task_expired",
    "task_returned",
    "task_abandoned",
    "lease_lost",
    "worker_started",
    "worker_stopped",
    "broker_event",
]
"""Every event there is."""

_NAMES = get_args(EventName)
_log = logging.getLogger("crossdock.events")


class Event(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One thing that happened."""

    name: EventName
    at_ms: int
    """When, in milliseconds since the Unix epoch."""
    task: str = ""
    """Name of the task; "" if the event is not about one, or its name is unknown."""
    id: str = ""
    queue: str = ""
    worker: str = ""
    attempt: int = 0
    detail: str = ""
    """What the event adds: an error, a reason, a broker's report."""
    seconds: float = 0.0
    """A duration where the event has one: run time of an execution, delay of a retry."""


Observer = Callable[[Event], Any]


class Events:
    """Who observes what. `wants(name)` is one set look-up, so an event that nobody observes is never built."""

    def __init__(self) -> None:
        self._observers: dict[str, list[Observer]] = {}
        self.wanted: set[str] = set()

    def subscribe(self, name: EventName, observer: Observer) -> None:
        """Tell `observer` of every event of this name from now on.

        Raises:
            ConfigurationError: There is no such event, or the observer is asynchronous: nobody would await it.
        """
        if name not in _NAMES:
            raise ConfigurationError(f"there is no event {name!r}; there are: {', '.join(_NAMES)}")
        if inspect.iscoroutinefunction(observer):
            raise ConfigurationError(f"an observer of {name} must be a plain function: it is called, and nobody would await it")
        self._observers.setdefault(name, []).append(observer)
        self.wanted.add(name)

    def publish(self, event: Event) -> None:
        """Tell the observers; an error of theirs is logged and goes no further."""
        for observer in self._observers.get(event.name, ()):
            try:
                observer(event)
            except BaseException:
                _log.exception("an observer of %s failed", event.name)
