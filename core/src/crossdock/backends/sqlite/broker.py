"""The asynchronous face of the SQLite backend: each verb becomes a command for the engine's thread."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import msgspec

from crossdock.backends.sqlite import location
from crossdock.backends.sqlite.command import Loss
from crossdock.backends.sqlite.database import Database
from crossdock.backends.sqlite.engine import Engine
from crossdock.backends.sqlite.store import Store
from crossdock.backends.sqlite.tables import LONGEST_DELAY, MAX_BODY, STEP
from crossdock.errors import BrokerClosed, EnqueueFailed, EnqueueUnknown, SettleUnknown, UnsupportedCapability
from crossdock.spi import (
    Ability,
    Broker,
    BrokerSettings,
    Capabilities,
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
    Support,
    Survives,
)

_AT_REST: Final = frozenset({State.READY, State.SCHEDULED, State.DEAD})
_NATIVE: Final = Ability(Support.NATIVE)
_SWEEP: Final = 0.25
"""Seconds after which a receive that waits has noticed what fell due; in fact a few milliseconds."""

_FULL: Final = Capabilities(
    server="SQLite",
    version=sqlite3.sqlite_version,
    survives=frozenset({Survives.PROCESS, Survives.POWER}),
    durability_note="Each commit waits for the disk (write-ahead log, synchronous=FULL). One host, one disk.",
    clock="client",
    fencing=Ability(Support.NATIVE, "A settlement finds its lease, or changes nothing, in one transaction."),
    takeover=QueueSpec("").lease + _SWEEP,
    delay=_NATIVE,
    delay_resolution=0.001,
    delay_lateness=_SWEEP,
    delay_longest=LONGEST_DELAY,
    deduplication=_NATIVE,
    deduplication_window=0.0,
    listable=frozenset(State),
    removable=_AT_REST,
    purgeable=_AT_REST,
    by_id=_NATIVE,
    list_queues=_NATIVE,
    signals=Ability(Support.UNSUPPORTED, "The SQLite broker brings no signals yet."),
    max_body=MAX_BODY,
)
_RELAXED: Final = msgspec.structs.replace(
    _FULL,
    survives=frozenset({Survives.PROCESS}),
    durability_note="Commits do not wait for the disk (synchronous=NORMAL): a power loss takes the last ones, a killed process none.",
)


class SqliteBroker(Broker):
    """A Broker on a file.

    Args:
        settings: `url` names the file, the option `durability` says whether commits wait for the disk.

    Raises:
        ConfigurationError: The URL names no file, or has an unknown option.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._location = location.parse(settings.url, settings.options)
        self._engine: Engine | None = None
        self._opening: asyncio.Future[None] | None = None

    # --- life ---

    async def open(self) -> None:
        while self._opening is not None:
            await asyncio.wait([self._opening])
        if self._engine is None:
            self._opening = asyncio.get_running_loop().create_future()
            try:
                engine = Engine(self._open_store, self._settings.clock, self._settings.report)
                await engine.start()
                self.capabilities = _FULL if self._location.durability == "full" else _RELAXED
                self._engine = engine
            finally:
                self._opening.set_result(None)
                self._opening = None

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await engine.stop()

    def _open_store(self, pause: Callable[[float], object]) -> Store:
        return Store(lambda: Database(self._location, pause), self._settings.namespace, self._settings.clock)

    def _running(self) -> Engine:
        if self._engine is None:
            raise BrokerClosed("The SQLite broker is not open: it was closed, or open() was not called yet.")
        return self._engine

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        engine = self._running()
        if queues:
            await engine.call(lambda store: store.declare(queues))

    # --- messages in ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        engine = self._running()
        if not messages:
            return []
        return await engine.call(lambda store: store.enqueue(messages), lambda loss: _not_stored(messages, loss))

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return await self._running().receive(lanes, limit, wait)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        engine = self._running()
        if not deliveries:
            return []
        return await engine.call(lambda store: store.deliveries.extend(deliveries))

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        engine = self._running()
        if not settlements:
            return []
        return await engine.call(lambda store: store.deliveries.settle(settlements), lambda loss: _not_settled(settlements, loss))

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        return await self._running().call(lambda store: store.repairs.stats(queues))

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        return await self._running().call(lambda store: store.repairs.peek(queue, state, ids, after, limit))

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        engine = self._running()
        _refuse_leased("remove", state)
        return await engine.call(lambda store: store.repairs.remove(queue, state, ids))

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        engine = self._running()
        messages = [replay.message for replay in replays]
        return await engine.call(lambda store: store.repairs.replay(queue, replays), lambda loss: _not_stored(messages, loss))

    async def purge(self, queue: str, state: State) -> int:
        _refuse_leased("purge", state) if self._engine else None
        purged = 0
        while True:
            step = await self._running().call(lambda store: store.repairs.purge(queue, state))
            purged += step
            if step < STEP:
                return purged

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`."""
        engine = self._running()
        for queue in queues:
            while await engine.call(partial(Store.erase, queue=queue)):
                pass


def _not_stored(messages: Sequence[Message], loss: Loss) -> list[Refusal]:
    refusals: list[Refusal] = []
    for index, message in enumerate(messages):
        error: EnqueueFailed | EnqueueUnknown
        if loss.perhaps:
            error = EnqueueUnknown(f"Message {message.id!r} may be stored or not: {loss.error}", message, safe_to_repeat=True)
        else:
            error = EnqueueFailed(f"Message {message.id!r} was not stored: {loss.error}", message)
        error.__cause__ = loss.error
        refusals.append(Refusal(index, error))
    return refusals


def _not_settled(settlements: Sequence[Settlement], loss: Loss) -> list[Refusal]:
    if not loss.perhaps:
        raise loss.error
    return [
        Refusal(index, SettleUnknown(f"Message {settlement.delivery.message.id!r} may be settled or not: {loss.error}"))
        for index, settlement in enumerate(settlements)
    ]


def _refuse_leased(verb: str, state: State) -> None:
    if state is State.LEASED:
        raise UnsupportedCapability(f"The SQLite broker cannot {verb} leased messages: they belong to their workers until settled.")
