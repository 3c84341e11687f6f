"""Retry policies: the table of delays, and what holds for every policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.errors import ConfigurationError
from crossdock.retry import LONGEST, Backoff, RetryPolicy

ERROR = ValueError("no")


def delays(policy: RetryPolicy, seed: int = 0) -> list[float]:
    """The waits between the attempts of a task that always fails."""
    rng, result, attempt = random.Random(seed), [], 1
    while (delay := policy.next_delay(attempt, ERROR, 0.0, rng)) is not None:
        result.append(delay)
        attempt += 1
    return result


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (RetryPolicy.fixed(4, 7.0), [7.0, 7.0, 7.0]),
        (RetryPolicy.fixed(1, 7.0), []),
        (RetryPolicy.fixed(3, 0), [0.0, 0.0]),
        (RetryPolicy.linear(5, 10.0), [10.0, 20.0, 30.0, 40.0]),
        (RetryPolicy.linear(6, 10.0, 25.0), [10.0, 20.0, 25.0, 25.0, 25.0]),
        (RetryPolicy.call(lambda attempt, error: attempt * 1.5 if attempt < 4 else None), [1.5, 3.0, 4.5]),
        (RetryPolicy.call(lambda attempt, error: -3), [0.0] * 999_999),
        (RetryPolicy.call(lambda attempt, error: 1e300, max_attempts=2), [LONGEST]),
        (RetryPolicy.call(lambda attempt, error: 1, max_attempts=3), [1.0, 1.0]),
    ],
    ids=["fixed", "single", "at once", "linear", "linear bounded", "call", "call negative", "call absurd", "call bounded"],
)
def test_delays_without_jitter(policy: RetryPolicy, expected: list[float]) -> None:
    """The table of what each kind waits, and after how many attempts it gives up."""
    if len(expected) > 1000:
        assert [policy.next_delay(n, ERROR, 0, random.Random()) for n in (1, 999_999, 1_000_000)] == [0.0, 0.0, None]
    else:
        assert delays(policy) == expected


def test_the_default_doubles_its_ceiling_from_2_to_300_seconds() -> None:
    """Exponential: 5 attempts; the ceilings are 2, 4, 8 ... and stay at 300."""
    policy = RetryPolicy.exponential()
    assert policy.backoff == Backoff()
    assert len(delays(policy)) == 4
    assert [policy.backoff.ceiling(n) for n in range(1, 11)] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert policy.backoff.ceiling(1_000_000) == 300


def test_full_jitter_reaches_from_zero_to_the_ceiling() -> None:
    """The wait is spread over the whole range under the ceiling, evenly."""
    policy, rng = RetryPolicy.exponential(10, 8.0, 100.0), random.Random(1)
    seen = [policy.next_delay(1, ERROR, 0.0, rng) or 0.0 for _ in range(4000)]
    assert max(seen) <= 8.0
    assert max(seen) > 7.9
    assert min(seen) < 0.1
    assert sum(seen) / len(seen) == pytest.approx(4.0, abs=0.2)


@given(
    attempt=st.integers(1, 2_000_000),
    max_attempts=st.integers(1, 1_000_000_000),
    low=st.floats(0, 1e10),
    high=st.floats(0, 1e10),
    kind=st.sampled_from(["fixed", "linear", "exponential"]),
    give_up_after=st.none() | st.floats(0, 1e10),
    age=st.floats(0, 1e10),
    seed=st.integers(),
)
def test_every_policy_stays_within_its_bounds(
    attempt: int, max_attempts: int, low: float, high: float, kind: Any, give_up_after: float | None, age: float, seed: int
) -> None:
    """A delay is under its ceiling and its maximum; there is none after the last attempt or beyond `give_up_after`."""
    backoff = Backoff(kind, max_attempts, low, high, give_up_after)
    delay = RetryPolicy(backoff).next_delay(attempt, ERROR, age, random.Random(seed))
    if attempt >= max_attempts:
        assert delay is None
    elif delay is None:
        assert give_up_after is not None
        assert age + backoff.ceiling(attempt) > give_up_after
    else:
        assert 0.0 <= delay <= backoff.ceiling(attempt)
        assert delay <= (low if kind == "fixed" else high)
        assert kind == "exponential" or delay == backoff.ceiling(attempt)
        assert give_up_after is None or age + delay <= give_up_after


@given(
    st.sampled_from(["fixed", "linear", "exponential"]), st.integers(1, 10**9), st.floats(0, 1e10), st.none() | st.floats(0, 1e10)
)
def test_a_backoff_travels_as_data(kind: Any, max_attempts: int, base: float, give_up_after: float | None) -> None:
    """What a call sets arrives at the worker as it was."""
    backoff = Backoff(kind, max_attempts, base, 300.0, give_up_after)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(backoff), type=Backoff) == backoff
    assert msgspec.json.decode(msgspec.json.encode(backoff), type=Backoff) == backoff


def test_give_up_after_counts_from_the_first_enqueue() -> None:
    """No attempt is made that would begin later than that."""
    policy = RetryPolicy.fixed(100, 10.0, give_up_after=60.0)
    rng = random.Random()
    assert policy.next_delay(3, ERROR, 50.0, rng) == 10.0
    assert policy.next_delay(3, ERROR, 50.1, rng) is None
    by_function = RetryPolicy.call(lambda attempt, error: 10.0, give_up_after=60.0)
    assert by_function.next_delay(3, ERROR, 50.0, rng) == 10.0
    assert by_function.next_delay(3, ERROR, 50.1, rng) is None


@pytest.mark.parametrize(
    ("retry_on", "no_retry_on", "retried", "given_up"),
    [
        (None, (), [ValueError(), KeyboardInterrupt(), BaseException()], []),
        ((OSError,), (), [OSError(), TimeoutError()], [ValueError()]),
        (None, (OSError,), [ValueError()], [OSError(), TimeoutError()]),
        ((OSError,), (TimeoutError,), [OSError(), ConnectionError()], [TimeoutError(), ValueError()]),
        ((), (), [], [ValueError()]),
        (OSError, TimeoutError, [OSError()], [TimeoutError(), ValueError()]),
    ],
    ids=["all", "only", "not", "both", "none", "bare classes"],
)
@pytest.mark.parametrize(
    "make",
    [RetryPolicy.fixed, RetryPolicy.linear, RetryPolicy.exponential, lambda **rest: RetryPolicy.call(lambda a, e: 1.0, **rest)],
)
def test_exceptions_that_are_retried(
    make: Callable[..., RetryPolicy], retry_on: Any, no_retry_on: Any, retried: list[BaseException], given_up: list[BaseException]
) -> None:
    """`retry_on` and `no_retry_on` take classes with their subclasses; the second wins."""
    policy = make(retry_on=retry_on, no_retry_on=no_retry_on)
    for error in retried:
        assert policy.next_delay(1, error, 0.0, random.Random()) is not None
    for error in given_up:
        assert policy.next_delay(1, error, 0.0, random.Random()) is None


def test_a_function_is_told_the_attempt_and_the_error() -> None:
    """`call` passes what failed, and what it raises comes through to be dealt with."""
    told: list[object] = []

    def decide(attempt: int, error: BaseException) -> float:
        told.append((attempt, error))
        if attempt == 2:
            raise KeyError("a bug of its own")
        return 3.0

    policy = RetryPolicy.call(decide)
    assert policy.next_delay(1, ERROR, 0.0, random.Random()) == 3.0
    with pytest.raises(KeyError):
        policy.next_delay(2, ERROR, 0.0, random.Random())
    assert told == [(1, ERROR), (2, ERROR)]


@pytest.mark.parametrize("answer", [math.nan, math.inf, -math.inf, "3", [1]])
def test_a_function_that_answers_nonsense_is_an_error(answer: Any) -> None:
    """What is no number of seconds is never taken for a delay."""
    with pytest.raises((ValueError, TypeError)):
        RetryPolicy.call(lambda attempt, error: answer).next_delay(1, ERROR, 0.0, random.Random())


@pytest.mark.parametrize("value", [-1, -0.001, math.nan, math.inf, 1.1e10, "5", None, True, [1]])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: RetryPolicy.fixed(delay=value), "delay"),
        (lambda value: RetryPolicy.linear(step=value), "step"),
        (lambda value: RetryPolicy.linear(max_backoff=value), "max_backoff"),
        (lambda value: RetryPolicy.exponential(min_backoff=value), "min_backoff"),
        (lambda value: RetryPolicy.exponential(max_backoff=value), "max_backoff"),
        (lambda value: RetryPolicy.fixed(give_up_after=value if value is not None else -1), "give_up_after"),
        (lambda value: RetryPolicy.call(lambda a, e: 1, give_up_after=value if value is not None else -1), "give_up_after"),
    ],
)
def test_bad_seconds_are_refused(make: Callable[[Any], RetryPolicy], name: str, value: object) -> None:
    """Negative, infinite or absurd numbers, and what is no number, are refused under the argument's name."""
    with pytest.raises(ConfigurationError, match=rf"a retry policy's {name} must be a number of seconds from 0 to"):
        make(value)


