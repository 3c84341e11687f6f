"""Servers: which one has a queue's keys, and a link to it. One server, the master of a Sentinel's set, or the nodes of a Cluster."""

from __future__ import annotations

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar
from weakref import WeakSet

from crossdock_redis import keys
from crossdock_redis.address import Address
from crossdock_redis.link import Link, LinkBroken, ask
from crossdock_redis.replies import ServerError, explain

T = TypeVar("T")
Place = tuple[str, int]
"""Host and port."""

_WATCH: Final = 1.0
"""Seconds between two questions to the Sentinels who is the master."""
_SAMPLE: Final = 5
"""How many nodes of a Cluster are asked at once which slots each has."""


class Servers(ABC):
    """The servers behind one URL.

    Args:
        address: What the URL says.
    """

    spread = False
    """Whether queues live on different servers, so that no script may serve two of them."""

    def __init__(self, address: Address) -> None:
        self.address = address

    @abstractmethod
    async def link(self, key: str) -> Link:
        """Connect to the server that has a key. Raises `LinkBroken`."""

    async def links(self, key: str) -> Sequence[Link]:
        """Connect to every server that stores something, first the one that has this key. Raises `LinkBroken`."""
        return [await self.link(key)]

    async def look_again(self) -> None:
        """Somebody else serves by now: find out who, before the next link."""
        return

    async def close(self) -> None:
        """Forget what was found out."""
        return


class OneServer(Servers):
    """A server at a fixed address."""

    async def link(self, key: str) -> Link:
        host, port = self.address.hosts[0] if self.address.hosts else ("", 0)
        return await Link.to(self.address, host, port)


