"""What a handler raises to choose its own ending. These are orders, not errors."""

from __future__ import annotations


class TaskOutcome(Exception):
    """The root of `RetryLater`, `Reject` and `Snooze`."""


class RetryLater(TaskOutcome):
    """Count this attempt as failed and try again after `delay`, whatever the retry policy's own delay.

    `max_attempts` still holds: the last attempt is dead-lettered.

    Args:
        delay: Seconds until the next attempt.
        text: Why; kept in the task's history.
    """

    delay: float = 0.0

    def __init__(self, delay: float = 0.0, text: str = "") -> None:
        super().__init__(text or f"retry in {delay:g} s")
        self.delay = max(0.0, float(delay))


class Reject(TaskOutcome):
    """Dead-letter the task now: trying again cannot help.

    Args:
        text: Why; stands in the dead letter.
    """

    def __init__(self, text: str = "rejected by the task") -> None:
        super().__init__(text)


class Snooze(TaskOutcome):
    """Run this task again after `delay` without spending an attempt.

    Args:
        delay: Seconds.
    """

    delay: float = 0.0

    def __init__(self, delay: float) -> None:
        super().__init__(f"snoozed for {delay:g} s")
        self.delay = max(0.0, float(delay))
