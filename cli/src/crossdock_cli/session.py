"""An open broker for one command."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from crossdock.config import Settings, load_settings, require_url
from crossdock.errors import NotFound, UnsupportedCapability
from crossdock.plugins import create_broker
from crossdock.spi import Broker, QueueStats

T = TypeVar("T")


def with_broker(url: str | None, namespace: str | None, work: Callable[[Broker], Awaitable[T]]) -> T:
    """Open the broker that options, environment or file name, do the work, and close it."""
    return asyncio.run(_run(load_settings(url=url, namespace=namespace), work))


async def _run(settings: Settings, work: Callable[[Broker], Awaitable[T]]) -> T:
    async with opened(settings) as broker:
        return await work(broker)


@asynccontextmanager
async def opened(settings: Settings) -> AsyncGenerator[Broker]:
    """The open broker of these settings."""
    broker = create_broker(require_url(settings), namespace=settings.namespace)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


async def existing_queues(broker: Broker, names: Sequence[str]) -> Sequence[QueueStats]:
    """Count the named queues, or all of the namespace where none is named.

    Raises:
        NotFound: There is no queue of such a name; the text has the nearest one.
        UnsupportedCapability: None is named, and this broker cannot list its queues.
    """
    try:
        everything = await broker.stats(None)
    except UnsupportedCapability as error:
        if names:
            return await broker.stats(names)
        how = "name those that you mean, as in `crossdock queue list NAME` and `crossdock dlq list --queue NAME`"
        raise UnsupportedCapability(f"{error}; {how}") from error
    by_name = {stats.queue: stats for stats in everything}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(by_name) or 'none'}"
            raise NotFound(f"there is no queue {name!r} in this namespace; {hint}")
    return [by_name[name] for name in names] if names else everything
