"""The asynchronous face of the Redis backend."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from crossdock.errors import BrokerClosed, BrokerError, BrokerUnavailable, CrossdockError, EnqueueFailed, UnsupportedCapability
from crossdock.spi import (
    Blocked,
    Broker,
    BrokerSettings,
    ClockSkew,
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
    StateLost,
    Unblocked,
)
from crossdock_redis import address, facts, keys, scripts
from crossdock_redis.desk import Receipt, group_by_batch, lease_lost
from crossdock_redis.incoming import Incoming, Item
from crossdock_redis.limits import BATCH
from crossdock_redis.link import LinkBroken
from crossdock_redis.repairs import Repairs, no_letter
from crossdock_redis.route import Route, Surroundings
from crossdock_redis.servers import behind
from crossdock_redis.servertime import ServerTime
from crossdock_redis.spread import receive_from_many

_WATCH: Final = 5.0
"""Seconds between two looks whether the server still has what was declared: it can lose that without losing a connection (FLUSHALL)."""
_SKEW: Final = 1.0
"""Seconds by which two clocks may differ before it is told."""


class RedisBroker(Broker):
    """A Broker on Redis or Valkey.

    Args:
        settings: `url` and `options` as `address.parse` reads them.

    Raises:
        ConfigurationError: The URL cannot be used, or has an unknown option.
    """

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self._address = address.parse(settings.url, settings.options)
        self._namespace = settings.namespace
        self._clock = settings.clock
        self._servers = behind(self._address)
        self._time = ServerTime(settings.clock)
        self._prefixes: dict[str, str] = {}
        self._declared: dict[str, QueueSpec] = {}
        self._routes: dict[str, Route] = {}
        self._opening: asyncio.Future[None] | None = None
        self._open = False
        self._connected = False
        self._why_down = ""
        self._blocked: str | None = None
        self._jobs: set[asyncio.Task[None]] = set()
        self._restoring = asyncio.Lock()

    # --- life ---

    async def open(self) -> None:
        while self._opening is not None:
            await asyncio.wait([self._opening])
        if self._open:
            return
        opening = self._opening = asyncio.get_running_loop().create_future()
        try:
            told, *others = await self._first_contact()
            for each in (told, *others):
                facts.check(each, self._address)
            self.capabilities = facts.capabilities(told, self._address, others)
            self._time.heard(told.clock_ms)
            self._repairs = Repairs(self._namespace, self._prefix, self._time)
            self._incoming = Incoming(
                prefix_of=self._prefix,
                register=self._register_unknown,
                timeout=self._address.timeout,
                time=self._time,
                unavailable=self._unavailable,
                blocked=self._note_blocked,
            )
            self._open = self._connected = True
            if self._declared:
                self._do(self._watch())
            self._settings.report(Connected())
            self._note_blocked(next(filter(None, (facts.obstacle(each, self._address) for each in (told, *others))), None))
            if abs(told.skew) > _SKEW:
                self._settings.report(ClockSkew(told.skew))
        finally:
            opening.set_result(None)
            self._opening = None

    async def _first_contact(self) -> Sequence[facts.Facts]:
        """What the servers tell of themselves, first the one that has the registry."""
        try:
            links = await self._servers.links(self._home)
            try:
                async with asyncio.timeout(self._address.timeout):
                    return await asyncio.gather(*map(facts.ask, links))
            finally:
                for link in links:
                    link.close()
        except (LinkBroken, TimeoutError) as error:
            await self._servers.close()
            raise self._unavailable(str(error) or "no answer came in time") from error

    async def close(self) -> None:
        while self._opening is not None:
            await asyncio.wait([self._opening])
        self._open = False
        jobs = list(self._jobs)
        for job in jobs:
            job.cancel()
        if jobs:
            await asyncio.wait(jobs)
        await asyncio.gather(*(route.close() for route in self._routes.values()))
        self._routes.clear()
        await self._servers.close()

    def _check_open(self) -> None:
        if not self._open:
            raise BrokerClosed("The Redis broker is not open: it was closed, or open() was not called yet.")

    # --- the way to a queue ---

    @property
    def _home(self) -> str:
        return keys.registry(self._namespace)

    def _prefix(self, queue: str) -> str:
        prefix = self._prefixes.get(queue)
        if prefix is None:
            prefix = self._prefixes[queue] = keys.prefix(self._namespace, queue)
        return prefix

    def _route(self, key: str) -> Route:
        """The route to a key: one for all, or one each where queues are spread over servers."""
        self._check_open()
        name = key if self._servers.spread else ""
        route = self._routes.get(name)
        if route is None:
            around = Surroundings(
                self._servers, self._prefix, self._clock, self._time, self._note_up, self._note_down, self._unavailable
            )
            route = self._routes[name] = Route(key, around)
        return route

    def _route_of(self, queue: str) -> Route:
        return self._route(self._prefix(queue))

    def _by_route(self, queues: Sequence[str]) -> Mapping[Route, list[str]]:
        routes: dict[Route, list[str]] = {}
        for queue in queues:
            routes.setdefault(self._route_of(queue), []).append(queue)
        return routes

    # --- what happens to the connection ---

    def _unavailable(self, reason: str) -> BrokerError:
        if self._opening is None and not self._open:
            return BrokerClosed("The Redis broker was closed before the server had answered.")
        if self._why_down and self._why_down not in reason:
            reason += f" ({self._why_down})"
        return BrokerUnavailable(f"{self._address.shown} cannot be used: {reason}.")

    def _note_down(self, reason: str) -> None:
        self._why_down = reason
        if self._connected:
            self._connected = False
            self._settings.report(Disconnected(reason))

    def _note_up(self) -> None:
        self._why_down = ""
        if not self._connected and self._open:
            self._connected = True
            self._settings.report(Connected())
            self._do(self._restore())

    def _note_blocked(self, reason: str | None) -> None:
        if reason is not None and self._blocked is None:
            self._settings.report(Blocked(reason))
        elif reason is None and self._blocked is not None:
            self._settings.report(Unblocked())
        self._blocked = reason

    def _do(self, job: Any) -> None:
        task = asyncio.get_running_loop().create_task(job, name="crossdock-redis-job")
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _restore(self) -> None:
        """Should the server have lost what was declared, declare it again, and say so."""
        with contextlib.suppress(BrokerUnavailable, BrokerClosed):
            async with self._restoring:
                await self._declare_what_is_lost()

    async def _declare_what_is_lost(self) -> None:
        lost: list[str] = []
        for route, queues in self._by_route(list(self._declared)).items():
            lost += await self._repairs.missing(route, queues)
        if lost:
            await self.declare([self._declared[queue] for queue in lost])
            self._settings.report(StateLost(f"the server had lost the queues {', '.join(sorted(lost))}, with all that was in them"))

    async def _register(self, queues: Sequence[str]) -> None:
        await self._repairs.register(self._route(self._home), queues)

    async def _register_unknown(self, queues: Sequence[str]) -> None:
        """Queues that the server does not know: they are new, or it has lost them."""
        await self._register(queues)
        if not self._declared.keys().isdisjoint(queues):
            async with self._restoring:
                await self._declare_what_is_lost()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH)
            await self._restore()

    # --- declare, enqueue ---

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        self._check_open()
        if not queues:
            return
        specs = {spec.name: spec for spec in queues}
        await self._register(list(specs))
        for route, names in self._by_route(list(specs)).items():
            await self._repairs.declare(route, [specs[name] for name in names])
        if not self._declared:
            self._do(self._watch())
        self._declared.update(specs)

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        self._check_open()
        if not messages:
            return []
        if not self._servers.spread:
            return await self._incoming.enqueue(self._route("").incoming, list(enumerate(messages)))
        routes: dict[Route, list[Item]] = defaultdict(list)
        for item in enumerate(messages):
            routes[self._route_of(item[1].queue)].append(item)
        return await self._incoming_by_route(routes)

    async def _incoming_by_route(self, routes: Mapping[Route, list[Item]]) -> list[Refusal]:
        message_at = {index: message for items in routes.values() for index, message in items}

        def refused(index: int, error: BrokerError) -> CrossdockError:
            message = message_at[index]
            return EnqueueFailed(f"Message {message.id!r} was not stored: {error}", message)

        return await _each(
            {tuple(index for index, _ in items): self._incoming.enqueue(route.incoming, items) for route, items in routes.items()},
            refused,
        )

    # --- deliveries ---

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        if self._servers.spread:
            routes: dict[Route, list[Lane]] = {}
            for lane in lanes:
                routes.setdefault(self._route_of(lane.queue), []).append(lane)
            if len(routes) != 1:
                return await receive_from_many(routes, lanes, limit, wait, self._clock, self._prefix)
            [route] = routes
        else:
            route = self._route("")
        deadline = self._clock.monotonic() + wait
        deliveries, pause = await route.desk.look(lanes, limit)
        while not deliveries and (left := deadline - self._clock.monotonic()) > 0:
            deliveries, pause = await route.parked.look(lanes, limit, left, pause)
        return deliveries

    async def extend(self, deliveries: Sequence[Delivery]) -> Sequence[Refusal]:
        self._check_open()
        refusals: list[Refusal] = []
        routes = self._mine(deliveries, refusals)
        extensions = {tuple(indexes): self._extend(route, deliveries, indexes) for route, indexes in routes.items()}
        return refusals + await _each(extensions, lambda index, error: error)

    async def _extend(self, route: Route, deliveries: Sequence[Delivery], indexes: Sequence[int]) -> list[Refusal]:
        refusals: list[Refusal] = []
        for first in range(0, len(indexes), BATCH):
            refusals += await self._extend_batch(route, deliveries, indexes[first : first + BATCH])
        return refusals

    async def _extend_batch(self, route: Route, deliveries: Sequence[Delivery], indexes: Sequence[int]) -> list[Refusal]:
        queues: dict[str, int] = {}
        order: list[int] = []
        parts: list[str | int] = []
        for (queue, batch), group in group_by_batch(deliveries, indexes).items():
            parts += (
                queues.setdefault(queue, len(queues) + 1),
                batch,
                len(group),
                *(deliveries[index].message.id for index in group),
            )
            order += group
        command = ("EVALSHA", scripts.digest("extend"), len(queues), *map(self._prefix, queues), *parts)
        answers: list[list[int]] = await route.ask(lambda: [command])
        [refused] = answers
        return [Refusal(order[number], lease_lost(deliveries[order[number]])) for number in refused]

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        self._check_open()
        refusals: list[Refusal] = []
        routes = self._mine([settlement.delivery for settlement in settlements], refusals)
        if len(routes) == 1:
            [(route, indexes)] = routes.items()
            return refusals + list(await route.desk.settle(settlements, indexes))
        calls = {tuple(indexes): route.desk.settle(settlements, indexes) for route, indexes in routes.items()}
        return refusals + await _each(calls, lambda index, error: error)

    def _mine(self, deliveries: Sequence[Delivery], refusals: list[Refusal]) -> Mapping[Route, list[int]]:
        """Indexes of deliveries by route; those that this Broker did not make, since it was opened, are refused."""
        desks = {id(route.desk): route for route in self._routes.values()}
        routes: dict[Route, list[int]] = {}
        for index, delivery in enumerate(deliveries):
            receipt = delivery.receipt
            route = desks.get(id(receipt.desk)) if type(receipt) is Receipt else None
            if route is None:
                refusals.append(Refusal(index, lease_lost(delivery)))
            else:
                try:
                    routes[route].append(index)
                except KeyError:
                    routes[route] = [index]
        return routes

    # --- looking and repairing ---

    async def stats(self, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        self._check_open()
        names = await self._repairs.registered(self._route(self._home)) if queues is None else queues
        found: dict[str, QueueStats] = {}
        for route, some in self._by_route(list(dict.fromkeys(names))).items():
            found.update(await self._repairs.stats(route, some))
        if queues is None:
            return [found[name] for name in names if name in found]
        return [found.get(name) or QueueStats(name, 0, 0, 0, 0, 0.0, None, 0) for name in queues]

    async def peek(
        self, queue: str, state: State, *, ids: Sequence[str] = (), after: Cursor | None = None, limit: int = 100
    ) -> Page:
        self._check_open()
        return await self._repairs.peek(self._route_of(queue), queue, state, ids, after, limit)

    async def remove(self, queue: str, state: State, ids: Sequence[str]) -> Sequence[Refusal]:
        self._check_open()
        _refuse_leased("remove", state)
        return await self._repairs.remove(self._route_of(queue), queue, state, ids)

    async def replay(self, queue: str, replays: Sequence[Replay]) -> Sequence[Refusal]:
        self._check_open()
        targets: dict[str, list[tuple[int, Replay]]] = {}
        for index, replay in enumerate(replays):
            targets.setdefault(replay.message.queue, []).append((index, replay))
        refusals: list[Refusal] = []
        for target, some in targets.items():
            if target != queue:
                await self._register([target])
            source = self._route_of(queue)
            if source is self._route_of(target):
                refusals += await self._repairs.replay(source, queue, some, target)
            else:
                refusals += await self._replay_elsewhere(queue, some, target)
        return refusals

    async def _replay_elsewhere(self, queue: str, replays: Sequence[tuple[int, Replay]], target: str) -> list[Refusal]:
        """To another server: stored there first, then removed here."""
        page = await self._repairs.peek(self._route_of(queue), queue, State.DEAD, [replay.id for _, replay in replays], None, 1)
        there = {entry.message.id for entry in page.entries}
        refusals = [Refusal(index, no_letter(replay.id, queue)) for index, replay in replays if replay.id not in there]
        letters = {index: replay for index, replay in replays if replay.id in there}
        items = [(index, replay.message) for index, replay in letters.items()]
        not_stored = await self._incoming.enqueue(self._route_of(target).incoming, items, beyond_limit=True)
        for refusal in not_stored:
            del letters[refusal.index]
        await self._repairs.remove(self._route_of(queue), queue, State.DEAD, [replay.id for replay in letters.values()])
        return refusals + not_stored

    async def purge(self, queue: str, state: State) -> int:
        self._check_open()
        _refuse_leased("purge", state)
        return await self._repairs.purge(self._route_of(queue), queue, state)

    async def erase(self, queues: Sequence[str]) -> None:
        """Make queues disappear, with all that is in them; see `crossdock.spi.SupportsErase`."""
        self._check_open()
        for queue in queues:
            await self._repairs.erase(self._route_of(queue), queue)
            self._declared.pop(queue, None)
        if queues:
            await self._repairs.unregister(self._route(self._home), queues)


async def _each(
    calls: Mapping[tuple[int, ...], Awaitable[Sequence[Refusal]]], refused: Callable[[int, BrokerError], CrossdockError]
) -> list[Refusal]:
    """The refusals of a batch that goes to several servers at once.

    Args:
        calls: By the indexes of the items that each is for.
        refused: Makes the error of an item whose server could not be reached, where another one was.

    Raises:
        BrokerUnavailable, BrokerClosed: No server could be reached; nothing was attempted.
    """
    outcomes = await asyncio.gather(*calls.values(), return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors and (len(errors) == len(outcomes) or not all(isinstance(error, BrokerError) for error in errors)):
        raise errors[0]
    refusals: list[Refusal] = []
    for indexes, outcome in zip(calls, outcomes, strict=True):
        if isinstance(outcome, BrokerError):
            refusals += (Refusal(index, refused(index, outcome)) for index in indexes)
        elif not isinstance(outcome, BaseException):
            refusals += outcome
    return refusals


def _refuse_leased(verb: str, state: State) -> None:
    if state is State.LEASED:
        raise UnsupportedCapability(f"The Redis broker cannot {verb} leased messages: they belong to their workers until settled.")
