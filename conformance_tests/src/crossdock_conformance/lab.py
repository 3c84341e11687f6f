"""Lab: what a scenario works with. An empty namespace, a clock, and shorthands for what all scenarios do.

A scenario is written once and runs on two kinds of time. Where the backend lives by the clock it is given, time is virtual: it
stands still until `pass_time`, and what is true is true at once. Where the server has a clock of its own, `pass_time` waits, leases
are short, and what must become true is waited for. A scenario therefore names times by what they are (`lease`, `sweep`, `lateness`,
`moment`), and asserts through `take`, `holds` and `until`, which wait where waiting is due.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import msgspec

from crossdock.clock import SystemClock, VirtualClock
from crossdock.errors import BrokerError, CrossdockError, LeaseLost, UnsupportedCapability
from crossdock.spi import (
    LEVELS,
    Ack,
    Broker,
    BrokerEvent,
    Capabilities,
    Clock,
    Cursor,
    Dead,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    QueueStats,
    Reason,
    Refusal,
    Replay,
    Settlement,
    State,
    Support,
    SupportsErase,
)
from crossdock_conformance.target import Target

T = TypeVar("T")
E = TypeVar("E", bound=CrossdockError)

EARLY: Final = 0.05
"""Seconds by which a message may come before its due time: clocks are read in milliseconds, and two of them differ."""
ENDINGS: Final[Mapping[str, State | None]] = {
    "ack": None,
    "give-back": State.READY,
    "retry": State.READY,
    "dead": State.DEAD,
    "give-back later": State.SCHEDULED,
    "retry later": State.SCHEDULED,
}
"""The ways to end a delivery, and the state each leaves its message in; `Lab.ending` makes them, "later" means `Lab.far`."""
_SHORT_LEASE: Final = 2.0
"""Seconds of a lease in real time."""
_QUIET: Final = 0.3
"""Real seconds after which nothing more is expected to come."""
_POLL: Final = 0.01
_SLOW: Final = 1.0
"""Real seconds that a slow machine may add to whatever is measured."""


class _Skewed:
    """A clock like another one, but for its time of day."""

    def __init__(self, clock: Clock, skew: float) -> None:
        self._clock = clock
        self._skew_ms = round(skew * 1000)

    def time_ms(self) -> int:
        return self._clock.time_ms() + self._skew_ms

    def monotonic(self) -> float:
        return self._clock.monotonic()

    async def sleep(self, seconds: float) -> None:
        await self._clock.sleep(seconds)


class Lab:
    """One namespace of one target, for one scenario. Belongs to the running event loop.

    Args:
        target: What is tested.
        namespace: Begins the names of all namespaces that are used; the default is drawn.
        real_time: Use the system's clock even where time could be in our hands.
    """

    def __init__(self, target: Target, namespace: str = "", *, real_time: bool = False) -> None:
        self.target = target
        self.capabilities: Capabilities = target.capabilities
        self.namespace = namespace or f"t{secrets.randbits(53):016d}"
        self.virtual = target.virtual and not real_time
        self._turned = VirtualClock()
        self.clock: Clock = self._turned if self.virtual else SystemClock()
        """The one that Brokers are given; where the server has its own, deadlines of leases are still told in this one."""
        default = QueueSpec("q").lease
        self.lease = default if self.virtual else _SHORT_LEASE
        """Seconds of the lease of every queue that `open` declares."""
        self.sweep = self.capabilities.takeover - default
        """Seconds after the end of a lease within which a message is delivered again."""
        self.lateness = self.capabilities.delay_lateness
        """Seconds a due message may be late."""
        self.moment = 10.0 if self.virtual else max(1.0, 2 * self.lateness)
        """Seconds: a while that is long for the broker and short for a lease of minutes. Delays and ages are told in it."""
        self.far = min(3600.0, self.capabilities.delay_longest or 3600.0)
        """Seconds: an hour, or the longest delay where that is shorter."""
        self.early = 0.0 if self.virtual else EARLY
        """Seconds by which a message may come before its due time."""
        self.slack = 0.0 if self.virtual else _SLOW
        """Seconds that a slow machine may add to whatever is measured."""
        self.patience = target.patience
        delays = self.capabilities.delay.support is not Support.UNSUPPORTED
        self.endings = [kind for kind, state in ENDINGS.items() if delays or state is not State.SCHEDULED]
        """Those of `ENDINGS` that the backend declares to know."""
        self.events: list[BrokerEvent] = []
        """What Brokers reported."""
        self._opened: list[tuple[Broker, str]] = []
        self._used: dict[str, set[str]] = {}
        self._numbers = itertools.count(1)

    # --- brokers ---

    def build(self, namespace: str = "", *, skew: float = 0.0) -> Broker:
        """Return a Broker that is not open yet; the lab closes it in the end.

        Args:
            namespace: What follows the lab's own in its name.
            skew: Seconds by which the wall clock that it is given is ahead of the broker's.
        """
        name = self.namespace + namespace
        clock = _Skewed(self.clock, skew) if skew else self.clock
        broker = self.target.make_broker(name, clock, self.events.append)
        self._opened.append((broker, name))
        self._used.setdefault(name, set())
        return broker

    async def open(self, namespace: str = "", queues: Iterable[str] = ("q",)) -> Broker:
        """Return an open Broker.

        Args:
            namespace: What follows the lab's own in its name.
            queues: Declared with the lab's lease. Others have the default of 30 s.
        """
        broker = self.build(namespace)
        await broker.open()
        await self.declare(broker, *(QueueSpec(queue, lease=self.lease) for queue in queues))
        return broker

    async def declare(self, broker: Broker, *specs: QueueSpec) -> None:
        """Declare queues."""
        if specs:
            await broker.declare(specs)
        self._note_used(broker, (spec.name for spec in specs))

    async def close(self) -> None:
        """Close every Broker, then remove what the scenario left in the broker, where the backend can do that.

        Not before: an open Broker declares again what it declared and misses.
        """
        try:
            for broker, _ in self._opened:
                await broker.close()
        finally:
            for name, queues in self._used.items():
                await self._erase(name, sorted(queues))

    async def _erase(self, namespace: str, queues: Sequence[str]) -> None:
        eraser = self.target.make_broker(namespace, self.clock)
        try:
            await eraser.open()
            if isinstance(eraser, SupportsErase):
                await eraser.erase(queues)
        except BrokerError:
            pass  # the scenario has ended; whatever is wrong was its to find
        finally:
            await eraser.close()

    def _note_used(self, broker: Broker, queues: Iterable[str]) -> None:
        for opened, namespace in self._opened:
            if opened is broker:
                self._used[namespace].update(queues)

    # --- time ---

    @asynccontextmanager
    async def in_real_time(self) -> AsyncGenerator[Lab]:
        """A lab on the same target that uses the system's clock, as other processes do: itself if it does so already, else another."""
        if not self.virtual:
            yield self
            return
        lab = Lab(self.target, real_time=True)
        try:
            yield lab
        finally:
            await lab.close()

    async def pass_time(self, seconds: float) -> None:
        """Return when so much time has passed for the broker, and a millisecond, so that rounding never decides a scenario."""
        if self.virtual:
            await self.turns()  # whoever was about to wait does so before time moves
            self._turned.advance(seconds + 0.001)
        else:
            await asyncio.sleep(seconds + 0.001)

    async def lease_over(self) -> None:
        """Return when leases that began before this call are over, and what they held must be delivered again."""
        await self.pass_time(self.lease + self.sweep)

    async def turns(self, count: int = 50) -> None:
        """Let others run, for so many turns of the loop."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def until(self, fact: Callable[[], Awaitable[bool] | bool], what: str) -> None:
        """Return when a fact holds. Fails where it does not within the target's patience.

        Args:
            fact: Asked again and again.
            what: Completes "it took too long until ...".
        """
        end = time.monotonic() + self.patience
        while True:
            answer = fact()
            if answer if isinstance(answer, bool) else await answer:
                return
            assert time.monotonic() < end, f"it took too long until {what}"
            await asyncio.sleep(_POLL)

    async def eventually(self, check: Callable[[], Awaitable[None]]) -> None:
        """Return when an async function of assertions passes: at the first try in virtual time, within the patience else."""
        end = time.monotonic() + (0.0 if self.virtual else self.patience)
        while True:
            try:
                await check()
                return
            except AssertionError:
                if time.monotonic() >= end:
                    raise
            await asyncio.sleep(_POLL)

    @asynccontextmanager
    async def waiting(
        self, broker: Broker, wait: float, limit: int = 100, queue: str = "q"
    ) -> AsyncGenerator[asyncio.Task[Sequence[Delivery]]]:
        """Run a receive that has begun to wait; whatever the scenario does, it must have ended when the block does."""
        task = asyncio.ensure_future(broker.receive(self.lanes(queue), limit, wait))
        await self.turns()
        assert not task.done(), "a receive should wait for a first delivery"
        try:
            yield task
            await asyncio.wait([task], timeout=self.patience)
            assert task.done(), "a waiting receive was not woken"
        finally:
            task.cancel()
            await asyncio.wait([task])

    @asynccontextmanager
    async def beside(self, call: Coroutine[Any, Any, T]) -> AsyncGenerator[asyncio.Task[T]]:
        """Run a call beside the block. The block waits for its end and raises its error; where the block fails, it is cancelled."""
        task = asyncio.ensure_future(call)
        try:
            yield task
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def interrupted(self, call: Coroutine[Any, Any, T], seconds: float) -> T | None:
        """Begin a call and cancel it after some real seconds. Returns what it returned nevertheless, None if it did not."""
        task = asyncio.ensure_future(call)
        end = time.monotonic() + seconds
        while not task.done() and time.monotonic() < end:
            await self.turns(1)
        task.cancel()
        await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    # --- values ---

    def message(self, id: str = "", queue: str = "q", priority: Priority = Priority.NORMAL, **fields: Any) -> Message:
        """Make a message; without an id, one that no other message has."""
        id = id or f"m{next(self._numbers)}"
        return Message(id, queue, priority, fields.pop("body", f"body of {id}".encode()), **fields)

    def messages(self, count: int, **fields: Any) -> list[Message]:
        """Make so many messages."""
        return [self.message(**fields) for _ in range(count)]

    def lanes(self, *queues: str, quota: int = 0) -> list[Lane]:
        """Every level of these queues, most urgent first."""
        return [Lane(queue, level, quota) for queue in queues for level in LEVELS]

    def retry(self, delivery: Delivery, delay: float = 0.0, **changes: Any) -> Nack:
        """Make the settlement that stores a replacement."""
        old = delivery.message
        fresh = Message(old.id, old.queue, old.priority, b"retried " + old.body, generation=old.generation + 1)
        return Nack(delivery, delay, msgspec.structs.replace(fresh, **changes))

    def dead(self, delivery: Delivery, **changes: Any) -> Dead:
        """Make the settlement that dead-letters."""
        now = self.clock.time_ms()
        letter = DeadLetter(delivery.message, Reason.REJECTED, now, "shop.pay", "builtins.OSError", "f1", b"story")
        return Dead(delivery, msgspec.structs.replace(letter, **changes))

    def ending(self, kind: str, delivery: Delivery) -> Settlement:
        """Make the settlement that `ENDINGS` calls so."""
        delay = self.far if ENDINGS[kind] is State.SCHEDULED else 0.0
        match kind.split()[0]:
            case "ack":
                return Ack(delivery)
            case "give-back":
                return Nack(delivery, delay)
            case "retry":
                return self.retry(delivery, delay)
            case _:
                return self.dead(delivery)

    def revived(self, message: Message, **changes: Any) -> Replay:
        """Make the order to replay a dead message, one generation on."""
        changes = {"generation": message.generation + 1, **changes}
        return Replay(message.id, msgspec.structs.replace(message, **changes))

    # --- verbs, for where nothing should be refused ---

    async def enqueue(self, broker: Broker, *messages: Message) -> None:
        """Store messages. Fails if one is refused."""
        self._note_used(broker, (message.queue for message in messages))
        self.nothing_refused(await broker.enqueue(messages))

    async def settle(self, broker: Broker, *settlements: Settlement) -> None:
        """End deliveries. Fails if one is refused."""
        self.nothing_refused(await broker.settle(settlements))

    async def take(self, broker: Broker, limit: int = 100, queue: str = "q", lanes: Sequence[Lane] = ()) -> list[Delivery]:
        """Receive what is READY, up to `limit`: by one receive that looks once in virtual time, else until no more comes."""
        lanes = lanes or self.lanes(queue)
        taken = list(await broker.receive(lanes, limit, 0))
        while not self.virtual and len(taken) < limit:
            more = await broker.receive(lanes, limit - len(taken), _QUIET)
            if not more:
                break
            taken += more
        return taken

    async def take_one(self, broker: Broker, queue: str = "q") -> Delivery:
        """Receive the one message that is READY."""
        taken = await self.take(broker, queue=queue) if self.virtual else await broker.receive(self.lanes(queue), 1, self.patience)
        assert len(taken) == 1, f"{len(taken)} messages were delivered where one is READY"
        return taken[0]

    async def take_exactly(self, broker: Broker, count: int, queue: str = "q", lanes: Sequence[Lane] = ()) -> list[Delivery]:
        """Receive so many messages that are READY, or become so without any time passing. Fails if they do not come."""
        taken: list[Delivery] = []
        try:
            async with asyncio.timeout(self.patience):
                while len(taken) < count:
                    taken += await broker.receive(lanes or self.lanes(queue), count - len(taken), 3600)
        except TimeoutError as error:
            raise AssertionError(f"of {count} messages only {len(taken)} were delivered") from error
        return taken

    async def comes(self, broker: Broker, not_before: float, not_after: float, queue: str = "q") -> Delivery:
        """Receive the next message of a queue, by a receive that waits for it, and fail unless it comes in time.

        Args:
            broker: Has no receive under way.
            not_before: It may not come earlier. In seconds of `clock.monotonic()`.
            not_after: It may not come later, but for what a slow machine adds.
            queue: Where. Nothing is READY there yet.
        """
        now = self.clock.monotonic()
        if self.virtual:
            await self.turns()
            self._turned.advance(max(0.0, not_before - now - 0.001))
            assert not await self.take(broker, queue=queue), "it came before its time"
            async with self.waiting(broker, not_after - now + 3600, limit=1, queue=queue) as receive:
                await self.pass_time(not_after - self.clock.monotonic())
            (delivery,) = receive.result()
            return delivery
        deliveries = await broker.receive(self.lanes(queue), 1, not_after - now + self.patience)
        came = self.clock.monotonic()
        assert deliveries, "it did not come"
        assert came >= not_before, f"it came {not_before - came:.3f} s before its time"
        assert came <= not_after + self.slack, f"it came {came - not_after:.3f} s too late"
        return deliveries[0]

    async def bury(self, broker: Broker, *messages: Message, **changes: Any) -> None:
        """Enqueue messages and dead-letter them, in this order. Nothing else may be READY in their queues."""
        for message in messages:
            await self.enqueue(broker, message)
            await self.settle(broker, self.dead(await self.take_one(broker, message.queue), **changes))

    async def fill(
        self, broker: Broker, count: int = 7, queue: str = "long", states: Sequence[State] = tuple(State)
    ) -> dict[State, list[str]]:
        """Bring messages into states of an empty queue, and return what `holds` expects then; SCHEDULED only where delays are known.

        Args:
            broker: Who does it; its leases on LEASED ones are not returned.
            count: How many into each state. Their ids are "ready0", "ready1" and so on, in the order of a listing.
            queue: One that was not declared has leases of 30 s, so that a slow machine loses none. The SCHEDULED are due after 60 s.
            states: Which.
        """
        width = len(str(count - 1))
        filled = {state: [f"{state.value}{number:0{width}}" for number in range(count)] for state in states}
        if self.capabilities.delay.support is Support.UNSUPPORTED:
            filled.pop(State.SCHEDULED, None)
        await self.bury(broker, *(self.message(id, queue) for id in filled.get(State.DEAD, ())))
        await self.enqueue(broker, *(self.message(id, queue) for id in filled.get(State.LEASED, ())))
        await self.take_exactly(broker, len(filled.get(State.LEASED, ())), queue)
        scheduled = enumerate(filled.get(State.SCHEDULED, ()), 60)
        await self.enqueue(broker, *(self.message(id, queue, delay_ms=second * 1000) for second, id in scheduled))
        await self.enqueue(broker, *(self.message(id, queue) for id in filled.get(State.READY, ())))
        return filled

    async def replay(self, broker: Broker, *replays: Replay, queue: str = "q") -> None:
        """Bring dead letters back to life. Fails if one is refused."""
        self._note_used(broker, (replay.message.queue for replay in replays))
        self.nothing_refused(await broker.replay(queue, replays))

    async def stats(self, broker: Broker, queue: str = "q") -> QueueStats:
        """Return the figures of one queue."""
        (stats,) = await broker.stats([queue])
        return stats

    async def entries(self, broker: Broker, state: State, queue: str = "q", limit: int = 1000) -> list[Entry]:
        """List a state page by page."""
        found: list[Entry] = []
        after: Cursor | None = None
        while True:
            page = await broker.peek(queue, state, after=after, limit=limit)
            assert len(page.entries) <= limit, f"a page has {len(page.entries)} entries where {limit} were asked for"
            found += page.entries
            after = page.next
            if after is None:
                return found

    async def ids(self, broker: Broker, state: State, queue: str = "q") -> list[str]:
        """List the ids of a state."""
        return [entry.message.id for entry in await self.entries(broker, state, queue)]

    # --- assertions ---

    async def lost(self, broker: Broker, delivery: Delivery) -> None:
        """Assert that a Broker can do nothing with a delivery: each settlement and an extension is refused with `LeaseLost`."""
        refused = self.errors(await broker.settle([self.ending(kind, delivery) for kind in self.endings]))
        done = [kind for index, kind in enumerate(self.endings) if refused.get(index) is not LeaseLost]
        if self.errors(await broker.extend([delivery])) != {0: LeaseLost}:
            done.append("extension")
        assert not done, f"not refused with LeaseLost, for a delivery that is lost: {', '.join(done)}"

    async def holds(
        self, broker: Broker, expected: Mapping[State, Sequence[str]], queue: str = "q", *, in_order: bool = True
    ) -> None:
        """Assert that exactly these messages are in these states: by listing what can be listed, by counting what can be counted.

        Args:
            broker: Whose namespace is meant.
            expected: Ids by state; a state that is left out is empty.
            queue: Which queue.
            in_order: The order of ids counts.
        """

        async def check() -> None:
            stats = await self.stats(broker, queue)
            counts = {
                State.READY: stats.ready,
                State.SCHEDULED: stats.scheduled,
                State.LEASED: stats.leased,
                State.DEAD: stats.dead,
            }
            for state in State:
                wanted = list(expected.get(state, ()))
                if state in self.capabilities.listable:
                    found = await self.ids(broker, state, queue)
                    listed = (found, wanted) if in_order else (sorted(found), sorted(wanted))
                    assert listed[0] == listed[1], f"{state.value} are {listed[0]}, and should be {listed[1]}"
                count = counts[state]
                assert count is None or count == len(wanted), f"stats count {count} {state.value} messages, not {len(wanted)}"

        await self.eventually(check)

    @staticmethod
    async def raises(expected: type[E], call: Awaitable[object]) -> E:
        """Await a call that must raise this error, and return it."""
        try:
            answer = await call
        except expected as error:
            raised = error
        else:
            raise AssertionError(f"{expected.__name__} was not raised; {answer!r} was returned")
        assert str(raised).strip(), f"{expected.__name__} says nothing"
        return raised

    @staticmethod
    def nothing_refused(refusals: Sequence[Refusal]) -> None:
        """Fail if anything was refused; raises the `UnsupportedCapability` of an item that was refused with it."""
        for refusal in refusals:
            if isinstance(refusal.error, UnsupportedCapability):
                raise refusal.error
        assert not refusals, f"refused: {[(refusal.index, refusal.error) for refusal in refusals]}"

    @staticmethod
    def errors(refusals: Sequence[Refusal]) -> dict[int, type[Exception]]:
        """Return the error types of refusals by index, and check their form."""
        for refusal in refusals:
            text = str(refusal.error)
            assert isinstance(refusal.error, CrossdockError), f"a refusal carries {type(refusal.error).__name__}"
            assert text.strip(), f"{type(refusal.error).__name__} says nothing"
            assert "Traceback" not in text
        assert len({refusal.index for refusal in refusals}) == len(refusals), "an item was refused twice"
        return {refusal.index: type(refusal.error) for refusal in refusals}
