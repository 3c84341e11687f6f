"""What a running task can ask about itself."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Protocol

from crossdock.errors import ConfigurationError
from crossdock.spi import Priority


class Context(Protocol):
    """The execution that is going on. Read-only."""

    @property
    def id(self) -> str:
        """The message's id: the same in all its attempts, deliveries and replays."""
        ...

    @property
    def task(self) -> str:
        """Name of the task."""
        ...

    @property
    def queue(self) -> str:
        """Queue it was received from."""
        ...

    @property
    def priority(self) -> Priority:
        """Level it was received at."""
        ...

    @property
    def attempt(self) -> int:
        """1 + failures recorded so far. A crash of the worker records none."""
        ...

    @property
    def delivery_count(self) -> int:
        """Hand-overs since it was last stored; above 1, an earlier execution may have begun and not ended."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers set at the enqueue."""
        ...

    @property
    def enqueued_ms(self) -> int:
        """When it was first enqueued, in milliseconds since the Unix epoch; 0 = its producer did not say."""
        ...

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger `crossdock.task.<name>` whose records carry `task_id`, `task` and `attempt`."""
        ...


running: ContextVar[Any] = ContextVar("crossdock_running")
"""The execution under way in this asyncio task or thread; set by the executor."""


def current_context() -> Context:
    """Return the context of the task that is running here, in async code and in threads.

    Raises:
        ConfigurationError: No task is running here.
    """
    try:
        context: Context = running.get()
    except LookupError:
        raise ConfigurationError("current_context() works only inside a running task; no task is running here") from None
    return context
