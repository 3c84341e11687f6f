"""The servers that a reader of some pages has: each of one's own, on localhost, with nothing in it; and `redis-cli`.

A page that needs one gets a real server on a port of its own; the address on the page is replaced by its address.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from pages import Page

from crossdock_conformance.servers import Server, ServerNotFound, find_servers, start_server
from crossdock_conformance.servers.finding import BinarySource, GivenSource


class Kind(NamedTuple):
    """One kind of server, as pages have it."""

    name: str
    address: str
    """Where pages have it."""
    alike: tuple[str, ...] = ()
    """Kinds of servers that will do as well."""
    client: str = ""
    """What pages ask it with."""


REDIS: Final = Kind("redis", "localhost:6379", alike=("valkey",), client="redis-cli")
KINDS: Final = (REDIS, Kind("rabbitmq", "localhost:5672"), Kind("nats", "localhost:4222"))

_EXECUTED = ("console", "python")


def needed(page: Page) -> list[Kind]:
    """The servers that a block that is executed mentions, or asks."""
    executed = [fence.text for fence in page.fences if (fence.title or fence.language in _EXECUTED) and not fence.no_test]
    return [kind for kind in KINDS if any(kind.address in text or (kind.client and kind.client in text) for text in executed)]


@contextmanager
def started(page: Page, place: Path) -> Iterator[tuple[Page, Path]]:
    """Start the servers that a page needs.

    Args:
        page: The page.
        place: A folder for what this makes.

    Yields:
        The page with the servers' addresses, and the folder in which the page's terminal has to find `redis-cli`.

    Raises:
        ServerNotFound: There is no such server here, or no redis-cli.
    """
    programs, copy, text = place / "bin", place / page.path.name, page.text
    programs.mkdir(parents=True)
    with ExitStack() as servers:
        for kind in needed(page):
            url = urlsplit(servers.enter_context(_start(kind)).url)
            text = text.replace(kind.address, f"{url.hostname}:{url.port}")
            if kind is REDIS:
                # Standard output is no terminal here, and still answers are to be shown as on one.
                script = f'#!/bin/sh\nexec {shlex.quote(_redis_cli())} -h {url.hostname} -p {url.port} --no-raw "$@"\n'
                (programs / kind.client).write_text(script)
                (programs / kind.client).chmod(0o755)
                # What a reader's server has by default; those for tests have something else.
                subprocess.run(
                    [programs / kind.client, "CONFIG", "SET", "appendfsync", "everysec"], check=True, capture_output=True
                )
        copy.write_text(text, encoding="utf-8")
        yield Page(copy, text), programs


def _start(kind: Kind) -> Server:
    # One that is given by its URL is perhaps not empty, and not ours to fill.
    names = (kind.name, *kind.alike)
    sources = [source for name in names for source in find_servers(name) if not isinstance(source, GivenSource)]
    if sources:
        return sources[0].start()
    server = start_server(kind.name)  # which may install it
    if not server.controllable:
        raise ServerNotFound(f"there is no {kind.name} server for pages: the one that is given by its URL may have data", kind.name)
    return server


def _redis_cli() -> str:
    names = (REDIS.name, *REDIS.alike)
    programs = [source.binary for name in names for source in find_servers(name) if isinstance(source, BinarySource)]
    folders = [Path(binary.path).parent for binary in programs if binary.root is None]
    found = [path for name in (REDIS.client, "valkey-cli") for place in ("", *folders) if (path := shutil.which(Path(place, name)))]
    if not found:
        text = f"there is no {REDIS.client} for tests: it is neither on PATH nor beside a server. To have it: apt-get install redis-tools"
        raise ServerNotFound(text, REDIS.name)
    return found[0]
