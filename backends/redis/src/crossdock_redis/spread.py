"""Receiving from queues that live on different servers: no script serves two of them, so quotas are dealt out here.

A server that does not answer holds up nobody: its queues are left out until it does.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

from crossdock.errors import BrokerUnavailable
from crossdock.spi import Clock, Delivery, Lane
from crossdock_redis import keys
from crossdock_redis.desk import Woken
from crossdock_redis.limits import LOOK
from crossdock_redis.route import Route

_Found = tuple[list[Delivery], float]
_PATIENCE: Final = 1.0
"""Seconds of one look after which a server that gives no answer is left out, if another one does."""
_LEAST_PATIENCE: Final = 0.05
"""Seconds that each question of a look is given, however late it comes."""


async def receive_from_many(
    routes: Mapping[Route, Sequence[Lane]],
    lanes: Sequence[Lane],
    limit: int,
    wait: float,
    clock: Clock,
    prefix_of: Callable[[str], str],
) -> Sequence[Delivery]:
    """`Broker.receive` over several routes.

    Args:
        routes: The lanes of each.
        lanes: All of them in order.
        limit: Most deliveries.
        wait: Seconds to wait for a first one.
        clock: For the end of the wait.
        prefix_of: The prefix of a queue's keys.
    """
    deadline = clock.monotonic() + wait
    route_of = {lane.queue: route for route, each in routes.items() for lane in each}
    woken: dict[Route, Woken] = {}
    try:
        while True:
            look = _Look(route_of, lanes, limit, woken)
            deliveries = await look.take()
            left = deadline - clock.monotonic()
            if deliveries or left <= 0:
                return deliveries
            woken = await _wait(routes, min(left, look.pause, LOOK), prefix_of)
    finally:
        for route in routes:
            route.waker.rest()


class _Look:
    """One look at all lanes.

    Args:
        route_of: The route of each queue.
        lanes: In order.
        limit: Most deliveries.
        woken: Tokens that were taken for this look.
    """

    def __init__(self, route_of: Mapping[str, Route], lanes: Sequence[Lane], limit: int, woken: dict[Route, Woken]) -> None:
        self._route_of = route_of
        self._lanes = lanes
        self._limit = limit
        self._woken = woken
        self._deliveries: list[Delivery] = []
        self._asked: Counter[tuple[str, int]] = Counter()
        self._taken: Counter[tuple[str, int]] = Counter()
        self._silent: set[Route] = set()
        self._answered = False
        self._patient_until = asyncio.get_running_loop().time() + _PATIENCE
        self.pause = math.inf
        """In how many seconds there will be more; infinity if that is not known."""

    @property
    def _left(self) -> int:
        return self._limit - len(self._deliveries)

    async def take(self) -> list[Delivery]:
        """What there is now: first all quotas, then what is over, in the order of the lanes.

        Raises:
            BrokerUnavailable, BrokerClosed: Nobody answered.
        """
        try:
            await self._take_quotas()
            if not (self._silent and self._deliveries):  # else there is something, and time is short
                await self._take_cut_quotas()
                await self._take_what_is_over()
        except BaseException:
            _give_back(self._deliveries)
            raise
        finally:
            for route, tokens in self._woken.items():
                route.desk.hand_on(tokens)
        return self._deliveries

    async def _take_quotas(self) -> None:
        """All routes at once, which is why they are cut to the limit beforehand."""
        orders: dict[Route, list[Lane]] = {}
        left = self._limit
        for lane in self._lanes:
            quota = min(lane.quota, left)
            if quota > 0:
                left -= quota
                orders.setdefault(self._route_of[lane.queue], []).append(Lane(lane.queue, lane.priority, quota))
        for found in (await self._ask_all({route: (each, _quotas(each)) for route, each in orders.items()})).values():
            self._deliveries += found

    async def _take_cut_quotas(self) -> None:
        """What others left undone of the limit may fill a quota that was cut."""
        for lane in self._lanes:
            more = min(lane.quota - self._asked[_key(lane)], self._left)
            if more > 0 and self._may_have_more(lane):
                await self._ask_one(self._route_of[lane.queue], [lane], more)

    async def _take_what_is_over(self) -> None:
        lanes = [lane for lane in self._lanes if self._may_have_more(lane)]
        if self._left <= 0 or not lanes:
            return
        by_route: dict[Route, list[Lane]] = {}
        for lane in lanes:
            by_route.setdefault(self._route_of[lane.queue], []).append(Lane(lane.queue, lane.priority, 1))
        # One of each at once, because most have nothing. Then only those that had one are asked in turn, as long as there is room.
        first = await self._ask_all({route: (each, 1) for route, each in by_route.items()})
        spare = {route: found[0] for route, found in first.items() if found}
        try:
            for route, run in groupby(lanes, key=lambda lane: self._route_of[lane.queue]):
                if self._left > 0 and first.get(route):
                    await self._take_run(route, list(run), spare)
        finally:
            _give_back(list(spare.values()))

    def _may_have_more(self, lane: Lane) -> bool:
        """Whether it gave all that it was asked for."""
        return self._taken[_key(lane)] >= self._asked[_key(lane)] and self._route_of[lane.queue] not in self._silent

    async def _take_run(self, route: Route, run: Sequence[Lane], spare: dict[Route, Delivery]) -> None:
        """Fill up from lanes of one route that follow each other, beginning with what it gave already."""
        if route in spare and _key_of(spare[route]) in map(_key, run):
            self._deliveries.append(spare.pop(route))
        if self._left > 0:
            await self._ask_one(route, run, self._left)

    async def _ask_one(self, route: Route, lanes: Sequence[Lane], most: int) -> None:
        order = [Lane(lane.queue, lane.priority, most) for lane in lanes]
        self._deliveries += (await self._ask_all({route: (order, most)})).get(route, ())

    async def _ask_all(self, orders: Mapping[Route, tuple[Sequence[Lane], int]]) -> dict[Route, list[Delivery]]:
        """Look at these lanes, for so many of each route, all routes at once. What is silent is left out.

        Raises:
            BrokerUnavailable, BrokerClosed: Nobody has answered in this look yet.
        """
        asked = [route for route in orders if route not in self._silent and route.desk.unanswered < _PATIENCE]
        if not asked and not self._answered:
            asked = list(orders)
        self._silent |= orders.keys() - asked
        looks = [
            asyncio.ensure_future(route.desk.look_once(*orders[route], self._woken.pop(route, ()), passes=1)) for route in asked
        ]
        try:
            outcomes = await self._outcomes(looks)
        except BaseException:
            for look in looks:
                look.cancel()
            for outcome in await asyncio.gather(*looks, return_exceptions=True):
                if not isinstance(outcome, BaseException):
                    _give_back(outcome[0])
            raise
        answers: dict[Route, list[Delivery]] = {}
        errors: list[BaseException] = []
        for route, outcome in zip(asked, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                self._silent.add(route)
                errors.append(outcome)
                continue
            answers[route], pause = outcome
            self.pause = min(self.pause, pause)
            self._asked.update({_key(lane): lane.quota for lane in orders[route][0]})
            self._taken.update(map(_key_of, answers[route]))
        self._answered = self._answered or bool(answers)
        unexpected = [error for error in errors if not isinstance(error, BrokerUnavailable | asyncio.CancelledError)]
        if unexpected or (errors and not self._answered):
            for found in answers.values():
                _give_back(found)
            raise (unexpected or errors)[0]
        return answers

    async def _outcomes(self, looks: Sequence[asyncio.Future[_Found]]) -> list[_Found | BaseException]:
        """Of each look, when all are done, or some are and the others take too long."""
        late = set(looks)
        while late:
            left = self._patient_until - asyncio.get_running_loop().time()
            _, late = await asyncio.wait(late, timeout=max(left, _LEAST_PATIENCE))
            if self._answered or any(look not in late and look.exception() is None for look in looks):
                break
        for look in late:
            look.cancel()  # what it takes all the same is given back
        return await asyncio.gather(*looks, return_exceptions=True)


def _key(lane: Lane) -> tuple[str, int]:
    return lane.queue, int(lane.priority)


def _key_of(delivery: Delivery) -> tuple[str, int]:
    return delivery.message.queue, int(delivery.message.priority)


def _quotas(lanes: Sequence[Lane]) -> int:
    return sum(lane.quota for lane in lanes)


async def _wait(routes: Mapping[Route, Sequence[Lane]], seconds: float, prefix_of: Callable[[str], str]) -> dict[Route, Woken]:
    waits: dict[asyncio.Task[str | None], Route] = {}
    for route, lanes in routes.items():
        wanted = tuple(keys.token(prefix_of(lane.queue), lane.priority) for lane in lanes)
        waits[asyncio.ensure_future(route.waker.wait(wanted, seconds))] = route
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for route in routes:
            route.waker.interrupt()
        await asyncio.wait(waits)
    return {route: [keys.queue_and_level(token)] for each, route in waits.items() if (token := each.result())}


def _give_back(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        receipt: Any = delivery.receipt
        receipt.desk.give_back(delivery)
