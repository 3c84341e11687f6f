"""Random programs against a plain model of the interface: after every step each message is exactly where it must be.

Where the interface leaves a choice (a lease that expired and that nobody took over yet, a due time that just passed), the model
accepts each allowed answer and follows the one it saw. In virtual time clocks jump and leases run out; on servers nothing falls due
and no lease ends while a program runs, so that no answer depends on the speed of the machine.

A program that fails is shortened by Hypothesis and printed as a call of `replay`.
"""

from __future__ import annotations

import asyncio
import functools
import pprint
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

import msgspec
from hypothesis import HealthCheck, Phase, settings
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
    redact,
)
from crossdock_conformance.lab import Lab
from crossdock_conformance.target import Target

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., None])
Steps = Sequence[tuple[str, Mapping[str, Any]]]

STEPS: Final = 50
"""Most steps in a program."""

_SPECS: Final = {"plain": QueueSpec("plain"), "tight": QueueSpec("tight", lease=5.0, max_ready=3, dead_max_count=2)}
_HOUR: Final = 3_600_000

_queues = st.sampled_from(sorted(_SPECS))
_ids = st.sampled_from([f"m{number}" for number in range(8)])
_levels = st.sampled_from([int(Priority.HIGH), int(Priority.NORMAL)])
_at_rest = st.sampled_from(["ready", "scheduled", "dead"])
_delays = st.sampled_from([0, 0, 0, 1000, 30_000])
_who = st.integers(0, 1)
_pick = st.integers(0, 99)


@dataclass(eq=False)
class _Held:
    """What the model knows of one stored message."""

    message: Message
    due_ms: int  # 0 = it was READY when it was stored
    serial: int
    state: State
    count: int = 0
    lease_end: float = 0.0
    grant: _Grant | None = None
    fresh: bool = True  # READY from the beginning and never handed over: first in, first out holds
    letter: DeadLetter | None = None


@dataclass(eq=False)
class _Grant:
    """A delivery somebody received, perhaps long ago."""

    broker: Broker
    delivery: Delivery
    held: _Held
    ending: Settlement | None = None


@dataclass
class _Model:
    """The store as it must be."""

    stored: dict[tuple[str, str], _Held] = field(default_factory=dict[tuple[str, str], _Held])
    dropped: Counter[str] = field(default_factory=Counter[str])

    def of(self, queue: str) -> dict[str, _Held]:
        return {id: held for (name, id), held in self.stored.items() if name == queue}


def _step(**strategies: Any) -> Callable[[F], F]:
    """Make a method a rule, and have its calls remembered."""

    def make(method: F) -> F:
        @functools.wraps(method)
        def remembered(self: Machine, **arguments: Any) -> None:
            self.steps.append((method.__name__, arguments))
            method(self, **arguments)

        return cast(F, rule(**strategies)(remembered))  # type: ignore[no-untyped-call]  # pyright: ignore[reportUnknownArgumentType]

    return make


def _picked(things: Sequence[T], number: int) -> T:
    return things[number % len(things)]


