"""Shares of slots among queues and levels, against a plain model of a broker's receive."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock.lanes import LEVEL_SHARES, PROBES, LaneKey, Lanes, Plan
from crossdock.queues import Queue
from crossdock.spi import LEVELS, Lane, Priority

ENDLESS = 10**9
WEIGHTS = {"critical": 6, "high": 4, "default": 2, "low": 1}
CRITICAL, HIGH, NORMAL, LOW = LEVELS


class Model:
    """Queues of anonymous messages, and a worker that asks for them as `Broker.receive` promises to answer."""

    def __init__(self, lanes: Lanes, waiting: Mapping[LaneKey, int]) -> None:
        self.lanes = lanes
        self.waiting = Counter(dict(waiting))
        self.got: Counter[LaneKey] = Counter()
        self.plans: list[list[Lane]] = []

    def receive(self, limit: int, without: Collection[str] = ()) -> Counter[LaneKey]:
        """One receive with so many free slots."""
        plan = self.lanes.plan(limit, without)
        self.plans.append(plan.lanes)
        taken: Counter[LaneKey] = Counter()
        for lane, quota in [*((lane, lane.quota) for lane in plan.lanes), *((lane, limit) for lane in plan.lanes)]:
            key = (lane.queue, lane.priority)
            count = min(quota, limit - taken.total(), self.waiting[key])
            if count > 0:
                taken[key] += count
                self.waiting[key] -= count
        self.lanes.record(plan, taken)
        self.got += taken
        return taken

    def receive_in_all(self, total: int, limit: int) -> None:
        """Receives until so many messages were taken in all."""
        while self.got.total() < total:
            assert self.receive(limit), "there was nothing left"

    def share_of_queue(self, name: str) -> float:
        """Percent of all that was taken."""
        return 100 * sum(self.got[name, level] for level in LEVELS) / self.got.total()

    def share_of_level(self, level: Priority) -> float:
        """Percent of all that was taken."""
        return 100 * sum(count for (_, each), count in self.got.items() if each == level) / self.got.total()


def weighted(weights: Mapping[str, int], *, strict: bool = False) -> Lanes:
    """Lanes for queues of these weights."""
    return Lanes([(Queue(name), weight) for name, weight in weights.items()], strict=strict)


def full(names: Collection[str], levels: Collection[Priority] = LEVELS) -> dict[LaneKey, int]:
    """Backlogs that never empty."""
    return {(name, level): ENDLESS for name in names for level in levels}


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_levels_share_6_4_2_1(slots: int) -> None:
    """With all levels waiting their shares are within 2 points over 10,000 messages, on one slot as on many."""
    model = Model(weighted({"q": 1}), full(["q"]))
    model.receive_in_all(10_000, slots)
    for level, share in LEVEL_SHARES.items():
        assert model.share_of_level(level) == pytest.approx(100 * share / 13, abs=0.1 if slots < 100 else 1)


@pytest.mark.parametrize("levels", [(NORMAL,), LEVELS, (CRITICAL, LOW)], ids=["one level", "all levels", "two levels"])
@pytest.mark.parametrize("slots", [1, 7, 100])
def test_queues_share_by_weight(slots: int, levels: Sequence[Priority]) -> None:
    """critical=6, high=4, default=2, low=1 within 2 points over 10,000 messages, whatever the levels within."""
    model = Model(weighted(WEIGHTS), full(WEIGHTS, levels))
    model.receive_in_all(10_000, slots)
    for name, weight in WEIGHTS.items():
        assert model.share_of_queue(name) == pytest.approx(100 * weight / 13, abs=0.1 if slots < 100 else 1)


def test_shares_hold_for_any_number_of_free_slots_at_a_time() -> None:
    """A worker rarely frees the same number of slots twice."""
    model = Model(weighted(WEIGHTS), full(WEIGHTS))
    for slots in itertools.cycle([1, 2, 25, 1, 1, 99, 3]):
        if model.got.total() >= 10_000:
            break
        model.receive(slots)
    for name, weight in WEIGHTS.items():
        assert model.share_of_queue(name) == pytest.approx(100 * weight / 13, abs=0.5)
    for level, share in LEVEL_SHARES.items():
        assert model.share_of_level(level) == pytest.approx(100 * share / 13, abs=0.5)


def test_more_queues_than_slots() -> None:
    """Two hundred queues and 33 slots at a time: each gets its share all the same, though not in every receive."""
    weights = {f"q{number}": 1 + number % 3 for number in range(200)}
    model = Model(weighted(weights), full(weights, [NORMAL, LOW]))
    model.receive_in_all(40_000, 33)
    for name, weight in weights.items():
        assert sum(model.got[name, level] for level in LEVELS) == pytest.approx(100 * weight, abs=11)
    assert model.share_of_level(NORMAL) == pytest.approx(200 / 3, abs=1)


@pytest.mark.parametrize(("slots", "portion"), [(3, 1), (8, 2), (33, 11)])
def test_of_very_many_queues_few_are_asked_at_a_time(slots: int, portion: int) -> None:
    """Several slots each, where there are slots for that; few slots go one by one. Nobody is ever ahead by more than such a portion."""
    names = [f"q{number}" for number in range(50)]
    model = Model(weighted(dict.fromkeys(names, 1)), full(names, [NORMAL]))
    model.receive_in_all(3000, slots)  # from here on it is known that only NORMAL waits
    for _ in range(50):
        assert len(model.receive(slots)) <= -(-slots // portion)
    model.receive_in_all(6000, slots)
    counts = [model.got[name, NORMAL] for name in names]
    assert max(counts) - min(counts) <= 2 * portion


@pytest.mark.parametrize("slots", [1, 100])
def test_very_different_weights(slots: int) -> None:
    """1,000 : 1 gives the small one its thousandth, neither more nor nothing."""
    model = Model(weighted({"big": 1000, "small": 1}), full(["big", "small"], [NORMAL]))
    model.receive_in_all(20_000, slots)
    assert sum(model.got["small", level] for level in LEVELS) == pytest.approx(20, abs=2)


def test_the_most_urgent_comes_first() -> None:
    """Before anything else is known, a single slot takes CRITICAL of the heaviest queue."""
    model = Model(weighted({"low": 1, "critical": 6}), full(["low", "critical"]))
    assert model.receive(1) == {("critical", CRITICAL): 1}
    assert Model(weighted({"q": 1}), full(["q"])).receive(1) == {("q", CRITICAL): 1}


@pytest.mark.parametrize("slots", [1, 25, 100])
def test_idle_shares_are_given_away(slots: int) -> None:
    """Slots are never left empty; those that wait share what the others do not use, by their weights."""
    model = Model(weighted(WEIGHTS), full(["high", "low"], [NORMAL]))
    for _ in range(max(100, 3_000 // slots)):
        assert model.receive(slots).total() == slots
    assert model.share_of_queue("high") == pytest.approx(80, abs=1)
    assert model.share_of_queue("low") == pytest.approx(20, abs=1)


def test_a_single_waiting_level_gets_everything() -> None:
    """LOW of one queue fills all slots while nothing else waits."""
    model = Model(weighted(WEIGHTS), full(["low"], [LOW]))
    for _ in range(50):
        assert model.receive(100) == {("low", LOW): 100}


@pytest.mark.parametrize("slots", [1, 25])
def test_a_queue_that_needs_less_than_its_share_gets_what_it_needs(slots: int) -> None:
    """A heavy queue with few messages is served at once; the rest goes to the others, by their weights."""
    model = Model(weighted(WEIGHTS), full(["high", "default", "low"], [NORMAL]))
    for number in range(max(200, 6_000 // slots)):
        model.waiting["critical", LEVELS[number % 4]] += slots if number % 5 == 0 else 0
        model.receive(slots)
    assert sum(model.waiting["critical", level] for level in LEVELS) <= 2 * slots
    assert model.share_of_queue("critical") == pytest.approx(20, abs=0.5)
    assert model.share_of_queue("high") == pytest.approx(80 * 4 / 7, abs=2)
    assert model.share_of_queue("low") == pytest.approx(80 / 7, abs=2)


@pytest.mark.parametrize("slots", [1, 25, 100])
@pytest.mark.parametrize("late", [("critical", CRITICAL), ("low", LOW)])
def test_a_lane_that_fills_later_gets_its_share_soon(late: LaneKey, slots: int) -> None:
    """It is noticed in the next receive, and from then on has its full share, neither less for having been empty nor more."""
    name, _ = late
    others = [each for each in WEIGHTS if each != name]
    model = Model(weighted(WEIGHTS), full(others, [NORMAL]))
    for _ in range(500):
        model.receive(slots)
    model.waiting[late] = ENDLESS
    assert model.receive(slots)[late] >= 1
    model.got.clear()
    model.receive_in_all(5000, slots)
    assert model.share_of_queue(name) == pytest.approx(100 * WEIGHTS[name] / 13, abs=2)


def test_a_burst_is_not_paid_for_later() -> None:
    """What a queue took while it was alone is not held against it when others come."""
    model = Model(weighted({"a": 1, "b": 1}), full(["a"], [NORMAL]))
    model.receive_in_all(10_000, 10)
    model.waiting["b", NORMAL] = ENDLESS
    model.got.clear()
    model.receive_in_all(100, 10)
    assert model.share_of_queue("a") == pytest.approx(50, abs=11)


def test_queues_at_their_own_limit_are_left_out() -> None:
    """Their slots go to the others meanwhile, and afterwards shares are as before."""
    model = Model(weighted({"a": 3, "b": 1}), full(["a", "b"], [NORMAL]))
    assert model.lanes.plan(10, {"a", "b"}).lanes == []
    for _ in range(200):
        assert model.receive(10, without={"a"}) == {("b", NORMAL): 10}
    model.got.clear()
    model.receive_in_all(4000, 10)
    assert model.share_of_queue("a") == pytest.approx(75, abs=2)


def test_an_idle_worker_takes_the_most_urgent_first() -> None:
    """When nothing was waiting anywhere and messages come, the level counts, whatever the order of the queues."""
    model = Model(weighted({"a": 1000, "b": 1}), {})
    for _ in range(3):
        assert not model.receive(1)
    model.waiting["a", LOW] = model.waiting["a", NORMAL] = model.waiting["b", CRITICAL] = 1
    assert [list(model.receive(1)) for _ in range(3)] == [[("b", CRITICAL)], [("a", NORMAL)], [("a", LOW)]]


def test_what_one_queue_leaves_goes_to_the_heaviest_other() -> None:
    """The rest of a receive is filled in the order of claims, not in the order of listing."""
    model = Model(weighted({"low": 1, "default": 2, "critical": 6}), full(["low", "default"], LEVELS))
    taken = model.receive(9)
    assert sum(taken["default", level] for level in LEVELS) == 8
    assert sum(taken["low", level] for level in LEVELS) == 1


def test_what_a_receive_proves() -> None:
    """Less than asked for: everything is empty now. Something from the second pass: all lanes before it are."""
    lanes = weighted({"a": 2, "b": 1})
    lanes.record(lanes.plan(1), {})
    assert not any(_active(lanes).values())
    assert [lane.quota for lane in lanes.plan(1).lanes] == [1] * 8
    lanes = weighted({"a": 2, "b": 1})
    plan = lanes.plan(3)
    asked = [("a", CRITICAL, 1), ("a", HIGH, 1), ("a", NORMAL, 0), ("a", LOW, 0), ("b", CRITICAL, 1), ("b", HIGH, 0)]
    assert [(lane.queue, lane.priority, lane.quota) for lane in plan.lanes][:6] == asked
    lanes.record(plan, {("b", CRITICAL): 1, ("b", NORMAL): 2})
    known = _active(lanes)
    assert [known[lane.queue, lane.priority] for lane in plan.lanes] == [False] * 6 + [True, True]


def test_a_delivery_from_a_lane_that_was_not_planned_does_no_harm() -> None:
    """A backend may hand over what it had fetched for the receive before."""
    lanes = weighted({"a": 1, "b": 1})
    lanes.record(lanes.plan(2, {"a"}), {("a", CRITICAL): 1, ("b", LOW): 1})
    lanes.record(lanes.plan(2, {"a"}), {("a", CRITICAL): 2, ("unknown", LOW): 1})
    assert sum(lane.quota for lane in lanes.plan(10).lanes if _active(lanes)[lane.queue, lane.priority]) == 10


# --- strict ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [1, 3, 10])
def test_a_strict_worker_takes_queues_in_order(slots: int) -> None:
    """A later queue waits for all that is in an earlier one, a lower level for all that is in a higher one, at every moment."""
    lanes = weighted({"first": 1, "second": 1000}, strict=True)
    order = [(name, level) for name in ("first", "second") for level in LEVELS]
    model = Model(lanes, dict.fromkeys(order, 7))
    for step in range(60):
        if step % 9 == 4:
            model.waiting[order[step % 8]] += 5
        before = Counter(model.waiting)
        taken = model.receive(slots)
        first_left = next((key for key in order if before[key] > taken[key]), None)
        if first_left is not None:
            assert not any(taken[key] for key in order[order.index(first_left) + 1 :])


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_a_strict_queue_serves_its_levels_in_order(slots: int) -> None:
    """A lower level waits for all higher ones, also for those that come in a burst after having been empty."""
    model = Model(Lanes([(Queue("q", priorities="strict"), 1)]), full(["q"], [LOW]))
    for step in range(200):
        if step % 7 == 3:
            for level in (CRITICAL, HIGH, NORMAL):
                model.waiting["q", level] += 1 + (step * level) % 150
        if step % 50 == 20:  # sometimes everything is empty for a while
            model.waiting["q", LOW] = 0
            while model.receive(slots):
                pass
            model.waiting["q", LOW] = ENDLESS
            model.waiting["q", HIGH] = slots
        before = Counter(model.waiting)
        taken = model.receive(slots)
        assert taken.total() == slots
        first_left = next(level for level in LEVELS if before["q", level] > taken["q", level])
        assert not any(taken["q", level] for level in LEVELS if level < first_left)


@pytest.mark.parametrize("slots", [1, 10, 100])
def test_a_strict_queue_among_others_keeps_its_order_and_its_share(slots: int) -> None:
    """Being strict inside gives it no larger share, and its bursts do not break its order."""
    strict = Queue("strict", priorities="strict")
    model = Model(Lanes([(strict, 1), (Queue("fair"), 3)]), full(["strict", "fair"], [LOW]))
    for step in range(max(200, 6_000 // slots)):
        if step % 20 == 3:
            model.waiting["strict", CRITICAL] += slots
        before = Counter(model.waiting)
        taken = model.receive(slots)
        assert taken.total() == slots
        if before["strict", CRITICAL] > taken["strict", CRITICAL]:
            assert not taken["strict", LOW]
    assert model.share_of_queue("strict") == pytest.approx(25, abs=2)


def test_a_strict_queue_that_fills_among_busy_ones_is_noticed_and_then_strict() -> None:
    """It may be found at any level, one message each, and from the next receive on its order is kept."""
    strict = Queue("strict", priorities="strict")
    model = Model(Lanes([(strict, 1), (Queue("busy"), 1)]), full(["busy"], [NORMAL]))
    for _ in range(20):
        model.receive(10)
    model.waiting["strict", CRITICAL] = model.waiting["strict", LOW] = 100
    taken = model.receive(10)
    assert taken["strict", CRITICAL] >= 1
    assert taken["strict", LOW] <= 1
    while model.waiting["strict", CRITICAL] > 10:
        assert not model.receive(10)["strict", LOW]


# --- what holds for every plan --------------------------------------------------------------------

Arrivals = list[tuple[int, Priority, int]]
Step = tuple[int, Arrivals, set[int]]

WEIGHT = st.integers(1, 1000)
KIND = st.sampled_from(["fair", "strict"])
QUEUES = st.lists(st.tuples(KIND, WEIGHT), min_size=1, max_size=5).map(
    lambda drawn: [(Queue(f"q{number}", priorities=kind), weight) for number, (kind, weight) in enumerate(drawn)]  # type: ignore[arg-type]
)
FAIR_QUEUES = QUEUES.map(lambda queues: [(Queue(queue.name), weight) for queue, weight in queues])
ARRIVALS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(LEVELS), st.integers(0, 200)), max_size=6)
SLOTS = st.integers(1, 120)
STEPS = st.lists(st.tuples(SLOTS, ARRIVALS, st.sets(st.integers(0, 4), max_size=4)), max_size=40)
"""Free slots, what arrives where, and queues that are at their own limit, or empty."""


@given(QUEUES, st.booleans(), STEPS)
def test_every_plan_is_sound(queues: list[tuple[Queue, int]], strict: bool, steps: list[Step]) -> None:
    """Each lane of each queue that may be served is planned exactly once, no quota is negative or beyond the slots, no slot wasted."""
    names = [queue.name for queue, _ in queues]
    model = Model(Lanes(queues, strict=strict), {})
    for slots, arrivals, full_queues in steps:
        for queue, level, count in arrivals:
            if queue < len(names):
                model.waiting[names[queue], level] += count
        without = {names[number] for number in full_queues if number < len(names)}
        served = [name for name in names if name not in without]
        there = sum(model.waiting[name, level] for name in served for level in LEVELS)
        taken = model.receive(slots, without)
        plan = model.plans[-1]
        assert sorted((lane.queue, lane.priority) for lane in plan) == sorted((name, level) for name in served for level in LEVELS)
        assert all(0 <= lane.quota <= slots for lane in plan)
        assert taken.total() == min(slots, there)


def test_what_a_queue_of_many_leaves_goes_to_the_next_in_turn() -> None:
    """Where not every queue gets a turn, those that follow may fill what is left, so that nobody has to look at all of them."""
    names = [f"q{number}" for number in range(50)]
    model = Model(weighted(dict.fromkeys(names, 1)), full(names, [NORMAL]))
    model.receive_in_all(3000, 33)
    first, *others = [lane for lane in model.lanes.plan(33).lanes if lane.quota > 1]
    model.waiting[first.queue, first.priority] = 2
    taken = model.receive(33)
    assert dict(taken) == {
        (lane.queue, lane.priority): count for lane, count in zip([first, *others], [2, 11, 11, 9], strict=False)
    }


def test_empty_lanes_of_many_queues_are_asked_in_turn() -> None:
    """Among busy lanes a few of them in each receive, all of them within some receives; all at once where slots come one by one or
    nothing is busy."""
    names = [f"q{number}" for number in range(200)]
    model = Model(weighted(dict.fromkeys(names, 1)), full(names, [NORMAL]))
    model.receive_in_all(10_000, 33)
    asked: Counter[LaneKey] = Counter()
    for _ in range(600 // PROBES + 1):
        plan = model.lanes.plan(33).lanes
        assert len(plan) == 800
        ones = [(lane.queue, lane.priority) for lane in plan if lane.quota == 1]
        assert len(ones) <= PROBES
        asked.update(ones)
    assert len(asked) == 600
    assert sum(lane.quota == 1 for lane in model.lanes.plan(1).lanes) == 601
    model.lanes.record(model.lanes.plan(33), {})
    assert [lane.quota for lane in model.lanes.plan(33).lanes] == [1] * 800


@given(FAIR_QUEUES, STEPS)
def test_shares_of_busy_lanes_add_up(queues: list[tuple[Queue, int]], steps: list[Step]) -> None:
    """The quotas of lanes known to be busy are the slots; each lane that was empty is asked for one."""
    names = [queue.name for queue, _ in queues]
    model = Model(Lanes(queues), full(names))
    for slots, _, empty in steps:
        for number in range(len(names)):
            for level in LEVELS:
                model.waiting[names[number], level] = 0 if number in empty else ENDLESS
        busy = {key for key, share in _active(model.lanes).items() if share}
        model.receive(slots)
        quotas = {(lane.queue, lane.priority): lane.quota for lane in model.plans[-1]}
        assert sum(quotas[key] for key in busy) == (slots if busy else 0)
        assert all(quotas[key] == 1 for key in quotas.keys() - busy)


def _active(lanes: Lanes) -> dict[LaneKey, bool]:
    return {key: level.active for key, level in lanes._levels.items()}


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 30), ARRIVALS), min_size=1, max_size=12),
    st.integers(0, 3),
    st.sampled_from(LEVELS),
)
def test_nobody_starves_in_fair_mode(weights: list[int], pattern: list[tuple[int, Arrivals]], queue: int, level: Priority) -> None:
    """Whatever the others do, a waiting message of any level of any queue is served within a bounded number of slots."""
    names = [f"q{number}" for number in range(len(weights))]
    model = Model(weighted(dict(zip(names, weights, strict=True))), {})
    patient = (names[queue % len(names)], level)
    for other in names:
        for each in LEVELS:
            model.waiting[other, each] = 50
    for slots, _ in pattern:
        model.receive(slots)
    model.waiting[patient] = max(model.waiting[patient], 1)
    # One full round of both round-robins, and as much again for debts from before.
    bound = 4 * 13 * (sum(weights) + 1) + 4 * sum(slots for slots, _ in pattern)
    spent = 0
    for slots, arrivals in itertools.cycle(pattern):
        for other, each, count in arrivals:
            model.waiting[names[other % len(names)], each] += count
        for other in names:
            model.waiting[other, CRITICAL] += slots
        taken = model.receive(slots)
        spent += taken.total()
        if taken[patient]:
            break
        assert spent <= bound


def test_the_model_follows_the_interface() -> None:
    """Pass 1 up to the quotas in order, pass 2 up to the limit in order: the model itself, on the example of two lanes."""

    class Fixed:
        plan: Callable[..., Plan] = lambda *_: Plan(5, [Lane("a", LOW, 1), Lane("b", LOW, 2)], (), {})
        record: Callable[..., None] = lambda *_: None

    model = Model(Fixed(), {("a", LOW): 5, ("b", LOW): 5})  # type: ignore[arg-type]
    assert model.receive(5) == {("a", LOW): 3, ("b", LOW): 2}
    assert model.receive(2) == {("a", LOW): 1, ("b", LOW): 1}
