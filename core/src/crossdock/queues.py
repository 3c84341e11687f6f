"""Queue: what a program says about one of its queues."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from crossdock import names
from crossdock.errors import ConfigurationError
from crossdock.retry import RetryPolicy, check_policy
from crossdock.spi import QueueSpec


class Queue(msgspec.Struct, frozen=True):
    """Settings of a queue. A queue that is not listed has the defaults.

    The same names, as a table per queue, stand in `crossdock.toml`::

        [queues.emails]
        weight = 2
        max_attempts = 3

    Raises:
        ConfigurationError: A value is out of its range; the text names it.
    """

    name: str
    """1 to 63 characters of `A-Z a-z 0-9 _ -`, starting with a letter or digit."""
    weight: int = 1
    """Share of a worker's slots while other queues wait too, 1 to 1,000."""
    priorities: Literal["fair", "strict"] = "fair"
    """`fair`: with all levels waiting they get 6 : 4 : 2 : 1 of the queue's slots. `strict`: a lower level waits for all higher ones."""
    lease: float = 30.0
    """Seconds after which a dead worker's tasks go to another, 1 to 3,600. Live workers extend it, so it does not limit a task."""
    concurrency: int | None = None
    """Most tasks of this queue that one worker process runs at once; None = the worker's concurrency."""
    max_ready: int | None = None
    """Most messages waiting; a further enqueue raises `QueueFull`. None = no limit."""
    max_attempts: int | None = None
    """Attempts for tasks that state none; None = 5."""
    retry: RetryPolicy | None = None
    """Retry policy for tasks that state none; None = `RetryPolicy.exponential()` with `max_attempts`."""
    timeout: float | None = None
    """Seconds one execution may take, for tasks that state none; None = no limit."""
    max_deliveries: int = 3
    """Deliveries without an ending after which a message is dead-lettered as poison, 1 to 1,000."""
    on_expired: Literal["dead_letter", "drop"] = "dead_letter"
    """What becomes of a message received after its `expires` instant. Counted either way."""
    keep_dead: float | None = None
    """Seconds a dead letter is kept; None = until replayed or discarded."""
    keep_dead_count: int | None = None
    """Most dead letters kept, the oldest leave first; None = no limit."""

    def __post_init__(self) -> None:
        names.check_queue(self.name)
        self._check("weight", 1, 1000, whole=True)
        self._check("lease", 1, 3600)
        self._check("concurrency", 1, 100_000, whole=True, optional=True)
        self._check("max_ready", 1, 1_000_000_000, whole=True, optional=True)
        self._check("max_attempts", 1, 1_000_000, whole=True, optional=True)
        check_policy(self.retry)
        self._check("timeout", 0.001, 366 * 24 * 3600, optional=True)
        self._check("max_deliveries", 1, 1000, whole=True)
        self._check("keep_dead", 1, 100 * 366 * 24 * 3600, optional=True)
        self._check("keep_dead_count", 0, 1_000_000_000, whole=True, optional=True)
        if self.priorities not in ("fair", "strict"):
            raise ConfigurationError(f"queue {self.name!r}: priorities is 'fair' or 'strict', not {self.priorities!r}")
        if self.on_expired not in ("dead_letter", "drop"):
            raise ConfigurationError(f"queue {self.name!r}: on_expired is 'dead_letter' or 'drop', not {self.on_expired!r}")

    def _check(self, field: str, low: float, high: float, *, whole: bool = False, optional: bool = False) -> None:
        value: Any = getattr(self, field)
        if optional and value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
            numbers = " in whole numbers" if whole else ""
            raise ConfigurationError(f"queue {self.name!r}: {field} must be from {low:,} to {high:,}{numbers}, not {value!r}")

    def spec(self) -> QueueSpec:
        """What a backend needs to know of this queue."""
        return QueueSpec(
            name=self.name,
            lease=self.lease,
            max_ready=self.max_ready,
            dead_max_age=self.keep_dead,
            dead_max_count=self.keep_dead_count,
        )
