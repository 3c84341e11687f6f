"""The memory broker: queues that live in this process and end with it. For tests, development and first steps.

It is also the reference reading of `crossdock.spi.Broker`: where a docstring there leaves you in doubt, look here. The verbs are in
`MemoryBroker`, what they do to one queue is in `_Queue`, and the four states are four sorted containers, `_Order`.

URLs: `memory://` or `memory://name`, no options. All Brokers of a process whose URLs bear the same name share one store, whatever
event loop or thread they live in; namespaces isolate within it. A store begins with the first Broker opened on it and lives until
`forget(name)` or the end of the process, with or without Brokers. A test that wants one to itself makes up a name and forgets it
afterwards. A forked child starts without stores. Brokers that share a store must share a clock too.

Nothing here survives the process, and nothing else is missing: limits, leases, fencing and retention are exact.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import platform
import re
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import suppress
from heapq import heapify, heappop, heappush
from typing import Any, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

from crossdock.errors import (
    BrokerClosed,
    ConfigurationError,
    CrossdockError,
    EnqueueFailed,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    QueueFull,
    UnsupportedCapability,
)
from crossdock.spi import (
    LEVELS,
    Ability,
    Ack,
    BackendPlugin,
    Broker,
    BrokerSettings,
    Capabilities,
    Cursor,
    Dead,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Page,
    Priority,
    QueueSpec,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
    Support,
    hookimpl,
    redact,
)

MAX_BODY: Final = 16 * 1024 * 1024
_MAX_PAGE: Final = 1000
_FOREVER: Final = 1e15
"""Seconds: the longest delay of a give-back or retry, so that infinity has a due time, too."""
_URL: Final = re.compile(r"memory://([A-Za-z0-9][A-Za-z0-9_-]{0,62})?")

_AT_REST: Final = frozenset({State.READY, State.SCHEDULED, State.DEAD})
_NATIVE: Final = Ability(Support.NATIVE)
_CAPABILITIES: Final = Capabilities(
    server="memory",
    version=f"Python {platform.python_version()}",
    survives=frozenset(),
    durability_note="Messages live in this process and end with it.",
    clock="client",
    fencing=Ability(Support.NATIVE, "A delivery is settled under the same lock that hands it over."),
    takeover=QueueSpec("").lease,
    delay=_NATIVE,
    delay_resolution=0.001,
    delay_lateness=0.25,
    delay_longest=math.inf,
    deduplication=_NATIVE,
    deduplication_window=0.0,
    listable=frozenset(State),
    removable=_AT_REST,
    purgeable=_AT_REST,
    by_id=_NATIVE,
    list_queues=_NATIVE,
    signals=Ability(Support.UNSUPPORTED, "The memory broker brings no signals yet."),
    max_body=MAX_BODY,
)


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the memory backend."""
    return BackendPlugin(name="memory", api_version=1, schemes=("memory",), create=MemoryBroker, example_url="memory://")


def forget(name: str = "") -> None:
    """Drop the store of `memory://name`, with all it holds. Nothing happens if there is none.

    Brokers that are open go on with the old store; those opened from now on share a new, empty one.
    """
    _stores.pop(name, None)


