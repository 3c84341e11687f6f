"""The twelve verbs on a list in a JSON file.

The file of a namespace is read at the start of each verb and written at its end, under a lock. So every verb is one step: it
happened or it did not, and nobody sees it half done.
"""

from __future__ import annotations

import asyncio
import fcntl
import math
import os
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EnqueueFailed,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    QueueFull,
    UnsupportedCapability,
)
from crossdock.spi import (
    Ability,
    Ack,
    Broker,
    BrokerSettings,
    Capabilities,
    Cursor,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Page,
    QueueSpec,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
    Support,
    Survives,
)

POLL = 0.02
"""Seconds between two looks of a waiting receive."""
MAX_BODY = 1024 * 1024
REMEMBERED = 10_000
"""How many settlements a Broker remembers, to know one that is repeated."""

AT_REST = frozenset({State.READY, State.SCHEDULED, State.DEAD})


class Record(msgspec.Struct):
    """A stored message."""

    message: Message
    state: State
    place: int
    """Its turn: lower is earlier."""
    until_ms: int = 0
    """SCHEDULED: when it is due. LEASED: when the lease ends. READY: since when. DEAD: when it died."""
    delivery_count: int = 0
    receipt: str = ""
    letter: DeadLetter | None = None

    def key(self) -> tuple[int, int, str]:
        """Where it stands among the records of its state."""
        if self.state is State.READY:
            return -self.message.priority, self.place, self.message.id
        if self.state is State.DEAD:
            return self.until_ms, 0, self.message.id
        return self.until_ms, self.place, self.message.id


class Store(msgspec.Struct):
    """All that a file holds."""

    records: list[Record] = []
    specs: dict[str, QueueSpec] = {}
    dropped: dict[str, int] = {}
    places: int = 0

    def spec(self, queue: str) -> QueueSpec:
        return self.specs.setdefault(queue, QueueSpec(queue))

    def next_place(self) -> int:
        self.places += 1
        return self.places

    def of(self, queue: str, state: State) -> list[Record]:
        """The records of a queue in one state, in order."""
        return sorted((r for r in self.records if r.message.queue == queue and r.state is state), key=Record.key)

    def find(self, queue: str, id: str) -> Record | None:
        return next((r for r in self.records if r.message.id == id and r.message.queue == queue), None)

    def catch_up(self, now_ms: int) -> None:
        """Do what time has done: due messages and expired leases become READY, old dead letters leave."""
        for record in self.records:
            if record.state in (State.SCHEDULED, State.LEASED) and record.until_ms <= now_ms:
                if record.state is State.SCHEDULED:
                    record.place = self.next_place()
                record.state = State.READY
        for name, spec in self.specs.items():
            letters = self.of(name, State.DEAD)
            too_old = -math.inf if spec.dead_max_age is None else now_ms - spec.dead_max_age * 1000
            too_many = 0 if spec.dead_max_count is None else len(letters) - spec.dead_max_count
            for number, record in enumerate(letters):
                if number < too_many or record.until_ms < too_old:
                    self.records.remove(record)
                    self.dropped[name] = self.dropped.get(name, 0) + 1

    def wait_until(self, record: Record, due_ms: int, now_ms: int) -> None:
        """Make a record READY, or SCHEDULED if its time is still to come."""
        if due_ms > now_ms:
            record.message = msgspec.structs.replace(record.message, eta_ms=due_ms, delay_ms=0)
        record.state = State.SCHEDULED if due_ms > now_ms else State.READY
        record.until_ms = max(due_ms, now_ms)

    def store(self, message: Message, now_ms: int) -> None:
        """Store a new message."""
        record = Record(message, State.READY, self.next_place())
        self.records.append(record)
        self.spec(message.queue)
        self.wait_until(record, due_ms(message, now_ms), now_ms)


def due_ms(message: Message, now_ms: int) -> int:
    """When a message that is stored now may run."""
    return now_ms + message.delay_ms if message.delay_ms > 0 else message.eta_ms