class Machine(RuleBasedStateMachine):
    """Two Brokers on one store do random things; a plain dictionary says what must come of it."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.lab = Lab(target)
        self.model = _Model()
        self.grants: list[_Grant] = []
        self.serial = 0
        self.brokers: list[Broker] = []
        self.steps: list[tuple[str, Mapping[str, Any]]] = []

    @initialize()
    def start(self) -> None:
        """Connect."""
        self.brokers = [self.run(self.connect()) for _ in range(2)]

    def run(self, verb: Coroutine[Any, Any, T]) -> T:
        """Have a verb done."""
        return self.runner.run(verb)

    async def connect(self) -> Broker:
        """Open one more Broker."""
        broker = await self.lab.open(queues=())
        await self.lab.declare(broker, *_SPECS.values())
        return broker

    def teardown(self) -> None:
        """Disconnect and remove everything."""
        self.run(self.lab.close())
        self.runner.close()

    # --- what time has done ---

    def delay(self, ms: int) -> int:
        """A delay; on servers one that does not end while a program runs."""
        return ms if self.lab.virtual or not ms else _HOUR

    def states(self, held: _Held) -> set[State]:
        """The states the message may be in now."""
        if held.state is State.SCHEDULED:
            overdue = self.lab.clock.time_ms() - held.due_ms
            if overdue >= 0:
                return {State.READY} if overdue > self.lab.lateness * 1000 else {State.SCHEDULED, State.READY}
        if held.state is State.LEASED and self.lab.clock.monotonic() >= held.lease_end - self.lab.slack:
            return {State.LEASED, State.READY}
        return {held.state}

    def receivable(self, held: _Held) -> tuple[bool, bool]:
        """Whether a receive must find it, and whether it may."""
        must = self.states(held) == {State.READY} or (
            held.state is State.LEASED and self.lab.clock.monotonic() >= held.lease_end + self.lab.sweep
        )
        return must, State.READY in self.states(held)

    def store(self, message: Message, delay_ms: int) -> None:
        """Note that a message was stored."""
        self.serial += 1
        due_ms = self.lab.clock.time_ms() + delay_ms if delay_ms else 0
        state = State.SCHEDULED if delay_ms else State.READY
        held = _Held(message, due_ms, self.serial, state, fresh=not delay_ms)
        self.model.stored[message.queue, message.id] = held

    # --- steps ---

    @_step(
        at=_who,
        batch=st.lists(st.tuples(_queues, _ids, _levels, _delays, st.integers(0, 2), st.booleans()), min_size=1, max_size=4),
    )
    def enqueue(self, at: int, batch: list[tuple[str, str, int, int, int, bool]]) -> None:
        """Store messages, some of them twice, some of them late."""
        now_ms = self.lab.clock.time_ms()
        messages: list[Message] = []
        for queue, id, priority, delay_ms, generation, as_eta in batch:
            self.serial += 1
            ms = self.delay(delay_ms)
            due = {"eta_ms": now_ms + ms} if as_eta and ms else {"delay_ms": ms}
            messages.append(Message(id, queue, Priority(priority), f"{id} {self.serial}".encode(), generation=generation, **due))
        refused = self.errors(self.run(self.brokers[at].enqueue(messages)))
        for index, (message, (queue, id, _, delay_ms, generation, _)) in enumerate(zip(messages, batch, strict=True)):
            held = self.model.stored.get((queue, id))
            if held is not None:
                assert refused.get(index) is (None if held.message.generation >= generation else EnqueueFailed)
                continue
            states = [self.states(each) for each in self.model.of(queue).values()]
            limit = _SPECS[queue].max_ready
            if limit is not None and not delay_ms:
                if states.count({State.READY}) >= limit:
                    assert refused[index] is QueueFull
                if sum(State.READY in each for each in states) < limit:
                    assert index not in refused
            if index not in refused:
                self.store(message, self.delay(delay_ms))
            else:
                assert refused[index] is QueueFull

    @_step(
        at=_who,
        lanes=st.lists(st.tuples(_queues, _levels, st.integers(0, 3)), min_size=1, max_size=4, unique_by=lambda lane: lane[:2]),
        limit=st.integers(1, 6),
    )
    def receive(self, at: int, lanes: list[tuple[str, int, int]], limit: int) -> None:
        """Take messages from some lanes."""
        waiting = {
            (queue, priority): [held for held in self.model.of(queue).values() if held.message.priority == priority]
            for queue, priority, _ in lanes
        }
        must = {lane: sum(self.receivable(held)[0] for held in waiting[lane]) for lane in waiting}
        may = {lane: sum(self.receivable(held)[1] for held in waiting[lane]) for lane in waiting}
        fresh = {lane: sorted((h for h in waiting[lane] if h.fresh), key=lambda h: h.serial) for lane in waiting}
        broker = self.brokers[at]
        wanted = [Lane(queue, Priority(priority), quota) for queue, priority, quota in lanes]
        if self.lab.virtual:
            deliveries = list(self.run(broker.receive(wanted, limit, 0)))
        else:
            deliveries = self.run(self.lab.take(broker, limit=min(limit, sum(must.values())) or 1, lanes=wanted))
        taken = Counter((delivery.message.queue, int(delivery.message.priority)) for delivery in deliveries)
        assert len({(delivery.message.queue, delivery.message.id) for delivery in deliveries}) == len(deliveries)
        if self.lab.virtual and must == may:
            assert taken == Counter(self.shares(lanes, limit, must))
        assert sum(taken.values()) >= min(limit, sum(must.values()))
        for delivery in deliveries:
            self.follow_delivery(broker, delivery)
        for lane, in_order in fresh.items():
            got = [delivery.message.id for delivery in deliveries if (delivery.message.queue, delivery.message.priority) == lane]
            got = [id for id in got if id in [held.message.id for held in in_order]]
            assert got == [held.message.id for held in in_order][: len(got)], "first in, first out"

    @staticmethod
    def shares(lanes: list[tuple[str, int, int]], limit: int, available: dict[tuple[str, int], int]) -> dict[Any, int]:
        """What the two passes must take from each lane."""
        taken = dict.fromkeys(available, 0)
        for quotas in ([quota for _, _, quota in lanes], [limit] * len(lanes)):
            for (queue, priority, _), quota in zip(lanes, quotas, strict=True):
                lane = queue, priority
                taken[lane] += min(quota, available[lane] - taken[lane], limit - sum(taken.values()))
        return {lane: count for lane, count in taken.items() if count}

    def follow_delivery(self, broker: Broker, delivery: Delivery) -> None:
        """Check a delivery and note it."""
        message = delivery.message
        held = self.model.stored[message.queue, message.id]
        assert self.receivable(held)[1], f"{message.id} was {held.state}"
        assert self.same(message, held)
        assert delivery.delivery_count == held.count + 1
        now = self.lab.clock.monotonic()
        lease = _SPECS[message.queue].lease
        assert now < delivery.lease_until <= now + lease
        assert delivery.receipt not in [grant.delivery.receipt for grant in self.grants if grant.broker is broker]
        held.grant = _Grant(broker, delivery, held)
        self.grants.append(held.grant)
        held.state, held.count, held.fresh = State.LEASED, held.count + 1, False
        held.lease_end = now + lease

    @precondition(lambda self: self.grants)
    @_step(
        at=_who,
        kinds=st.lists(st.tuples(_pick, st.sampled_from(["ack", "give-back", "retry", "dead"]), _delays), min_size=1, max_size=3),
    )
    def settle(self, at: int, kinds: list[tuple[int, str, int]]) -> None:
        """Settle what is open, also long after its lease."""
        batch: list[tuple[_Grant, Settlement]] = []
        if mine := [grant for grant in self.grants if grant.broker is self.brokers[at] and grant.ending is None]:
            for number, kind, delay_ms in kinds:
                grant = _picked(mine, number)
                batch.append((grant, self.settlement(grant, kind, self.delay(delay_ms))))
        self.check_settled(self.brokers[at], batch)

    @precondition(lambda self: any(grant.ending for grant in self.grants))
    @_step(number=_pick, kind=st.sampled_from(["again", "again", "ack", "give-back", "retry"]))
    def settle_again(self, number: int, kind: str) -> None:
        """Settle what was settled, in the same way or another."""
        grant = _picked([grant for grant in self.grants if grant.ending is not None], number)
        self.check_settled(grant.broker, [(grant, self.settlement(grant, kind, 0))])

    def check_settled(self, broker: Broker, batch: list[tuple[_Grant, Settlement]]) -> None:
        """Settle a batch and check every answer."""
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

    def settlement(self, grant: _Grant, kind: str, delay_ms: int) -> Settlement:
        """Make a settlement."""
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

    def follow_ending(self, grant: _Grant, settlement: Settlement) -> None:
        """Note what a settlement did."""
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
        """Note what retention dropped."""
        most = _SPECS[queue].dead_max_count
        dead = [held for held in self.model.of(queue).values() if held.letter is not None]
        dead.sort(key=lambda held: (held.letter.died_ms if held.letter else 0, held.message.id))
        for held in dead[: len(dead) - most] if most is not None and len(dead) > most else ():
            del self.model.stored[queue, held.message.id]
            self.model.dropped[queue] += 1

    @precondition(lambda self: self.grants)
    @_step(numbers=st.lists(_pick, min_size=1, max_size=3, unique=True))
    def extend(self, numbers: list[int]) -> None:
        """Renew leases, also long after their end."""
        first = _picked(self.grants, numbers[0])
        mine = [grant for grant in self.grants if grant.broker is first.broker]
        chosen = list(dict.fromkeys([first, *(_picked(mine, number) for number in numbers[1:])]))
        refused = self.errors(self.run(first.broker.extend([grant.delivery for grant in chosen])))
        for index, grant in enumerate(chosen):
            held = grant.held
            if index in refused:
                assert refused[index] is LeaseLost
                assert held.grant is not grant or State.READY in self.states(held), "a live lease was refused"
            else:
                assert held.grant is grant, "a lost lease was extended"
                held.lease_end = self.lab.clock.monotonic() + _SPECS[held.message.queue].lease

    @_step(at=_who, queue=_queues, to=_queues, others=st.lists(_ids, max_size=2), delay_ms=_delays)
    def replay(self, at: int, queue: str, to: str, others: list[str], delay_ms: int) -> None:
        """Replay the dead letters of a queue, and some that may not be there."""
        replays: list[Replay] = []
        delay_ms = self.delay(delay_ms)
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

    @_step(at=_who, queue=_queues, state=_at_rest, chosen=st.lists(_ids, max_size=3))
    def remove(self, at: int, queue: str, state: str, chosen: list[str]) -> None:
        """Remove messages by id, some of which may not be there."""
        if State(state) not in self.lab.capabilities.removable:
            return
        refused = self.errors(self.run(self.brokers[at].remove(queue, State(state), chosen)))
        for index, id in enumerate(chosen):
            held = self.model.stored.get((queue, id))
            if index not in refused:
                assert held is not None
                assert State(state) in self.states(held)
                self.drop(held)
            else:
                assert refused[index] is NotFound
                assert held is None or self.states(held) != {State(state)}

    @precondition(lambda self: len(self.model.stored) > 6)
    @_step(at=_who, queue=_queues, state=_at_rest)
    def purge(self, at: int, queue: str, state: str) -> None:
        """Empty one state, where what is left can be seen."""
        if State(state) not in self.lab.capabilities.purgeable or self.lab.capabilities.listable != frozenset(State):
            return
        count = self.run(self.brokers[at].purge(queue, State(state)))
        left = {entry.message.id for entry in self.look(queue)[0]}
        gone = [held for id, held in self.model.of(queue).items() if id not in left]
        assert len(gone) == count
        for id, held in self.model.of(queue).items():
            assert (State(state) in self.states(held)) if id not in left else (self.states(held) != {State(state)})
        for held in gone:
            self.drop(held)

    def drop(self, held: _Held) -> None:
        """Note that a message is gone."""
        held.grant = None
        del self.model.stored[held.message.queue, held.message.id]

    @precondition(lambda self: self.lab.virtual)
    @_step(seconds=st.sampled_from([0.01, 1.0, 4.5, 5.0, 29.0, 31.0]))
    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.run(self.lab.pass_time(seconds))

    @precondition(lambda self: len(self.grants) > 8)
    @_step(at=_who)
    def crash(self, at: int) -> None:
        """A worker goes away; its deliveries must run out, and nobody settles them any more."""
        gone = self.brokers[at]
        self.run(gone.close())
        self.grants = [grant for grant in self.grants if grant.broker is not gone]
        self.brokers[at] = self.run(self.connect())

    # --- after each step ---

    @invariant()
    def everything_is_where_it_must_be(self) -> None:
        """Conservation: each message is stored once, as itself, in a state it may be in, and the figures agree."""
        for queue in _SPECS if self.brokers else ():
            found, dropped = self.look(queue)
            known = self.model.of(queue)
            listed = [entry.message.id for entry in found]
            assert len(listed) == len(set(listed)), "conservation: something is there twice"
            listable = self.lab.capabilities.listable
            # In real time a message may change its state between the listings of two states, and show in neither.
            surely = {
                id
                for id, held in known.items()
                if (states := self.states(held)) <= listable and (self.lab.virtual or len(states) == 1)
            }
            lost, strange = sorted(surely - set(listed)), sorted(set(listed) - set(known))
            assert not lost, f"conservation: {lost} lost in {queue!r}"
            assert not strange, f"conservation: {strange} back from the dead in {queue!r}"
            for entry in found:
                held = known[entry.message.id]
                assert entry.state in self.states(held)
                assert self.same(entry.message, held)
                assert entry.delivery_count in (held.count, None)
                assert entry.letter == (held.letter if entry.state is State.DEAD else None)
            assert dropped in (self.model.dropped[queue], None)

    def look(self, queue: str) -> tuple[list[Entry], int | None]:
        """List a queue by one Broker, and check the figures that the other gives."""
        entries: list[Entry] = []
        dropped: int | None = None

        async def check() -> None:
            nonlocal entries, dropped
            listable = [state for state in State if state in self.lab.capabilities.listable]
            entries = [entry for state in listable for entry in await self.lab.entries(self.brokers[1], state, queue, limit=3)]
            stats = await self.lab.stats(self.brokers[0], queue)
            counted = Counter(entry.state for entry in entries)
            figures = {
                State.SCHEDULED: stats.scheduled,
                State.READY: stats.ready,
                State.LEASED: stats.leased,
                State.DEAD: stats.dead,
            }
            wrong = {state: figures[state] for state in listable if figures[state] not in (counted[state], None)}
            assert not wrong, f"the figures say {wrong}, the listings {dict(counted)}"
            dropped = stats.dead_dropped

        self.run(self.lab.eventually(check))
        return entries, dropped

    @staticmethod
    def same(message: Message, held: _Held) -> bool:
        """Equal but for the due time, which a backend may return as what it made of it."""
        plain = msgspec.structs.replace(message, eta_ms=0, delay_ms=0)
        return plain == msgspec.structs.replace(held.message, eta_ms=0, delay_ms=0) and message.delay_ms == 0

    def errors(self, refusals: Sequence[Refusal]) -> dict[int, type[Exception]]:
        """Error types of refusals by index."""
        return self.lab.errors(refusals)


def replay(target: Target | str, steps: Steps) -> None:
    """Run one program again.

    Args:
        target: What to run it on, or its URL.
        steps: Names of steps and their arguments, as a failure prints them.

    Raises:
        AssertionError: It fails as it did, or in another way.
    """
    target = target if isinstance(target, Target) else Target(target)
    _ = target.capabilities  # asked before an event loop runs
    machine = Machine(target)
    try:
        machine.start()
        for name, arguments in steps:
            getattr(machine, name)(**arguments)
            machine.everything_is_where_it_must_be()
    finally:
        machine.teardown()


def try_programs(target: Target, *, seconds: float, steps: int = STEPS, shrink: bool = True) -> int:
    """Try random programs for so many real seconds; returns how many steps were taken.

    Args:
        target: What is tried.
        seconds: For how long.
        steps: Of one program, at most.
        shrink: Whether a shorter program that fails is looked for.

    Raises:
        AssertionError: A program fails. The text is the shortest such program that was found.
    """
    taken = 0
    last: list[Machine] = []

    def machine() -> Machine:
        nonlocal taken
        taken += len(last[0].steps) if last else 0
        last[:] = [Machine(target)]
        return last[0]

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    some = settings(
        max_examples=5,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=slow,
        phases=phases,
        report_multiple_bugs=False,
    )
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            run_state_machine_as_test(machine, settings=some)  # type: ignore[arg-type]  # a factory is as good as the class
        except Exception as error:
            raise AssertionError(_script(target, last[0].steps, error)) from error
    return taken


def _script(target: Target, steps: Steps, error: Exception) -> str:
    what = str(error).partition("\n")[0] or type(error).__name__
    program = pprint.pformat(list(steps), width=110, sort_dicts=False)
    return (
        f"a random program fails: {what}\n\nRun it again with\n\n"
        f"from crossdock_conformance.model import replay\n\nreplay({redact(target.url)!r}, {program})\n"
    )
