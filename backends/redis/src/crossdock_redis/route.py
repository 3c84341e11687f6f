"""Route: the way to the server that has some queues, with a connection for each kind of work, made when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from crossdock.errors import BrokerError
from crossdock.spi import Clock
from crossdock_redis import keys, replies
from crossdock_redis.desk import Desk
from crossdock_redis.lane import Lane, NoAnswer
from crossdock_redis.link import Command, LinkRefused
from crossdock_redis.parked import Parked
from crossdock_redis.replies import ServerError
from crossdock_redis.servers import Servers
from crossdock_redis.servertime import ServerTime
from crossdock_redis.waker import Waker


@dataclass(frozen=True)
class Surroundings:
    """What all routes of a Broker have in common."""

    servers: Servers
    prefix_of: Callable[[str], str]
    """The prefix of a queue's keys."""
    clock: Clock
    time: ServerTime
    up: Callable[[], None]
    down: Callable[[str], None]
    unavailable: Callable[[str], BrokerError]


class Route:
    """Connections to one server.

    Args:
        key: A key that the server has.
        around: What it shares with other routes.
    """

    def __init__(self, key: str, around: Surroundings) -> None:
        self._key = key
        self._around = around
        self._timeout = around.servers.address.timeout
        self.incoming = self._lane()
        """For messages to be stored."""
        self.side = self._lane()
        """For looking, repairing and extending."""
        self.desk = Desk(
            self._lane(),
            prefix_of=around.prefix_of,
            clock=around.clock,
            timeout=self._timeout,
            now_ms=around.time.now_ms,
            heard=around.time.heard,
            unavailable=around.unavailable,
        )
        self.parked = Parked(
            self._lane(),
            self.desk,
            prefix_of=around.prefix_of,
            push=self._push,
            timeout=self._timeout,
            unavailable=around.unavailable,
        )
        self.waker = Waker(lambda: around.servers.link(key), self._hand_on)

    def _lane(self) -> Lane:
        around = self._around
        address = around.servers.address
        return Lane(
            lambda: around.servers.link(self._key),
            look_again=around.servers.look_again,
            replicas=address.wait_replicas,
            wait_timeout=address.wait_timeout,
            up=around.up,
            down=around.down,
        )

    def _hand_on(self, token: str) -> None:
        queue, level = keys.queue_and_level(token)
        self.desk.hand_on([(queue, level)])

    async def _push(self, key: str) -> None:
        await self.ask(lambda: [("RPUSH", key, 1), ("PEXPIRE", key, 1000)])

    async def ask(self, make: Callable[[], Sequence[Command]], *, replicated: bool = False) -> list[Any]:
        """Send commands on the side lane and return their answers.

        Raises:
            BrokerUnavailable: The server cannot be reached, does not answer, or refuses.
        """
        try:
            answers = await self.side.call(make, self._timeout, replicated=replicated)
        except (NoAnswer, LinkRefused) as error:
            raise self._around.unavailable(str(error)) from error
        for answer in answers:
            if isinstance(answer, ServerError):
                raise self._around.unavailable(replies.explain(answer)) from answer
        return answers

    async def close(self) -> None:
        """Disconnect, after giving back what was handed over and not taken."""
        await self.parked.close()
        await self.waker.close()
        await self.desk.close()
        for lane in (self.incoming, self.side):
            lane.close()
