"""The client: a Broker on a server at the other end of a socket."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from crossdock import errors
from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    CrossdockError,
    EnqueueError,
    EnqueueFailed,
    EnqueueUnknown,
    LeaseLost,
    MessageTooLarge,
    SettleUnknown,
)
from crossdock.spi import (
    LEVELS,
    Ack,
    Broker,
    BrokerSettings,
    Connected,
    Cursor,
    Dead,
    Delivery,
    Disconnected,
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
    redact,
)
from crossdock_remote import wire

ANSWER: Final = 4.0
"""Seconds to wait for an answer, beyond those that a receive waits."""
RETURN: Final = 1.0
"""Seconds for which a verb waits for the connection to come back."""
SLICE: Final = 1.0
"""Seconds for which one request to receive waits at the server."""


class Lost(Exception):
    """It was written, and no answer came."""


class Link:
    """One connection, and the calls that wait for their answers on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self.listening = asyncio.ensure_future(self._listen())
        """Ends with the connection."""

    def send(self, verb: str, *arguments: object) -> tuple[int, asyncio.Future[Any]]:
        """Write a request; the future gets what came of it, or `Lost`. Raises `ConfigurationError` for what cannot be written."""
        number = next(self._numbers)
        try:
            request = wire.Request(number, verb, msgspec.Raw(wire.encode(arguments)))
        except (OverflowError, ValueError, TypeError) as error:
            raise ConfigurationError(f"This cannot be sent ({type(error).__name__}): check its numbers and names.") from error
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: future.cancelled() or future.exception())  # whoever asked may be gone
        self._waiting[number] = verb, future
        self._writer.write(wire.frame(request))
        return number, future

    async def call(self, verb: str, *arguments: object) -> Any:
        """Send a request and return what came of it. Raises `Lost`."""
        return await self.answer(self.send(verb, *arguments)[1], ANSWER)

    async def answer(self, future: asyncio.Future[Any], wait: float) -> Any:
        """Wait for what comes of a request. Where that takes too long the connection is given up."""
        await asyncio.wait([future], timeout=wait)
        if not future.done():
            self.abort()
        return await future

    def going_on(self) -> dict[int, tuple[str, asyncio.Future[Any]]]:
        """What waits for its answer, by number: its verb and its future."""
        return dict(self._waiting)

    async def _listen(self) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                reply = wire.decode(await wire.read(self._reader), type=wire.Reply)
                verb, future = self._waiting.pop(reply.number)
                if reply.error is not None:
                    kind, text = reply.error
                    future.set_exception(getattr(errors, kind)(text))
                else:
                    future.set_result(wire.decode(reply.value, type=wire.VALUES[verb]))
        self.abort()

    def abort(self) -> None:
        """End it."""
        self._writer.transport.abort()
        for _, future in self._waiting.values():
            future.set_exception(Lost())
        self._waiting.clear()


