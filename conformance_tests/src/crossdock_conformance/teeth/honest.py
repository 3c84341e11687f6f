"""The memory broker behind a layer that changes nothing: what the broken ones are made from."""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.plugins import create_broker
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
    SupportsErase,
)


class Honest(Broker):
    """The memory broker behind a layer that changes nothing. The broken ones change one thing each."""

    def __init__(self, settings: BrokerSettings) -> None:
        self.settings = settings
        self.inner = create_broker(settings.url, namespace=settings.namespace, clock=settings.clock, report=settings.report)

    async def open(self) -> None:
        await self.inner.open()
        self.capabilities = self.inner.capabilities

    async def close(self) -> None:
        await self.inner.close()

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self.inner.declare(queues)

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        return await self.inner.enqueue(messages)

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return await self.inner.receive(lanes, limit, wait)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        return await self.inner.extend(deliveries)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return await self.inner.settle(settlements)

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        return await self.inner.stats(queues)

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        return await self.inner.peek(queue, state, ids=ids, after=after, limit=limit)

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        return await self.inner.remove(queue, state, ids)

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        return await self.inner.replay(queue, replays)

    async def purge(self, queue: str, state: State) -> int:
        return await self.inner.purge(queue, state)

    async def erase(self, queues: Sequence[str]) -> None:
        """As `SupportsErase`."""
        assert isinstance(self.inner, SupportsErase)
        await self.inner.erase(queues)
