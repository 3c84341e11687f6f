"""Lanes: quotas first, then what is left over, lane by lane; and what core makes of that, strict order and fair shares."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from crossdock.spi import LEVELS, Ack, Broker, Delivery, Lane, Priority, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.scenario import scenario

CRITICAL, HIGH, NORMAL, LOW = LEVELS
LEVEL_WEIGHTS: Final = {CRITICAL: 6, HIGH: 4, NORMAL: 2, LOW: 1}
QUEUE_WEIGHTS: Final = {"a": 6, "b": 2, "c": 1}

Key = tuple[str, Priority]
"""What tells lanes apart."""
A, B, C = ("a", NORMAL), ("b", NORMAL), ("c", NORMAL)


def _key(of: Lane | Delivery) -> Key:
    holder = of.message if isinstance(of, Delivery) else of
    return holder.queue, holder.priority


async def _fill(broker: Broker, lab: Lab, counts: Mapping[Key, int]) -> dict[Key, list[str]]:
    """Enqueue so many messages for each lane, and return their ids."""
    stored = {key: lab.messages(count, queue=key[0], priority=key[1]) for key, count in counts.items()}
    everything = [message for messages in stored.values() for message in messages]
    for start in range(0, len(everything), 1000):
        await lab.enqueue(broker, *everything[start : start + 1000])
    return {key: [message.id for message in messages] for key, messages in stored.items()}


async def _counts(broker: Broker, lab: Lab, queue: str, ready: int) -> None:
    """Wait until so many messages are counted as ready: a networked broker may hand out what it stored a little later."""

    async def check() -> None:
        found = (await lab.stats(broker, queue)).ready
        assert found == ready, f"stats count {found} ready messages in {queue!r}, not {ready}"

    await lab.eventually(check)


async def _takes(broker: Broker, lab: Lab, lanes: Sequence[Lane], limit: int, expected: Mapping[Key, int]) -> None:
    """Assert how many messages a receive takes from each lane that gives any.

    Where messages come bit by bit it is continued, with what is left of the quotas.
    """
    taken: Counter[Key] = Counter()
    while True:
        left = [msgspec.structs.replace(lane, quota=max(0, lane.quota - taken[_key(lane)])) for lane in lanes]
        deliveries = await broker.receive(left, limit - taken.total(), 0 if lab.virtual else 0.3)
        taken.update(map(_key, deliveries))
        if lab.virtual or not deliveries or taken.total() == limit:
            break
    shown = [", ".join(f"{count} of {queue} {level.name}" for (queue, level), count in each.items()) for each in (taken, expected)]
    assert taken == expected, f"a receive took {shown[0] or 'nothing'}, not {shown[1]}"


# --- one receive ---


@scenario()
async def first_pass_takes_quotas(broker: Broker, lab: Lab) -> None:
    """Where every lane has enough, a receive takes from each what its quota says."""
    await _fill(broker, lab, {A: 20, B: 20, C: 20})
    await _takes(broker, lab, [Lane(*A, 6), Lane(*B, 3), Lane(*C, 1)], 10, {A: 6, B: 3, C: 1})


@scenario()
async def second_pass_gives_idle_shares_in_order(broker: Broker, lab: Lab) -> None:
    """What a lane cannot fill of its quota goes to the first lane, in their order, that has more than its own."""
    await _fill(broker, lab, {A: 2, B: 4, C: 20})
    await _takes(broker, lab, [Lane(*A, 6), Lane(*B, 3), Lane(*C, 1)], 10, {A: 2, B: 4, C: 4})


@scenario()
async def quota_zero_is_a_subscription(broker: Broker, lab: Lab) -> None:
    """A lane with the quota 0 gets nothing while others fill the limit, and what these leave over else."""
    await _fill(broker, lab, {A: 5, B: 5})
    lanes = [Lane(*A, 0), Lane(*B, 3)]
    await _takes(broker, lab, lanes, 3, {B: 3})
    await _takes(broker, lab, lanes, 4, {A: 2, B: 2})


@scenario()
async def limit_cuts_quotas(broker: Broker, lab: Lab) -> None:
    """Quotas beyond the limit are served in the order of the lanes."""
    await _fill(broker, lab, {A: 5, B: 5})
    await _takes(broker, lab, [Lane(*B, 4), Lane(*A, 4)], 6, {B: 4, A: 2})


@scenario()
async def quotas_divide_levels(broker: Broker, lab: Lab) -> None:
    """The levels of one queue get what quotas of 6, 4, 2 and 1 say, receive after receive."""
    await _fill(broker, lab, {("q", level): 26 for level in LEVELS})
    lanes = [Lane("q", level, weight) for level, weight in LEVEL_WEIGHTS.items()]
    for _ in range(4):
        await _takes(broker, lab, lanes, 13, {("q", level): weight for level, weight in LEVEL_WEIGHTS.items()})


@scenario()
async def levels_come_in_the_order_asked(broker: Broker, lab: Lab) -> None:
    """The lanes say which level comes first, not the level itself; within each the first in is the first out."""
    await lab.enqueue(broker, *(lab.message(f"{level.name}{n}", priority=level) for n in (1, 2) for level in reversed(LEVELS)))
    await _counts(broker, lab, "q", 8)
    taken = await lab.take(broker, limit=3, lanes=[Lane("q", LOW, 0), Lane("q", CRITICAL, 0)])
    assert [delivery.message.id for delivery in taken] == ["LOW1", "LOW2", "CRITICAL1"]
    taken = await lab.take_exactly(broker, 5)
    assert [delivery.message.id for delivery in taken] == ["CRITICAL2", "HIGH1", "HIGH2", "NORMAL1", "NORMAL2"]


@scenario()
async def levels_are_kept(broker: Broker, lab: Lab) -> None:
    """Each level comes back as itself, in deliveries and in listings, where the most urgent is first."""
    await lab.enqueue(broker, *(lab.message(level.name, priority=level) for level in reversed(LEVELS)))
    await lab.holds(broker, {State.READY: [level.name for level in LEVELS]})
    assert [delivery.message.priority for delivery in await lab.take_exactly(broker, 4)] == list(LEVELS)


@scenario()
async def waits_on_every_lane(broker: Broker, lab: Lab) -> None:
    """A receive that waits on several queues and levels is woken by a message for any of them, and by no other."""
    lanes = [Lane("a", NORMAL, 1), Lane("b", HIGH, 0)]
    for queue, level in map(_key, lanes):
        receive = asyncio.ensure_future(broker.receive(lanes, 1, 3600))
        await lab.turns()
        await lab.enqueue(broker, lab.message(queue="b", priority=LOW), lab.message(queue="c"))
        await lab.turns()
        assert not receive.done()
        await lab.enqueue(broker, lab.message("wanted", queue, level))
        await lab.until(receive.done, "a waiting receive was woken")
        (delivery,) = receive.result()
        assert delivery.message.id == "wanted"
        await lab.settle(broker, Ack(delivery))


# --- strict order ---


@scenario(limit=[1, 7])
async def strict_order(broker: Broker, lab: Lab, limit: int) -> None:
    """Lanes that are always asked in the same order are emptied in this order: queue by queue, level by level, first in first out."""
    lanes = lab.lanes("a", "b", quota=limit)
    messages = [lab.message(queue=lane.queue, priority=lane.priority) for _ in range(4) for lane in reversed(lanes)]
    await lab.enqueue(broker, *messages)
    received: list[str] = []
    while len(received) < len(messages):
        batch = await lab.take(broker, min(limit, len(messages) - len(received)), lanes=lanes)
        assert batch, "some did not come"
        received += [delivery.message.id for delivery in batch]
        await lab.settle(broker, *map(Ack, batch))
    assert received == [message.id for lane in lanes for message in messages if (message.queue, message.priority) == _key(lane)]


@scenario()
async def urgent_newcomer_comes_next(broker: Broker, lab: Lab) -> None:
    """In strict order on one slot a message that is stored late and is more urgent than those that wait is delivered next."""
    lanes = lab.lanes("a", "b", quota=1)
    least, *others = [_key(lane) for lane in reversed(lanes)]
    await _fill(broker, lab, {least: 10})
    for late in (least, *others):
        await _fill(broker, lab, {late: 1})
        await _counts(broker, lab, late[0], 11 if late[0] == least[0] else 1)
        (delivery,) = await lab.take_exactly(broker, 1, lanes=lanes)
        assert _key(delivery) == late
        await lab.settle(broker, Ack(delivery))


# --- fair shares ---


class Turns:
    """Whose turn it is on one slot: a deficit round robin by weight, as a worker has one.

    A lane that was asked and had nothing is idle: its share is the others', and it is asked first each time, so that it is noticed
    when it has something again.

    Args:
        weights: By lane.
    """

    def __init__(self, weights: Mapping[Key, float]) -> None:
        self._weights = weights
        self._owed = dict.fromkeys(weights, 0.0)
        self._idle: list[Key] = []

    def next(self) -> list[Lane]:
        """The lanes for the next receive, of one message."""
        busy = [key for key in self._weights if key not in self._idle]
        total = sum(self._weights[key] for key in busy)
        for key in busy:
            self._owed[key] += self._weights[key] / total
        busy.sort(key=lambda key: -self._owed[key])
        return [Lane(*key, 1) for key in (*self._idle, *busy[:1])] + [Lane(*key, 0) for key in busy[1:]]

    def record(self, lanes: Sequence[Lane], taken: Key) -> None:
        """Learn from a receive which lane gave its message; those before it had none."""
        keys = list(map(_key, lanes))
        before = keys[: keys.index(taken)]
        self._idle = [key for key in (*self._idle, *(key for key in before if key not in self._idle)) if key != taken]
        self._owed.update(dict.fromkeys(before, 0.0))
        self._owed[taken] -= 1


async def _work(broker: Broker, lab: Lab, turns: Turns, count: int) -> dict[Key, list[str]]:
    """Work off so many messages on one slot: while one is acked the next one is received. Returns the ids by lane, in order."""
    received: dict[Key, list[str]] = defaultdict(list)
    acks: list[Ack] = []
    for number in range(count):
        lanes = turns.next()
        wait = 0 if lab.virtual else lab.patience
        deliveries, refusals = await asyncio.gather(broker.receive(lanes, 1, wait), broker.settle(acks))
        lab.nothing_refused(refusals)
        assert len(deliveries) == 1, f"after {number} messages {len(deliveries)} came, not one, though more wait"
        key = _key(deliveries[0])
        received[key].append(deliveries[0].message.id)
        turns.record(lanes, key)
        acks = [Ack(deliveries[0])]
    await lab.settle(broker, *acks)
    return received


def _assert_shares(received: Mapping[Key, Sequence[str]], place: int, weights: Mapping[str, int] | Mapping[Priority, int]) -> None:
    """Queues (place 0) or levels (place 1) got what their weights say, within two points of a hundred."""
    total = sum(map(len, received.values()))
    for name, weight in weights.items():
        got = sum(len(ids) for key, ids in received.items() if key[place] == name)
        share, due = 100 * got / total, 100 * weight / sum(weights.values())
        label = name.name if isinstance(name, Priority) else name
        assert abs(share - due) <= 2, f"{label} got {share:.1f} % of {total} deliveries where {due:.1f} % were due"


@scenario(seconds=180)
async def fair_shares_on_one_slot(broker: Broker, lab: Lab) -> None:
    """On one slot with everything waiting, queues of the weights 6, 2 and 1 get these shares of 10,000 deliveries and levels 6, 4, 2
    and 1, within two points of a hundred; and within each level of each queue the first in is the first out."""
    weights = {(queue, level): heavy * urgent for queue, heavy in QUEUE_WEIGHTS.items() for level, urgent in LEVEL_WEIGHTS.items()}
    total = sum(weights.values())
    stored = await _fill(broker, lab, {key: 10_000 * weight // total + 50 for key, weight in weights.items()})
    received = await _work(broker, lab, Turns(weights), 10_000)
    _assert_shares(received, 0, QUEUE_WEIGHTS)
    _assert_shares(received, 1, LEVEL_WEIGHTS)
    for key, ids in received.items():
        assert ids == stored[key][: len(ids)], f"{key} was not delivered first in, first out"


@scenario()
async def idle_shares_are_given_away(broker: Broker, lab: Lab) -> None:
    """Levels with nothing waiting leave their shares to the others, by these others' weights, and have them again with the first
    message; no slot stays empty while anything waits."""
    turns = Turns({("q", level): weight for level, weight in LEVEL_WEIGHTS.items()})
    await _fill(broker, lab, {("q", NORMAL): 300, ("q", LOW): 300})
    _assert_shares(await _work(broker, lab, turns, 150), 1, {NORMAL: 2, LOW: 1})
    await _fill(broker, lab, {("q", HIGH): 150})
    _assert_shares(await _work(broker, lab, turns, 210), 1, {HIGH: 4, NORMAL: 2, LOW: 1})
    await _work(broker, lab, turns, 750 - 150 - 210)
    await lab.holds(broker, {})
