"""Ghosts: what the consumers of a server of an old version wait for or have behind them, and is not so, after it was killed.

A server writes down at different moments what is in a stream and where its consumers are. Killed, it may come back with

- deliveries of messages that are gone. Each pull has one of them tried again, finds nothing, and waits; and all of them are
  tried once more when their lease is over. A dozen make an idle worker deaf. They are acked: a sequence that is gone is nobody's.
- messages that a consumer has behind it and does not wait for: those that were acked, and are back; or, where the stream was empty
  and counts from one again, all that is stored from now on. Nobody would ever get them. The consumer is made anew once it waits for no
  ack, so that nobody's lease ends.

Whoever has nothing to do looks for both, soon after each connection.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from crossdock_nats import names, record
from crossdock_nats.api import Api, ConsumerInfo, Problem, StreamState
from crossdock_nats.link import Link
from crossdock_nats.queues import Level, Queues

_WINDOW: Final = 1000
"""Acks in one write."""
_FIRST: Final = 2.0
"""Seconds to the first look, at most, so that not all who have just connected look at once."""
_AGAIN: Final = 5.0
"""Seconds to the second look at a level of which something is leased; twice as long to each further one, since it costs the server some
time for each message in the stream."""
_STAGGER: Final = 0.2
"""Seconds, at most, by which Brokers make a consumer anew one after the other, so that mostly one of them does."""


class _Look(NamedTuple):
    at: float
    """Seconds of the clock."""
    pause: float = _AGAIN


class Ghosts:
    """Looks for ghosts, for one Broker while it is open.

    Args:
        link: The connection.
        api: JetStream on it.
        queues: Knows the server's version, and makes consumers.
        monotonic: The clock.
    """

    def __init__(self, link: Link, api: Api, queues: Queues, monotonic: Callable[[], float]) -> None:
        self._link = link
        self._api = api
        self._queues = queues
        self._monotonic = monotonic
        self._next: dict[bytes, _Look] = {}
        """When to look again at a consumer."""

    def forget(self) -> None:
        """The server was away: there may be new ones."""
        self._next.clear()

    async def lay(self, levels: Iterable[Level]) -> bool:
        """Free these levels of ghosts; says whether there were any. Raises `BrokerUnavailable`."""
        if not self._queues.features.leaves_ghosts:
            return False
        now = self._monotonic()
        due: list[Level] = []
        for level in levels:
            look = self._next.get(level.consumer)
            if look is None:
                self._next[level.consumer] = _Look(now + random.uniform(0, _FIRST))  # no secret
            elif look.at <= now:
                due.append(level)
                self._next[level.consumer] = _Look(now + look.pause, 2 * look.pause)
        if not due:
            return False
        infos = await self._infos(due)
        states = await self._states(due, deleted=any(info.num_ack_pending for info in infos.values()))
        ghosts = {level: _ghosts(level, info, states[level]) for level, info in infos.items() if level in states}
        haunted = [level for level, subjects in ghosts.items() if subjects]
        if haunted:
            await self._ack([subject for level in haunted for subject in ghosts[level]])
            infos |= await self._infos(haunted)
        stuck = await self._stuck(infos, states)
        if stuck:
            await asyncio.sleep(random.uniform(0, _STAGGER))  # no secret
            for level in await self._stuck(await self._infos(stuck), await self._states(stuck)):
                await self._api.delete_consumer(level.stream, level.consumer.decode())
                level.ready = False
        return bool(haunted or stuck)

    async def _infos(self, levels: Sequence[Level]) -> dict[Level, ConsumerInfo]:
        infos = await self._api.consumer_infos([(level.stream, level.consumer.decode()) for level in levels])
        return {level: info for level, info in zip(levels, infos, strict=True) if not isinstance(info, Problem)}

    async def _ack(self, subjects: Sequence[bytes]) -> None:
        for start in range(0, len(subjects), _WINDOW):
            reply = self._link.reply_to()
            some = subjects[start : start + _WINDOW]
            frames = [record.plain(subject, b"%s.%d" % (reply, index), b"+ACK") for index, subject in enumerate(some)]
            await self._link.exchange(reply, frames)

    async def _states(self, levels: Sequence[Level], *, deleted: bool = False) -> dict[Level, StreamState]:
        """What is in the streams of these levels. To be read after what their consumers say: a stream only grows."""
        states = await self._api.states(list(dict.fromkeys(level.stream for level in levels)), deleted=deleted)
        return {level: states[level.stream] for level in levels if level.stream in states}

    async def _stuck(self, infos: Mapping[Level, ConsumerInfo], states: Mapping[Level, StreamState]) -> list[Level]:
        """Those of these levels at which something lies that is behind their consumer, and is no delivery."""
        found: list[Level] = []
        for level, info in infos.items():
            delivered = info.delivered.stream_seq
            if level not in states:
                continue
            if delivered > states[level].last_seq:
                found.append(level)
            elif not info.num_ack_pending:
                first = {"seq": 1, "next_by_subj": level.subjects.filter(b"%d" % level.priority)}
                [stored] = await self._api.get(level.stream, [first], exact=level.queue.replicas > 1)
                if stored is not None and stored.seq <= delivered:
                    found.append(level)
                else:
                    self._next[level.consumer] = _Look(math.inf)
        return found


def _ghosts(level: Level, info: ConsumerInfo, state: StreamState) -> list[bytes]:
    """Where to ack what a level may wait for in vain."""
    if not info.num_ack_pending:
        return []
    first, last = info.ack_floor.stream_seq, info.delivered.stream_seq
    return [names.ack(level.stream, level.consumer, seq) for seq in state.deleted or () if first < seq <= last]
