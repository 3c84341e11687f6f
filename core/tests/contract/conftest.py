"""The bench on which every backend's Broker is tested against the promises of `crossdock.spi`.

A backend joins by one line in `STORES`. Tests see it only through the interface and through `lab`, never through its private state.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from crossdock.clock import VirtualClock
from crossdock.spi import (
    LEVELS,
    BackendPlugin,
    Broker,
    BrokerSettings,
    Cursor,
    Dead,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Priority,
    QueueStats,
    Reason,
    Refusal,
    State,
)

STORES: dict[str, Callable[[Path], str]] = {
    "memory": lambda folder: f"memory://{uuid.uuid4().hex}",
    "sqlite": lambda folder: f"sqlite:///{folder}/store.db",
}
"""By URL scheme: how to make the URL of a new, empty store, given an empty folder to use."""

PATIENCE = 10.0
"""Real seconds after which a test gives up waiting for something that must happen."""


def plugin_for(scheme: str) -> BackendPlugin:
    """Find the backend as an installation would."""
    (entry_point,) = entry_points(group="crossdock.backends", name=scheme)
    plugin = entry_point.load().crossdock_backend()
    assert isinstance(plugin, BackendPlugin)
    return plugin


class Lab:
    """One empty store, a clock in the tester's hand, and shorthands."""

    def __init__(self, scheme: str, folder: Path) -> None:
        self.plugin = plugin_for(scheme)
        self.url = STORES[scheme](folder)
        self.clock = VirtualClock()
        self._opened: list[Broker] = []
        self._numbers = itertools.count(1)

    # --- brokers and time ---

    def build(self, namespace: str = "default") -> Broker:
        """Return a Broker on the store that is not open yet; the lab closes it in the end."""
        broker = self.plugin.create(BrokerSettings(url=self.url, namespace=namespace, clock=self.clock))
        assert isinstance(broker, Broker)
        self._opened.append(broker)
        return broker

    async def open(self, namespace: str = "default") -> Broker:
        """Return an open Broker on the store."""
        broker = self.build(namespace)
        await broker.open()
        return broker

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass, and a millisecond, so that rounding never decides a test."""
        self.clock.advance(seconds + 0.001)

    async def turns(self, count: int = 50) -> None:
        """Let others run, for so many turns of the loop."""
        for _ in range(count):
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Close every Broker."""
        for broker in self._opened:
            await broker.close()

    @asynccontextmanager
    async def waiting(self, broker: Broker, wait: float, limit: int = 100) -> AsyncGenerator[asyncio.Task[Sequence[Delivery]]]:
        """Run a receive that has begun to wait; whatever the test does, it must have ended when the block does."""
        task = asyncio.ensure_future(broker.receive(self.lanes("q"), limit, wait))
        await self.turns()
        assert not task.done(), "it should wait for a first delivery"
        try:
            yield task
            await asyncio.wait([task], timeout=PATIENCE)
            assert task.done(), "the waiting receive was not woken"
        finally:
            task.cancel()
            await asyncio.wait([task])

    # --- values ---

    def message(self, id: str = "", queue: str = "q", priority: Priority = Priority.NORMAL, **fields: Any) -> Message:
        """Make a message; without an id, one that no other message has."""
        id = id or f"m{next(self._numbers)}"
        return Message(id, queue, priority, fields.pop("body", f"body of {id}".encode()), **fields)

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
        letter = DeadLetter(delivery.message, Reason.REJECTED, self.clock.time_ms(), "shop.pay", "builtins.OSError", "f1", b"story")
        return Dead(delivery, msgspec.structs.replace(letter, **changes))

    # --- shorthands for verbs ---

    async def take(self, broker: Broker, limit: int = 100, queue: str = "q") -> list[Delivery]:
        """Receive what is READY in a queue, without waiting."""
        return list(await broker.receive(self.lanes(queue), limit, 0))

    async def take_one(self, broker: Broker, queue: str = "q") -> Delivery:
        """Receive the one message that is READY in a queue."""
        (delivery,) = await self.take(broker, queue=queue)
        return delivery

    async def bury(self, broker: Broker, *messages: Message, **changes: Any) -> None:
        """Enqueue messages and dead-letter them, in this order."""
        for message in messages:
            assert not await broker.enqueue([message])
            taken = await self.take(broker, queue=message.queue)
            endings = [self.dead(each, **changes) if each.message == message else Nack(each) for each in taken]
            assert not await broker.settle(endings)

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
            assert len(page.entries) <= limit
            found += page.entries
            after = page.next
            if after is None:
                return found

    async def ids(self, broker: Broker, state: State, queue: str = "q") -> list[str]:
        """List the ids of a state."""
        return [entry.message.id for entry in await self.entries(broker, state, queue)]

    async def where(self, broker: Broker, queue: str = "q") -> dict[State, list[str]]:
        """List the ids of every state that has any, and check that the figures agree."""
        listed = {state: await self.ids(broker, state, queue) for state in State}
        stats = await self.stats(broker, queue)
        counted = {State.READY: stats.ready, State.SCHEDULED: stats.scheduled, State.LEASED: stats.leased, State.DEAD: stats.dead}
        assert counted == {state: len(ids) for state, ids in listed.items()}
        return {state: ids for state, ids in listed.items() if ids}

    @staticmethod
    def errors(refusals: Sequence[Refusal]) -> dict[int, type[Exception]]:
        """Return the error types of refusals by index, and check their form."""
        assert all(str(refusal.error).strip() and "Traceback" not in str(refusal.error) for refusal in refusals)
        assert len({refusal.index for refusal in refusals}) == len(refusals)
        return {refusal.index: type(refusal.error) for refusal in refusals}


@pytest.fixture(params=sorted(STORES))
def new_lab(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Lab]:
    """Make a lab with an empty store at each call."""
    numbers = itertools.count()

    def make() -> Lab:
        folder = tmp_path / f"store{next(numbers)}"
        folder.mkdir()
        return Lab(request.param, folder)

    return make


@pytest.fixture
def threads_end() -> Iterator[None]:
    """Fail if the test leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
        assert not thread.is_alive(), f"{thread.name} was left running"


@pytest_asyncio.fixture
async def lab(new_lab: Callable[[], Lab], threads_end: None) -> AsyncIterator[Lab]:
    """A lab, in this test's event loop; after the test every Broker is closed and nothing of it may still run."""
    lab = new_lab()
    yield lab
    await lab.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "a background task outlived close()"


@pytest_asyncio.fixture
async def broker(lab: Lab) -> Broker:
    """An open Broker on the lab's store."""
    return await lab.open()
