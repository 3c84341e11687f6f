"""The verbs, as plain functions that block. Each locks the queues it needs, looks, changes files, and flushes.

Several queues are locked in the order of their names, so that nobody waits in a circle. An `OSError` that escapes from a verb says
that something may have been done; one that comes before that is a `BrokerUnavailable`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from crossdock.errors import (
    BrokerUnavailable,
    ConfigurationError,
    EnqueueFailed,
    LeaseLost,
    MessageTooLarge,
    NotFound,
    QueueFull,
)
from crossdock.spi import (
    LEVELS,
    Ack,
    BrokerEvent,
    Clock,
    Cursor,
    Dead,
    Delivery,
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
    StateLost,
)
from crossdock_plainfiles import disk, location
from crossdock_plainfiles.queue import LOCK, About, Queue
from crossdock_plainfiles.record import ID, Record

MAX_BODY: Final = 16 * 1024 * 1024
LONGEST: Final = 1e12
"""Most seconds until a message is due."""
_MARGIN: Final = 0.05
"""Part of a lease that is taken off for the worker: the lease ends by the wall clock, which may be set meanwhile."""
_MAX_PAGE: Final = 1000
_REMEMBERED: Final = 10_000
"""How many settlements are remembered, to know one that is repeated."""


class Receipt(NamedTuple):
    """The right to settle one delivery."""

    owner: str
    """The Store that gave it out."""
    queue: str
    id: str
    fence: int


class Sight(NamedTuple):
    """What a receive saw that found nothing. While this is so, there is nothing."""

    numbers: Sequence[int]
    """Of the last change in each queue."""
    until_ms: float
    """When time alone will have changed something."""


NOTHING_SEEN: Final = Sight((), -math.inf)
"""So have a look."""


class Store:
    """One namespace in a folder. Belongs to one thread.

    Args:
        folder: The folder; it is there.
        namespace: Name of the directory in it.
        clock: Source of time.
        report: Gets `StateLost`.
    """

    def __init__(self, folder: Path, namespace: str, clock: Clock, report: Callable[[BrokerEvent], None]) -> None:
        self._root = folder
        self._folder = folder / location.check_name(namespace)
        self._clock = clock
        self._report = report
        self._queues: dict[str, Queue] = {}
        self._declared: dict[str, QueueSpec] = {}
        self._owner = secrets.token_hex(8)
        self._settled: dict[object, int] = {}

    def _queue(self, name: str) -> Queue:
        if name not in self._queues:
            self._queues[name] = Queue.at(self._folder / location.check_name(name))
        return self._queues[name]

    @contextmanager
    def _locked(self, names: Iterable[str], *, make: Iterable[str] = ()) -> Generator[dict[str, Queue]]:
        """Lock queues.

        Args:
            names: Those that need not exist.
            make: Those that are made if they do not.
        """
        location.check_folder(self._root)
        made = set(make)
        with ExitStack() as stack:
            try:
                queues: dict[str, Queue] = {}
                for name in sorted({*names, *made}):
                    queues[name] = stack.enter_context(self._queue(name).locked(self._clock, make=name in made))
                    self._declare_again(queues[name])
            except OSError as error:
                raise BrokerUnavailable(f"The file {error.filename!r} cannot be used: {disk.why(error)}.") from error
            yield queues

    def _declare_again(self, queue: Queue) -> None:
        """Where a queue that we had declared was removed, and somebody made it again."""
        if queue.exists and queue.about.spec is None and queue.name in self._declared:
            queue.describe(About(self._declared[queue.name], queue.about.dropped, queue.about.doomed))
            self._report(StateLost(f"the queue {queue.name!r} was removed, and is declared again"))

    def declare(self, specs: Sequence[QueueSpec]) -> None:
        """Make queues known."""
        with self._locked((), make=[spec.name for spec in specs]) as queues:
            for spec in specs:
                self._declared[spec.name] = spec = msgspec.structs.replace(spec, lease=min(spec.lease, LONGEST))
                about = queues[spec.name].about
                queues[spec.name].describe(About(spec, about.dropped, about.doomed))

    # --- messages in ---

    def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        """Store messages."""
        refusals: list[Refusal] = []
        with self._locked((), make=[message.queue for message in messages]) as queues:
            for index, message in enumerate(messages):
                queue = queues[message.queue]
                held = queue.get(message.id)
                if held is not None and held.generation >= message.generation:
                    continue  # stored already: done
                error = _objection(message, held, queue) or _no_room(message, queue) or _put(message, queue)
                if error is not None:
                    refusals.append(Refusal(index, error))
            _flush(queues)
        return refusals

    # --- deliveries ---

    def receive(self, lanes: Sequence[Lane], limit: int, seen: Sight) -> tuple[Sequence[Delivery], Sight]:
        """Take messages, and say what was seen. Given what the look before has seen, it does not lock for the same again."""
        names = sorted({lane.queue for lane in lanes})
        if self._clock.time_ms() < seen.until_ms and seen.numbers == self._glance(names):
            return (), seen
        with self._locked(names) as queues:
            ready = [queues[lane.queue].ready(lane.priority, limit) for lane in lanes]
            shares = _shares([lane.quota for lane in lanes], [len(records) for records in ready], limit)
            chosen = [
                (queues[lane.queue], record)
                for lane, records, share in zip(lanes, ready, shares, strict=True)
                for record in records[:share]
            ]
            messages = [queue.read(record).message for queue, record in chosen]  # before anything is taken: one may be damaged
            deliveries = [self._hand_over(*each, message) for each, message in zip(chosen, messages, strict=True)]
            _flush(queues)
            until_ms = min((queue.next_change_ms() for queue in queues.values()), default=math.inf)
            return deliveries, Sight([queue.number for queue in queues.values()], until_ms)

    def _glance(self, names: Sequence[str]) -> Sequence[int]:
        return [self._queue(name).glance() for name in names]

    def _hand_over(self, queue: Queue, record: Record, message: Message) -> Delivery:
        """Give a message to a worker. Whoever had it before has lost it by this."""
        lease, fence, count = queue.spec.lease, queue.next_number(), record.delivery_count + 1
        queue.move(record, state=State.LEASED, since_ms=queue.now_ms + round(lease * 1000), delivery_count=count, fence=fence)
        receipt = Receipt(self._owner, queue.name, record.id, fence)
        return Delivery(message, count, queue.now + lease * (1 - _MARGIN), receipt)

    def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        """Renew leases. One that is over and that nobody has taken over is renewed, too."""
        refusals: list[Refusal] = []
        with self._locked(self._queues_of(deliveries)) as queues:
            for index, delivery in enumerate(deliveries):
                held = self._held(queues, delivery)
                if held is None:
                    refusals.append(_lease_lost(index, delivery))
                else:
                    queue, record = held
                    queue.move(record, state=State.LEASED, since_ms=queue.now_ms + round(queue.spec.lease * 1000))
        return refusals

    def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        """End deliveries."""
        refusals: list[Refusal] = []
        with self._locked(self._queues_of([settlement.delivery for settlement in settlements])) as queues:
            for index, settlement in enumerate(settlements):
                held = self._held(queues, settlement.delivery)
                if held is not None:
                    _end(*held, settlement)
                    self._remember(settlement)
                elif self._settled.get(settlement.delivery.receipt) != hash(settlement):
                    refusals.append(_lease_lost(index, settlement.delivery))
            _flush(queues)
            for queue in queues.values():
                queue.retain()
        return refusals

    def _queues_of(self, deliveries: Sequence[Delivery]) -> Sequence[str]:
        receipts = [delivery.receipt for delivery in deliveries]
        return [receipt.queue for receipt in receipts if isinstance(receipt, Receipt) and receipt.owner == self._owner]

    def _held(self, queues: dict[str, Queue], delivery: Delivery) -> tuple[Queue, Record] | None:
        """What a receipt of ours still gives a right to: a message, until it was settled, removed or handed over again."""
        receipt = delivery.receipt
        if not isinstance(receipt, Receipt) or receipt.owner != self._owner:
            return None
        queue = queues[receipt.queue]
        record = queue.get(receipt.id)
        return (queue, record) if record is not None and record.fence == receipt.fence else None

    def _remember(self, settlement: Settlement) -> None:
        self._settled[settlement.delivery.receipt] = hash(settlement)
        if len(self._settled) > _REMEMBERED:
            del self._settled[next(iter(self._settled))]

    # --- looking ---

    def stats(self, names: Sequence[str] | None) -> Sequence[QueueStats]:
        """Count messages."""
        location.check_folder(self._root)
        if names is None:
            names = sorted(lock.parent.name for lock in self._folder.glob(f"[!.]*/{LOCK}"))
        return [self._stats_of(name) for name in names]

    def _stats_of(self, name: str) -> QueueStats:
        with self._locked([name]) as queues:
            queue = queues[name]
            queue.retain()
            ages = [(queue.now_ms - record.since_ms) / 1000 for record in queue.all(State.READY)]
            return QueueStats(
                name,
                ready=len(queue.all(State.READY)),
                scheduled=len(queue.all(State.SCHEDULED)),
                leased=len(queue.all(State.LEASED)),
                dead=len(queue.all(State.DEAD)),
                oldest_ready_age=max(ages, default=0.0),
                dead_dropped=queue.about.dropped,
            )

    def peek(self, name: str, state: State, ids: Sequence[str], after: Cursor | None, limit: int) -> Page:
        """Show messages."""
        behind = () if after is None else _key(after, name, state)
        limit = max(1, min(limit, _MAX_PAGE))
        with self._locked([name]) as queues:
            queue = queues[name]
            queue.retain()
            if ids:
                return Page([queue.read(record) for id in ids if (record := queue.get(id, state)) is not None])
            found = queue.beyond(state, behind, limit + 1)
            shown = found[:limit]
            return Page([queue.read(record) for record in shown], _cursor(name, shown[-1]) if found[limit:] else None)

    # --- repairing ---

    def remove(self, name: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        """Delete messages by id."""
        refusals: list[Refusal] = []
        with self._locked([name]) as queues:
            for index, id in enumerate(ids):
                record = queues[name].get(id, state)
                if record is None:
                    refusals.append(Refusal(index, NotFound(f"No {state.value} message {id!r} is in queue {name!r}.")))
                else:
                    queues[name].drop(record)
            _flush(queues)
        return refusals

    def purge(self, name: str, state: State) -> int:
        """Delete all messages of a state."""
        with self._locked([name]) as queues:
            doomed = list(queues[name].all(state))
            for record in doomed:
                queues[name].drop(record)
            _flush(queues)
            return len(doomed)

    def replay(self, name: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        """Bring dead letters back to life: the new message is stored, durably, then the letter goes."""
        refusals: list[Refusal] = []
        targets = [replay.message.queue for replay in replays] if self._queue(name).glance() else ()
        with self._locked([name], make=targets) as queues:
            source = queues[name]
            replayed: set[Record] = set()
            for index, (id, message) in enumerate((replay.id, replay.message) for replay in replays):
                letter = source.get(id, State.DEAD)
                if letter is None or letter in replayed:
                    refusals.append(Refusal(index, NotFound(f"No dead letter {id!r} is in queue {name!r}.")))
                    continue
                target = queues[message.queue]
                held = target.get(message.id)
                if held is letter:  # it is about to make room
                    held = None
                if held is None or held.generation < message.generation:
                    error = _objection(message, held, target) or _put(message, target)
                    if error is not None:
                        refusals.append(Refusal(index, error))
                        continue
                if source.get(id) is letter:  # not if the new message is in the same queue, where it is the newer file
                    replayed.add(letter)
            _flush(queues)
            for letter in replayed:
                source.drop(letter)
            source.flush()
        return refusals

    def erase(self, names: Sequence[str]) -> None:
        """Make queues disappear."""
        with self._locked(names) as queues:
            for name, queue in queues.items():
                self._declared.pop(name, None)
                if queue.exists:
                    queue.erase()


# --- what the verbs share -------------------------------------------------------------------------


def _shares(quotas: Sequence[int], ready: Sequence[int], limit: int) -> Sequence[int]:
    """How many messages to take from each lane: at first up to its quota, then up to what is left of the limit."""
    shares = [0] * len(quotas)
    for most in (quotas, [limit] * len(quotas)):
        for lane in range(len(shares)):
            shares[lane] += max(0, min(most[lane], ready[lane] - shares[lane], limit - sum(shares)))
    return shares


def _flush(queues: dict[str, Queue]) -> None:
    for queue in queues.values():
        queue.flush()


def _due_ms(message: Message, queue: Queue) -> int:
    return queue.now_ms + message.delay_ms if message.delay_ms > 0 else message.eta_ms


def _objection(message: Message, held: Record | None, queue: Queue) -> EnqueueFailed | None:
    """Why a message cannot be stored where `held`, an older one, has its id."""
    what = f"Message {message.id!r} for queue {queue.name!r}"
    if not ID.fullmatch(message.id):
        return EnqueueFailed(f"{what} was not stored: an id has 1 to 64 letters, digits, '-' or '_'.", message)
    if len(message.body) > MAX_BODY:
        return MessageTooLarge(f"{what} has a body of {len(message.body)} bytes; the limit is {MAX_BODY}.", message)
    if int(message.priority) not in LEVELS:
        return EnqueueFailed(f"{what} has the priority {int(message.priority)}, which is no level.", message)
    if _due_ms(message, queue) > queue.now_ms + LONGEST * 1000:
        return EnqueueFailed(f"{what} would be due in more than {LONGEST:g} s.", message)
    if held is not None:
        return EnqueueFailed(f"{what} was not stored: generation {held.generation} of it is still there.", message)
    return None


def _no_room(message: Message, queue: Queue) -> QueueFull | None:
    """Why a message that would be READY now cannot be enqueued, if the queue is full."""
    most = queue.spec.max_ready
    if most is None or _due_ms(message, queue) > queue.now_ms or len(queue.all(State.READY)) < most:
        return None
    return QueueFull(f"Queue {queue.name!r} holds its max_ready of {most} messages; {message.id!r} was not stored.", message)


def _put(message: Message, queue: Queue) -> EnqueueFailed | None:
    """Store a message as never delivered before; returns why that failed, if it did."""
    try:
        queue.store(message, *queue.waiting(_due_ms(message, queue)))
    except OSError as error:  # such as a full disk
        failed = EnqueueFailed(f"Message {message.id!r} cannot be written to queue {queue.name!r}: {disk.why(error)}.", message)
        failed.__cause__ = error
        return failed
    return None


def _end(queue: Queue, record: Record, settlement: Settlement) -> None:
    """End a delivery. Its receipt is worth nothing from now on."""
    match settlement:
        case Ack():
            queue.drop(record)
        case Nack(delay=delay, replacement=replacement):
            state, since_ms = queue.waiting(queue.now_ms + round(min(delay, LONGEST) * 1000))
            if replacement is None:  # given back: the same file, the same count, the same place in line
                queue.move(record, state=state, since_ms=since_ms, delivery_count=record.delivery_count - 1, fence=0)
            else:
                queue.store(replacement, state, since_ms)
        case Dead(letter=letter):
            queue.store(letter, State.DEAD, letter.died_ms, record.delivery_count)


def _cursor(queue: str, record: Record) -> Cursor:
    return Cursor(msgspec.json.encode((queue, record.state, record.key())).hex())


def _key(cursor: Cursor, queue: str, state: State) -> tuple[int, int | str]:
    """The place in a listing that a cursor means."""
    try:
        of_queue, of_state, key = msgspec.json.decode(bytes.fromhex(cursor), type=tuple[str, State, tuple[int, int | str]])
    except (ValueError, msgspec.DecodeError) as error:
        raise ConfigurationError("This is no cursor of a listing; start again without one.") from error
    if (of_queue, of_state) != (queue, state):
        raise ConfigurationError(f"This is a cursor of {of_state.value} messages of queue {of_queue!r}; start again without one.")
    return key


def _lease_lost(index: int, delivery: Delivery) -> Refusal:
    return Refusal(index, LeaseLost(f"The lease on message {delivery.message.id!r} is over; nothing was changed."))
