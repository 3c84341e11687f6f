"""Delays: how a wait is made of levels. Pure.

Level i is a queue in which every message waits for the same time, 125 ms << i, so that none stands before another that is due earlier.
A wait is the sum of the levels whose bits are set; the message goes through them from the longest to the shortest. Its routing key names
them, each with an @ before it, which can stand in no name: `@c.@3.@z.<namespace>.<queue>.p<level>`, 226 bytes at most of the 255 there are.
"""

from __future__ import annotations

from typing import Final

TICK_MS: Final = 125
LEVELS: Final = 31
END: Final = "@z"
"""The word behind the last level."""
_DIGITS: Final = "0123456789abcdefghijklmnopqrstu"
_MAY_BE_EARLY_MS: Final = 40
"""Of the 50 ms by which a message may come too early, these are used to lose less by rounding up."""
LONGEST: Final = (TICK_MS * ((1 << LEVELS) - 1)) / 1000
"""Seconds of the longest wait: eight and a half years."""


def word(level: int) -> str:
    """The word for a level in a routing key."""
    return f"@{_DIGITS[level]}"


def ttl_ms(level: int) -> int:
    """How long a message waits in a level."""
    return TICK_MS << level


def ticks(wait_ms: int) -> int:
    """A wait in ticks, rounded up; 0 if it is too short to be one. The longest wait is not exceeded."""
    return min(-(-max(0, wait_ms - _MAY_BE_EARLY_MS) // TICK_MS), (1 << LEVELS) - 1)


def routing_key(wait_ms: int, due_key: str) -> str:
    """The routing key of a message that has to wait so long; `ticks` of it is above 0."""
    count = ticks(wait_ms)
    words = [word(level) for level in reversed(range(LEVELS)) if count >> level & 1]
    return ".".join((*words, END, due_key))
