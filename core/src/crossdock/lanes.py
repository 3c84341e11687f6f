"""Lanes and quotas: how a worker's free slots are shared among queues and levels. Pure: no clock, no I/O, no randomness.

Weighted turns in two steps, queues by weight, then levels within a queue by 6 : 4 : 2 : 1. Each of them has a mark that moves on by
1 / weight with every message it gives, and the lowest mark is next; so shares are right over time even on one slot. A lane that was
found empty takes no turns; it is asked for one message each time, so that it is noticed when it fills.

A worker may serve hundreds of queues, and plans every few milliseconds. So the lanes that nothing happens to stand ready in lists,
and what a plan and its record do one by one, they do for lanes that messages are expected or came from. For the broker's sake, too:
among busy lanes, very many empty ones are asked in turn, a few in each receive.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from heapq import heapreplace
from operator import attrgetter
from typing import Final, TypeVar

from crossdock.queues import Queue
from crossdock.spi import LEVELS, Lane, Priority

LEVEL_SHARES: Final = {Priority.CRITICAL: 6, Priority.HIGH: 4, Priority.NORMAL: 2, Priority.LOW: 1}

FEW: Final = 8
"""Busy queues of which each gets a turn in every receive, as far as the slots go. Of more than that, a few get several slots each."""
TURNS: Final = 3
"""How many these few are. A message of one queue alone costs a broker as much as several, and a receive for many slots at once means
that tasks are short, so that the turns of the others come soon."""
SPARE: Final = 4
"""Queues that may take what those few leave over. A broker that finds all it was asked for in the lanes with a quota need not look at
hundreds of others."""
PROBES: Final = 16
"""Empty lanes that a receive asks for a message among busy ones, where tasks are short. Of 200 queues each empty lane is asked in every
fiftieth receive, which is some hundredths of a second."""
SHORT: Final = 16
"""A receive for so many slots at once means that tasks are short."""

LaneKey = tuple[str, Priority]


class _Share:
    """Something that has a weight and, while it has messages, takes turns."""

    __slots__ = ("active", "mark", "stride", "weight")

    def __init__(self, weight: int) -> None:
        self.active = True
        self.weight = weight
        self.stride = 1.0 / weight
        self.mark = self.stride

    @property
    def start(self) -> float:
        """Where its turn begins; the mark is where it ends."""
        return self.mark - self.stride


class _Level(_Share):
    """A level of a queue: one lane."""

    __slots__ = ("ask_none", "ask_one", "key", "place", "probed", "queue")

    def __init__(self, queue: _Queue, level: Priority) -> None:
        super().__init__(LEVEL_SHARES[level])
        self.queue = queue
        self.key = (queue.name, level)
        self.place = -level, queue.place
        """Among lanes that are probed: the most urgent ones of all queues come first."""
        self.ask_none = Lane(queue.name, level, 0)
        self.ask_one = Lane(queue.name, level, 1)
        self.probed = False
        """Whether it is asked for one message only to notice when it fills."""

    def ask(self, quota: int) -> Lane:
        if quota > 1:
            return Lane(*self.key, quota)
        return self.ask_one if quota else self.ask_none


class _Queue(_Share):
    __slots__ = ("ask_none", "levels", "name", "place", "planned", "strict", "turns")

    def __init__(self, queue: Queue, weight: int, place: int) -> None:
        super().__init__(weight)
        self.name = queue.name
        self.place = place
        self.strict = queue.priorities == "strict"
        self.levels = [_Level(self, level) for level in LEVELS]
        self.set_turns(self.levels.copy())

    def set_turns(self, turns: list[_Level]) -> None:
        """Say which levels are active, the next one first."""
        self.turns = turns
        self.planned = self.levels if self.strict and turns else turns
        """The levels that are not just probed, in the order in which plans have them."""
        for level in self.levels:
            level.probed = level not in self.planned
        self.ask_none = [level.ask_none for level in self.planned]
        """Stands for it in plans that ask it for nothing."""

    def sort_turns(self) -> None:
        """Bring its levels into order after marks moved on."""
        self.turns.sort(key=_mark)
        self.ask_none = [level.ask_none for level in self.planned]

    def share_out(self, quota: int, limit: int) -> dict[_Level, int]:
        """What its levels are asked for, in order, when it is its turn for `quota` messages of `limit`."""
        if not self.strict:
            return _share_out(quota, self.turns)
        # Levels above the first active one were empty. What came there meanwhile goes first, even beyond the queue's share; its
        # mark evens that out. Levels below wait for pass 2.
        quotas: dict[_Level, int] = {}
        for level in self.levels:
            quotas[level] = quota if level.active else limit
            if level.active:
                break
        return quotas


class Plan:
    """What to ask the broker for, and what `Lanes.record` has to know of it."""

    __slots__ = ("busy", "lanes", "limit", "quotas")

    def __init__(self, limit: int, lanes: list[Lane], busy: Sequence[_Queue], quotas: Mapping[_Level, int]) -> None:
        self.limit = limit
        self.lanes = lanes
        """In the order in which they are to be served, those that are probed first."""
        self.busy = busy
        """The active queues, in the order of their lanes."""
        self.quotas = quotas
        """What is asked of lanes that are not just probed, in order, zeros left out."""


class Lanes:
    """Plans each receive, and learns from what it brought.

    Args:
        queues: With their weights, in the order given by the user; each at most once.
        strict: Serve queues strictly in that order instead of by weight.
    """

    def __init__(self, queues: Sequence[tuple[Queue, int]], *, strict: bool = False) -> None:
        self._strict = strict
        self._queues = [_Queue(queue, weight, place) for place, (queue, weight) in enumerate(queues)]
        self._levels = {level.key: level for queue in self._queues for level in queue.levels}
        self._by_place = sorted(self._levels.values(), key=_place)
        self._any_strict = any(queue.strict for queue in self._queues)
        self._turns = sorted(self._queues, key=_mark)
        self._probes: tuple[list[Lane], list[Lane]] | None = None
        """The lanes that were empty: asked for one message, and for none."""
        self._turn_of_probes = 0
        self._in_order = [level.ask_none for level in self._by_place]

    def plan(self, limit: int, without: Collection[str] = ()) -> Plan:
        """Plan a receive of up to `limit` messages.

        Args:
            limit: Free slots, at least 1.
            without: Queues to leave out: they may not take any more now.
        """
        if self._strict:
            return Plan(limit, self._plan_in_order(limit, without), (), {})
        busy, lanes = self._turns, self._plan_probes(limit)
        if without:
            busy = [queue for queue in busy if queue.name not in without]
            lanes = [lane for lane in lanes if lane.queue not in without]
        quotas: dict[_Level, int] = {}
        if busy:
            portion = _portion(limit, len(busy))
            shares = _share_out(limit, busy, portion)
            if portion > 1:
                shares.update(dict.fromkeys(busy[len(shares) : len(shares) + SPARE], portion))
            for queue, quota in shares.items():
                quotas_here = queue.share_out(quota, limit)
                lanes += [level.ask(quotas_here.get(level, 0)) for level in queue.planned]
                quotas |= quotas_here
            for queue in busy[len(shares) :]:
                lanes += queue.ask_none
        elif self._any_strict:
            # Nothing is known to wait: a strict queue can be asked for all there may be of a level, and its order holds at once.
            # Among busy queues it is asked for one of each level; only in the receive in which it is noticed may a lower level
            # then come before the rest of a higher one.
            idle = [level for level in self._by_place if level.queue.name not in without]
            quotas = {level: limit for level in idle if level.queue.strict}
            lanes = [level.ask(quotas.get(level, 1)) for level in idle]
        return Plan(limit, lanes, busy, quotas)

    def record(self, plan: Plan, taken: Mapping[LaneKey, int]) -> None:
        """Learn from a receive: which lanes are empty, who got how much.

        Args:
            plan: What was asked for.
            taken: Messages received, by lane.
        """
        if self._strict:
            return
        if sum(taken.values()) < plan.limit:  # everything is empty now
            self._settle_up({}, {level for queue in plan.busy for level in queue.turns})
        else:
            got = {self._levels[key]: count for key, count in taken.items() if key in self._levels}
            self._settle_up(got, self._emptied(plan, got))
        if len(plan.busy) < len(self._turns):
            self._pass_over(set(self._turns).difference(plan.busy))

    def _plan_probes(self, limit: int) -> list[Lane]:
        if self._probes is None:
            empty = [level for level in self._by_place if level.probed]
            self._probes = [level.ask_one for level in empty], [level.ask_none for level in empty]
        ones, nones = self._probes
        if len(ones) <= 2 * PROBES or limit < SHORT or not self._turns:  # two receives' worth is not worth taking turns
            return ones.copy()
        step = -(-len(ones) // PROBES)
        first = self._turn_of_probes = (self._turn_of_probes + 1) % step
        lanes = nones.copy()
        lanes[first::step] = ones[first::step]
        return lanes

    def _plan_in_order(self, limit: int, without: Collection[str]) -> list[Lane]:
        if limit != self._in_order[0].quota:
            self._in_order = [Lane(*level.key, limit) for queue in self._queues for level in queue.levels]
        return [lane for lane in self._in_order if lane.queue not in without] if without else self._in_order

    def _emptied(self, plan: Plan, got: Mapping[_Level, int]) -> set[_Level]:
        """The lanes that a receive which brought all it was to bring has shown to be empty."""
        probed = sorted((level for level in got if level.probed), key=_place)
        asked = {**dict.fromkeys(probed, 1), **plan.quotas}
        emptied: set[_Level] = set()
        left = plan.limit
        for level, quota in asked.items():
            could = min(quota, left)
            count = min(got.get(level, 0), could)
            if count < could:
                emptied.add(level)
            left -= count
        if left:  # these came in pass 2: all lanes before the last one that it reached are empty
            order = [*probed, *(level for queue in plan.busy for level in queue.planned)]
            reached = [place for place, level in enumerate(order) if got.get(level, 0) > asked.get(level, 0)]
            if reached:
                emptied.update(order[: reached[-1]])
                emptied.discard(order[reached[-1]])
        return emptied

    def _settle_up(self, got: Mapping[_Level, int], emptied: Collection[_Level]) -> None:
        """Let marks move on, what is empty leave the turns, and what was found waiting join them."""
        gave: dict[_Queue, int] = {}
        found: dict[_Queue, list[_Level]] = {}
        for level, count in got.items():
            gave[level.queue] = gave.get(level.queue, 0) + count
            if level.active:
                level.mark += count * level.stride
            elif level not in emptied:
                found.setdefault(level.queue, []).append(level)
        for level in emptied:
            level.active = False
            gave.setdefault(level.queue, 0)
        if emptied or found:
            self._probes = None
        for queue, count in gave.items():
            queue.mark += count * queue.stride
            if emptied or found:
                queue.set_turns(_in_turns(queue.turns, found.get(queue, ())))
            elif len(queue.turns) > 1:
                queue.sort_turns()
        new = [queue for queue in found if not queue.active]
        for queue in gave if emptied else ():
            queue.active = bool(queue.turns)
        self._turns = _in_turns(self._turns, new)

    def _pass_over(self, left_out: Collection[_Queue]) -> None:
        """Queues that could not take their turn are not owed it: they go on where the others are now."""
        now = next((queue.start for queue in self._turns if queue not in left_out), 0.0)
        for queue in left_out:
            queue.mark = max(queue.mark, now + queue.stride)
        self._turns.sort(key=_mark)


_S = TypeVar("_S", bound=_Share)
_mark = attrgetter("mark")
_place = attrgetter("place")


def _portion(slots: int, queues: int) -> int:
    """How many slots a queue gets in its turn."""
    return max(1, slots // TURNS) if queues > FEW else 1


def _share_out(slots: int, turns: Sequence[_S], portion: int = 1) -> dict[_S, int]:
    """Give slots away, a portion to whose turn it is. Return how many each got, in the order of turns, without zeros."""
    if slots == 1 or len(turns) == 1:
        return {turns[0]: slots}
    rounds = slots // sum(share.weight for share in turns) if portion == 1 and slots > len(turns) else 0
    quotas = {share: rounds * share.weight for share in turns} if rounds else {}
    marks = [(share.mark, place, share) for place, share in enumerate(turns[:slots])]  # in order, hence a heap
    left = slots - sum(quotas.values())
    while left:
        mark, place, share = marks[0]
        quota = min(portion, left)
        quotas[share] = quotas.get(share, 0) + quota
        left -= quota
        heapreplace(marks, (mark + quota * share.stride, place, share))
    return quotas


def _in_turns(turns: Sequence[_S], found: Sequence[_S]) -> list[_S]:
    """Return those that are still active, the next one first, with those that were found waiting among them."""
    going_on = [share for share in turns if share.active]
    going_on.sort(key=_mark)
    if found:  # they are owed nothing for when they were empty: they join where the others are
        now = going_on[0].start if going_on else 0.0
        for share in found:
            share.active = True
            share.mark = now + share.stride
        going_on += found
        going_on.sort(key=_mark)
    return going_on
