"""Letters: what has to be looked after where messages are dead, which is to count them and to keep no more than was asked for."""

from __future__ import annotations

from crossdock.errors import BrokerError
from crossdock_nats import names, record
from crossdock_nats.api import Api
from crossdock_nats.queues import Queue, Queues
from crossdock_nats.servertime import ServerTime


class Letters:
    """Dead letters of all queues.

    Args:
        api: JetStream.
        queues: Their streams and consumers.
        time: The server's time.
    """

    def __init__(self, api: Api, queues: Queues, time: ServerTime) -> None:
        self._api = api
        self._queues = queues
        self._time = time

    async def stored(self, queue: Queue) -> None:
        """A letter was stored in this queue."""
        try:
            await self._queues.counter(queue, names.DEAD)
            await self.retain(queue)
        except BrokerError:  # the letter is safe, and the next look does it
            return

    async def retain(self, queue: Queue) -> None:
        """Drop the oldest letters, as far as the queue's settings say so. Raises `BrokerUnavailable`."""
        spec, subjects = queue.spec, queue.subjects
        if subjects is None or (spec.dead_max_count is None and spec.dead_max_age is None):
            return
        if spec.dead_max_count is not None and spec.dead_max_age is None and subjects.keyed:
            # 0 is none at all for us, and no limit for the server.
            which = {"keep": spec.dead_max_count} if spec.dead_max_count else {}
            if spec.dead_max_count < 2**63:
                await self._api.purge(queue.stream, filter=subjects.filter(names.DEAD), **which)
            return
        index = await self.index(queue, names.DEAD)
        beyond = len(index) - spec.dead_max_count if spec.dead_max_count is not None else 0
        oldest_ms = self._time.now_ms() - spec.dead_max_age * 1000 if spec.dead_max_age is not None else 0
        over = [subject for place, (died_ms, _, subject) in enumerate(index) if place < beyond or died_ms < oldest_ms]
        # By sequence: servers below 2.10 miscount after a purge of one subject.
        found = await self._api.get(queue.stream, [{"last_by_subj": subject} for subject in over], exact=queue.replicas > 1)
        await self._api.delete(queue.stream, [stored.seq for stored in found if stored is not None])

    async def index(self, queue: Queue, place: bytes) -> list[tuple[int, str, str]]:
        """All that is SCHEDULED or DEAD in a queue, in order: when it is due or died, in milliseconds; id; subject."""
        subjects = queue.there
        found = await self._api.subjects(queue.stream, subjects.filter(place))
        if subjects.keyed:
            entries = [(read.key, read.id, subject) for subject in found for read in [subjects.read(subject.encode())]]
        else:  # the time is in the message
            got = await self._api.get(queue.stream, [{"last_by_subj": subject} for subject in found], exact=queue.replicas > 1)
            entries = [
                (_when(stored.headers, stored.data), subjects.read(stored.subject).id, stored.subject.decode())
                for stored in got
                if stored
            ]
        return sorted(entries)


def _when(headers: bytes, data: bytes) -> int:

    return record.number(headers, b"cd-due") or record.died_ms(headers, data)