class MemoryBroker(Broker):
    """A Broker on a store in this process.

    Args:
        settings: `url` names the store, `clock` is its only source of time.

    Raises:
        ConfigurationError: The URL is more than `memory://name`, or has options.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        url = _URL.fullmatch(settings.url.partition("?")[0])
        if url is None:
            raise ConfigurationError(
                f"The broker URL {redact(settings.url)!r} cannot be used: write memory:// or memory://NAME, where NAME has "
                "1 to 63 letters, digits, '-' or '_' and starts with a letter or digit."
            )
        if settings.options:
            names = ", ".join(sorted(settings.options))
            raise ConfigurationError(f"memory:// takes no options: remove {names} from the broker URL.")
        self._name = url[1] or ""
        self._namespace = settings.namespace
        self._clock = settings.clock
        self._store: _Store | None = None
        self._naps: set[_Nap] = set()

    # --- life ---

    async def open(self) -> None:
        if self._store is None:
            self._store = _stores.setdefault(self._name, _Store())
            self.capabilities = _CAPABILITIES

    async def close(self) -> None:
        self._store = None
        naps = list(self._naps)
        for nap in naps:
            nap.interrupt()
        if naps:
            await asyncio.wait([nap.sleeper for nap in naps])

    async def _enter(self) -> _Store:
        """Begin a verb: let the loop take a turn, as a network would, so that a busy caller starves no neighbour.

        Nothing else in a verb but the nap of `receive` awaits; hence a cancelled call has done nothing, or everything.
        """
        if self._store is not None:
            await asyncio.sleep(0)
        if self._store is None:
            raise BrokerClosed("The memory broker is not open: it was closed, or open() was not called yet.")
        return self._store

    def _moment(self) -> _Moment:
        return _Moment(self._clock.monotonic(), self._clock.time_ms())

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        store = await self._enter()
        with store.lock:
            now = self._moment()
            for spec in queues:
                store.queue(self._namespace, spec.name, now).declare(spec)

    # --- messages in ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        store = await self._enter()
        refusals: list[Refusal] = []
        with store.lock:
            now = self._moment()
            queue: _Queue | None = None
            for index, message in enumerate(messages):
                if queue is None or queue.spec.name != message.queue:
                    queue = store.queue(self._namespace, message.queue, now)
                held = queue.stored.get(message.id)
                if held is not None and held.message.generation >= message.generation:
                    continue
                error = queue.objection(message, held) or queue.no_room(message, now)
                if error is None:
                    queue.store(message, now)
                else:
                    refusals.append(Refusal(index, error))
        return refusals

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deadline = self._clock.monotonic() + wait
        reached = -math.inf
        while True:
            store = await self._enter()
            with store.lock:
                now = self._moment()
                # A nap that ended by itself has reached its end, even if float arithmetic puts that a hair into the future.
                now = now._replace(seconds=max(now.seconds, reached))
                queues = {lane.queue: store.queue(self._namespace, lane.queue, now) for lane in lanes}
                deliveries = self._take(lanes, queues, limit, now)
                if deliveries or now.seconds >= deadline:
                    return deliveries
                until = min([deadline, *(queue.next_change(now) for queue in queues.values())])
                nap = _Nap(lanes, until, asyncio.ensure_future(self._clock.sleep(until - now.seconds)))
                for queue in queues.values():
                    queue.naps.add(nap)
            self._naps.add(nap)
            try:
                await asyncio.wait([nap.sleeper])
            finally:
                self._naps.discard(nap)
                with store.lock:
                    for queue in queues.values():
                        queue.naps.discard(nap)
                if not nap.sleeper.done():
                    nap.sleeper.cancel()
                elif not nap.sleeper.cancelled():
                    reached = until

    def _take(self, lanes: Sequence[Lane], queues: dict[str, _Queue], limit: int, now: _Moment) -> list[Delivery]:
        deliveries: list[Delivery] = []
        quotas = [(lane, lane.quota) for lane in lanes]
        leftovers = [(lane, limit) for lane in lanes]
        for lane, quota in (*quotas, *leftovers):
            queue = queues[lane.queue]
            ready = queue.ready[lane.priority]
            count = min(quota, limit - len(deliveries), len(ready))
            deliveries += [queue.hand_over(ready.pop(), self, now) for _ in range(count)]
        return deliveries

    def _held(self, delivery: Delivery) -> _Stored | None:
        """What the delivery's receipt still gives a right to: its message, until that was settled, removed or handed over again.

        A lease that has expired is lost only when somebody takes the message: until then its late holder may still settle or
        extend, and a handler's work is not done twice for nothing.
        """
        receipt = delivery.receipt
        if isinstance(receipt, _Receipt) and receipt.owner is self and receipt.stored.receipt is receipt:
            return receipt.stored
        return None

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        store = await self._enter()
        refusals: list[Refusal] = []
        with store.lock:
            now = self._moment()
            for index, delivery in enumerate(deliveries):
                stored = self._held(delivery)
                if stored is None:
                    refusals.append(Refusal(index, _lease_lost(delivery)))
                else:
                    store.queue(self._namespace, stored.message.queue, now).lease(stored, now)
        return refusals

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        store = await self._enter()
        refusals: list[Refusal] = []
        with store.lock:
            now = self._moment()
            queue: _Queue | None = None
            for index, settlement in enumerate(settlements):
                delivery = settlement.delivery
                receipt = delivery.receipt
                stored = self._held(delivery)
                if stored is not None:
                    if queue is None or queue.spec.name != stored.message.queue:
                        queue = store.queue(self._namespace, stored.message.queue, now)
                    queue.settle(stored, settlement, now)
                elif not (isinstance(receipt, _Receipt) and receipt.ending == _ending(settlement)):
                    refusals.append(Refusal(index, _lease_lost(delivery)))
        return refusals

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        store = await self._enter()
        with store.lock:
            now = self._moment()
            names = store.names(self._namespace) if queues is None else queues
            return [store.look(self._namespace, name, now).stats(now) for name in names]

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        store = await self._enter()
        place = _place(after, queue, state) if after is not None else None
        with store.lock:
            shown = store.look(self._namespace, queue, self._moment())
            if ids:
                return Page([stored.entry() for stored in shown.find(state, ids)])
            return shown.page(state, place, max(1, min(limit, _MAX_PAGE)))

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        store = await self._enter()
        _refuse_leased("remove", state)
        refusals: list[Refusal] = []
        with store.lock:
            source = store.look(self._namespace, queue, self._moment())
            for index, id in enumerate(ids):
                found = source.find(state, [id])
                if found:
                    source.drop(found[0])
                else:
                    refusals.append(Refusal(index, NotFound(f"No {state.value} message {id!r} is in queue {queue!r}.")))
        return refusals

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        store = await self._enter()
        refusals: list[Refusal] = []
        with store.lock:
            now = self._moment()
            source = store.look(self._namespace, queue, now)
            for index, (id, message) in enumerate((replay.id, replay.message) for replay in replays):
                found = source.find(State.DEAD, [id])
                if not found:
                    refusals.append(Refusal(index, NotFound(f"No dead letter {id!r} is in queue {queue!r}.")))
                    continue
                letter = found[0]
                target = store.queue(self._namespace, message.queue, now)
                held = target.stored.get(message.id)
                if held is letter:  # it is about to make room
                    held = None
                stored_already = held is not None and held.message.generation >= message.generation
                error = None if stored_already else target.objection(message, held)
                if error is not None:
                    refusals.append(Refusal(index, error))
                    continue
                # Under the lock nobody sees the moment between; without one, store first.
                source.drop(letter)
                if not stored_already:
                    target.store(message, now)
        return refusals

    async def purge(self, queue: str, state: State) -> int:
        store = await self._enter()
        _refuse_leased("purge", state)
        with store.lock:
            purged = store.look(self._namespace, queue, self._moment())
            doomed = purged.all(state)
            for stored in doomed:
                purged.drop(stored)
            return len(doomed)

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`."""
        store = await self._enter()
        with store.lock:
            store.erase(self._namespace, queues)