class SentinelSet(Servers):
    """Whichever server the Sentinels call the master. They are asked for each new link, and each second whether it is still the one:
    a master that was replaced without a death does not hear of it for ten seconds, and what it takes meanwhile is lost."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._sentinel = replace(address, login=address.sentinel_login, database=0, protocol=2)
        """How a Sentinel is talked to."""
        self._place: Place | None = None
        self._links: WeakSet[Link] = WeakSet()
        """Those to that place."""
        self._watching: asyncio.Task[None] | None = None

    async def link(self, key: str) -> Link:
        place = await self._master()
        self._now_at(place)
        link = await self._checked(place)
        self._links.add(link)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch(), name="crossdock-redis-sentinel")
        return link

    def _now_at(self, place: Place) -> None:
        """Whoever still talks to another server is to connect again."""
        if place != self._place:
            self._place = place
            for link in list(self._links):
                link.close()
            self._links.clear()

    async def _watch(self) -> None:
        link: Link | None = None
        try:
            while True:
                await asyncio.sleep(_WATCH)
                try:
                    link = link or await Link.to(self._sentinel, *random.choice(self.address.hosts))
                    if await self._named(link) != self._place:  # one alone may be wrong
                        self._now_at(await self._master())
                except (LinkBroken, ServerError):
                    if link is not None:
                        link.close()
                        link = None
        finally:
            if link is not None:
                link.close()

    async def close(self) -> None:
        self._place = None
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def _checked(self, place: Place) -> Link:
        """A link to it, if it is a master."""
        link = await Link.to(self.address, *place)
        try:
            [role] = await ask(link, ("ROLE",))
        except ServerError:
            return link  # it does not tell; should it be a replica, it refuses the first write
        except BaseException:
            link.close()
            raise
        if role[0] != b"master":
            link.close()
            raise LinkBroken("the server that the Sentinels call the master is none (yet)")
        return link

    async def _master(self) -> Place:
        """The one that more than half of the Sentinels name; if time is short, the one that most name who answered. A Sentinel that
        was cut off from the others may still name an old one."""
        named: Counter[Place] = Counter()
        reasons: list[str] = []
        with _all_at_once([self._named_by(place) for place in self.address.hosts]) as answers:
            try:
                async with asyncio.timeout(self.address.timeout / 2):
                    for answer in answers:
                        try:
                            place = await answer
                        except LinkBroken as error:
                            reasons.append(str(error))
                        else:
                            named[place] += 1
                            if 2 * named[place] > len(self.address.hosts):
                                return place
            except TimeoutError:
                reasons.append(f"no answer within {self.address.timeout / 2:g} s")
        if not named:
            raise LinkBroken(f"no Sentinel names a master {self.address.master!r}: {'; '.join(dict.fromkeys(reasons))}")
        return named.most_common(1)[0][0]

    async def _named_by(self, sentinel: Place) -> Place:
        async with _linked(self._sentinel, sentinel) as link:
            place = await self._named(link)
        if place is None:
            raise LinkBroken(f"the Sentinel at {shown(sentinel)} knows no master of this name")
        return place

    async def _named(self, sentinel: Link) -> Place | None:
        [answer] = await ask(sentinel, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.address.master))
        return (answer[0].decode(), int(answer[1])) if answer else None


class Cluster(Servers):
    """The nodes of a Cluster. What they tell of their slots is kept until one of them turns out not to have what it should."""

    spread = True

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._known: set[Place] = set(address.hosts)
        self._owners: list[tuple[range, Place]] | None = None
        self._exploring: asyncio.Task[None] | None = None

    async def link(self, key: str) -> Link:
        owners = await self._explored()
        slot = keys.slot(key)
        place = next((place for slots, place in owners if slot in slots), None)
        if place is None:
            self._owners = None
            raise LinkBroken(f"no node of the Cluster has slot {slot}, where {key!r} would be")
        try:
            return await Link.to(self.address, *place)
        except LinkBroken:
            self._owners = None  # by now another one may have its slots
            raise

    async def links(self, key: str) -> Sequence[Link]:
        first = await self.link(key)
        slot = keys.slot(key)
        others = {place: None for slots, place in await self._explored() if slot not in slots}
        connected = await asyncio.gather(*(Link.to(self.address, *place) for place in others), return_exceptions=True)
        return [first, *(link for link in connected if isinstance(link, Link))]

    async def _explored(self) -> list[tuple[range, Place]]:
        """Who has which slots. All who need to know wait for one answer."""
        while self._owners is None:
            if self._exploring is None:
                self._exploring = asyncio.get_running_loop().create_task(self._explore(), name="crossdock-redis-cluster")
                self._exploring.add_done_callback(self._explored_all)
            await asyncio.shield(self._exploring)
        return self._owners

    def _explored_all(self, exploring: asyncio.Task[None]) -> None:
        self._exploring = None
        if not exploring.cancelled():
            exploring.exception()  # seen, even if whoever waited for it has left

    async def _explore(self) -> None:
        places = random.sample(sorted(self._known), min(_SAMPLE, len(self._known)))
        reasons: list[str] = []
        with _all_at_once([self._slots_told_by(place) for place in places]) as answers:
            for answer in answers:
                try:
                    self._owners = await answer
                except LinkBroken as error:
                    reasons.append(str(error))
                else:
                    self._known = {*self.address.hosts, *(place for _, place in self._owners)}
                    return
        raise LinkBroken(f"no node tells who has which slots: {'; '.join(dict.fromkeys(reasons))}")

    async def _slots_told_by(self, node: Place) -> list[tuple[range, Place]]:
        async with _linked(self.address, node) as link:
            [told] = await ask(link, ("CLUSTER", "SLOTS"))
        return [(range(first, last + 1), (_host(master[0], node[0]), int(master[1]))) for first, last, master, *_ in told]

    async def look_again(self) -> None:
        self._owners = None

    async def close(self) -> None:
        self._owners = None
        if self._exploring is not None:
            self._exploring.cancel()


def behind(address: Address) -> Servers:
    """The servers that an address leads to."""
    match address.kind:
        case "server" | "socket":
            return OneServer(address)
        case "sentinel":
            return SentinelSet(address)
        case "cluster":
            return Cluster(address)


def shown(place: Place) -> str:
    """A place as people write it."""
    host, port = place
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(told: bytes | None, asked: str) -> str:
    """A node that knows no name for itself tells none, or a question mark: then it is where we asked."""
    return told.decode() if told and told != b"?" else asked


@contextlib.asynccontextmanager
async def _linked(address: Address, place: Place) -> AsyncGenerator[Link, None]:
    """A connection for one question. Raises `LinkBroken`, also for what the server refuses."""
    link = await Link.to(address, *place)
    try:
        yield link
    except ServerError as error:
        raise LinkBroken(f"{shown(place)} {explain(error).removeprefix('it ')}") from error
    finally:
        link.close()


@contextlib.contextmanager
def _all_at_once(asks: Sequence[Coroutine[Any, Any, T]]) -> Generator[Iterator[Awaitable[T]], None, None]:
    """The answers of several, the first one first; at the end nobody is waited for any more."""
    tasks = [asyncio.ensure_future(each) for each in asks]
    try:
        yield asyncio.as_completed(tasks)
    finally:
        for task in tasks:
            task.cancel()
            task.add_done_callback(_forget)


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()
