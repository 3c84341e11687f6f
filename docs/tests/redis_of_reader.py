"""The Redis that a reader of some pages has: a server of one's own at `localhost:6379`, with nothing in it, and `redis-cli`.

Each page that needs one gets a real server, Redis or Valkey, on a port of its own; the address on the page is replaced by its address.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pages import Page

from crossdock_conformance.servers import Server, ServerNotFound, find_servers, start_server
from crossdock_conformance.servers.finding import BinarySource, GivenSource

ADDRESS = "localhost:6379"
"""Where pages have the server."""
CLIENT = "redis-cli"
"""What pages ask it with."""
_EXECUTED = ("console", "python")


def is_needed(page: Page) -> bool:
    """Whether a block that is executed mentions the server, or asks it."""
    executed = [fence.text for fence in page.fences if (fence.title or fence.language in _EXECUTED) and not fence.no_test]
    return any(ADDRESS in text or CLIENT in text for text in executed)


@contextmanager
def started(page: Page, place: Path) -> Iterator[tuple[Page, Path]]:
    """Start a server for a page.

    Args:
        page: The page.
        place: A folder for what this makes.

    Yields:
        The page with the server's address, and the folder in which the page's terminal has to find `redis-cli`.

    Raises:
        ServerNotFound: There is no server here, or no redis-cli.
    """
    place.mkdir()
    with _start() as server:
        host, port = urlsplit(server.url).hostname, urlsplit(server.url).port
        programs, copy = place / "bin", place / page.path.name
        programs.mkdir()
        (programs / CLIENT).write_text(
            # Standard output is no terminal here, and still answers are to be shown as on one.
            f'#!/bin/sh\nexec {shlex.quote(_client())} -h {host} -p {port} --no-raw "$@"\n'
        )
        (programs / CLIENT).chmod(0o755)
        copy.write_text(page.text.replace(ADDRESS, f"{host}:{port}"), encoding="utf-8")
        yield Page(copy, copy.read_text(encoding="utf-8")), programs


def _start() -> Server:
    # One that is given by its URL is perhaps not empty, and not ours to fill.
    sources = [source for kind in ("redis", "valkey") for source in find_servers(kind) if not isinstance(source, GivenSource)]
    if sources:
        return sources[0].start()
    server = start_server("redis")  # which may install it
    if not server.controllable:
        raise ServerNotFound("there is no Redis server for pages: the one that is given by its URL may have data", "redis")
    return server


def _client() -> str:
    programs = [source.binary for kind in ("redis", "valkey") for source in find_servers(kind) if isinstance(source, BinarySource)]
    folders = [Path(binary.path).parent for binary in programs if binary.root is None]
    found = [path for name in (CLIENT, "valkey-cli") for place in ("", *folders) if (path := shutil.which(Path(place, name)))]
    if not found:
        text = f"there is no {CLIENT} for tests: it is neither on PATH nor beside a server. To have it: apt-get install redis-tools"
        raise ServerNotFound(text, "redis")
    return found[0]