class _Moment(NamedTuple):
    """One reading of the clock, for a whole batch."""

    seconds: float
    """Monotonic; leases and waits end by it."""
    ms: int
    """Since the Unix epoch; due times and retention go by it."""


class _Store:
    """What the Brokers of one name share: the queues of every namespace, and the lock to hold while touching them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._queues: dict[tuple[str, str], _Queue] = {}

    def erase(self, namespace: str, names: Iterable[str]) -> None:
        """Forget queues. A receive that waits for one looks again, and so waits for the one that comes after it."""
        for name in names:
            queue = self._queues.pop((namespace, name), None)
            if queue is not None:
                for stored in list(queue.stored.values()):
                    queue.drop(stored)
                for nap in queue.naps:
                    nap.interrupt()

    def queue(self, namespace: str, name: str, now: _Moment) -> _Queue:
        """The queue as it stands now; made if it does not exist, and not `named` until it is used for more than to wait for it."""
        queue = self._queues.get((namespace, name))
        if queue is None:
            queue = self._queues[namespace, name] = _Queue(name)
        queue.catch_up(now)
        return queue

    def look(self, namespace: str, name: str, now: _Moment) -> _Queue:
        """The queue as it stands now, letters beyond their retention dropped; an empty one, not kept, if it does not exist."""
        queue = self._queues.get((namespace, name)) or _Queue(name)
        queue.catch_up(now)
        queue.apply_retention(now)
        return queue

    def names(self, namespace: str) -> list[str]:
        return sorted(name for (space, name), queue in self._queues.items() if space == namespace and queue.named)


class _Stored:
    """A message in a queue. Its state is the `_Order` it stands in."""

    __slots__ = ("delivery_count", "key", "letter", "message", "order", "place", "ready_ms", "receipt")

    order: _Order[Any]
    key: Any  # in that order

    def __init__(self, message: Message, place: int, ready_ms: float) -> None:
        self.message = message
        self.place = place  # in the queue's sequence of messages becoming ready
        self.ready_ms = ready_ms  # since when it has been waiting to be run
        self.delivery_count = 0  # hand-overs since it was stored, less those given back
        self.receipt: _Receipt | None = None  # the last one given out for it, while that may settle it
        self.letter: DeadLetter | None = None

    def entry(self) -> Entry:
        return Entry(self.message, self.order.state, self.delivery_count, self.letter)


class _Receipt:
    """The right to settle one delivery. It remembers how it was used, so that the same settlement again is known as done."""

    __slots__ = ("ending", "owner", "stored")

    def __init__(self, owner: MemoryBroker, stored: _Stored) -> None:
        self.owner = owner
        self.stored = stored
        self.ending: object = None


class _Queue:
    """One queue: each message by its id, and in exactly one order.

    A message goes from SCHEDULED or LEASED to READY by the mere passing of time; `catch_up` makes that so before anything else is
    done or seen. Callers hold the store's lock.
    """

    def __init__(self, name: str) -> None:
        self.spec = QueueSpec(name)
        self.named = False  # it was declared, or held a message
        self.stored: dict[str, _Stored] = {}
        self.ready: dict[Priority, _Order[int]] = {level: _Order(State.READY) for level in LEVELS}
        self.scheduled: _Order[tuple[float, int]] = _Order(State.SCHEDULED)
        self.leased: _Order[tuple[float, int]] = _Order(State.LEASED)
        self.dead: _Order[tuple[int, str, int]] = _Order(State.DEAD)
        self.dead_dropped = 0
        self.naps: set[_Nap] = set()
        self._places = itertools.count()

    # --- time ---

    def catch_up(self, now: _Moment) -> None:
        """Let what is due become READY, and take back what is held beyond its lease."""
        while (first := self.scheduled.first()) is not None:
            (due_ms, _), stored = first
            if due_ms > now.ms:
                break
            self.scheduled.discard(stored)
            stored.place, stored.ready_ms = next(self._places), due_ms
            self._make_ready(stored, now)
        while (first := self.leased.first()) is not None:
            (lease_end, _), stored = first
            if lease_end > now.seconds:
                break
            # Its place is its old one, so a dead worker's messages do not queue up again. Its count stays: that hand-over was lost.
            self.leased.discard(stored)
            self._make_ready(stored, now)

    def next_change(self, now: _Moment) -> float:
        """Monotonic seconds at which `catch_up` will have something to do; infinity if never."""
        change = math.inf
        if (first := self.scheduled.first()) is not None:
            change = now.seconds + (first[0][0] - now.ms) / 1000
        if (first := self.leased.first()) is not None:
            change = min(change, first[0][0])
        return change

    # --- in ---

    def declare(self, spec: QueueSpec) -> None:
        """Change its settings."""
        self.spec, self.named = spec, True

    def objection(self, message: Message, held: _Stored | None) -> EnqueueFailed | None:
        """Why this message cannot be stored in this queue, where `held` (older) bears the same id."""
        if len(message.body) > MAX_BODY:
            return MessageTooLarge(
                f"Message {message.id!r} for queue {self.spec.name!r} has a body of {len(message.body)} bytes; "
                f"the memory broker takes at most {MAX_BODY}.",
                message,
            )
        if int(message.priority) not in LEVELS:
            return EnqueueFailed(
                f"Message {message.id!r} for queue {self.spec.name!r} has the priority {int(message.priority)}, which is no level.",
                message,
            )
        if held is not None:
            return EnqueueFailed(
                f"Queue {self.spec.name!r} still holds message {message.id!r} at generation {held.message.generation}, "
                f"so generation {message.generation} was not stored; settle, replay or remove that one first.",
                message,
            )
        return None

    def no_room(self, message: Message, now: _Moment) -> QueueFull | None:
        """Why a message that would be READY now cannot be enqueued, if the queue is full."""
        most = self.spec.max_ready
        if most is None or _due_ms(message, now) > now.ms or sum(map(len, self.ready.values())) < most:
            return None
        return QueueFull(
            f"Queue {self.spec.name!r} is full: it holds its max_ready of {most} messages; {message.id!r} was not stored.", message
        )

    def store(self, message: Message, now: _Moment) -> None:
        """Make a message SCHEDULED or READY, behind the others of its level, as never delivered before."""
        stored = _Stored(message, next(self._places), now.ms)
        self.stored[message.id] = stored
        self.named = True
        self._wait_until(_due_ms(message, now), stored, now)

    def _wait_until(self, due_ms: int, stored: _Stored, now: _Moment) -> None:
        if due_ms <= now.ms:
            self._make_ready(stored, now)
        else:
            stored.message = msgspec.structs.replace(stored.message, eta_ms=due_ms, delay_ms=0)
            self.scheduled.add((due_ms, stored.place), stored)
            self._announce(stored.message.priority, now.seconds + (due_ms - now.ms) / 1000)

    def _make_ready(self, stored: _Stored, now: _Moment) -> None:
        self.ready[stored.message.priority].add(stored.place, stored)
        self._announce(stored.message.priority, now.seconds)

    def _announce(self, priority: Priority, when: float) -> None:
        """Wake the receivers that want this level and would sleep beyond `when`, the instant something comes there."""
        for nap in self.naps:
            if when < nap.until and (self.spec.name, priority) in nap.wanted:
                nap.interrupt()

    # --- deliveries ---

    def hand_over(self, stored: _Stored, owner: MemoryBroker, now: _Moment) -> Delivery:
        """Give a message that was just taken out of its order to a worker. Whoever had it before has lost it by this."""
        receipt = stored.receipt = _Receipt(owner, stored)
        stored.delivery_count += 1
        lease_until = self._lease(stored, now)
        # Broker and worker read one clock, so the lease needs no safety margin.
        return Delivery(stored.message, stored.delivery_count, lease_until, receipt)

    def lease(self, stored: _Stored, now: _Moment) -> None:
        """Start the lease again, also one that expired and that nobody has taken over."""
        stored.order.discard(stored)
        self._lease(stored, now)

    def _lease(self, stored: _Stored, now: _Moment) -> float:
        lease_until = now.seconds + self.spec.lease
        self.leased.add((lease_until, stored.place), stored)
        self._announce(stored.message.priority, lease_until)
        return lease_until

    def settle(self, stored: _Stored, settlement: Settlement, now: _Moment) -> None:
        """End the delivery of a message, and its receipt with it."""
        if stored.receipt is not None:
            stored.receipt.ending = _ending(settlement)
            stored.receipt = None
        stored.order.discard(stored)
        match settlement:
            case Ack():
                del self.stored[stored.message.id]
            case Nack(delay=delay, replacement=replacement):
                if replacement is None:
                    stored.delivery_count -= 1  # and its place is its old one, as if it had never left
                else:
                    stored.message, stored.delivery_count = replacement, 0
                    stored.place, stored.ready_ms = next(self._places), now.ms
                self._wait_until(now.ms + round(min(delay, _FOREVER) * 1000), stored, now)
            case Dead(letter=letter):
                stored.message, stored.letter = letter.message, letter
                self.dead.add((letter.died_ms, letter.message.id, stored.place), stored)
                self.apply_retention(now)

    # --- out ---

    def drop(self, stored: _Stored) -> None:
        """Forget a message, whatever order it is in."""
        stored.order.discard(stored)
        stored.receipt = None
        del self.stored[stored.message.id]

    def apply_retention(self, now: _Moment) -> None:
        """Drop the oldest letters: those beyond `dead_max_age`, then those beyond `dead_max_count`."""
        oldest_ms = -math.inf if self.spec.dead_max_age is None else now.ms - self.spec.dead_max_age * 1000
        most = math.inf if self.spec.dead_max_count is None else self.spec.dead_max_count
        while (first := self.dead.first()) is not None:
            (died_ms, _, _), stored = first
            if died_ms >= oldest_ms and len(self.dead) <= most:
                break
            self.drop(stored)
            self.dead_dropped += 1

    # --- looking ---

    def _orders(self, state: State) -> Sequence[_Order[Any]]:
        match state:
            case State.READY:
                return tuple(self.ready.values())
            case State.SCHEDULED:
                return (self.scheduled,)
            case State.LEASED:
                return (self.leased,)
            case State.DEAD:
                return (self.dead,)

    def all(self, state: State) -> list[_Stored]:
        return [stored for order in self._orders(state) for _, stored in order.beyond()]

    def find(self, state: State, ids: Iterable[str]) -> list[_Stored]:
        """Those of these messages that are in this state."""
        return [stored for id in ids if (stored := self.stored.get(id)) is not None and stored.order.state is state]

    def page(self, state: State, after: _Place | None, limit: int) -> Page:
        """Up to `limit` messages in order, from behind the place `after`."""
        first_order, last_key = after if after is not None else (0, None)
        found: list[tuple[_Place, _Stored]] = []
        for index, order in enumerate(self._orders(state)[first_order:], first_order):
            for key, stored in order.beyond(last_key)[: limit + 1 - len(found)]:
                found.append(((index, key), stored))
            last_key = None
        shown = found[:limit]
        return Page(
            [stored.entry() for _, stored in shown],
            _cursor(self.spec.name, state, shown[-1][0]) if len(found) > limit else None,
        )

    def stats(self, now: _Moment) -> QueueStats:
        oldest = [first[1].ready_ms for order in self.ready.values() if (first := order.first()) is not None]
        return QueueStats(
            self.spec.name,
            ready=sum(map(len, self.ready.values())),
            scheduled=len(self.scheduled),
            leased=len(self.leased),
            dead=len(self.dead),
            oldest_ready_age=max(0.0, (now.ms - min(oldest)) / 1000) if oldest else 0.0,
            dead_dropped=self.dead_dropped,
        )


_Key = TypeVar("_Key", int, tuple[float, int], tuple[int, str, int])


class _Order(Generic[_Key]):
    """The messages of one state, each under a key of its own, lowest first.

    A heap of keys. What is discarded leaves its key behind there, until that comes to the top or half of the heap is such; so
    adding and taking cost O(log n), discarding O(1), and only a listing sorts.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._keys: list[_Key] = []
        self._stored: dict[_Key, _Stored] = {}

    def __len__(self) -> int:
        return len(self._stored)

    def add(self, key: _Key, stored: _Stored) -> None:
        self._stored[key] = stored
        heappush(self._keys, key)
        stored.order, stored.key = self, key

    def discard(self, stored: _Stored) -> None:
        del self._stored[stored.key]
        if len(self._keys) > 2 * len(self._stored) + 100:
            self._keys = list(self._stored)
            heapify(self._keys)

    def first(self) -> tuple[_Key, _Stored] | None:
        """The lowest key and its message; None if there is none."""
        while self._keys:
            key = self._keys[0]
            if (stored := self._stored.get(key)) is not None:
                return key, stored
            heappop(self._keys)
        return None

    def pop(self) -> _Stored:
        """Take out the message with the lowest key; there must be one."""
        while True:
            if (stored := self._stored.pop(heappop(self._keys), None)) is not None:
                return stored

    def beyond(self, key: _Key | None = None) -> list[tuple[_Key, _Stored]]:
        """All messages, or those with higher keys, in order."""
        self._keys = sorted(self._stored)  # a sorted list is a heap, too
        start = 0 if key is None else bisect_right(self._keys, key)
        return [(key, self._stored[key]) for key in self._keys[start:]]