class ToyBroker(Broker):
    """A Broker on one file per namespace.

    Args:
        settings: The URL is `toy:///relative/folder` or `toy:////absolute/folder`.

    Raises:
        ConfigurationError: The URL names no folder, or has options.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        folder = settings.url.partition("?")[0].removeprefix("toy://")
        if not folder.startswith("/") or folder == "/":
            raise ConfigurationError("A toy URL names a folder: toy:///relative/folder or toy:////absolute/folder.")
        if settings.options:
            raise ConfigurationError(f"toy:// has no options; remove {', '.join(settings.options)} from the URL.")
        self._folder = Path(folder[1:])
        self._path = self._folder / f"{settings.namespace}.json"
        self._clock = settings.clock
        self._is_open = False
        self._name = secrets.token_hex(8)  # in our receipts, which mean nothing to another Broker
        self._settled: dict[object, Settlement] = {}

    # --- life ---

    async def open(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BrokerUnavailable(f"The folder {self._folder} cannot be made: {error.strerror}.") from error
        native = Ability(Support.NATIVE)
        self.capabilities = Capabilities(
            server="toy",
            version="0.1.0",
            survives=frozenset({Survives.PROCESS}),
            durability_note="A file is replaced as a whole, and not flushed to the disk.",
            clock="client",
            fencing=native,
            takeover=QueueSpec("").lease + POLL,
            delay=native,
            delay_resolution=0.001,
            delay_lateness=0.25,
            delay_longest=math.inf,
            deduplication=native,
            deduplication_window=0.0,
            listable=frozenset(State),
            removable=AT_REST,
            purgeable=AT_REST,
            by_id=native,
            list_queues=native,
            signals=Ability(Support.UNSUPPORTED, "A file tells nobody."),
            max_body=MAX_BODY,
        )
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False

    @contextmanager
    def _store(self) -> Generator[tuple[Store, int]]:
        """The store as it is now, and now. What the block changes in it is kept, unless it raises."""
        if not self._is_open:
            raise BrokerClosed("The toy broker is not open.")
        try:
            with self._path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                now_ms = self._clock.time_ms()
                before = self._path.read_bytes() if self._path.exists() else b"{}"
                store = msgspec.json.decode(before, type=Store)
                store.catch_up(now_ms)
                yield store, now_ms
                after = msgspec.json.encode(store)
                if after != before:
                    draft = self._path.with_suffix(".draft")
                    draft.write_bytes(after)
                    os.replace(draft, self._path)
        except (OSError, msgspec.MsgspecError) as error:
            raise BrokerUnavailable(f"The file {self._path} cannot be used: {error}.") from error

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        with self._store() as (store, _):
            store.specs.update({spec.name: spec for spec in queues})

    # --- messages in ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        with self._store() as (store, now_ms):
            for index, message in enumerate(messages):
                held = store.find(message.queue, message.id)
                if held is not None and held.message.generation >= message.generation:
                    continue  # stored already: done
                error = objection(message, held)
                if error is None and due_ms(message, now_ms) <= now_ms:
                    most = store.spec(message.queue).max_ready
                    if most is not None and len(store.of(message.queue, State.READY)) >= most:
                        error = QueueFull(f"Queue {message.queue!r} holds its max_ready of {most} messages.", message)
                if error is None:
                    store.store(message, now_ms)
                else:
                    refusals.append(Refusal(index, error))
        return refusals

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deadline = self._clock.monotonic() + wait
        while True:
            await asyncio.sleep(0)
            deliveries = self._take(lanes, limit)
            if deliveries or self._clock.monotonic() >= deadline:
                return deliveries
            await asyncio.sleep(POLL)  # nothing is taken yet, so cancelling here loses nothing

    def _take(self, lanes: Sequence[Lane], limit: int) -> list[Delivery]:
        deliveries: list[Delivery] = []
        with self._store() as (store, now_ms):
            for lane, quota in [*((lane, lane.quota) for lane in lanes), *((lane, limit) for lane in lanes)]:
                lease = store.spec(lane.queue).lease
                waiting = [r for r in store.of(lane.queue, State.READY) if r.message.priority == lane.priority]
                for record in waiting[: min(quota, limit - len(deliveries))]:
                    record.state, record.until_ms = State.LEASED, now_ms + round(lease * 1000)
                    record.delivery_count += 1
                    record.receipt = f"{self._name} {store.next_place()}"
                    lease_until = self._clock.monotonic() + lease * 0.95  # the margin: the file's clock is the wall's
                    deliveries.append(Delivery(record.message, record.delivery_count, lease_until, record.receipt))
        return deliveries

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        with self._store() as (store, now_ms):
            for index, delivery in enumerate(deliveries):
                record = self._held(store, delivery)
                if record is None:
                    refusals.append(Refusal(index, lease_lost(delivery)))
                else:
                    record.state = State.LEASED
                    record.until_ms = now_ms + round(store.spec(record.message.queue).lease * 1000)
        return refusals

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        done: dict[object, Settlement] = {}
        with self._store() as (store, now_ms):
            for index, settlement in enumerate(settlements):
                receipt = settlement.delivery.receipt
                record = self._held(store, settlement.delivery)
                if record is not None:
                    end(store, record, settlement, now_ms)
                    done[receipt] = settlement
                elif done.get(receipt, self._settled.get(receipt)) != settlement:
                    refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            store.catch_up(now_ms)  # retention counts a letter that was just added
        self._settled.update(done)  # only now that the file has them
        while len(self._settled) > REMEMBERED:
            del self._settled[next(iter(self._settled))]
        return refusals

    def _held(self, store: Store, delivery: Delivery) -> Record | None:
        """The record that a delivery of ours still owns; None if it was settled, or somebody else has it."""
        record = store.find(delivery.message.queue, delivery.message.id)
        ours = isinstance(delivery.receipt, str) and delivery.receipt.startswith(self._name)
        return record if record is not None and ours and record.receipt == delivery.receipt else None

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        with self._store() as (store, now_ms):
            names = sorted(store.specs) if queues is None else queues
            return [statistics(store, name, now_ms) for name in names]

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        with self._store() as (store, _):
            records = store.of(queue, state)
        if ids:
            wanted = set(ids)
            return Page([entry(record) for record in records if record.message.id in wanted])
        if after is not None:
            try:
                last = msgspec.json.decode(bytes.fromhex(after), type=tuple[int, int, str])
            except (ValueError, msgspec.DecodeError) as error:
                raise ConfigurationError("This is no cursor of a listing; start again without one.") from error
            records = [record for record in records if record.key() > last]
        shown = records[:limit]
        more = len(records) > limit
        return Page([entry(record) for record in shown], Cursor(msgspec.json.encode(shown[-1].key()).hex()) if more else None)

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        refuse_leased("remove", state)
        refusals: list[Refusal] = []
        with self._store() as (store, _):
            for index, id in enumerate(ids):
                record = store.find(queue, id)
                if record is None or record.state is not state:
                    refusals.append(Refusal(index, NotFound(f"No {state.value} message {id!r} is in queue {queue!r}.")))
                else:
                    store.records.remove(record)
        return refusals

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        refusals: list[Refusal] = []
        with self._store() as (store, now_ms):
            for index, (id, message) in enumerate((replay.id, replay.message) for replay in replays):
                dead = store.find(queue, id)
                if dead is None or dead.state is not State.DEAD:
                    refusals.append(Refusal(index, NotFound(f"No dead letter {id!r} is in queue {queue!r}.")))
                    continue
                held = store.find(message.queue, message.id)
                if held is dead:  # it makes room
                    held = None
                stored_already = held is not None and held.message.generation >= message.generation
                error = None if stored_already else objection(message, held)
                if error is not None:
                    refusals.append(Refusal(index, error))
                    continue
                store.records.remove(dead)
                if not stored_already:
                    store.store(message, now_ms)
        return refusals

    async def purge(self, queue: str, state: State) -> int:
        refuse_leased("purge", state)
        with self._store() as (store, _):
            purged = store.of(queue, state)
            store.records = [record for record in store.records if record not in purged]
            return len(purged)


# --- what the verbs share -------------------------------------------------------------------------


def objection(message: Message, held: Record | None) -> EnqueueFailed | None:
    """Why a message cannot be stored where `held`, an older one, has its id."""
    if len(message.body) > MAX_BODY:
        return MessageTooLarge(f"Message {message.id!r} has {len(message.body)} bytes; the limit is {MAX_BODY}.", message)
    if held is not None:
        return EnqueueFailed(f"Queue {message.queue!r} still holds an earlier generation of {message.id!r}.", message)
    return None


def end(store: Store, record: Record, settlement: Settlement, now_ms: int) -> None:
    """End a delivery. Its receipt is worth nothing from now on."""
    record.receipt = ""
    if isinstance(settlement, Ack):
        store.records.remove(record)
    elif isinstance(settlement, Nack):
        if settlement.replacement is None:
            record.delivery_count -= 1  # given back: the same bytes, the same count
        else:
            record.message, record.delivery_count = settlement.replacement, 0
            record.place = store.next_place()
        store.wait_until(record, now_ms + round(settlement.delay * 1000), now_ms)
    else:
        record.message, record.letter = settlement.letter.message, settlement.letter
        record.state, record.until_ms = State.DEAD, settlement.letter.died_ms


def statistics(store: Store, queue: str, now_ms: int) -> QueueStats:
    """Count the messages of a queue."""
    ready = store.of(queue, State.READY)
    return QueueStats(
        queue,
        ready=len(ready),
        scheduled=len(store.of(queue, State.SCHEDULED)),
        leased=len(store.of(queue, State.LEASED)),
        dead=len(store.of(queue, State.DEAD)),
        oldest_ready_age=max((now_ms - record.until_ms) / 1000 for record in ready) if ready else 0.0,
        dead_dropped=store.dropped.get(queue, 0),
    )


def entry(record: Record) -> Entry:
    """A record as people see it."""
    return Entry(record.message, record.state, record.delivery_count, record.letter)


def refuse_leased(verb: str, state: State) -> None:
    """Leased messages belong to their workers."""
    if state is State.LEASED:
        raise UnsupportedCapability(f"The toy broker cannot {verb} leased messages.")


def lease_lost(delivery: Delivery) -> LeaseLost:
    """Somebody else has the message by now."""
    return LeaseLost(f"The lease on message {delivery.message.id!r} is over; nothing was changed.")