@pytest.mark.parametrize("value", [0, -1, 2.5, 2.0, math.nan, "5", None, True, 10**10])
@pytest.mark.parametrize("make", [RetryPolicy.fixed, RetryPolicy.linear, RetryPolicy.exponential])
def test_bad_numbers_of_attempts_are_refused(make: Callable[..., RetryPolicy], value: object) -> None:
    """The first attempt is one, and there are no halves: 2.5 could not be read by a worker."""
    with pytest.raises(ConfigurationError, match=r"max_attempts must be at least 1 and a whole number"):
        make(max_attempts=value)


@pytest.mark.parametrize("classes", ["ValueError", [ValueError], ValueError("x"), 3, (ValueError, "x")])
@pytest.mark.parametrize("name", ["retry_on", "no_retry_on"])
def test_what_are_no_exception_classes_is_refused(name: str, classes: object) -> None:
    """A slip is told where the policy is made, not when a task fails."""
    with pytest.raises(ConfigurationError, match=f"a retry policy's {name} must be a tuple of exception classes"):
        RetryPolicy.fixed(**{name: classes})  # type: ignore[arg-type]


def test_a_call_overrides_numbers_and_keeps_the_rules_about_exceptions() -> None:
    """`with_backoff`: other numbers, no function any more, the same exception classes."""
    policy = RetryPolicy.call(lambda attempt, error: 99.0, no_retry_on=(OSError,)).with_backoff(Backoff("fixed", 2, 5.0))
    assert delays(policy) == [5.0]
    assert policy.next_delay(1, OSError(), 0.0, random.Random()) is None