class _Nap:
    """A receive that waits until an instant, or until another caller puts something it wants into one of its queues."""

    def __init__(self, lanes: Sequence[Lane], until: float, sleeper: asyncio.Future[None]) -> None:
        self.wanted = {(lane.queue, lane.priority) for lane in lanes}
        self.until = until
        self.sleeper = sleeper
        self._loop = asyncio.get_running_loop()
        self._interrupted = False

    def interrupt(self) -> None:
        """End it now. Callable from any thread."""
        if not self._interrupted:
            self._interrupted = True
            with suppress(RuntimeError):  # its loop was closed over it: nobody waits any more
                self._loop.call_soon_threadsafe(self.sleeper.cancel)


_Place = tuple[int, Any]
"""A place in a listing: which of the state's orders, and the key there."""


_CURSORS: Final[dict[State, Any]] = {
    State.READY: tuple[str, Literal["ready"], int, int],
    State.SCHEDULED: tuple[str, Literal["scheduled"], int, tuple[float, int]],
    State.LEASED: tuple[str, Literal["leased"], int, tuple[float, int]],
    State.DEAD: tuple[str, Literal["dead"], int, tuple[int, str, int]],
}
"""What is in the cursor of a listing: the queue, the state and a place."""


def _cursor(queue: str, state: State, place: _Place) -> Cursor:
    return Cursor(msgspec.json.encode((queue, state.value, *place)).hex())


