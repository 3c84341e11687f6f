"""The asynchronous face of the RabbitMQ backend."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from pamqp import commands

from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    CrossdockError,
    EnqueueFailed,
    EnqueueUnknown,
    MessageTooLarge,
    QueueFull,
    UnsupportedCapability,
)
from crossdock.spi import (
    LEVELS,
    Blocked,
    Broker,
    BrokerSettings,
    Connected,
    Cursor,
    Delivery,
    Disconnected,
    Lane,
    Message,
    Page,
    QueueSpec,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
    StateLost,
    Unblocked,
)
from crossdock_rabbitmq import address, delays, facts, names, wire
from crossdock_rabbitmq.connection import Connection
from crossdock_rabbitmq.definitions import Definitions
from crossdock_rabbitmq.letters import Letters
from crossdock_rabbitmq.link import Link, LinkBroken, LinkRefused, Refused
from crossdock_rabbitmq.management import Management
from crossdock_rabbitmq.publisher import Fate, Outcome, Publisher
from crossdock_rabbitmq.reading import Reading
from crossdock_rabbitmq.receiving import Receiving
from crossdock_rabbitmq.settling import Settling
from crossdock_rabbitmq.storing import Parcel, Storing
from crossdock_rabbitmq.topology import CONSUMER_TIMEOUT_MS

T = TypeVar("T")

_LEVELS: Final = frozenset(map(int, LEVELS))
_log = logging.getLogger("crossdock.broker")
_TOO_LONG: Final = 0.8
"""The part of the time for which the server lets a delivery be held after which a warning is due."""
_SLOWEST_HEARTBEAT: Final = 10
"""Seconds."""
_LEAVE_WITHIN: Final = 3.0
"""Seconds that a closing Broker takes to leave its deliveries to others."""
_LARGEST: Final = (1 << 63) - 1


class RabbitMQBroker(Broker):
    """A Broker on RabbitMQ.

    Args:
        settings: `url` and `options` as `address.parse` reads them.

    Raises:
        ConfigurationError: The URL cannot be used, or has an unknown option.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._address = address.parse(settings.url, settings.options)
        self._namespace = settings.namespace
        self._clock = settings.clock
        self._definitions = Definitions(settings.namespace, self._address)
        self._management = Management(self._address) if self._address.management else None
        self._specs: dict[str, QueueSpec] = {}
        self._warned: set[str] = set()
        self._gates: dict[str, asyncio.Lock] = {}
        self._opening: asyncio.Future[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._open = False
        self._connected = False
        self._restoring = asyncio.Lock()
        self._version: tuple[int, ...] = ()
        self._connections: tuple[Connection, ...] = ()

    # --- life ---

    async def open(self) -> None:
        while self._opening is not None or self._closing is not None:
            await asyncio.wait([job for job in (self._opening, self._closing) if job is not None])
        if self._open:
            return
        opening = self._opening = asyncio.get_running_loop().create_future()
        try:
            await self._connect()
            self._open = self._connected = True
            self._settings.report(Connected())
        except BaseException:
            await self._disconnect()
            raise
        finally:
            opening.set_result(None)
            self._opening = None

    async def _connect(self) -> None:
        self._publisher = Publisher()
        self._publishing = self._connection("publish", self._publisher.attach)
        self._consuming = self._connection("consume", self._check)
        self._connections = (self._publishing, self._consuming)
        try:
            for connection in self._connections:
                await connection.open()
            link = await self._consuming.get(0)
            await self._definitions.make_delay(link)
        except LinkRefused as error:
            raise self._unavailable(str(error)) from error.__cause__
        except LinkBroken as error:
            raise self._unavailable(str(error)) from error
        self.capabilities = facts.capabilities(link.server, self._address.queue_type)
        self._storing = Storing(
            self._namespace, self._publisher, self._clock, self._address.timeout, self._make_again, self._see_to
        )
        counts = self._version < (4, 3) or self._address.queue_type == "classic"
        self._settling = Settling(self._storing, self._clock.monotonic, counts, self._tend)
        self._receiving = self._settling.receiving = Receiving(
            self._namespace,
            self._consuming,
            self._specs,
            self._clock.monotonic,
            self._version,
            self._address.queue_type == "classic",
            self._address.timeout,
            self._settling.give_back,
            self._restore,
            self._unavailable,
        )
        self._letters = Letters(
            self._namespace, self._clock, self._specs, self._link, self._storing, self._objection, self._not_stored
        )

    def _connection(self, purpose: str, prepare: Any) -> Connection:
        return Connection(
            self._address,
            f"crossdock {self._namespace} {purpose}",
            self._heartbeat,
            prepare,
            self._note_up,
            self._note_down,
            self._note_blocked,
        )

    def _heartbeat(self) -> int:
        """A third of the shortest lease: a server notices a silent peer after two to three heartbeats."""
        if self._address.heartbeat is not None:
            return self._address.heartbeat
        shortest = min((spec.lease for spec in self._specs.values()), default=QueueSpec("").lease)
        return max(1, min(_SLOWEST_HEARTBEAT, int(shortest / 3)))

    async def _check(self, link: Link) -> None:
        if (why := facts.obstacle(link.server)) is not None:
            raise ConfigurationError(f"{self._address.shown} cannot be used: {why}.")
        _, self._version = facts.version_of(link.server)
        if self._open:
            await self._after_a_loss(link)

    async def close(self) -> None:
        while self._opening is not None:
            await asyncio.wait([self._opening])
        if self._closing is None and self._open:
            self._open = False
            self._closing = asyncio.get_running_loop().create_task(self._end(), name="crossdock-rabbitmq-close")
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def _end(self) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LEAVE_WITHIN):
                    await self._receiving.close(self._settling.leave)
                    await self._letters.close()
            await self._receiving.end_jobs()
            await self._letters.end_jobs()
            await self._disconnect()
        finally:
            self._closing = None

    async def _disconnect(self) -> None:
        connections, self._connections = self._connections, ()
        await asyncio.gather(*(connection.close() for connection in connections))

    def _check_open(self) -> None:
        if not self._open:
            raise BrokerClosed("The RabbitMQ broker is not open: it was closed, or open() was not called yet.")

    # --- what happens to the connections ---

    def _unavailable(self, reason: str) -> BrokerUnavailable:
        return BrokerUnavailable(f"{self._address.shown} cannot be used: {reason.rstrip('.')}.")

    def _note_down(self, reason: str) -> None:
        if self._connected and self._open:
            self._connected = False
            self._settings.report(Disconnected(reason))

    def _note_up(self) -> None:
        if not self._connected and self._open and all(each.link is not None for each in self._connections):
            self._connected = True
            self._settings.report(Connected())
            self._receiving.wake()

    def _note_blocked(self, reason: str | None) -> None:
        if self._open:
            self._settings.report(Unblocked() if reason is None else Blocked(reason))

    async def _link(self) -> Link:
        """The connection for everything but publishing. Raises `BrokerClosed`, `BrokerUnavailable`."""
        if self._closing is None:
            self._check_open()
        try:
            return await self._consuming.get(self._address.timeout)
        except LinkBroken as error:
            raise self._unavailable(str(error)) from error

    # --- definitions ---

    async def _after_a_loss(self, link: Link) -> None:
        """Should the server have lost what was declared, declare it again, and say so once."""
        try:
            await self._definitions.make_delay(link)
            async with self._restoring:
                if lost := await self._definitions.missing(link, list(self._specs)):
                    await self._definitions.make(link, lost, self._version)
                    self._settings.report(
                        StateLost(f"the server had lost parts of the queues {', '.join(sorted(lost))}, with what was in them")
                    )
        except ConfigurationError as error:
            raise LinkBroken(str(error)) from error

    async def _restore(self) -> None:
        link = await self._link()
        with contextlib.suppress(Refused):
            await self._after_a_loss(link)

    async def _make_lost(self, queues: Iterable[str]) -> None:
        """Queues that are not there though something was to go into them: they are new, or the server has lost them."""
        queues = list(queues)
        link = await self._link()
        await self._asked(self._definitions.make_delay(link))
        if not self._specs.keys().isdisjoint(queues):
            await self._asked(self._after_a_loss(link))
        await self._asked(self._definitions.make(link, queues, self._version))

    async def _make_again(self, queues: Iterable[str]) -> bool:
        """`_make_lost` for when something was attempted already; what goes wrong may go right the next time."""
        try:
            await self._make_lost(queues)
        except BrokerUnavailable:
            return self._open  # lost just now, or the server was deleting it: the next attempt may go right
        except (BrokerClosed, ConfigurationError):
            return False
        return True

    async def _see_to(self, queues: Iterable[str], create: bool) -> set[str]:
        """Have queues there before something is on its way to them that nobody can take back; returns those that are not."""
        link = await self._link()
        lost: list[str] = await self._asked(self._definitions.missing(link, queues))
        if lost and create:
            await self._make_lost(lost)
            return set()
        return set(lost)

    async def _asked(self, call: Coroutine[Any, Any, Any]) -> Any:
        """Await a call, and turn the errors of the connection into ours."""
        try:
            return await call
        except LinkBroken as error:
            if not self._open:
                raise BrokerClosed("The RabbitMQ broker was closed before the server had answered.") from error
            raise self._unavailable(str(error)) from error
        except Refused as error:
            advice = "; give this user the permissions that crossdock-rabbitmq's README names" if error.code == 403 else ""
            raise self._unavailable(" ".join(str(error).split()) + advice) from error

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        self._check_open()
        if not queues:
            return
        specs = {spec.name: spec for spec in queues}
        new = [name for name in specs if name not in self._specs]
        if new:
            await self._asked(self._definitions.make(await self._link(), new, self._version))
        self._specs.update(specs)
        for spec in queues:
            if spec.lease > self._longest_hold(spec.name):
                self._warn_of_timeout(spec.name, f"has leases of {spec.lease:g} s")
        if not self._receiving.has_lanes:
            await self._asked(self._consuming.quicken())

    def _longest_hold(self, queue: str) -> float:
        """Seconds for which the server lets a delivery of a queue be held, as far as can be known."""
        if self._definitions.sets_timeout(self._version) and queue not in self._definitions.older:
            return CONSUMER_TIMEOUT_MS / 1000
        return self._address.consumer_timeout

    def _warn_of_timeout(self, queue: str, what: str) -> None:
        if queue not in self._warned:
            self._warned.add(queue)
            _log.warning(
                "Queue %r %s, and this RabbitMQ takes a delivery away that is held for longer than its consumer_timeout, %g s: set "
                "consumer_timeout in its rabbitmq.conf, in milliseconds, to more than your longest task takes, and the option "
                "consumer_timeout of the broker URL, in seconds, to the same.",
                queue,
                what,
                self._longest_hold(queue),
            )

    # --- enqueue ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        self._check_open()
        refusals: list[Refusal] = []
        parcels: list[Parcel] = []
        indexes: list[int] = []
        limited: set[str] = set()
        storing = self._storing
        for index, message in enumerate(messages):
            if (error := self._objection(message)) is not None:
                refusals.append(Refusal(index, error))
                continue
            spec = self._specs.get(message.queue)
            if spec is not None and spec.max_ready is not None:
                limited.add(message.queue)
            parcels.append(storing.parcel(message, storing.wait_ms(message)))
            indexes.append(index)
        if not parcels:
            return refusals
        if self._publishing.link is None:
            try:
                await self._publishing.get(self._address.timeout)
            except LinkBroken as error:
                raise self._unavailable(str(error)) from error
        if limited:
            return refusals + await self._enqueue_limited(messages, parcels, indexes, limited)
        outcomes = await storing.store(parcels)
        self._note_stored(messages)
        for number, outcome in outcomes.items():
            index = indexes[number]
            refusals.append(Refusal(index, self._not_stored(messages[index], outcome)))
        return refusals

    def _note_stored(self, messages: Sequence[Message]) -> None:
        if self._receiving.has_lanes:
            for queue, priority in {(message.queue, message.priority) for message in messages}:
                self._receiving.stored(queue, priority)

    async def _enqueue_limited(
        self, messages: Sequence[Message], parcels: Sequence[Parcel], indexes: Sequence[int], limited: set[str]
    ) -> list[Refusal]:
        """Store what there is room for. Exact for one Broker; others may count at the same time."""
        refusals: list[Refusal] = []
        async with contextlib.AsyncExitStack() as gates:
            for queue in sorted(limited):
                await gates.enter_async_context(self._gates.setdefault(queue, asyncio.Lock()))
            room = {queue: (self._specs[queue].max_ready or 0) - await self._ready(queue) for queue in limited}
            allowed: list[Parcel] = []
            kept: list[int] = []
            for index, parcel in zip(indexes, parcels, strict=True):
                if parcel.queue in room and not parcel.delayed:
                    if room[parcel.queue] <= 0:
                        refusals.append(Refusal(index, self._full(messages[index])))
                        continue
                    room[parcel.queue] -= 1
                allowed.append(parcel)
                kept.append(index)
            if allowed:
                outcomes = await self._storing.store(allowed)
                refusals += [
                    Refusal(kept[number], self._not_stored(messages[kept[number]], each)) for number, each in outcomes.items()
                ]
        return refusals

    async def _ready(self, queue: str) -> int:
        """How many messages of a queue are READY, in the server and in our hands."""
        link = await self._link()
        waiting = self._receiving.waiting(queue)
        found: list[tuple[int, int] | None]
        found = await _all(self._asked(link.count(names.ready(self._namespace, queue, level))) for level in LEVELS)
        return waiting + sum(each[0] for each in found if each is not None)

    def _objection(self, message: Message) -> EnqueueFailed | None:
        """Why a message cannot be stored, whatever the server says."""
        if len(message.body) > facts.MAX_BODY:
            return MessageTooLarge(
                f"Message {message.id!r} for queue {message.queue!r} has a body of {len(message.body)} bytes; "
                f"RabbitMQ takes at most {facts.MAX_BODY}.",
                message,
            )
        if message.priority not in _LEVELS:
            return EnqueueFailed(
                f"Message {message.id!r} for queue {message.queue!r} has the priority {int(message.priority)}, which is no level.",
                message,
            )
        if not 0 <= message.generation <= _LARGEST:
            return EnqueueFailed(
                f"Message {message.id!r} for queue {message.queue!r} has the generation {message.generation}, "
                "and AMQP has no number for that.",
                message,
            )
        if (message.eta_ms or message.delay_ms) and self._storing.wait_ms(message) > delays.LONGEST * 1000:
            return EnqueueFailed(
                f"Message {message.id!r} for queue {message.queue!r} is due later than in {delays.LONGEST:.0f} seconds, "
                "the longest that RabbitMQ keeps it waiting.",
                message,
            )
        return None

    @staticmethod
    def _full(message: Message) -> QueueFull:
        return QueueFull(f"Queue {message.queue!r} is full: it holds its max_ready; {message.id!r} was not stored.", message)

    def _not_stored(self, message: Message, outcome: Outcome) -> CrossdockError:
        """The error for a message that was not stored for certain."""
        match outcome.fate:
            case Fate.UNKNOWN:
                return EnqueueUnknown(
                    f"Message {message.id!r} for queue {message.queue!r} is perhaps stored: {outcome.why}. "
                    "Enqueued again, it may be there twice.",
                    message,
                )
            case Fate.REFUSED:
                return QueueFull(
                    f"The server refuses message {message.id!r}: a policy says that the queue {message.queue!r} is full, "
                    "or too few of its nodes are there.",
                    message,
                )
            case _:
                return EnqueueFailed(f"Message {message.id!r} for queue {message.queue!r} was not stored: {outcome.why}.", message)

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        self._check_open()
        return await self._receiving.receive(lanes, limit, wait)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        self._check_open()
        for queue, seconds in self._settling.held_for(deliveries).items():
            if seconds > self._longest_hold(queue) * _TOO_LONG:
                self._warn_of_timeout(queue, f"has a task that has been running for {seconds:.0f} s")
        await self._receiving.make_sure(delivery.receipt for delivery in deliveries)
        return self._settling.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        self._check_open()
        return await self._settling.settle(settlements)

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        self._check_open()
        if queues is None:
            raise UnsupportedCapability("AMQP names no queues")
        unacked = await self._management.unacked() if self._management and queues else None
        return await _all(self._asked(self._look(queue, unacked)) for queue in queues)

    async def _look(self, queue: str, unacked: Mapping[str, int] | None) -> QueueStats:
        link = await self._link()
        leased = None
        if unacked is not None:
            handed_out = sum(unacked.get(names.ready(self._namespace, queue, level), 0) for level in LEVELS)
            leased = max(0, handed_out - self._receiving.waiting(queue))
        if await link.count(names.dead(self._namespace, queue)) is None:
            return QueueStats(queue, ready=0, leased=leased, dead=0)
        return QueueStats(queue, ready=await self._ready(queue), leased=leased, dead=await self._letters.count(queue))

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        self._check_open()
        _refuse_unless(state in self.capabilities.listable, f"list {state.value} messages")
        page: Page = await self._asked(self._letters.peek(queue, ids, after, limit))
        return page

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        self._check_open()
        if not ids:
            return []
        _refuse_unless(state in self.capabilities.removable, f"remove {state.value} messages")
        refusals: list[Refusal] = await self._asked(self._letters.remove(queue, ids))
        return refusals

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        self._check_open()
        if not replays:
            return []
        refusals: list[Refusal] = await self._asked(self._letters.replay(queue, replays))
        return refusals

    async def purge(self, queue: str, state: State) -> int:
        self._check_open()
        _refuse_unless(state in self.capabilities.purgeable, f"purge {state.value} messages")
        if state is State.DEAD:
            count: int = await self._asked(self._letters.purge(queue))
            return count
        emptied: int = await self._asked(self._purge_ready(queue))
        return emptied

    async def _purge_ready(self, queue: str) -> int:
        link = await self._link()
        if not names.is_name(queue):
            return 0
        count = await self._receiving.empty(link, queue)
        for level in LEVELS:
            try:
                answer = await link.call(commands.Queue.Purge(queue=names.ready(self._namespace, queue, level)))
                count += answer.message_count
            except Refused as error:
                if error.code != 404:
                    raise
        return count

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`.

        What waits in the delay is looked for among all that waits there, of every namespace of the virtual host.
        """
        self._check_open()
        if queues:
            await self._asked(self._erase(dict.fromkeys(queues)))

    async def _erase(self, queues: Iterable[str]) -> None:
        link = await self._link()
        for queue in queues:
            self._specs.pop(queue, None)
            self._gates.pop(queue, None)
        await self._take_from_delay(
            link, tuple(f".{delays.END}.{names.due_key(self._namespace, queue, level)}" for queue in queues for level in LEVELS)
        )
        for queue in queues:
            await self._letters.let_go(queue)
            await self._receiving.forget(queue)
            await self._definitions.erase(link, queue)

    async def _take_from_delay(self, link: Link, ends: tuple[str, ...]) -> None:
        """Remove what waits for some queues, from the longest level down, as messages move."""
        for level in reversed(range(delays.LEVELS)):
            found = await link.count(names.delay_level(level))
            if found is None or not found[0]:
                continue
            doomed: list[int] = []

            def take(tag: int, arguments: bytes, header: bytes, body: bytes, doomed: list[int] = doomed) -> None:
                if wire.routing_key(arguments).endswith(ends):
                    doomed.append(tag)

            reading = await Reading.begin(link, names.delay_level(level), take)
            try:
                await reading.catch_up()
                if doomed:
                    await reading.take(doomed)
            finally:
                await reading.close()

    # --- retention ---

    def _tend(self, queues: set[str]) -> None:
        for queue in queues:
            self._letters.tend(queue)


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Await calls at the same time, and return their results in order; where one raises, none goes on."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return [await task for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for task in tasks:
            _ = task.cancelled() or task.exception()


def _refuse_unless(able: bool, what: str) -> None:
    if not able:
        raise UnsupportedCapability(f"RabbitMQ cannot {what}: AMQP shows and finds dead letters only.")
