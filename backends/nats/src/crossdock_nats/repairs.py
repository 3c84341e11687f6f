"""Repairs: removing, replaying, purging."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec

from crossdock.errors import NotFound, SettleUnknown, UnsupportedCapability
from crossdock.spi import LEVELS, Ack, Lane, Refusal, Replay, State
from crossdock_nats import limits, names
from crossdock_nats.api import Api, Problem
from crossdock_nats.incoming import Incoming, Item
from crossdock_nats.looking import Looking
from crossdock_nats.queues import Queue, Queues
from crossdock_nats.receiver import Receiver
from crossdock_nats.servertime import ServerTime
from crossdock_nats.settling import Settling

_PAUSE_MS: Final = 5000
"""Milliseconds after which a level that was paused for a removal goes on by itself, should we die meanwhile."""
_BATCH: Final = 1000
_LOOKS: Final = 10
"""Looks in a row, at most, of a purge that finds nothing where something is counted."""
_LOOK: Final = 0.3
"""Seconds of each but the first."""


class Repairs:
    """Repairs, for one Broker while it is open.

    Args:
        api: JetStream.
        queues: Their streams and consumers.
        looking: Finds messages.
        incoming: Stores what is replayed.
        receiver: Takes what is purged; nobody else receives by it.
        settling: Ends what is purged.
        time: The server's time.
    """

    def __init__(
        self,
        api: Api,
        queues: Queues,
        looking: Looking,
        incoming: Incoming,
        receiver: Receiver,
        settling: Settling,
        time: ServerTime,
    ) -> None:
        self._api = api
        self._queues = queues
        self._looking = looking
        self._incoming = incoming
        self._receiver = receiver
        self._settling = settling
        self._time = time

    async def remove(self, name: str, state: State, ids: Sequence[str]) -> list[Refusal]:
        """As `Broker.remove`."""
        refuse_leased("remove", state)
        if not ids:
            return []
        if state is State.READY and not self._queues.features.pauses:
            raise UnsupportedCapability(
                "The NATS broker cannot remove ready messages from a server below 2.11: whether one is just being delivered cannot be told."
            )
        queue = (await self._queues.look([name])).get(name)
        gone = await self._removed(queue, state, ids) if queue is not None else set[str]()
        refusals: list[Refusal] = []
        for index, id in enumerate(ids):
            if id in gone:
                gone.discard(id)  # named twice, it is there once
            else:
                refusals.append(Refusal(index, NotFound(f"No {state.value} message {id!r} is in queue {name!r}.")))
        return refusals

    async def _removed(self, queue: Queue, state: State, ids: Sequence[str]) -> set[str]:
        found = await self._looking.find(queue, state, ids)
        if not found:
            return set()
        if state is not State.READY:
            deleted = await self._api.delete(queue.stream, [stored.seq for stored in found.values()])
            return {id for id, done in zip(found, deleted, strict=True) if done}
        # Paused, a level delivers nothing, so what lies beyond its place now is nobody's.
        subjects = queue.there
        levels = {subjects.read(stored.subject).place for stored in found.values()}
        consumers = [subjects.consumer(level) for level in LEVELS if b"%d" % level in levels]
        until = datetime.fromtimestamp((self._time.now_ms() + _PAUSE_MS) / 1000, UTC).isoformat().replace("+00:00", "Z")
        paused = await self._pause(queue, consumers, {"pause_until": until})
        try:
            found = await self._looking.find(queue, state, list(found))
            if not found:
                return set()
            deleted = await self._api.delete(queue.stream, [stored.seq for stored in found.values()])
            return {id for id, done in zip(found, deleted, strict=True) if done}
        finally:
            await self._pause(queue, paused, {})

    async def _pause(self, queue: Queue, consumers: Sequence[str], body: dict[str, Any]) -> list[str]:
        """Pause consumers, or let them go on; returns those that are there. Where there is none, nothing is delivered."""
        requests: list[tuple[str, object]] = [(f"CONSUMER.PAUSE.{queue.stream}.{consumer}", body) for consumer in consumers]
        answers = await self._api.ask(requests, _Paused)
        return [consumer for consumer, answer in zip(consumers, answers, strict=True) if not isinstance(answer, Problem)]

    async def replay(self, name: str, replays: Sequence[Replay]) -> list[Refusal]:
        """As `Broker.replay`."""
        refusals: list[Refusal] = []
        queue = (await self._queues.look([name])).get(name)
        found = await self._looking.find(queue, State.DEAD, [replay.id for replay in replays]) if queue is not None else {}
        items: list[Item] = []
        most, now_ms = self._incoming.most, self._time.now_ms()
        first: set[str] = set()
        repeated: list[int] = []
        gone: set[str] = set()
        for index, replay in enumerate(replays):
            letter = found.get(replay.id)
            if replay.id in first:
                repeated.append(index)
            elif letter is None:
                refusals.append(Refusal(index, NotFound(f"No dead letter {replay.id!r} is in queue {name!r}.")))
            elif (error := limits.objection(replay.message, most, now_ms)) is not None:
                refusals.append(Refusal(index, error))
            else:
                first.add(replay.id)
                same = replay.message.queue == name and replay.message.id == replay.id
                items.append(Item(index, replay.message, letter if same else None))
        for start in range(0, len(items), limits.WINDOW):
            some = items[start : start + limits.WINDOW]
            not_stored: list[Refusal] = []
            await self._incoming.store(some, not_stored, beyond_limit=True)
            refused = {refusal.index for refusal in not_stored}
            refusals += not_stored
            assert queue is not None
            done = [replays[item.at].id for item in some if item.at not in refused]
            gone.update(done)
            await self._api.delete(queue.stream, [found[id].seq for id in done])
        for index in repeated:  # a letter that is named twice is there once, unless it could not be replayed
            if replays[index].id in gone:
                refusals.append(Refusal(index, NotFound(f"No dead letter {replays[index].id!r} is in queue {name!r}.")))
            else:
                refusals += [Refusal(index, refusal.error) for refusal in await self.replay(name, [replays[index]])]
        return refusals

    async def purge(self, name: str, state: State) -> int:
        """As `Broker.purge`."""
        refuse_leased("purge", state)
        queue = (await self._queues.look([name])).get(name)
        if queue is None:
            return 0
        if state is not State.READY:
            place = names.SCHEDULED if state is State.SCHEDULED else names.DEAD
            return await self._api.purge(queue.stream, filter=queue.there.filter(place))
        [stats] = await self._looking.stats([name])
        lanes = [Lane(name, level, 0) for level in LEVELS]
        purged = looks = 0
        while purged < stats.ready and looks < _LOOKS:
            # One look that finds nothing proves nothing, as when a leader is just being elected.
            taken = await self._receiver.receive(lanes, min(_BATCH, stats.ready - purged), _LOOK if looks else 0)
            if not taken:
                looks += 1
                [now] = await self._looking.stats([name])
                if not now.ready:
                    break
                continue
            looks = 0
            refused = await self._settling.settle([Ack(delivery) for delivery in taken])
            purged += len(taken) - sum(not isinstance(refusal.error, SettleUnknown) for refusal in refused)
        return purged


class _Paused(msgspec.Struct):
    paused: bool = False


def refuse_leased(verb: str, state: State) -> None:
    """Raise `UnsupportedCapability` for what is not ours to touch."""
    if state is State.LEASED:
        raise UnsupportedCapability(f"The NATS broker cannot {verb} leased messages: they belong to their workers until settled.")
