"""A producer and a worker that go on whatever happens to the server, and the notes they take."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, EnqueueUnknown, LeaseLost
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, BrokerEvent, Delivery, Lane, Message, Priority, QueueSpec, SupportsErase

LEASE = 5.0
"""Seconds."""
PATIENCE = 60.0
"""Seconds that a fact is waited for at most: CI's machines are slow at times."""

Report = Callable[[BrokerEvent], None]


def new_namespace() -> str:
    """A name that no other test has."""
    return "t" + secrets.token_hex(8)


def message(id: str, queue: str = "q", body: bytes = b"body", priority: Priority = Priority.NORMAL) -> Message:
    """A message that is due now."""
    return Message(id, queue, priority, body)


def lanes_of(*queues: str, quota: int = 0) -> list[Lane]:
    """All levels of these queues."""
    return [Lane(queue, level, quota) for queue in queues for level in LEVELS]


def make_broker(url: str, namespace: str, report: Report = lambda event: None) -> Broker:
    """An unopened Broker, as an application has it."""
    return create_broker(url, namespace=namespace, clock=SystemClock(), report=report)


@asynccontextmanager
async def opened(
    url: str, namespace: str, report: Report = lambda event: None, queues: Sequence[str] = ("q",), lease: float = 30.0
) -> AsyncGenerator[Broker]:
    """An open Broker that has declared these queues."""
    broker = make_broker(url, namespace, report)
    await broker.open()
    try:
        await broker.declare([QueueSpec(queue, lease=lease) for queue in queues])
        yield broker
    finally:
        await broker.close()


async def erase(url: str, namespace: str, queues: Sequence[str] = ("q",)) -> None:
    """Have nothing left of a namespace."""
    broker = make_broker(url, namespace)
    await broker.open()
    try:
        assert isinstance(broker, SupportsErase)
        await broker.erase(queues)
    finally:
        await broker.close()


async def until(fact: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a fact."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"not true within {seconds:g} s: {what}"
        await asyncio.sleep(0.01)


class Traffic:
    """One producer and one worker, each with a Broker of its own.

    Args:
        url: The broker URL, with options.
        queues: Each message goes to the next one.
        report: Told what either Broker reports.
    """

    def __init__(self, url: str, queues: Sequence[str] = ("q",), report: Report = lambda event: None) -> None:
        self._url = url
        self._queues = queues
        self.namespace = new_namespace()
        self._producer = make_broker(url, self.namespace, report)
        self._worker = make_broker(url, self.namespace, report)
        self._tasks: list[asyncio.Task[None]] = []
        self._producing = True
        self._number = 0
        self.confirmed: list[str] = []
        """Ids that the server has, as it says."""
        self.unknown: set[str] = set()
        """Ids of which nothing is known."""
        self.refused: set[str] = set()
        """Ids that are certainly not stored."""
        self.delivered: Counter[str] = Counter()
        self.settled: set[str] = set()
        """Ids whose ack was not refused."""
        self.errors: Counter[str] = Counter()
        """What an application was told, shortened."""

    async def __aenter__(self) -> Self:
        await self._producer.open()
        await self._worker.open()
        await self._worker.declare([QueueSpec(queue, lease=LEASE) for queue in self._queues])
        self._tasks = [asyncio.create_task(self._produce()), asyncio.create_task(self._work())]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._producer.close()
        await self._worker.close()
        if kind is None:
            await erase(self._url, self.namespace, self._queues)

    async def flows(self) -> None:
        """Return when something that is enqueued from now on is worked off."""
        first = len(self.confirmed)
        await until(lambda: self._alive() and any(id in self.settled for id in self.confirmed[first:]), f"it flows; {self.said()}")

    async def ends(self) -> list[str]:
        """Stop the producer, let the worker finish, and return the ids that were confirmed and never came."""
        self._producing = False
        await until(lambda: self._tasks[0].done(), "the producer ends")
        try:
            await until(lambda: self._alive() and self.settled >= set(self.confirmed), "all is worked off")
        except AssertionError:
            print(self.said())
        return [id for id in self.confirmed if id not in self.settled]

    def _alive(self) -> bool:
        for task in self._tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error
        return True

    def said(self) -> str:
        """The notes in a few lines."""
        return (
            f"{len(self.confirmed)} confirmed, {len(self.unknown)} unknown, {len(self.refused)} refused, "
            f"{len(self.settled)} settled, {sum(count > 1 for count in self.delivered.values())} delivered again\n"
            + "\n".join(f"{count} x {text}" for text, count in self.errors.most_common(8))
        )

    # --- what they do ---

    async def _produce(self) -> None:
        while self._producing:
            batch = [message(f"m{self._number + i:06}", self._queues[(self._number + i) % len(self._queues)]) for i in range(10)]
            self._number += len(batch)
            try:
                refusals = await self._producer.enqueue(batch)
            except BrokerUnavailable as error:
                self.errors[f"enqueue: {error}"[:160]] += 1
                self.refused |= {each.id for each in batch}
                await asyncio.sleep(0.02)
                continue
            errors = {batch[refusal.index].id: refusal.error for refusal in refusals}
            for said in errors.values():
                self.errors[f"enqueue: {type(said).__name__} {str(said).partition(': ')[2] or said}"[:160]] += 1
            self.unknown |= {id for id, said in errors.items() if isinstance(said, EnqueueUnknown)}
            self.refused |= {id for id, said in errors.items() if not isinstance(said, EnqueueUnknown)}
            self.confirmed += [each.id for each in batch if each.id not in errors]
            await asyncio.sleep(0.005)

    async def _work(self) -> None:
        lanes = lanes_of(*self._queues, quota=5)
        while True:
            try:
                deliveries = await self._worker.receive(lanes, 50, 0.5)
            except BrokerUnavailable as error:
                self.errors[f"receive: {error}"[:160]] += 1
                await asyncio.sleep(0.02)
                continue
            self.delivered.update(delivery.message.id for delivery in deliveries)
            await self._settle(deliveries)

    async def _settle(self, deliveries: Sequence[Delivery]) -> None:
        refusals = await self._worker.settle([Ack(delivery) for delivery in deliveries])
        refused = {refusal.index for refusal in refusals}
        for refusal in refusals:
            assert isinstance(refusal.error, LeaseLost), refusal
        self.settled.update(delivery.message.id for index, delivery in enumerate(deliveries) if index not in refused)
