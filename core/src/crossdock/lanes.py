"""Lanes and quotas: how a worker's free slots are shared among queues and levels. Pure: no clock, no I/O, no randomness.

A deficit round-robin in two steps, queues by weight, then levels within a queue by 6 : 4 : 2 : 1. A share that cannot be paid out in
whole slots is carried over as credit, so that shares are right over time even on one slot. A lane that was found empty has no share
and no credit; it is asked for one message each time, so that it is noticed when it fills.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

from crossdock.queues import Queue
from crossdock.spi import LEVELS, Lane, Priority

LEVEL_SHARES: Final = {Priority.CRITICAL: 6, Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}

LaneKey = tuple[str, Priority]


class _Share:
    """Something that has a weight and, while it has messages, a claim on slots."""

    __slots__ = ("active", "credit", "quota", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.credit = 0.0
        self.active = True
        self.quota = 0


class Lanes:
    """Plans each receive, and learns from what it brought.

    Args:
        queues: With their weights, in the order given by the user; each at most once.
        strict: Serve queues strictly in that order instead of by weight.
    """

    def __init__(self, queues: Sequence[tuple[Queue, int]], *, strict: bool = False) -> None:
        self._strict = strict
        self._order = [queue.name for queue, _ in queues]
        self._queues = {queue.name: _Share(weight) for queue, weight in queues}
        self._levels = {queue.name: {level: _Share(LEVEL_SHARES[level]) for level in LEVELS} for queue, _ in queues}
        self._strict_queues = {queue.name for queue, _ in queues if queue.priorities == "strict"}

    def plan(self, limit: int, without: Collection[str] = ()) -> list[Lane]:
        """Return the lanes for a receive of up to `limit` messages, in the order in which they are to be served.

        Args:
            limit: Free slots, at least 1.
            without: Queues to leave out: they may not take any more now.
        """
        names = [name for name in self._order if name not in without]
        if self._strict:
            return [Lane(name, level, limit) for name in names for level in LEVELS]
        queues = {name: self._queues[name] for name in names}
        _share_out(limit, queues.values())
        probes: list[Lane] = []
        lanes: list[Lane] = []
        for name in sorted(names, key=lambda name: -_claim(queues[name])):
            plan_queue = self._plan_strict_queue if name in self._strict_queues else self._plan_queue
            probes_here, lanes_here = plan_queue(name, queues[name], limit)
            probes += probes_here
            lanes += lanes_here
        probes.sort(key=lambda lane: -lane.priority)
        return probes + lanes

    def record(self, limit: int, lanes: Sequence[Lane], taken: Mapping[LaneKey, int]) -> None:
        """Learn from a receive: which lanes are empty, who got how much.

        Args:
            limit: As planned for.
            lanes: As planned.
            taken: Messages received, by lane.
        """
        total = sum(taken.values())
        self._learn_activity(limit, lanes, taken, total)
        if self._strict:
            return
        planned = {lane.queue for lane in lanes}
        _settle_up({self._queues[name]: sum(taken.get((name, level), 0) for level in LEVELS) for name in planned})
        for name in planned:
            _settle_up({share: taken.get((name, level), 0) for level, share in self._levels[name].items()})

    def _plan_queue(self, name: str, queue: _Share, _: int) -> tuple[list[Lane], list[Lane]]:
        levels = self._levels[name]
        _share_out(queue.quota, levels.values())
        probes = [Lane(name, level, 1) for level, share in levels.items() if not share.active]
        active = [(level, share) for level, share in levels.items() if share.active]
        active.sort(key=lambda pair: -_claim(pair[1]))
        return probes, [Lane(name, level, share.quota) for level, share in active]

    def _plan_strict_queue(self, name: str, queue: _Share, limit: int) -> tuple[list[Lane], list[Lane]]:
        levels = self._levels[name]
        if not queue.active:
            # Among busy queues it is asked for one of each level; only in the receive in which it is noticed may a lower level then
            # come before the rest of a higher one.
            busy = any(share.active for share in self._queues.values())
            return [Lane(name, level, 1 if busy else limit) for level in LEVELS], []
        top = next(level for level in LEVELS if levels[level].active)
        # Levels above `top` were empty. When it is the queue's turn, what came there meanwhile goes first, even beyond the queue's
        # share; credit evens that out. Levels below `top` wait for pass 2.
        above = limit if queue.quota else 0
        return [], [Lane(name, level, above if level > top else queue.quota if level == top else 0) for level in LEVELS]

    def _learn_activity(self, limit: int, lanes: Sequence[Lane], taken: Mapping[LaneKey, int], total: int) -> None:
        left = limit
        last_of_pass_2 = -1
        for at, lane in enumerate(lanes):
            got = taken.get((lane.queue, lane.priority), 0)
            could = min(lane.quota, left)
            left -= min(got, could)
            share = self._levels[lane.queue][lane.priority]
            if got < could:
                share.active = False
            elif got:
                share.active = True
            if got > could:
                last_of_pass_2 = at
        for at, lane in enumerate(lanes):
            if total < limit or at < last_of_pass_2:
                self._levels[lane.queue][lane.priority].active = False
        for name in {lane.queue for lane in lanes}:
            self._queues[name].active = any(share.active for share in self._levels[name].values())


def _claim(share: _Share) -> float:
    """What it is owed, for the order: credit first, then weight."""
    return (share.credit + share.weight / 1e6) if share.active else -1e9


def _share_out(slots: int, shares: Collection[_Share]) -> None:
    """Set each quota: the slots by weight, corrected by credit, in whole numbers that sum to `slots`; 0 for inactive ones."""
    active = [share for share in shares if share.active]
    for share in shares:
        share.quota = 0
    weights = sum(share.weight for share in active)
    if not active or slots <= 0:
        return
    due = {share: max(0.0, share.credit + slots * share.weight / weights) for share in active}
    if not any(due.values()):  # the only ones left are in debt to others that are empty now
        due = {share: share.weight for share in active}
    scale = slots / sum(due.values())
    for share in active:
        share.quota = int(due[share] * scale + 1e-9)
    left = slots - sum(share.quota for share in active)
    active.sort(key=lambda share: (due[share] * scale - share.quota, share.weight), reverse=True)
    for share in active[:left]:
        share.quota += 1


def _settle_up(taken: Mapping[_Share, int]) -> None:
    """Credit each active share with what it was due of all that was taken, less what it got; nobody is owed what was not there."""
    active = [share for share in taken if share.active]
    weights = sum(share.weight for share in active)
    total = sum(taken[share] for share in active)
    for share, got in taken.items():
        if not share.active:
            share.credit = 0.0
            continue
        share.credit += total * share.weight / weights - got
        bound = 2.0 * max(1, total)
        share.credit = max(-bound, min(bound, share.credit))