class RemoteBroker(Broker):
    """A Broker at `remote://host:port`."""

    def __init__(self, settings: BrokerSettings) -> None:
        parts = urlsplit(settings.url)
        if parts.path or settings.options or not parts.hostname or parts.port is None:
            raise ConfigurationError(f"The broker URL {redact(settings.url)} cannot be used: write remote://host:port.")
        self._address = parts.hostname, parts.port
        self._settings = settings
        self._changing = asyncio.Lock()
        self._declared: dict[str, QueueSpec] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self._linked = asyncio.Event()
        self._closing = False
        self._errands: set[asyncio.Task[Any]] = set()

    # --- life ---

    async def open(self) -> None:
        async with self._changing:
            if self._keeper is None:
                self._closing, self._session, self._store = False, uuid.uuid4().hex, ""
                self._begin(await self._connect())
                self._keeper = asyncio.ensure_future(self._keep())

    async def close(self) -> None:
        async with self._changing:
            if (keeper := self._keeper) is not None:
                self._closing = True
                parting = asyncio.ensure_future(self._part())
                await asyncio.shield(parting)
                keeper.cancel()
                await asyncio.wait([keeper])
                self._keeper = None

    async def _part(self) -> None:
        """Let what goes on end, take nothing along, and say goodbye; then nothing is connected."""
        if (link := self._link) is not None:
            with contextlib.suppress(Lost):
                for number, (verb, _) in link.going_on().items():
                    if verb == "receive":
                        await link.call("cancel", number)
                while going_on := {future for _, future in link.going_on().values()} | self._errands:
                    _, late = await asyncio.wait(going_on, timeout=ANSWER)
                    if late:
                        break
                await link.call("bye")
            link.abort()
            await link.listening

    async def _connect(self) -> Link:
        link: Link | None = None
        try:
            async with asyncio.timeout(ANSWER):
                link = Link(*await asyncio.open_connection(*self._address, limit=64 * 1024 * 1024))
                welcome: wire.Welcome = await link.call("hello", self._session, self._settings.namespace)
                await link.call("declare", list(self._declared.values()))
        except BaseException as error:
            if link is not None:
                link.abort()
            if isinstance(error, OSError | Lost):
                raise BrokerUnavailable(f"The server {redact(self._settings.url)} cannot be reached; is it running?") from error
            raise
        self.capabilities = welcome.capabilities
        if self._store not in ("", welcome.store):
            self._settings.report(StateLost("The server lost all that it had stored; queues are declared again."))
        self._store = welcome.store
        return link

    def _begin(self, link: Link) -> None:
        self._link = link
        self._linked.set()
        self._settings.report(Connected())

    async def _keep(self) -> None:
        """Connect again whenever the connection is lost."""
        try:
            while not self._closing:
                assert self._link is not None
                await asyncio.shield(self._link.listening)
                self._link = None
                self._linked.clear()
                self._settings.report(Disconnected("The connection to the server was lost."))
                while self._link is None:
                    await self._settings.clock.sleep(random.uniform(0.02, 0.3))
                    with contextlib.suppress(BrokerUnavailable):
                        self._begin(await self._connect())
        finally:
            self._linked.clear()
            if self._link is not None:
                self._link.abort()
                self._link = None

    async def _available(self) -> Link:
        """The connection; waits a moment for one. Raises `BrokerClosed` or `BrokerUnavailable`."""
        if self._keeper is None or self._closing:
            raise BrokerClosed("The remote broker is not open: it was closed, or open() was not called yet.")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RETURN):
                await self._linked.wait()
        if self._closing:
            raise BrokerClosed("The remote broker was closed meanwhile.")
        if self._link is None or self._link.listening.done():
            raise BrokerUnavailable(f"The connection to {redact(self._settings.url)} is lost, and comes back when the server does.")
        return self._link

    async def _ask(self, verb: str, *arguments: object) -> Any:
        """A verb of which it does not matter whether it was done when no answer comes."""
        link = await self._available()
        try:
            return await link.call(verb, *arguments)
        except Lost as error:
            raise BrokerUnavailable(f"The connection to {redact(self._settings.url)} was lost before the answer came.") from error

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self._ask("declare", queues)
        self._declared |= {spec.name: spec for spec in queues}

    # --- messages in ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await self._store_all("enqueue", messages, list(messages), ())

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        return await self._store_all("replay", [replay.message for replay in replays], list(replays), (queue,))

    async def _store_all(self, verb: str, messages: Sequence[Message], items: list[Any], before: tuple[str, ...]) -> list[Refusal]:
        link = await self._available()
        refusals = [
            Refusal(index, error) for index, message in enumerate(messages) if (error := self._objection(message)) is not None
        ]
        fit = sorted(set(range(len(items))) - {refusal.index for refusal in refusals})
        try:
            refused: list[wire.Refused] = await link.call(verb, *before, [items[index] for index in fit])
        except Lost as error:
            text = "Message {!r} may be stored or not: the connection was lost before the answer came."
            return [*refusals, *(Refusal(at, _unknown(text, messages[at], error)) for at in fit)]
        return [*refusals, *(Refusal(fit[one.index], _error(one, messages[fit[one.index]])) for one in refused)]

    def _objection(self, message: Message) -> EnqueueFailed | None:
        if len(message.body) > self.capabilities.max_body:
            return MessageTooLarge(f"Message {message.id!r} has a body of {len(message.body)} bytes, which is too large.", message)
        try:
            wire.encode(message)
        except (OverflowError, ValueError):
            return EnqueueFailed(f"Message {message.id!r} has a number or a name that cannot be written down.", message)
        if int(message.priority) not in LEVELS:
            return EnqueueFailed(f"Message {message.id!r} has the priority {int(message.priority)}, which is no level.", message)
        return None

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        clock = self._settings.clock
        deadline = clock.monotonic() + wait
        while True:
            left = deadline - clock.monotonic()
            try:
                deliveries = await self._receive(await self._available(), lanes, limit, max(0.0, min(left, SLICE)))
            except (BrokerUnavailable, Lost) as error:
                if left <= 0:
                    raise BrokerUnavailable("The connection to the server was lost, and nothing was received.") from error
                await clock.sleep(0.01)
                continue
            if deliveries or left <= SLICE:
                return deliveries

    async def _receive(self, link: Link, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        sent = self._settings.clock.monotonic()
        number, future = link.send("receive", lanes, limit, wait)
        try:
            received: wire.Received = await link.answer(future, wait + ANSWER)
        except asyncio.CancelledError:
            self._do_aside(self._give_back(link, number, future))
            raise
        return [
            Delivery(one.message, one.count, sent + received.waited + one.remaining, one.receipt) for one in received.deliveries
        ]

    async def _give_back(self, link: Link, number: int, future: asyncio.Future[Any]) -> None:
        """End a receive that nobody awaits any more, and return what came of it nevertheless."""
        with contextlib.suppress(Lost, CrossdockError):
            await link.call("cancel", number)
            received: wire.Received = await link.answer(future, ANSWER)
            await link.call("settle", [wire.Ending(one.receipt, 0.0) for one in received.deliveries])

    def _do_aside(self, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        ours, foreign = _receipts(deliveries)
        refused: list[wire.Refused] = await self._ask("extend", list(ours.values()))
        return [*foreign, *(Refusal(list(ours)[one.index], _error(one)) for one in refused)]

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        link = await self._available()
        ours, foreign = _receipts([settlement.delivery for settlement in settlements])
        try:
            refused: list[wire.Refused] = await link.call("settle", [_ending(settlements[at], ours[at]) for at in ours])
        except Lost as error:
            text = "The connection was lost before the answer came; settle it again."
            return [*foreign, *(Refusal(at, _caused(SettleUnknown(text), error)) for at in ours)]
        return [*foreign, *(Refusal(list(ours)[one.index], _error(one)) for one in refused)]

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        return list(await self._ask("stats", queues))

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        page: Page = await self._ask("peek", queue, state, ids, after, limit)
        return page

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        refused: list[wire.Refused] = await self._ask("remove", queue, state, ids)
        return [Refusal(one.index, _error(one)) for one in refused]

    async def purge(self, queue: str, state: State) -> int:
        return int(await self._ask("purge", queue, state))

    async def erase(self, queues: Sequence[str]) -> None:
        """As `SupportsErase`."""
        await self._ask("erase", queues)
        for queue in queues:
            self._declared.pop(queue, None)


def _receipts(deliveries: Sequence[Delivery]) -> tuple[dict[int, wire.Receipt], list[Refusal]]:
    """Receipts by index, and refusals of what was never ours."""
    ours = {at: delivery.receipt for at, delivery in enumerate(deliveries) if isinstance(delivery.receipt, wire.Receipt)}
    text = "This delivery did not come from a remote broker; nothing was changed."
    return ours, [Refusal(at, LeaseLost(text)) for at in range(len(deliveries)) if at not in ours]


def _ending(settlement: Settlement, receipt: wire.Receipt) -> wire.Ending:
    match settlement:
        case Ack():
            return wire.Ending(receipt)
        case Nack(_, delay, replacement):
            return wire.Ending(receipt, delay, replacement)
        case Dead(_, letter):
            return wire.Ending(receipt, letter=letter)


def _error(refused: wire.Refused, message: Message | None = None) -> CrossdockError:
    kind: type[CrossdockError] = getattr(errors, refused.error)
    return kind(refused.text, message) if issubclass(kind, EnqueueError) else kind(refused.text)


def _unknown(text: str, message: Message, cause: Lost) -> EnqueueUnknown:
    unknown = EnqueueUnknown(text.format(message.id), message, safe_to_repeat=True)
    unknown.__cause__ = cause
    return unknown


def _caused(error: SettleUnknown, cause: Lost) -> SettleUnknown:
    error.__cause__ = cause
    return error
