"""Where the measured tasks go: a SQLite file, a server of our own, and a namespace of a broker for each measurement."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.spi import Broker, SupportsErase

if TYPE_CHECKING:
    from crossdock_conformance.servers.finding import BinarySource

APP = f"{Path(__file__).resolve().parent / 'app.py'}:app"


@contextmanager
def given(url: str) -> Iterator[str]:
    """The URL of a broker that somebody else runs."""
    yield url


@contextmanager
def sqlite(options: str = "") -> Iterator[str]:
    """The URL of a new file, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="crossdock-bench-") as folder:
        yield f"sqlite:///{folder}/tasks.db{options}"


def programs(server: str) -> Sequence[BinarySource]:
    """The programs on this machine that are this server, "KIND" or "KIND:VERSION", of the kinds that the conformance suite knows."""
    from crossdock_conformance.servers import find_servers
    from crossdock_conformance.servers.finding import BinarySource

    kind, _, version = server.partition(":")
    return [source for source in find_servers(kind, version or None) if isinstance(source, BinarySource)]


@contextmanager
def server(program: BinarySource) -> Iterator[str]:
    """The URL of a new server as it is by default, ended afterwards."""
    with program.start() as started:
        yield started.url


@contextmanager
def redis(program: BinarySource, *, appendonly: bool) -> Iterator[str]:
    """The URL of a new Redis or Valkey, ended afterwards. Its append-only file, if it has one, is synced each second."""
    from crossdock_conformance.servers.local import LocalServer
    from crossdock_conformance.servers.redis_server import Redis, Setup, Valkey

    recipe = {recipe.kind: recipe for recipe in (Redis, Valkey)}[program.kind]
    server = LocalServer(
        recipe(Setup(lines=["appendfsync everysec" if appendonly else "appendonly no"])), program.binary, program.version
    )
    try:
        server.start()
        yield server.url
    finally:
        server.close()


def load_app(url: str, namespace: str = "bench") -> Any:
    """Import `app.py` anew, for one namespace of one broker. Processes started from now on find the same one."""
    os.environ |= {"CROSSDOCK_URL": url, "CROSSDOCK_NAMESPACE": namespace}
    from crossdock.loading import load_app

    sys.modules.pop("app", None)
    return load_app(APP)


@asynccontextmanager
async def part(url: str, name: str, queues: Sequence[str] = ("default",)) -> AsyncIterator[Any]:
    """The App in a namespace of its own, of which these queues are erased afterwards where the broker can do that."""
    app = load_app(url, f"bench-{os.getpid()}-{name}")
    try:
        yield app
    finally:
        await app.close()
        broker: Broker = app.make_broker()
        await broker.open()
        if isinstance(broker, SupportsErase):
            await broker.erase(queues)
        await broker.close()
