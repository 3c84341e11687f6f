"""Windows: how many messages a lane asks the server for ahead of their acks. Pure.

A consumer has a window, the most that it may hold unacked. It decides both the speed of a lane (window / 1.4 ms, the way of an ack and of
what it makes room for) and how much is handed over that nobody can take yet. So a lane begins with its share of the free slots, and gets
more only where that was used up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from crossdock.spi import Lane

MOST: Final = 2000
"""The largest window; quorum queues take no larger one."""
STALE: Final = 0.5
"""Seconds after which what nobody took goes back; with the sweep and the way it is within 0.75."""
STALE_IF_BRISK: Final = 3.0
"""The same where receives follow each other quickly: each lane's turn comes, and what went back would lose its place."""
_BRISK: Final = 0.03
"""Seconds from one receive that brings something to the next, usually, where they are quick."""
_USUALLY: Final = 0.75
BRISK_AFTER: Final = 32
"""So many of them show what is usual."""
IDLE: Final = 0.2
"""Seconds without a receive after which a lane asks for nothing more."""
PUT_OFF: Final = 0.02
"""Seconds for which acks wait for a receive that can take what they make room for."""
PUSH: Final = 0.003
"""Seconds in which the server usually sends what there is room for; after that it is asked whether there is anything."""
PAUSE: Final = 0.01
"""Seconds between two changes of a window, at least: each costs the server some milliseconds."""
SHRINK: Final = 2.0
"""Seconds without a message after which a lane that grew begins again."""
_QUICK: Final = 0.1
"""Seconds within which quick tasks end."""
_LASTS: Final = 0.02
"""Seconds of work that a window may hold where that is more than was asked for."""
_WORTH: Final = 1.25
"""A window grows by this factor at least, because each change costs some milliseconds."""
MISSES: Final = 3
"""How often a lane may bring too little before its window grows."""
_AHEAD: Final = 0.4
"""Seconds of work that a lane may be handed ahead of what it can start: it must be taken before it is stale."""
_LEFT_ALONE: Final = 5.0, 60.0
"""Seconds, doubled each time, and at most, for which a lane is left alone that the server does not answer about."""


def first(lanes: Sequence[Lane], limit: int) -> list[int]:
    """The windows with which lanes begin: their quotas, and a share each of what no quota names."""
    share = max(1, (limit - sum(lane.quota for lane in lanes)) // len(lanes))
    return [min(MOST, max(share, min(lane.quota, limit))) for lane in lanes]


def stale_after(times: Sequence[float], away: float) -> float:
    """Seconds after which what nobody took goes back.

    Args:
        times: When the last `BRISK_AFTER` receives that brought something ended.
        away: Seconds for which nobody has been receiving or settling.
    """
    if len(times) < BRISK_AFTER or away > STALE:
        return STALE
    quick = sum(later - earlier < _BRISK for earlier, later in pairwise(times))
    return STALE_IF_BRISK if quick >= _USUALLY * BRISK_AFTER else STALE


def faster(window: int, most: int, out: int, rate: float) -> int:
    """The window of the consumer that takes the place of one that brings too little at a time; 0 if it is large enough.

    That is for quick tasks only: what is handed over ahead of them must be taken before it is stale.

    Args:
        window: The old one.
        most: How many messages were asked for at most.
        out: Messages that are delivered and not acked.
        rate: Acks per second.
    """
    if most == 1:  # on one slot nothing is faster, and first in has to be first out
        return 0
    wanted = min(MOST, max(most, min(2 * window, round(rate * _LASTS))))
    return wanted if wanted >= window * _WORTH and rate * _QUICK >= out else 0


def grown(out: int, need: int, rate: float) -> int:
    """The window of the consumer that takes the place of one whose window is used up by what is being worked on.

    A new consumer's window counts only what it brings itself. So where nothing ends it is exactly what is needed now; the more ends,
    the more it has room for what will take the place of that.

    Args:
        out: Messages that are delivered and not acked.
        need: How many more are wanted now.
        rate: Acks per second.
    """
    return min(MOST, need + min(out, round(rate * _AHEAD)))


def after_a_stall(times: int) -> float:
    """Seconds for which a lane is left alone after the server has given no answer about its queue so many times in a row."""
    shortest, longest = _LEFT_ALONE
    return min(longest, shortest * 2.0 ** min(times, 10))
