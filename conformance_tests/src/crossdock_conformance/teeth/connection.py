"""A server that comes and goes, a broker that copes with it, and some that do not."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from crossdock.errors import BrokerClosed, BrokerUnavailable, EnqueueError, EnqueueFailed, EnqueueUnknown, SettleUnknown
from crossdock.spi import (
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
)
from crossdock_conformance.teeth.honest import Honest


class Switch:
    """A server with one store in memory, which can be stopped, started, paused and cut off. One for a whole target."""

    def __init__(self) -> None:
        self.runs = True
        self.breaks = 0
        """How often connections were lost."""

    def stop(self) -> None:
        """As `ServerControl.stop`; so the others."""
        self.runs = False
        self.breaks += 1

    def kill(self) -> None:
        self.stop()

    def start(self) -> None:
        self.runs = True

    def pause(self) -> None:
        self.stop()

    def resume(self) -> None:
        self.start()

    def cut(self) -> None:
        """As `Target.cut`."""
        self.breaks += 1


class FarAway(Honest):
    """Honest, but behind a connection that takes a moment each way and is lost when the server is.

    Args:
        settings: As for every backend.
        switch: Its server.
    """

    def __init__(self, settings: BrokerSettings, switch: Switch) -> None:
        super().__init__(settings)
        self._switch = switch
        self._watching: asyncio.Task[None] | None = None
        self._receiving: set[asyncio.Task[Sequence[Delivery]]] = set()

    async def open(self) -> None:
        self._reach()
        await super().open()
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None
        await super().close()

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        breaks = await self._there()
        refusals = await super().enqueue(messages)
        if await self._lost_since(breaks):
            return [Refusal(index, self._unknown(message)) for index, message in enumerate(messages)]
        return refusals

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        await self._there()
        task = asyncio.ensure_future(super().receive(lanes, limit, wait))
        self._receiving.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) is not None and current.cancelling():
                task.cancel()
                raise
            raise BrokerUnavailable("The connection was lost while a receive waited.") from None
        finally:
            self._receiving.discard(task)

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        breaks = await self._there()
        refusals = await super().settle(settlements)
        if await self._lost_since(breaks):
            unknown = SettleUnknown("The connection was lost before the answer came; settle it again.")
            return [Refusal(index, unknown) for index in range(len(settlements))]
        return refusals

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await self._there()
        await super().declare(queues)

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        await self._there()
        return await super().extend(deliveries)

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        await self._there()
        return await super().stats(queues)

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        await self._there()
        return await super().peek(queue, state, ids=ids, after=after, limit=limit)

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        await self._there()
        return await super().remove(queue, state, ids)

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        await self._there()
        return await super().replay(queue, replays)

    async def purge(self, queue: str, state: State) -> int:
        await self._there()
        return await super().purge(queue, state)

    async def erase(self, queues: Sequence[str]) -> None:
        """As `SupportsErase`."""
        await self._there()
        await super().erase(queues)

    def _unknown(self, message: Message) -> EnqueueError:
        text = f"The connection was lost before the answer for message {message.id!r} came; enqueue it again under the same id."
        return EnqueueUnknown(text, message, safe_to_repeat=True)

    async def _there(self) -> int:
        """Take the way there. Returns how often connections were lost until then."""
        if self._watching is None:
            raise BrokerClosed("The broker is not open.")
        self._reach()
        await asyncio.sleep(0.001)
        self._reach()
        return self._switch.breaks

    async def _lost_since(self, breaks: int) -> bool:
        await asyncio.sleep(0.001)
        return self._switch.breaks != breaks

    def _reach(self) -> None:
        if not self._switch.runs:
            raise BrokerUnavailable("The server cannot be reached; it is tried again all the time.")

    async def _watch(self) -> None:
        """Report losses and returns, and end what waits on a lost connection."""
        breaks, connected = self._switch.breaks, True
        while True:
            await asyncio.sleep(0.002)
            if self._switch.breaks != breaks:
                breaks = self._switch.breaks
                for task in list(self._receiving):
                    task.cancel()
                if connected:
                    connected = False
                    self.settings.report(Disconnected("The server went away."))
            if self._switch.runs and not connected:
                connected = True
                self.settings.report(Connected())


class CallsUnknownFailed(FarAway):
    """Says that a message is certainly not stored when no answer came."""

    def _unknown(self, message: Message) -> EnqueueError:
        return EnqueueFailed(f"Message {message.id!r} could not be stored.", message)


class SwallowsErrors(FarAway):
    """Says that messages are stored when there is no connection."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        try:
            return await super().enqueue(messages)
        except BrokerUnavailable:
            return ()


class GoesDeaf(FarAway):
    """Never notices that its server is back: a receive waits on the old connection for ever."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        if self._switch.breaks:
            await asyncio.sleep(wait)
            return ()
        return await super().receive(lanes, limit, wait)
