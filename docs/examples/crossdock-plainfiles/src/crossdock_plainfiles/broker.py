"""The asynchronous face: each verb is a function of `Store`, run in a thread of the Broker's own, one after another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, TypeVar

from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    CrossdockError,
    EnqueueUnknown,
    SettleUnknown,
    UnsupportedCapability,
)
from crossdock.spi import (
    Ability,
    Broker,
    BrokerEvent,
    BrokerSettings,
    Capabilities,
    Connected,
    Cursor,
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
    Support,
    Survives,
)
from crossdock_plainfiles import disk, location
from crossdock_plainfiles.store import LONGEST, MAX_BODY, NOTHING_SEEN, Sight, Store

T = TypeVar("T")

POLL: Final = 0.02
"""Seconds between two looks of a waiting receive. Real ones, whatever the clock: nobody tells us of a file."""
_SWEEP: Final = 0.25
"""Seconds after which a receive that waits has noticed what fell due."""
_AT_REST: Final = frozenset({State.READY, State.SCHEDULED, State.DEAD})

_CAPABILITIES: Final = Capabilities(
    server="plain files",
    version="1",
    survives=frozenset({Survives.PROCESS, Survives.POWER}),
    durability_note="Files and directories are flushed before a verb returns. One host, one local disk: locks reach no further.",
    clock="client",
    fencing=Ability(Support.NATIVE, "A settlement finds the number of its hand-over in a file's name, or changes nothing."),
    takeover=QueueSpec("").lease + _SWEEP,
    delay=Ability(
        Support.EMULATED, "Who next looks at the queue moves what is due: a rename each, so 10,000 at once take a while."
    ),
    delay_resolution=0.001,
    delay_lateness=_SWEEP,
    delay_longest=LONGEST,
    deduplication=Ability(Support.NATIVE, "The id and the generation are in the file's name."),
    deduplication_window=0.0,
    listable=frozenset(State),
    removable=_AT_REST,
    purgeable=_AT_REST,
    by_id=Ability(Support.EMULATED, "Directories are listed, if they have changed; then it is a look-up."),
    list_queues=Ability(Support.NATIVE, "A queue is a directory."),
    signals=Ability(Support.UNSUPPORTED, "A folder tells nobody; a state store would."),
    max_body=MAX_BODY,
)


class PlainFilesBroker(Broker):
    """A Broker on a folder.

    Args:
        settings: `url` names the folder, `clock` is the only source of time.

    Raises:
        ConfigurationError: The URL names no folder, or has options.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._folder = location.parse(settings.url, settings.options)
        self._clock = settings.clock
        self._report = settings.report
        self._store = Store(self._folder, settings.namespace, settings.clock, self._tell)
        self._thread: ThreadPoolExecutor | None = None
        self._process = 0
        self._is_connected = True

    # --- life ---

    async def open(self) -> None:
        if self._thread is None:
            thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crossdock-plainfiles")
            try:
                await asyncio.wrap_future(thread.submit(location.claim, self._folder))
            except BaseException:
                thread.shutdown()
                raise
            self.capabilities = _CAPABILITIES
            self._loop = asyncio.get_running_loop()
            self._thread, self._process = thread, os.getpid()

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None and self._process == os.getpid():
            await asyncio.wrap_future(thread.submit(int))  # what was begun before ends before, a give-back included
            thread.shutdown()

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self._do(lambda: self._store.declare(queues))

    # --- messages in ---

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await self._do(lambda: self._store.enqueue(messages), lambda error: _perhaps_stored(messages, error))

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deadline = self._clock.monotonic() + wait
        seen = NOTHING_SEEN
        while True:
            is_last = self._clock.monotonic() >= deadline
            thread = self._running()
            taking = thread.submit(_without_foreign_errors, partial(self._store.receive, lanes, limit, seen))
            try:
                deliveries, seen = await self._outcome(taking)
            except asyncio.CancelledError:
                thread.submit(self._give_back, taking)
                raise
            except BrokerUnavailable:
                if is_last:
                    raise
                deliveries, seen = (), NOTHING_SEEN  # it is reported, and may be over before the wait is
            if deliveries or is_last:
                return deliveries
            await asyncio.sleep(POLL)  # nothing is taken yet, so being cancelled here loses nothing

    def _give_back(self, taking: Future[tuple[Sequence[Delivery], Sight]]) -> None:
        """Give back what was taken for a cancelled receive. It runs behind that in the thread, hence before whatever comes next."""
        if not taking.cancelled() and taking.exception() is None:
            self._store.settle([Nack(delivery) for delivery in taking.result()[0]])

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        return await self._do(lambda: self._store.extend(deliveries))

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return await self._do(lambda: self._store.settle(settlements), lambda error: _perhaps_settled(settlements, error))

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        return await self._do(lambda: self._store.stats(queues))

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        return await self._do(lambda: self._store.peek(queue, state, ids, after, limit))

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        return await self._do(lambda: self._store.remove(queue, _at_rest("remove", state), ids))

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        messages = [replay.message for replay in replays]
        return await self._do(lambda: self._store.replay(queue, replays), lambda error: _perhaps_stored(messages, error))

    async def purge(self, queue: str, state: State) -> int:
        return await self._do(lambda: self._store.purge(queue, _at_rest("purge", state)))

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`."""
        await self._do(lambda: self._store.erase(queues))

    # --- the thread ---

    def _running(self) -> ThreadPoolExecutor:
        if self._thread is None or self._process != os.getpid():  # a forked child has no thread
            raise BrokerClosed("The plain files broker is not open: it was closed, or open() was not called yet.")
        return self._thread

    async def _do(self, work: Callable[[], T], excuse: Callable[[OSError], T] | None = None) -> T:
        """Have work done in the thread, behind what was begun before. `excuse` answers for work that the disk cut short."""
        return await self._outcome(self._running().submit(_without_foreign_errors, work, excuse))

    async def _outcome(self, working: Future[T]) -> T:
        """Wait for work in the thread, and report whether the folder can be used."""
        try:
            outcome = await asyncio.wrap_future(working)
        except BrokerUnavailable as error:
            if self._is_connected:
                self._is_connected = False
                self._report(Disconnected(str(error)))
            raise
        if not self._is_connected:
            self._is_connected = True
            self._report(Connected())
        return outcome

    def _tell(self, event: BrokerEvent) -> None:
        """Report what the thread has found out."""
        self._loop.call_soon_threadsafe(self._report, event)


def _without_foreign_errors(work: Callable[[], T], excuse: Callable[[OSError], T] | None = None) -> T:
    try:
        return work()
    except OSError as error:
        if excuse is not None:
            return excuse(error)
        raise BrokerUnavailable(f"The file {error.filename!r} cannot be used: {disk.why(error)}.") from error


def _perhaps_stored(messages: Sequence[Message], cause: OSError) -> Sequence[Refusal]:
    text = f"It may be stored or not: {disk.why(cause)}. Enqueuing it again is safe."
    return [_refusal(index, EnqueueUnknown(text, message, safe_to_repeat=True), cause) for index, message in enumerate(messages)]


def _perhaps_settled(settlements: Sequence[Settlement], cause: OSError) -> Sequence[Refusal]:
    text = f"It may be settled or not: {disk.why(cause)}. Settling it again is safe."
    return [_refusal(index, SettleUnknown(text), cause) for index in range(len(settlements))]


def _refusal(index: int, error: CrossdockError, cause: OSError) -> Refusal:
    error.__cause__ = cause
    return Refusal(index, error)


def _at_rest(verb: str, state: State) -> State:
    if state is State.LEASED:
        raise UnsupportedCapability(f"The plain files broker cannot {verb} leased messages: they belong to their workers.")
    return state
