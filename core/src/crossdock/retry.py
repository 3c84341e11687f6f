"""Retry policies: given an attempt and an error, again after how long, or not at all. Pure."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Final, Literal

import msgspec

from crossdock.errors import ConfigurationError

LONGEST: Final = 1e10
"""Seconds; about 317 years. What is longer is a slip."""

RetryFunction = Callable[[int, BaseException], float | None]
"""A policy of your own: (attempt just failed, 1 = the first; its error) -> seconds until the next, or None to give up."""


class Backoff(msgspec.Struct, frozen=True, omit_defaults=True):
    """A built-in retry policy as plain data, so that it can travel in an envelope."""

    kind: Literal["fixed", "linear", "exponential"] = "exponential"
    max_attempts: int = 5
    """Attempts in all, the first included."""
    base: float = 2.0
    """Seconds: the delay (fixed), the step (linear), or the first ceiling (exponential)."""
    max_backoff: float = 300.0
    """Seconds no delay exceeds."""
    give_up_after: float | None = None
    """Seconds since the first enqueue after which no further attempt is made; None = no such limit."""

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "linear", "exponential"):
            raise ConfigurationError(f"a retry policy's kind is 'fixed', 'linear' or 'exponential', not {self.kind!r}")
        if type(self.max_attempts) is not int or not 1 <= self.max_attempts <= 1_000_000_000:
            raise ConfigurationError(
                f"a retry policy's max_attempts must be at least 1 and a whole number up to 1,000,000,000, not {self.max_attempts!r}"
            )
        base = {"fixed": "delay", "linear": "step", "exponential": "min_backoff"}[self.kind]
        _check_seconds(base, self.base)
        _check_seconds("max_backoff", self.max_backoff)
        if self.give_up_after is not None:
            _check_seconds("give_up_after", self.give_up_after)

    def ceiling(self, attempt: int) -> float:
        """Longest delay in seconds after the given failed attempt, without jitter."""
        if self.kind == "fixed":
            return self.base
        if self.kind == "linear":
            return min(self.base * attempt, self.max_backoff)
        # 2.0 ** 1024 overflows; every sensible max_backoff is reached long before.
        return min(self.base * 2.0 ** min(attempt - 1, 64), self.max_backoff)


def _check_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST:
        raise ConfigurationError(f"a retry policy's {name} must be a number of seconds from 0 to {LONGEST:.0f}, not {value!r}")


def _check_classes(name: str, classes: Any) -> None:
    try:
        isinstance(None, classes or ())  # what a failing task will ask, which is no time to find out that it cannot be asked
    except TypeError:
        raise ConfigurationError(f"a retry policy's {name} must be a tuple of exception classes, not {classes!r}") from None


class RetryPolicy:
    """When a failed task runs again.

    Use `RetryPolicy.fixed`, `.linear`, `.exponential` or `.call`. The default for tasks that state none is
    `RetryPolicy.exponential()`: 5 attempts, full jitter under ceilings of 2, 4, 8 ... 300 seconds.
    """

    def __init__(
        self,
        backoff: Backoff,
        *,
        function: RetryFunction | None = None,
        retry_on: tuple[type[BaseException], ...] | None = None,
        no_retry_on: tuple[type[BaseException], ...] = (),
    ) -> None:
        self.backoff = backoff
        self.function = function
        self.retry_on = retry_on
        self.no_retry_on = no_retry_on
        _check_classes("retry_on", retry_on)
        _check_classes("no_retry_on", no_retry_on)

    @classmethod
    def fixed(
        cls,
        max_attempts: int = 5,
        delay: float = 10.0,
        *,
        give_up_after: float | None = None,
        retry_on: tuple[type[BaseException], ...] | None = None,
        no_retry_on: tuple[type[BaseException], ...] = (),
    ) -> RetryPolicy:
        """Wait the same time before each attempt, without jitter.

        Args:
            max_attempts: Attempts in all, the first included.
            delay: Seconds before each further attempt.
            give_up_after: Seconds since the first enqueue after which no further attempt is made.
            retry_on: Only these exceptions (and their subclasses) are retried; None = every one.
            no_retry_on: These are not; wins over `retry_on`.
        """
        return cls(Backoff("fixed", max_attempts, delay, delay, give_up_after), retry_on=retry_on, no_retry_on=no_retry_on)

    @classmethod
    def linear(
        cls,
        max_attempts: int = 5,
        step: float = 10.0,
        max_backoff: float = 300.0,
        *,
        give_up_after: float | None = None,
        retry_on: tuple[type[BaseException], ...] | None = None,
        no_retry_on: tuple[type[BaseException], ...] = (),
    ) -> RetryPolicy:
        """Wait `step`, 2 x `step`, 3 x `step` ... seconds, at most `max_backoff`, without jitter.

        Other arguments as for `fixed`.
        """
        return cls(Backoff("linear", max_attempts, step, max_backoff, give_up_after), retry_on=retry_on, no_retry_on=no_retry_on)

    @classmethod
    def exponential(
        cls,
        max_attempts: int = 5,
        min_backoff: float = 2.0,
        max_backoff: float = 300.0,
        *,
        give_up_after: float | None = None,
        retry_on: tuple[type[BaseException], ...] | None = None,
        no_retry_on: tuple[type[BaseException], ...] = (),
    ) -> RetryPolicy:
        """Wait a random time ("full jitter") under a ceiling that doubles from `min_backoff` to `max_backoff` seconds.

        Other arguments as for `fixed`.
        """
        return cls(
            Backoff("exponential", max_attempts, min_backoff, max_backoff, give_up_after),
            retry_on=retry_on,
            no_retry_on=no_retry_on,
        )

    @classmethod
    def call(
        cls,
        function: RetryFunction,
        *,
        max_attempts: int = 1_000_000,
        give_up_after: float | None = None,
        retry_on: tuple[type[BaseException], ...] | None = None,
        no_retry_on: tuple[type[BaseException], ...] = (),
    ) -> RetryPolicy:
        """Ask `function(attempt, error)` for the seconds to wait; None gives up. Other arguments as for `fixed`."""
        return cls(
            Backoff("fixed", max_attempts, 0.0, 0.0, give_up_after),
            function=function,
            retry_on=retry_on,
            no_retry_on=no_retry_on,
        )

    def with_backoff(self, backoff: Backoff) -> RetryPolicy:
        """The same exception rules with other numbers: what a single call may override."""
        return RetryPolicy(backoff, retry_on=self.retry_on, no_retry_on=self.no_retry_on)

    def next_delay(self, attempt: int, error: BaseException, age: float, rng: random.Random) -> float | None:
        """Decide what follows a failure.

        Args:
            attempt: The attempt that failed; 1 = the first.
            error: What it raised.
            age: Seconds since the task was first enqueued.
            rng: Source of the jitter.

        Returns:
            Seconds until the next attempt, or None: give up.

        Raises:
            ValueError: The policy's function returned something else than that. What it raises itself passes through.
        """
        backoff = self.backoff
        if attempt >= backoff.max_attempts or isinstance(error, self.no_retry_on):
            return None
        if self.retry_on is not None and not isinstance(error, self.retry_on):
            return None
        delay: float | None
        if self.function is not None:
            delay = self.function(attempt, error)
            if delay is not None and not math.isfinite(delay):
                raise ValueError(f"the retry function returned {delay!r}, which is no number of seconds")
        elif backoff.kind == "exponential":
            delay = rng.uniform(0.0, backoff.ceiling(attempt))
        else:
            delay = backoff.ceiling(attempt)
        if delay is not None and backoff.give_up_after is not None and age + delay > backoff.give_up_after:
            return None
        return None if delay is None else min(max(0.0, float(delay)), LONGEST)


def check_policy(policy: object) -> None:
    """Refuse what is no policy where one belongs, such as a number of attempts. Raises `ConfigurationError`."""
    if policy is not None and not isinstance(policy, RetryPolicy):
        raise ConfigurationError(f"retry must be a RetryPolicy such as RetryPolicy.fixed(max_attempts=3), not {policy!r}")
