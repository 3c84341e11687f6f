"""NatsBroker: the twelve verbs, each handed to the part that does it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import msgspec

from crossdock.errors import BrokerClosed, BrokerError, BrokerUnavailable, ConfigurationError
from crossdock.spi import (
    Broker,
    BrokerSettings,
    Cursor,
    Delivery,
    Lane,
    Message,
    Page,
    QueueSpec,
    QueueStats,
    Refusal,
    Replay,
    Settlement,
    State,
)
from crossdock_nats import facts, record, topology
from crossdock_nats.address import Address, parse
from crossdock_nats.alarms import Alarms
from crossdock_nats.api import DISABLED, Api, Problem
from crossdock_nats.ghosts import Ghosts
from crossdock_nats.incoming import Incoming
from crossdock_nats.leases import Leases
from crossdock_nats.letters import Letters
from crossdock_nats.limits import is_name
from crossdock_nats.link import Link
from crossdock_nats.looking import Looking
from crossdock_nats.queues import Queues, Vanished, explain
from crossdock_nats.receiver import Receiver
from crossdock_nats.repairs import Repairs
from crossdock_nats.returning import Returning
from crossdock_nats.room import Room
from crossdock_nats.servertime import ServerTime
from crossdock_nats.settling import Settling

T = TypeVar("T")

_ATTEMPTS: Final = 5
_DEFAULT_PAYLOAD: Final = 1024 * 1024


class NatsBroker(Broker):
    """A Broker on NATS JetStream.

    Args:
        settings: As every backend gets them.

    Raises:
        ConfigurationError: The URL cannot be used.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._address = parse(settings.url, settings.options)
        self._lock = asyncio.Lock()
        self._session: _Session | None = None
        self._ending: _Session | None = None

    def __repr__(self) -> str:
        return f"NatsBroker({self._address.shown!r}, namespace={self._settings.namespace!r})"

    # --- life ---

    async def open(self) -> None:
        async with self._lock:
            if self._session is not None:
                return
            session = _Session(self._settings, self._address)
            try:
                await session.open()
            except BaseException:
                await asyncio.shield(asyncio.ensure_future(session.close()))
                raise
            self.capabilities = facts.capabilities(session.version, session.max_payload(), self._address)
            self._session = session

    async def close(self) -> None:
        async with self._lock:
            self._ending = self._session or self._ending
            self._session = None
            if self._ending is not None:
                await self._ending.close()
                self._ending = None

    def _running(self) -> _Session:
        if self._session is None:
            raise BrokerClosed("The NATS broker is not open: it was closed, or open() was not called yet.")
        return self._session

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        session = self._running()
        for spec in queues:
            if not is_name(spec.name):
                raise ConfigurationError(f"{spec.name!r} is no queue name: use 1 to 63 letters, digits, '-' or '_'.")
        if queues:
            await session.queues.declare(queues)

    # --- messages ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await self._running().incoming.enqueue(messages)

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        session = self._running()
        session.follow_alarms()
        return await session.receiver.receive(lanes, limit, wait)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        return await self._running().leases.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return await self._running().settling.settle(settlements)

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        session = self._running()
        session.follow_alarms()
        return await _steady(lambda: session.looking.stats(queues))

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        session = self._running()
        return await _steady(lambda: session.looking.peek(queue, state, ids, after, limit))

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        session = self._running()
        return await _steady(lambda: session.repairs.remove(queue, state, ids))

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        session = self._running()
        return await _steady(lambda: session.repairs.replay(queue, replays))

    async def purge(self, queue: str, state: State) -> int:
        session = self._running()
        return await _steady(lambda: session.repairs.purge(queue, state))

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`."""
        session = self._running()
        if queues:
            await session.queues.erase(queues)
            await session.alarms.erase_if_idle(session.queues)


class _Session:
    """All that a Broker has while it is open."""

    def __init__(self, settings: BrokerSettings, address: Address) -> None:
        clock, report = settings.clock, settings.report
        self._address = address
        self._checks: set[asyncio.Task[None]] = set()
        self.version = "unknown"
        self._payload = _DEFAULT_PAYLOAD
        self.link = Link(address, report, self._back)
        api = Api(self.link, address.domain)
        time = ServerTime(clock, report)
        self._api = api
        self.queues = Queues(self.link, api, settings.namespace, address, time, report, self._changed)
        self._returning = Returning(self.link)
        self._ghosts = Ghosts(self.link, api, self.queues, clock.monotonic)
        letters = Letters(api, self.queues, time)
        self.alarms = Alarms(self.link, api, settings.namespace, address, time)
        self.queues.ask_time = self.alarms.ask_time
        self.looking = Looking(api, self.queues, letters, time)
        self.incoming = Incoming(
            self.link, api, self.queues, Room(self.looking), self.alarms, time, lambda: self.max_payload() - record.LETTER_ROOM
        )
        self.receiver = Receiver(self, self.link, api, self.queues, self._returning, self._ghosts, clock, time, report)
        self._purger = Receiver(self, self.link, api, self.queues, self._returning, self._ghosts, clock, time, report, b"x")
        self.leases = Leases(self, self.link, api, self.queues, clock)
        self.settling = Settling(
            self, self.link, api, self.queues, letters, self.alarms, time, self.leases, clock, self.max_payload
        )
        self.repairs = Repairs(api, self.queues, self.looking, self.incoming, self._purger, self.settling, time)

    async def open(self) -> None:
        await self.link.open()
        self._learn_server()
        if topology.Features.of(self.version).version < topology.OLDEST:
            raise ConfigurationError(f"{self._address.shown} is NATS {self.version}; crossdock needs 2.9 or later.")
        answer = await self._api.ask_one("INFO", None, _Anything)
        if isinstance(answer, Problem):
            if answer.err_code in DISABLED or (answer.code == 503 and not self._has_jetstream()):
                raise ConfigurationError(
                    f"The NATS server at {self._address.shown} has no JetStream: start it with -js, and enable it for the account."
                )
            raise BrokerUnavailable(f"The NATS server at {self._address.shown} cannot be used. {explain(answer)}")

    def _has_jetstream(self) -> bool:
        return self.link.wire is not None and bool(self.link.wire.info.get("jetstream"))

    def _learn_server(self) -> None:
        if self.link.wire is not None:
            info = self.link.wire.info
            self.version = str(info.get("version", "unknown"))
            self._payload = int(info.get("max_payload", _DEFAULT_PAYLOAD))
            self.queues.features = topology.Features.of(self.version)

    def max_payload(self) -> int:
        """Bytes that the server takes in one message, headers and all."""
        return self._payload

    def follow_alarms(self) -> None:
        """Move what falls due, where the server does not do that by itself."""
        if not self.queues.features.schedules:
            self.alarms.follow()

    def _changed(self) -> None:
        self.receiver.wake()

    def _back(self) -> None:
        """The connection was made again: perhaps to another server, which lacks what the first one had."""
        self._learn_server()
        self.queues.doubt()
        self._ghosts.forget()
        self.alarms.back()
        self.receiver.wake()
        task = asyncio.ensure_future(self._check())
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def _check(self) -> None:
        """See whether what was declared is there, and whether the server knows what it delivered."""
        with suppress(BrokerError):
            await self.queues.look(list(self.queues.declared))
            self.receiver.wake()
            await self.receiver.compare()

    async def close(self) -> None:
        """Give back what was not returned, end what runs, and disconnect. May be called again."""
        if not self.link.closed:
            await self.receiver.close()
            await self._purger.close()
            await self._returning.close()
        for task in self._checks:
            task.cancel()
        if self._checks:
            await asyncio.wait(self._checks)
        await self.alarms.close()
        await self.leases.close()
        await self.link.close()


async def _steady(verb: Callable[[], Awaitable[T]]) -> T:
    """What a verb returns, done again where a queue vanished in the middle of it."""
    for _ in range(_ATTEMPTS):
        try:
            return await verb()
        except Vanished:
            await asyncio.sleep(0)
    return await verb()


class _Anything(msgspec.Struct):
    pass
