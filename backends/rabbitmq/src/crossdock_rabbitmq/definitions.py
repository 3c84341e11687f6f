"""Definitions: has what `topology` names declared in the server, and undone. Idempotent, whoever else does it at the same time."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Final

from pamqp import commands
from pamqp.base import Frame

from crossdock.errors import ConfigurationError
from crossdock.spi import LEVELS
from crossdock_rabbitmq import names, topology
from crossdock_rabbitmq.address import Address, QueueType
from crossdock_rabbitmq.link import Link, LinkBroken, Refused

_DELETED_WITHIN: Final = 15.0
"""Seconds for a deletion: after a node was killed, RabbitMQ 3.10 waits five seconds for replicas of a queue that it deletes."""
_ALONE_WITHIN: Final = 10.0
"""Seconds for others to have made, or deleted, a queue: then it is tried all the same."""
_LOOKS_AGAIN: Final = 0.02
"""Seconds between two looks for that."""
_MAY_DIFFER: Final = "x-consumer-timeout"
"""An argument that queues made on an older server lack."""


class Definitions:
    """What a Broker declares.

    Args:
        namespace: Whose queues.
        address: Says which type of queue.
    """

    def __init__(self, namespace: str, address: Address) -> None:
        self._namespace = namespace
        self._type: QueueType = address.queue_type
        self._making = asyncio.Lock()
        self.older: set[str] = set()
        """Queues that an older server made, without what a queue can say there today."""

    async def make_delay(self, link: Link) -> None:
        """See to it that messages can wait. Raises `LinkBroken`, `ConfigurationError`."""
        async with self._making:
            try:
                await link.call(commands.Exchange.Declare(exchange=names.DELAY_IN, passive=True))
            except Refused as error:
                if error.code != 404:
                    raise _impossible(error, names.DELAY_IN) from error
                await self._declare(link, topology.of_delay(self._type))

    def sets_timeout(self, version: Sequence[int]) -> bool:
        """Whether queues say for how long a delivery may be held."""
        return topology.sets_timeout(self._type, tuple(version))

    async def make(self, link: Link, queues: Iterable[str], version: Sequence[int]) -> None:
        """See to it that queues are there. Raises `LinkBroken`, `ConfigurationError`."""
        async with self._making:
            for queue in queues:
                if not names.is_name(queue):
                    raise ConfigurationError(f"{queue!r} can be no queue: names have 1 to 63 letters, digits, '-' and '_'.")
                async with self._alone(link, queue):
                    if await self._declare(link, topology.of_queue(self._namespace, queue, self._type, tuple(version))):
                        self.older.add(queue)

    async def missing(self, link: Link, queues: Iterable[str]) -> list[str]:
        """Those of these queues of which a part is not there. Raises `LinkBroken`, `Refused`."""
        lost: list[str] = []
        for queue in queues:
            parts = [names.dead(self._namespace, queue), *(names.ready(self._namespace, queue, level) for level in LEVELS)]
            for name in parts:
                if await link.count(name) is None:
                    lost.append(queue)
                    break
        return lost

    async def erase(self, link: Link, queue: str) -> None:
        """Delete a queue, with all that is in it but what still waits in the delay. Raises `LinkBroken`, `Refused`."""
        parts = [*(names.ready(self._namespace, queue, level) for level in LEVELS), names.dead(self._namespace, queue)]
        async with self._making, self._alone(link, queue):
            for name in parts:
                await link.call(commands.Queue.Delete(queue=name), _DELETED_WITHIN)

    @contextlib.asynccontextmanager
    async def _alone(self, link: Link, queue: str) -> AsyncGenerator[None]:
        """While no other Broker makes or deletes this queue: where both happen at once, RabbitMQ 3.10 may keep the process of a queue
        that it knows no more, and can make none of that name until it starts again.

        Raises:
            LinkBroken: The connection is lost.
        """
        lock = names.queue_lock(self._namespace, queue)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _ALONE_WITHIN
        while loop.time() < deadline:
            try:
                await link.call(commands.Queue.Declare(queue=lock, exclusive=True))
                break
            except Refused as error:
                if error.code != 405:  # we may not make anything, or it cannot be called so
                    break
            await asyncio.sleep(_LOOKS_AGAIN)
        try:
            yield
        finally:
            with contextlib.suppress(LinkBroken, Refused):
                await link.call(commands.Queue.Delete(queue=lock))

    async def _declare(self, link: Link, definitions: Iterable[topology.Definition]) -> bool:
        """Declare; returns whether a queue is as an older server made it."""
        older = False
        for definition in definitions:
            match definition:
                case topology.Queue():
                    older |= await self._declare_queue(link, definition)
                case topology.Exchange(name, type, arguments):
                    await _ask(
                        link,
                        commands.Exchange.Declare(exchange=name, exchange_type=type, durable=True, arguments=dict(arguments)),
                        commands.Exchange.Declare(exchange=name, passive=True),
                        name,
                    )
                case topology.Binding(queue, exchange, key):
                    await _ask(link, commands.Queue.Bind(queue=queue, exchange=exchange, routing_key=key), None, queue)
                case topology.Route(destination, source, key):
                    await _ask(
                        link, commands.Exchange.Bind(destination=destination, source=source, routing_key=key), None, destination
                    )
        return older

    async def _declare_queue(self, link: Link, queue: topology.Queue) -> bool:
        arguments = dict(queue.arguments)
        passive = commands.Queue.Declare(queue=queue.name, passive=True)
        try:
            await _ask(link, commands.Queue.Declare(queue=queue.name, durable=True, arguments=arguments), passive, queue.name)
        except ConfigurationError as error:
            if _MAY_DIFFER not in str(error.__cause__) or arguments.pop(_MAY_DIFFER, None) is None:
                raise
            await _ask(link, commands.Queue.Declare(queue=queue.name, durable=True, arguments=arguments), passive, queue.name)
            return True
        return False


async def _ask(link: Link, frame: Frame, otherwise: Frame | None, name: str) -> None:
    """Declare. Where we may not, what is there will do: `otherwise` asks for it; None takes it for granted."""
    try:
        await link.call(frame)
    except Refused as error:
        if error.code != 403:
            raise _impossible(error, name) from error
        if otherwise is not None:
            try:
                await link.call(otherwise)
            except Refused:
                raise _impossible(error, name) from error


def _impossible(error: Refused, name: str) -> ConfigurationError:
    """What to do about a definition that is refused."""
    if error.code == 403:
        return ConfigurationError(
            f"{name!r} is not there, and this user may not make it: give it the permissions that crossdock-rabbitmq's README names, "
            "or have a user that may declare it first."
        )
    found = re.search(r"inequivalent arg '([^']+)'.*received (.*?) but current is (.*?)(?:, class|$|\")", str(error))
    if found:
        return ConfigurationError(
            f"{name!r} is there with other arguments: {found[1]} should be {found[2]}, and is {found[3]}. It was left as it is. "
            "Use the type of queue it has (option queue_type), or empty it, delete it, and start again."
        )
    return ConfigurationError(f"The server refuses to declare {name!r}: {_short(str(error))}.")


def _short(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")
