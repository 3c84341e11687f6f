"""Parked: a look that waits in the server until there is something, so that an idle receiver has it after one way instead of three.

BLPOP and a look go out together on a connection of their own. BLPOP holds the connection until a token comes to one of the lists it
waits on, and then the server goes on with the look by itself.

Each level of each queue has a list that holds a token when something became ready there. Of the receivers that wait for it the server
gives it to the one that has waited longest, whose look hands a token on if it leaves anything. Should a token be lost with its taker,
the next look of the others finds what it stood for: no look is parked for longer than `LOOK`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from crossdock.errors import BrokerClosed, BrokerError
from crossdock.spi import Delivery
from crossdock.spi import Lane as LaneOfQueue
from crossdock_redis import keys
from crossdock_redis.desk import Ask, Desk, Request, expire
from crossdock_redis.lane import Lane, NoAnswer
from crossdock_redis.limits import BATCH, LOOK
from crossdock_redis.link import Command, LinkRefused

_TICK: Final = 0.2
"""Seconds by which a server may end a BLPOP late: it looks after such times ten times a second."""


class Parked:
    """Parks looks, one at a time.

    Args:
        lane: To the server; this object's alone.
        desk: Makes the looks and reads what comes of them.
        prefix_of: The prefix of a queue's keys.
        push: Puts a token into a list, to end a look's wait.
        timeout: Seconds after which a caller is told that nothing is known.
        unavailable: Makes the error for a server that does not answer, from a reason.
    """

    def __init__(
        self,
        lane: Lane,
        desk: Desk,
        *,
        prefix_of: Callable[[str], str],
        push: Callable[[str], Awaitable[None]],
        timeout: float,
        unavailable: Callable[[str], BrokerError],
    ) -> None:
        self._lane = lane
        self._desk = desk
        self._prefix_of = prefix_of
        self._push = push
        self._timeout = timeout
        self._unavailable = unavailable
        self._over: asyncio.Future[None] | None = None
        self._ask: Ask | None = None
        self._bell = ""
        self._rings: set[asyncio.Task[None]] = set()
        self._closed = False

    async def look(self, lanes: Sequence[LaneOfQueue], limit: int, seconds: float, pause: float) -> tuple[list[Delivery], float]:
        """Receive as soon as there is something. `Desk.look` in form and promises.

        Args:
            lanes: In order, with their quotas.
            limit: Most deliveries.
            seconds: How long to wait, at most; it may be less.
            pause: In how many seconds something falls due, as the look before told.

        Raises:
            BrokerUnavailable, BrokerClosed
        """
        loop = asyncio.get_running_loop()
        if self._over is not None:  # a look that somebody left behind; its bell was rung
            await asyncio.wait([self._over], timeout=self._timeout)
            if self._is_parked():
                raise self._unavailable("no answer came in time")
        if self._closed:
            raise BrokerClosed("The Redis broker was closed while a receive waited.")
        ask = self._ask = Ask(lanes, min(limit, BATCH), [(lane.queue, int(lane.priority)) for lane in lanes], 2, tends=True)
        request = Request(ask, ask.woken)
        self._over = loop.create_future()
        self._bell = keys.bell(self._prefix_of(lanes[0].queue), self._lane.name)
        self._lane.post(partial(self._commands, request), partial(self._answered, request), replicated=False)
        timers = [loop.call_later(LOOK + self._timeout, expire, ask.future)]
        if (ring := min(seconds, pause)) < LOOK + _TICK:
            timers.append(loop.call_later(ring, self._ring))
        try:
            return await ask.future
        except BaseException as error:
            self._desk.leave(ask)
            self._ring()
            if isinstance(error, TimeoutError):
                raise self._unavailable("no answer came in time") from error
            raise
        finally:
            self._ask = None
            for timer in timers:
                timer.cancel()

    def _is_parked(self) -> bool:
        return self._over is not None

    def _commands(self, request: Request) -> Sequence[Command]:
        look = self._desk.command(request, self._lane)
        assert request.ask is not None
        lists = [keys.token(self._prefix_of(lane.queue), lane.priority) for lane in request.ask.lanes]
        return [("BLPOP", self._bell, *lists, LOOK), look]

    def _answered(self, request: Request, outcome: list[Any] | NoAnswer | LinkRefused) -> None:
        over, self._over = self._over, None
        self._desk.answered(request, outcome if isinstance(outcome, Exception) else outcome[1:])
        if over is not None:
            over.set_result(None)

    def _ring(self) -> None:
        """End the wait of the look that is parked, if it still waits."""
        if self._over is not None:

            async def ring() -> None:
                await self._push(self._bell)

            task = asyncio.get_running_loop().create_task(ring(), name="crossdock-redis-ring")
            self._rings.add(task)
            task.add_done_callback(self._rung)

    def _rung(self, task: asyncio.Task[None]) -> None:
        self._rings.discard(task)
        if not task.cancelled():
            task.exception()  # then the look ends by itself, a little later

    async def close(self) -> None:
        """End the look that is parked; what it took goes back by way of the desk."""
        self._closed = True
        if self._ask is not None and not self._ask.future.done():
            self._ask.future.set_exception(BrokerClosed("The Redis broker was closed while a receive waited."))
        if self._over is not None:
            self._ring()
            await asyncio.wait([self._over], timeout=self._timeout)
        self._lane.close()
        for task in list(self._rings):
            task.cancel()
        if self._rings:
            await asyncio.wait(self._rings)
