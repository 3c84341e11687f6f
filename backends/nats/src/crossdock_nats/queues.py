"""Queues: which streams and consumers there are, as far as this Broker knows, and how they come into being.

Nothing is asked twice: what was learned holds until the server answers that it is not so any more, a Broker tells the others that it
changed something (a note), or the connection was away. A queue that we declared and that is gone without a note was lost: it is declared
again, and reported.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from crossdock.errors import BrokerUnavailable
from crossdock.spi import LEVELS, BrokerEvent, Priority, QueueSpec, StateLost
from crossdock_nats import names, topology
from crossdock_nats.address import Address
from crossdock_nats.api import STREAM_EXISTS, STREAM_MISSING, Api, ConsumerInfo, Problem, StreamInfo, moment
from crossdock_nats.limits import is_name
from crossdock_nats.link import Link
from crossdock_nats.names import Subjects
from crossdock_nats.receipt import Receipt
from crossdock_nats.servertime import ServerTime

_ATTEMPTS: Final = 8
_PAUSE: Final = 0.02


FINAL: Final = {
    10023: "There is no space left for it",
    10047: "There is no space left for it",
    10002: "The account's storage is used up",
    10026: "The stream may have no more consumers",
    10027: "The account may have no more streams",
    10028: "There is no memory left for it",
    10074: "Replicas need a cluster; leave replicas=1",
    10005: "Not enough servers for that many replicas",
    10039: "JetStream is not enabled for this account",
    10076: "JetStream is not enabled on this server: start it with -js",
}
"""What does not change by trying again, and what to say of it."""


class Vanished(BrokerUnavailable):
    """A queue was erased between two requests about it; asked again, it is not there, or it is a new one."""


class Level:
    """One level of a queue in one life: what messages are taken by."""

    __slots__ = (
        "consumer",
        "empty",
        "empty_until",
        "end",
        "out",
        "pending",
        "priority",
        "pull",
        "queue",
        "ready",
        "start",
        "stream",
        "subjects",
        "turn",
    )

    def __init__(self, queue: Queue, subjects: Subjects, priority: Priority, prefix: str) -> None:
        self.queue = queue
        self.priority = priority
        self.stream = queue.stream
        self.consumer = subjects.consumer(priority).encode()
        self.pull = f"{prefix}CONSUMER.MSG.NEXT.{queue.stream}.".encode() + self.consumer
        """The subject on which messages are asked for."""
        first = subjects.level(priority, "")
        self.end = len(b".r") if subjects.keyed else 0
        self.start = len(first) - self.end
        self.subjects = subjects
        self.ready = False
        """Whether its consumer is known to be there."""
        self.pending = 0
        """How many waited there when it was asked last; -1 = it was not asked."""
        self.turn = 0
        """The number that the consumer gave to its last delivery to us: it goes back only where the server forgot something."""
        self.empty = False
        """Whether it had nothing when it was asked last."""
        self.empty_until = 0.0
        """Until when it passes for empty, because a pull that stood there brought nothing a moment ago."""
        self.out: dict[int, Receipt] = {}
        """Deliveries that were returned and have not ended, by sequence."""

    def subject(self, id: str) -> bytes:
        """Where a message of the level is."""
        return self.subjects.level(self.priority, id)


class Queue:
    """What is known of a queue."""

    __slots__ = ("counters", "keyed", "levels", "name", "replicas", "spec", "stale", "stream", "subjects", "unexplained")

    def __init__(self, namespace: str, name: str) -> None:
        self.name = name
        self.stream = names.stream(namespace, name)
        self.spec = QueueSpec(name)
        self.subjects: Subjects | None = None
        """None = there is no such stream."""
        self.levels: dict[int, Level] = {}
        self.counters: set[bytes] = set()
        """The places of which the server counts the messages, besides the levels."""
        self.unexplained = 0
        """How many messages of the stream were in no count lately, however long we waited."""
        self.replicas = 1
        self.keyed = True
        self.stale = True
        """Ask before the next use."""

    @property
    def there(self) -> Subjects:
        """Its subjects. Raises `Vanished` if the queue was erased since it was looked at."""
        if self.subjects is None:
            raise Vanished(f"Queue {self.name!r} was erased just now.")
        return self.subjects


class _Note(msgspec.Struct, omit_defaults=True):
    sender: str
    queue: str
    erased: bool = False
    lease: float = 0.0
    """The lease that holds from now on, where it changed; 0 = it did not."""


class Queues:
    """The queues of a namespace.

    Args:
        link: The connection.
        api: JetStream on it.
        namespace: Whose queues.
        address: Says how streams are to be kept.
        time: Learns the server's time from its answers.
        report: Told what was lost.
        changed: Called when something may have come into being, or gone.
    """

    def __init__(
        self,
        link: Link,
        api: Api,
        namespace: str,
        address: Address,
        time: ServerTime,
        report: Callable[[BrokerEvent], None],
        changed: Callable[[], None],
    ) -> None:
        self._link = link
        self._api = api
        self._namespace = namespace
        self._address = address
        self._time = time
        self._report = report
        self._changed = changed
        self._queues: dict[str, Queue] = {}
        self._declared: dict[str, QueueSpec] = {}
        self._lock = asyncio.Lock()
        self._me = secrets.token_hex(6)
        self.features = topology.Features(topology.OLDEST)
        self.by_consumer: dict[bytes, Level] = {}
        """Every level that something may come from."""
        self.shortened: Callable[[Queue], None] = lambda queue: None
        """Called when a queue's lease became shorter: who holds deliveries keeps what it was promised."""
        self.ask_time: Callable[[], Awaitable[None]] = _nothing
        """Learns the server's time where answers do not tell it (below 2.10)."""
        link.subscribe(names.notes(namespace), self._on_note)

    # --- what is known ---

    def known(self, name: str) -> Queue | None:
        """A queue whose stream is there, as far as we know; None = ask."""
        queue = self._queues.get(name)
        return queue if queue is not None and queue.subjects is not None and not queue.stale else None

    def doubt(self, names: Iterable[str] | None = None) -> None:
        """Ask again before the next use of these queues, or of all."""
        for name in list(self._queues) if names is None else names:
            if (queue := self._queues.get(name)) is not None:
                queue.stale = True

    @property
    def declared(self) -> Collection[str]:
        """The queues that were declared here."""
        return self._declared.keys()

    async def look(self, names: Iterable[str]) -> dict[str, Queue]:
        """Those of these queues that exist.

        Raises:
            BrokerUnavailable: JetStream does not answer.
        """
        wanted = list(dict.fromkeys(names))
        doubtful = [name for name in wanted if self.known(name) is None]
        if doubtful:
            async with self._alone():
                await self._learn([name for name in doubtful if self.known(name) is None])
        return {name: queue for name in wanted if (queue := self.known(name)) is not None}

    async def ensure(self, names: Iterable[str]) -> dict[str, Queue]:
        """These queues, made where they do not exist.

        Raises:
            BrokerUnavailable: JetStream does not answer, or will not make a stream.
        """
        wanted = list(dict.fromkeys(names))
        found = {name: queue for name in wanted if (queue := self.known(name)) is not None}
        if len(found) < len(wanted):
            async with self._alone():
                missing = [name for name in wanted if self.known(name) is None]
                await self._learn(missing)
                await self._make([QueueSpec(name) for name in missing if self.known(name) is None])
            found = {name: queue for name in wanted if (queue := self.known(name)) is not None}
        return found

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[None]:
        """One at a time learns and makes; whoever waits for that too long is told that there is no connection, as that one is."""
        await self._link.ready()
        try:
            async with asyncio.timeout(self._address.timeout):
                await self._lock.acquire()
        except TimeoutError as error:
            raise BrokerUnavailable(f"The NATS server at {self._address.shown} gives no answers.") from error
        try:
            yield
        finally:
            self._lock.release()

    async def tell_time(self, queue: Queue) -> None:
        """Learn the server's time anew, from an answer about this queue or, where that does not tell it, by other means."""
        began = self._time.begin()
        [info] = await self._api.streams([queue.stream])
        if isinstance(info, StreamInfo) and info.ts:
            self._time.heard(moment(info.ts), began)
        else:
            await self.ask_time()

    async def all_names(self) -> list[str]:
        """Every queue of the namespace."""
        streams = await self._api.stream_names(f"cd.{self._namespace}.>")
        return sorted(name for stream in streams if (name := names.queue_of(self._namespace, stream)) is not None)

    # --- declarations ---

    async def declare(self, specs: Sequence[QueueSpec]) -> None:
        """Make queues as they are declared, or change them.

        Raises:
            BrokerUnavailable: JetStream does not answer, or refuses.
        """
        latest = {spec.name: spec for spec in specs}
        async with self._alone():
            self.doubt(latest)
            await self._learn(list(latest))
            await self._make([spec for name, spec in latest.items() if self.known(name) is None])
            changed = [spec for name, spec in latest.items() if self._queues[name].spec != spec]
            if changed:
                await self._change(changed)
            self._declared.update(latest)

    async def _change(self, specs: Sequence[QueueSpec]) -> None:
        pairs = [(self._queues[spec.name], spec) for spec in specs]
        infos = await self._api.streams([queue.stream for queue, _ in pairs])
        # A longer lease is granted before it is announced: should we die in between, nobody reckons with more than the server grants.
        await self._set_leases([(queue, spec.lease) for queue, spec in pairs if spec.lease > queue.spec.lease])
        updates: list[tuple[str, object]] = []
        for (queue, spec), info in zip(pairs, infos, strict=True):
            if isinstance(info, StreamInfo):
                updates.append((f"STREAM.UPDATE.{queue.stream}", {**info.config, "description": topology.write_spec(spec)}))
        for answer in await self._api.ask(updates, StreamInfo):
            if isinstance(answer, Problem):
                raise BrokerUnavailable(f"The NATS server does not change a queue's settings. {explain(answer)}")
        changed: list[tuple[Queue, float]] = []
        for queue, spec in pairs:
            if spec.lease != queue.spec.lease:
                changed.append((queue, spec.lease))
            self._set_spec(queue, spec)
            self._tell(queue.name, lease=spec.lease)  # before it holds: whoever was promised more sees to it
        await self._set_leases(changed)  # again: others may have made consumers meanwhile, see `_make_levels`

    async def _set_leases(self, leases: Sequence[tuple[Queue, float]]) -> None:
        """Have the consumers that are there grant a lease of so many seconds."""
        there = await self._api.consumer_names([queue.stream for queue, _ in leases])
        await self._api.create_consumers(
            [
                (level.stream, topology.level_consumer(level.subjects, level.priority, lease))
                for queue, lease in leases
                for level in queue.levels.values()
                if level.consumer.decode() in there[level.stream]
            ]
        )

    async def levels(self, wanted: Sequence[tuple[Queue, Priority]]) -> None:
        """See to it that the consumers of these levels are there. Raises `BrokerUnavailable`."""
        levels = [queue.levels[level] for queue, level in wanted if not queue.levels[level].ready]
        if not levels:
            return
        # Making one that is there would do no harm, but is work for the server, most of all on 2.9, and many may ask at the same time.
        there = await self._api.consumer_names([level.stream for level in levels])
        for level in levels:
            level.ready = level.consumer.decode() in there[level.stream]
        failed = await self._make_levels([level for level in levels if not level.ready])
        if failed:  # mostly because the queue is just being erased
            for level, _ in failed:
                level.queue.stale = True
            await self.look(level.queue.name for level, _ in failed)
            for level, problem in failed:
                if _is_known(level):
                    raise BrokerUnavailable(f"The NATS server makes no consumer for queue {level.queue.name!r}. {explain(problem)}")

    async def _make_levels(self, levels: Sequence[Level]) -> list[tuple[Level, Problem]]:
        """Make consumers; returns those that cannot be made."""
        failed: list[tuple[Level, Problem]] = []
        while levels:
            leases = {level: level.queue.spec.lease for level in levels}
            answers = await self._api.create_consumers(
                [(level.stream, topology.level_consumer(level.subjects, level.priority, lease)) for level, lease in leases.items()]
            )
            for level, answer in zip(leases, answers, strict=True):
                if isinstance(answer, Problem):
                    failed.append((level, answer))
                else:
                    level.ready = True
            # Whoever changes the lease tells the consumers that it finds afterwards. Ours came later, or we see the new lease now.
            made = [level for level in leases if level.ready]
            for level in made:
                level.queue.stale = True
            await self.look(level.queue.name for level in made)
            levels = [level for level in made if level.ready and level.queue.spec.lease != leases[level] and _is_known(level)]
        return failed

    async def counter(self, queue: Queue, place: bytes) -> None:
        """See to it that the server counts the queue's SCHEDULED or DEAD messages."""
        if place not in queue.counters:
            [answer] = await self._api.create_consumers([(queue.stream, topology.counter(queue.there, place))])
            if isinstance(answer, ConsumerInfo):
                queue.counters.add(place)

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear."""
        async with self._alone():
            wanted = [name for name in dict.fromkeys(queues) if is_name(name)]
            requests: list[tuple[str, object]] = [(f"STREAM.DELETE.{names.stream(self._namespace, name)}", None) for name in wanted]
            for name in wanted:
                self._gone(name)
                self._tell(name, erased=True)  # so that who finds it gone knows why
            for answer in await self._api.ask(requests, _Anything):
                if isinstance(answer, Problem) and answer.err_code != STREAM_MISSING:
                    raise BrokerUnavailable(f"The NATS server does not delete a stream. {explain(answer)}")
            for name in wanted:
                self._gone(name)
                self._tell(name, erased=True)

    # --- learning and making ---

    async def _learn(self, wanted: Sequence[str]) -> None:
        for name in wanted:
            self._queues.setdefault(name, Queue(self._namespace, name))
        asked = [name for name in wanted if is_name(name)]
        began = self._time.begin()
        lost: list[str] = []
        for name, info in zip(asked, await self._api.streams([self._queues[name].stream for name in asked]), strict=True):
            queue = self._queues[name]
            if isinstance(info, Problem):
                if info.err_code != STREAM_MISSING:
                    raise BrokerUnavailable(explain(info))
                if queue.subjects is not None or name in self._declared:
                    lost.append(name)
                self._bind(queue, None, keyed=True)
            else:
                if info.ts and len(asked) <= 8:
                    self._time.heard(moment(info.ts), began)
                self._adopt(queue, info)
        if lost:
            declared = [self._declared[name] for name in lost if name in self._declared]
            await self._make(declared)
            self._report(StateLost(f"{len(lost)} queues that were there, with all that was in them: {', '.join(lost)[:200]}"))

    def _adopt(self, queue: Queue, info: StreamInfo) -> None:
        subjects = info.config.get("subjects") or [""]
        told = Subjects.read_life(subjects[0])
        if told is None:
            raise BrokerUnavailable(
                f"The stream {queue.stream} was not made by crossdock, and is where queue {queue.name!r} should be."
            )
        life, keyed = told
        if queue.subjects is None or queue.subjects.life != life:
            self._bind(queue, Subjects(self._namespace, queue.name, life, keyed=keyed), keyed=keyed)
        self._set_spec(queue, topology.read_spec(queue.name, info.config.get("description", "")))
        queue.replicas = info.config.get("num_replicas", 1)
        queue.stale = False

    def _set_spec(self, queue: Queue, spec: QueueSpec) -> None:
        before, queue.spec = queue.spec.lease, spec
        if spec.lease < before:
            self.shortened(queue)

    def _bind(self, queue: Queue, subjects: Subjects | None, *, keyed: bool) -> None:
        for level in queue.levels.values():
            self.by_consumer.pop(level.consumer, None)
        queue.subjects, queue.keyed, queue.counters, queue.unexplained = subjects, keyed, set(), 0
        queue.levels = {}
        if subjects is None:
            queue.spec, queue.stale = QueueSpec(queue.name), True
            return
        for priority in LEVELS:
            level = Level(queue, subjects, priority, self._api.prefix)
            queue.levels[priority] = level
            self.by_consumer[level.consumer] = level

    async def _make(self, specs: Sequence[QueueSpec]) -> None:
        for attempt in range(_ATTEMPTS):
            if not specs:
                return
            if attempt:
                await asyncio.sleep(_PAUSE)
            requests: list[tuple[str, object]] = []
            for spec in specs:
                subjects = Subjects(self._namespace, spec.name, names.new_life(), keyed=self.features.schedules)
                config = topology.queue_stream(self._namespace, spec, subjects, self._address)
                requests.append((f"STREAM.CREATE.{config['name']}", config))
            again: list[QueueSpec] = []
            made: list[Queue] = []
            for spec, answer in zip(specs, await self._api.ask(requests, StreamInfo), strict=True):
                if isinstance(answer, StreamInfo):
                    self._adopt(self._queues[spec.name], answer)
                    made.append(self._queues[spec.name])
                    self._tell(spec.name)
                elif answer.err_code != STREAM_EXISTS and (
                    answer.err_code in FINAL or attempt == _ATTEMPTS - 1 or not answer.err_code
                ):
                    raise BrokerUnavailable(f"The NATS server makes no stream for queue {spec.name!r}. {explain(answer)}")
                else:  # another Broker makes it, or erases it just now
                    again.append(spec)
            if (
                made and self.features.dear_consumers
            ):  # while there is nothing in the stream; else many would make them at the same time
                levels = [level for queue in made for level in queue.levels.values()]
                await self._api.create_consumers(
                    [(each.stream, topology.level_consumer(each.subjects, each.priority, each.queue.spec.lease)) for each in levels]
                )
            for spec, info in zip(again, await self._api.streams([self._queues[spec.name].stream for spec in again]), strict=True):
                if isinstance(info, StreamInfo):
                    self._adopt(self._queues[spec.name], info)
            specs = [spec for spec in again if self.known(spec.name) is None]
        raise BrokerUnavailable(f"Queue {specs[0].name!r} is made and erased again and again; try later.")

    # --- notes ---

    def _tell(self, queue: str, *, erased: bool = False, lease: float = 0.0) -> None:
        body = msgspec.json.encode(_Note(self._me, queue, erased, lease))
        if self._link.wire is not None:
            self._link.wire.write(b"PUB %s %d\r\n%s\r\n" % (names.notes(self._namespace), len(body), body))

    def _on_note(self, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        try:
            note = msgspec.json.decode(data, type=_Note)
        except msgspec.DecodeError:
            return
        if note.sender != self._me:
            queue = self._queues.get(note.queue)
            if note.erased:
                self._gone(note.queue)
            elif queue is not None:
                queue.stale = True
                if note.lease:
                    self._set_spec(queue, msgspec.structs.replace(queue.spec, lease=note.lease))
            self._changed()

    def _gone(self, name: str) -> None:
        self._declared.pop(name, None)
        if (queue := self._queues.get(name)) is not None:
            self._bind(queue, None, keyed=True)


def _is_known(level: Level) -> bool:
    """Whether its queue still has it, which was not erased."""
    return level.queue.levels.get(level.priority) is level


async def _nothing() -> None:
    """Do nothing."""


class _Anything(msgspec.Struct):
    pass


def explain(problem: Problem) -> str:
    """A problem as a sentence, with what to do."""
    if problem.code == 503 and not problem.err_code:
        return "JetStream does not answer: it is not enabled on this NATS server, starts just now, or its cluster has no quorum."
    if problem.code == 403:
        return f"The NATS user lacks a permission: {problem.description}."
    hint = FINAL.get(problem.err_code)
    return f"{hint} (the server says: {problem.description})." if hint else f"The server says: {problem.description}."
