"""A producer and a worker that go on whatever happens to the server, and the notes they take."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from crossdock.clock import SystemClock
from crossdock.errors import BrokerClosed, BrokerError, BrokerUnavailable, EnqueueUnknown, LeaseLost, SettleUnknown
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, BrokerEvent, Delivery, Lane, Message, Priority, QueueSpec

T = TypeVar("T")
LEASE = 2.0
"""Seconds: what was handed over when a connection broke comes back soon."""


def new_namespace() -> str:
    """A name that no other test has."""
    return "t" + secrets.token_hex(8)


def make_broker(
    url: str, namespace: str = "", report: Callable[[BrokerEvent], None] = lambda event: None, **options: Any
) -> Broker:
    """An unopened Broker, as an application has it. Options are added to the URL's query."""
    query = "&".join(f"{name}={value}" for name, value in options.items())
    joined = f"{url}{'&' if '?' in url else '?'}{query}" if query else url
    return create_broker(joined, namespace=namespace or new_namespace(), clock=SystemClock(), report=report)


@contextlib.asynccontextmanager
async def opened(
    url: str, namespace: str = "", report: Callable[[BrokerEvent], None] = lambda event: None, **options: Any
) -> AsyncGenerator[Any]:
    """An open Broker."""
    broker = make_broker(url, namespace, report, **options)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def message(id: str, queue: str = "q", body: bytes = b"body", priority: Priority = Priority.NORMAL, **fields: Any) -> Message:
    """A message that is due now."""
    return Message(id, queue, priority, body, **fields)


def lanes_of(*queues: str, quota: int = 0) -> list[Lane]:
    """All levels of these queues."""
    return [Lane(queue, level, quota) for queue in queues for level in LEVELS]


async def until(fact: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
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

    def __init__(
        self, url: str, queues: Sequence[str] = ("q",), report: Callable[[BrokerEvent], None] = lambda event: None
    ) -> None:
        self.namespace = new_namespace()
        self._queues = queues
        self._producer = make_broker(url, self.namespace, report)
        self._worker = make_broker(url, self.namespace, report)
        self._tasks: list[asyncio.Task[None]] = []
        self._producing = True
        self.confirmed: list[str] = []
        """Ids that the server has, as it says."""
        self.unknown: set[str] = set()
        """Ids of which nothing is known."""
        self.refused: set[str] = set()
        """Ids that are certainly not stored."""
        self.delivered: Counter[str] = Counter()
        self.acked: Counter[str] = Counter()
        """Confirmed acks."""
        self.run_after_ack: set[str] = set()
        """Ids that were delivered although their ack had been confirmed."""
        self.slowest: dict[str, float] = {}
        """Seconds of the slowest call of each verb."""
        self.errors: Counter[str] = Counter()

    async def __aenter__(self) -> Traffic:
        await self._producer.open()
        await self._worker.open()
        await self._worker.declare([QueueSpec(queue, lease=LEASE) for queue in self._queues])
        self._tasks = [asyncio.create_task(self._produce()), asyncio.create_task(self._work())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._producer.close()
        await self._worker.close()
        for task in self._tasks:
            if not task.cancelled() and (error := task.exception()):
                raise error

    async def flows(self, seconds: float = 15.0) -> None:
        """Return when something that was enqueued from now on has been worked off."""
        for task in self._tasks:
            assert not task.done(), task
        first = len(self.confirmed)
        await until(lambda: any(id in self.acked for id in self.confirmed[first:]), "what is enqueued now is worked off", seconds)

    async def ends(self, seconds: float = 20.0) -> list[str]:
        """Stop the producer, let the worker finish, and return the ids that were confirmed and never delivered."""
        self._producing = False
        await until(lambda: self._tasks[0].done(), "the producer ends", seconds)
        with contextlib.suppress(AssertionError):
            await until(lambda: self.delivered.keys() >= set(self.confirmed), "all is delivered", seconds)
        return [id for id in self.confirmed if id not in self.delivered]

    def said(self) -> str:
        """The notes in a line."""
        return (
            f"{len(self.confirmed)} confirmed, {len(self.unknown)} unknown, {len(self.refused)} refused, "
            f"{sum(count > 1 for count in self.delivered.values())} delivered again, {len(self.run_after_ack)} after their ack; "
            f"slowest {', '.join(f'{verb} {seconds:.2f} s' for verb, seconds in sorted(self.slowest.items()))}"
        )

    # --- what they do ---

    async def _timed(self, verb: str, call: Awaitable[T]) -> T:
        started = time.monotonic()
        try:
            return await call
        except BrokerError as error:
            self.errors[f"{verb}: {error}"] += 1
            raise
        finally:
            self.slowest[verb] = max(self.slowest.get(verb, 0.0), time.monotonic() - started)

    async def _produce(self) -> None:
        number = 0
        while self._producing:
            batch = [message(f"m{number + i:06}", self._queues[(number + i) % len(self._queues)]) for i in range(10)]
            number += len(batch)
            try:
                refusals = await self._timed("enqueue", self._producer.enqueue(batch))
            except BrokerUnavailable:
                self.refused |= {each.id for each in batch}
            else:
                errors = {batch[refusal.index].id: refusal.error for refusal in refusals}
                self.unknown |= {id for id, error in errors.items() if isinstance(error, EnqueueUnknown)}
                self.refused |= {id for id, error in errors.items() if not isinstance(error, EnqueueUnknown)}
                self.confirmed += [each.id for each in batch if each.id not in errors]
            await asyncio.sleep(0.005)

    async def _work(self) -> None:
        lanes = lanes_of(*self._queues, quota=5)
        settling: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    deliveries = await self._timed("receive", self._worker.receive(lanes, 50, 0.5))
                except BrokerUnavailable:
                    await asyncio.sleep(0.05)
                    continue
                if deliveries:
                    for delivery in deliveries:
                        self.delivered[delivery.message.id] += 1
                        if delivery.message.id in self.acked:
                            self.run_after_ack.add(delivery.message.id)
                    task = asyncio.create_task(self._settle(deliveries))
                    settling.add(task)
                    task.add_done_callback(settling.discard)
        finally:
            for task in settling:
                task.cancel()

    async def _settle(self, deliveries: Sequence[Delivery]) -> None:
        left: list[Delivery] = list(deliveries)
        while left:
            try:
                refusals = await self._timed("settle", self._worker.settle([Ack(delivery) for delivery in left]))
            except BrokerClosed:
                return
            except BrokerUnavailable:
                await asyncio.sleep(0.05)
                continue
            errors = {refusal.index: refusal.error for refusal in refusals}
            assert all(isinstance(error, LeaseLost | SettleUnknown | BrokerUnavailable) for error in errors.values()), errors
            for index, delivery in enumerate(left):
                if index not in errors:
                    self.acked[delivery.message.id] += 1
            left = [left[index] for index, error in errors.items() if not isinstance(error, LeaseLost)]