def _place(cursor: Cursor, queue: str, state: State) -> _Place:
    wrong = ConfigurationError(
        f"This is no cursor of a listing of {state.value} messages in queue {queue!r}; start again without one."
    )
    try:
        listed, _, order, key = msgspec.json.decode(bytes.fromhex(cursor), type=_CURSORS[state])
    except (ValueError, msgspec.DecodeError) as error:
        raise wrong from error
    if listed != queue:
        raise wrong
    return order, key


def _due_ms(message: Message, now: _Moment) -> int:
    return now.ms + message.delay_ms if message.delay_ms > 0 else message.eta_ms


def _ending(settlement: Settlement) -> object:
    """What tells two settlements of one delivery apart."""
    match settlement:
        case Ack():
            return Ack
        case Nack(delay=delay, replacement=replacement):
            return delay, replacement
        case Dead(letter=letter):
            return letter


def _lease_lost(delivery: Delivery) -> CrossdockError:
    message = delivery.message
    return LeaseLost(f"The lease on message {message.id!r} of queue {message.queue!r} is over; nothing was changed.")


def _refuse_leased(verb: str, state: State) -> None:
    if state is State.LEASED:
        raise UnsupportedCapability(f"The memory broker cannot {verb} leased messages: they belong to their workers until settled.")


_stores: dict[str, _Store] = {}
os.register_at_fork(after_in_child=_stores.clear)
