"""Random programs against a plain model of the contract: after every step each message is exactly where it must be.

Where the contract leaves a choice (a lease that expired and that nobody took over yet, a due time that just passed), the model
accepts each allowed answer and follows the one it saw.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from crossdock.errors import EnqueueFailed, LeaseLost, NotFound, QueueFull
from crossdock.spi import (
    Ack,
    Broker,
    Dead,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    Reason,
    Refusal,
    Replay,
    Settlement,
    State,
)

T = TypeVar("T")

SPECS = {"plain": QueueSpec("plain"), "tight": QueueSpec("tight", lease=5.0, max_ready=3, dead_max_count=2)}
STEPS = 50
SECONDS = 8.0
"""How long to try random programs; a faster backend is tried with more."""


queues = st.sampled_from(sorted(SPECS))
ids = st.sampled_from([f"m{number}" for number in range(8)])
levels = st.sampled_from([Priority.HIGH, Priority.NORMAL])
at_rest = st.sampled_from([State.READY, State.SCHEDULED, State.DEAD])
delays = st.sampled_from([0, 0, 0, 1000, 30_000])
who = st.integers(0, 1)


@dataclass(eq=False)
class Held:
    """What the model knows of one stored message."""

    message: Message
    due_ms: int  # 0 = it was READY when it was stored
    serial: int
    state: State
    count: int = 0
    lease_end: float = 0.0
    grant: Grant | None = None
    fresh: bool = True  # READY from the beginning and never handed over: first in, first out holds
    letter: DeadLetter | None = None


@dataclass(eq=False)
class Grant:
    """A delivery somebody received, perhaps long ago."""

    broker: Broker
    delivery: Delivery
    held: Held
    ending: Settlement | None = None


@dataclass
class Model:
    """The store as it must be."""

    stored: dict[tuple[str, str], Held] = field(default_factory=dict[tuple[str, str], Held])
    dropped: Counter[str] = field(default_factory=Counter[str])

    def of(self, queue: str) -> dict[str, Held]:
        return {id: held for (name, id), held in self.stored.items() if name == queue}


class Machine(RuleBasedStateMachine):
    """Two Brokers on one store do random things; a plain dictionary says what must come of it."""

    def __init__(self, lab: Any) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.lab = lab
        self.model = Model()
        self.grants: list[Grant] = []
        self.serial = 0
        self.brokers: list[Broker] = []

    @initialize()
    def start(self) -> None:
        self.brokers = [self.run(self.connect()) for _ in range(2)]
        capabilities = self.brokers[0].capabilities
        self.sweep = capabilities.takeover - QueueSpec("default").lease
        self.lateness = capabilities.delay_lateness

    def run(self, verb: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(verb)

    async def connect(self) -> Broker:
        broker: Broker = await self.lab.open()
        await broker.declare(list(SPECS.values()))
        return broker

    def teardown(self) -> None:
        self.run(self.lab.close())
        self.runner.close()

    # --- what time has done ---

    def states(self, held: Held) -> set[State]:
        """The states the message may be in now."""
        if held.state is State.SCHEDULED:
            overdue = self.lab.clock.time_ms() - held.due_ms
            if overdue >= 0:
                return {State.READY} if overdue > self.lateness * 1000 else {State.SCHEDULED, State.READY}
        if held.state is State.LEASED and self.lab.clock.monotonic() >= held.lease_end:
            return {State.LEASED, State.READY}
        return {held.state}

    def receivable(self, held: Held) -> tuple[bool, bool]:
        """Whether a receive must find it, and whether it may."""
        must = self.states(held) == {State.READY} or (
            held.state is State.LEASED and self.lab.clock.monotonic() >= held.lease_end + self.sweep
        )
        return must, State.READY in self.states(held)

    def store(self, message: Message, delay_ms: int) -> None:
        self.serial += 1
        due_ms = self.lab.clock.time_ms() + delay_ms if delay_ms else 0
        state = State.SCHEDULED if delay_ms else State.READY
        held = Held(message, due_ms, self.serial, state, fresh=not delay_ms)
        self.model.stored[message.queue, message.id] = held

    # --- rules ---

    @rule(at=who, batch=st.lists(st.tuples(queues, ids, levels, delays, st.integers(0, 2), st.booleans()), min_size=1, max_size=4))
    def enqueue(self, at: int, batch: list[tuple[str, str, Priority, int, int, bool]]) -> None:
        now_ms = self.lab.clock.time_ms()
        messages: list[Message] = []
        for queue, id, priority, delay_ms, generation, as_eta in batch:
            self.serial += 1
            due = {"eta_ms": now_ms + delay_ms} if as_eta and delay_ms else {"delay_ms": delay_ms}
            messages.append(Message(id, queue, priority, f"{id} {self.serial}".encode(), generation=generation, **due))
        refused = self.errors(self.run(self.brokers[at].enqueue(messages)))
        for index, (message, (queue, id, _, delay_ms, generation, _)) in enumerate(zip(messages, batch, strict=True)):
            held = self.model.stored.get((queue, id))
            if held is not None:
                assert refused.get(index) is (None if held.message.generation >= generation else EnqueueFailed)
                continue
            states = [self.states(each) for each in self.model.of(queue).values()]
            limit = SPECS[queue].max_ready
            if limit is not None and not delay_ms:
                if states.count({State.READY}) >= limit:
                    assert refused[index] is QueueFull
                if sum(State.READY in each for each in states) < limit:
                    assert index not in refused
            if index not in refused:
                self.store(message, delay_ms)
            else:
                assert refused[index] is QueueFull

    @rule(
        at=who,
        lanes=st.lists(st.tuples(queues, levels, st.integers(0, 3)), min_size=1, max_size=4, unique_by=lambda lane: lane[:2]),
        limit=st.integers(1, 6),
    )
    def receive(self, at: int, lanes: list[tuple[str, Priority, int]], limit: int) -> None:
        waiting = {
            (queue, priority): [held for held in self.model.of(queue).values() if held.message.priority == priority]
            for queue, priority, _ in lanes
        }
        must = {lane: sum(self.receivable(held)[0] for held in waiting[lane]) for lane in waiting}
        may = {lane: sum(self.receivable(held)[1] for held in waiting[lane]) for lane in waiting}
        fresh = {lane: sorted((h for h in waiting[lane] if h.fresh), key=lambda h: h.serial) for lane in waiting}
        broker = self.brokers[at]
        deliveries = self.run(broker.receive([Lane(*lane) for lane in lanes], limit, 0))
        taken = Counter((delivery.message.queue, delivery.message.priority) for delivery in deliveries)
        assert len({(delivery.message.queue, delivery.message.id) for delivery in deliveries}) == len(deliveries)
        if must == may:
            assert taken == Counter(self.shares(lanes, limit, must))
        assert sum(taken.values()) >= min(limit, sum(must.values()))
        for delivery in deliveries:
            self.follow_delivery(broker, delivery)
        for lane, in_order in fresh.items():
            got = [delivery.message.id for delivery in deliveries if (delivery.message.queue, delivery.message.priority) == lane]
            got = [id for id in got if id in [held.message.id for held in in_order]]
            assert got == [held.message.id for held in in_order][: len(got)], "first in, first out"

    @staticmethod
    def shares(lanes: list[tuple[str, Priority, int]], limit: int, available: dict[tuple[str, Priority], int]) -> dict[Any, int]:
        """What the two passes must take from each lane."""
        taken = dict.fromkeys(available, 0)
        for quotas in ([quota for _, _, quota in lanes], [limit] * len(lanes)):
            for (queue, priority, _), quota in zip(lanes, quotas, strict=True):
                lane = queue, priority
                taken[lane] += min(quota, available[lane] - taken[lane], limit - sum(taken.values()))
        return {lane: count for lane, count in taken.items() if count}

    def follow_delivery(self, broker: Broker, delivery: Delivery) -> None:
        message = delivery.message
        held = self.model.stored[message.queue, message.id]
        assert self.receivable(held)[1], f"{message.id} was {held.state}"
        assert self.same(message, held)
        assert delivery.delivery_count == held.count + 1
        now = self.lab.clock.monotonic()
        assert now < delivery.lease_until <= now + SPECS[message.queue].lease
        assert delivery.receipt not in [grant.delivery.receipt for grant in self.grants if grant.broker is broker]
        held.grant = Grant(broker, delivery, held)
        self.grants.append(held.grant)
        held.state, held.count, held.fresh = State.LEASED, held.count + 1, False
        held.lease_end = now + SPECS[message.queue].lease

    @precondition(lambda self: self.grants)
    @rule(at=who, data=st.data(), kinds=st.lists(st.sampled_from(["ack", "give-back", "retry", "dead"]), min_size=1, max_size=3))
    def settle(self, at: int, data: st.DataObject, kinds: list[str]) -> None:
        """Settle what is open, also long after its lease."""
        batch: list[tuple[Grant, Settlement]] = []
        if mine := [grant for grant in self.grants if grant.broker is self.brokers[at] and grant.ending is None]:
            for kind in kinds:
                grant = data.draw(st.sampled_from(mine))
                batch.append((grant, self.settlement(grant, kind, data.draw(delays))))
        self.check_settled(self.brokers[at], batch)

    @precondition(lambda self: any(grant.ending for grant in self.grants))
    @rule(data=st.data(), kind=st.sampled_from(["again", "again", "ack", "give-back", "retry"]))
    def settle_again(self, data: st.DataObject, kind: str) -> None:
        """Settle what was settled, in the same way or another."""
        grant = data.draw(st.sampled_from([grant for grant in self.grants if grant.ending is not None]))
        self.check_settled(grant.broker, [(grant, self.settlement(grant, kind, 0))])

    def check_settled(self, broker: Broker, batch: list[tuple[Grant, Settlement]]) -> None:
        refused = self.errors(self.run(broker.settle([settlement for _, settlement in batch])))
        for index, (grant, settlement) in enumerate(batch):
            held, done = grant.held, index not in refused
            assert done or refused[index] is LeaseLost
            if grant.ending is not None:
                assert done == (grant.ending == settlement)
            elif held.grant is not grant:
                assert not done, "a lost lease was accepted"
            elif done:
                self.follow_ending(grant, settlement)
            else:
                assert State.READY in self.states(held), "a live lease was refused"

    def settlement(self, grant: Grant, kind: str, delay_ms: int) -> Settlement:
        delivery, old = grant.delivery, grant.delivery.message
        self.serial += 1
        if kind == "again" and grant.ending is not None:
            return grant.ending
        if kind == "give-back":
            return Nack(delivery, delay_ms / 1000)
        if kind == "retry":
            body = f"{old.id} {self.serial}".encode()
            return Nack(delivery, delay_ms / 1000, Message(old.id, old.queue, old.priority, body, generation=old.generation + 1))
        if kind == "dead":
            return Dead(delivery, DeadLetter(old, Reason.REJECTED, self.lab.clock.time_ms(), story=f"{self.serial}".encode()))
        return Ack(delivery)

    def follow_ending(self, grant: Grant, settlement: Settlement) -> None:
        held, grant.ending, grant.held.grant = grant.held, settlement, None
        key = held.message.queue, held.message.id
        match settlement:
            case Ack():
                del self.model.stored[key]
            case Nack(delay=delay, replacement=None):
                held.count -= 1
                held.state = State.SCHEDULED if delay else State.READY
                held.due_ms = self.lab.clock.time_ms() + round(delay * 1000)
            case Nack(delay=delay, replacement=replacement):
                assert replacement is not None
                self.store(replacement, round(delay * 1000))
                self.model.stored[key].fresh = False  # its place among the others is not promised
            case Dead(letter=letter):
                held.state, held.letter = State.DEAD, letter
                self.forget_oldest(held.message.queue)

    def forget_oldest(self, queue: str) -> None:
        most = SPECS[queue].dead_max_count
        dead = [held for held in self.model.of(queue).values() if held.letter is not None]
        dead.sort(key=lambda held: (held.letter.died_ms if held.letter else 0, held.message.id))
        for held in dead[: len(dead) - most] if most is not None and len(dead) > most else ():
            del self.model.stored[queue, held.message.id]
            self.model.dropped[queue] += 1

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        first = data.draw(st.sampled_from(self.grants))
        mine = [grant for grant in self.grants if grant.broker is first.broker]
        chosen = data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=3, unique=True))
        refused = self.errors(self.run(first.broker.extend([grant.delivery for grant in chosen])))
        for index, grant in enumerate(chosen):
            held = grant.held
            if index in refused:
                assert refused[index] is LeaseLost
                assert held.grant is not grant or State.READY in self.states(held), "a live lease was refused"
            else:
                assert held.grant is grant, "a lost lease was extended"
                held.lease_end = self.lab.clock.monotonic() + SPECS[held.message.queue].lease

    @rule(at=who, queue=queues, to=queues, others=st.lists(ids, max_size=2), delay_ms=delays)
    def replay(self, at: int, queue: str, to: str, others: list[str], delay_ms: int) -> None:
        """Replay the dead letters of a queue, and some that may not be there."""
        replays: list[Replay] = []
        for id in [*others, *(id for id, held in self.model.of(queue).items() if held.state is State.DEAD)]:
            self.serial += 1
            held = self.model.stored.get((queue, id))
            generation = held.message.generation + 1 if held is not None else 1
            body = f"{id} {self.serial}".encode()
            replays.append(Replay(id, Message(id, to, Priority.NORMAL, body, delay_ms=delay_ms, generation=generation)))
        refused = self.errors(self.run(self.brokers[at].replay(queue, replays)))
        for index, order in enumerate(replays):
            held = self.model.stored.get((queue, order.id))
            there = self.model.stored.get((to, order.id))
            if held is None or held.state is not State.DEAD:
                assert refused[index] is NotFound
            elif there is not None and there is not held and there.message.generation < order.message.generation:
                assert refused[index] is EnqueueFailed
            else:
                assert index not in refused
                del self.model.stored[queue, order.id]
                if there is None or there is held:
                    self.store(order.message, delay_ms)

    @rule(at=who, queue=queues, state=at_rest, chosen=st.lists(ids, max_size=3))
    def remove(self, at: int, queue: str, state: State, chosen: list[str]) -> None:
        refused = self.errors(self.run(self.brokers[at].remove(queue, state, chosen)))
        for index, id in enumerate(chosen):
            held = self.model.stored.get((queue, id))
            if index not in refused:
                assert held is not None
                assert state in self.states(held)
                self.drop(held)
            else:
                assert refused[index] is NotFound
                assert held is None or self.states(held) != {state}

    @precondition(lambda self: len(self.model.stored) > 6)
    @rule(at=who, queue=queues, state=at_rest)
    def purge(self, at: int, queue: str, state: State) -> None:
        count = self.run(self.brokers[at].purge(queue, state))
        left = {id for ids in self.run(self.lab.where(self.brokers[at], queue)).values() for id in ids}
        gone = [held for id, held in self.model.of(queue).items() if id not in left]
        assert len(gone) == count
        for id, held in self.model.of(queue).items():
            assert (state in self.states(held)) if id not in left else (self.states(held) != {state})
        for held in gone:
            self.drop(held)

    def drop(self, held: Held) -> None:
        held.grant = None
        del self.model.stored[held.message.queue, held.message.id]

    @rule(seconds=st.sampled_from([0.01, 1.0, 4.5, 5.0, 29.0, 31.0]))
    def advance(self, seconds: float) -> None:
        self.run(self.lab.advance(seconds))

    @precondition(lambda self: len(self.grants) > 8)
    @rule(at=who)
    def crash(self, at: int) -> None:
        """A worker goes away; its deliveries must run out, and nobody settles them any more."""
        gone = self.brokers[at]
        self.run(gone.close())
        self.grants = [grant for grant in self.grants if grant.broker is not gone]
        self.brokers[at] = self.run(self.connect())

    # --- after each step ---

    @invariant()
    def everything_is_where_it_must_be(self) -> None:
        for queue in SPECS:
            found, dropped = self.run(self.look(queue))
            known = self.model.of(queue)
            assert sorted(entry.message.id for entry in found) == sorted(known), "conservation"
            for entry in found:
                held = known[entry.message.id]
                assert entry.state in self.states(held)
                assert self.same(entry.message, held)
                assert entry.delivery_count in (held.count, None)
                assert entry.letter == (held.letter if entry.state is State.DEAD else None)
            assert dropped in (self.model.dropped[queue], None)

    async def look(self, queue: str) -> tuple[list[Entry], int | None]:
        await self.lab.where(self.brokers[0], queue)
        found = [entry for state in State for entry in await self.lab.entries(self.brokers[1], state, queue, limit=3)]
        stats = await self.lab.stats(self.brokers[1], queue)
        return found, stats.dead_dropped

    @staticmethod
    def same(message: Message, held: Held) -> bool:
        """Equal but for the due time, which a backend may return as what it made of it."""
        plain = msgspec.structs.replace(message, eta_ms=0, delay_ms=0)
        return plain == msgspec.structs.replace(held.message, eta_ms=0, delay_ms=0) and message.delay_ms == 0

    def errors(self, refusals: Sequence[Refusal]) -> dict[int, type[Exception]]:
        found: dict[int, type[Exception]] = self.lab.errors(refusals)
        return found


@pytest.mark.timeout(300)  # finding the smallest failing program takes its time
def test_model(new_lab: Callable[[], Any]) -> None:
    """Whatever two Brokers, time and crashes do: nothing is lost, doubled, early, or settled by who lost it."""
    machine: Any = lambda: Machine(new_lab())  # noqa: E731 - a factory is as good as the class
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    some = settings(max_examples=20, stateful_step_count=STEPS, deadline=None, database=None, suppress_health_check=slow)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run_state_machine_as_test(machine, settings=some)
