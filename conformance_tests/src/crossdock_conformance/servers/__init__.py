"""Servers for tests: Redis, Valkey, NATS and RabbitMQ, started privately on loopback and ended with the test process.

    with start_server("redis", version="7.0") as server:
        ...server.url...
        server.restart(kill=True)

`finding` says where a server comes from, `Server` what it can do, `fixtures` how pytest shares one among tests. Needs no driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdock_conformance.servers.errors import NotControllable, ServerError, ServerFailed, ServerNotFound
    from crossdock_conformance.servers.finding import Source, find_servers, start_server
    from crossdock_conformance.servers.requirements import is_required, required
    from crossdock_conformance.servers.server import Server

__all__ = [
    "NotControllable",
    "Server",
    "ServerError",
    "ServerFailed",
    "ServerNotFound",
    "Source",
    "find_servers",
    "is_required",
    "required",
    "start_server",
]

_HOMES = {
    "errors": ["NotControllable", "ServerError", "ServerFailed", "ServerNotFound"],
    "finding": ["Source", "find_servers", "start_server"],
    "requirements": ["is_required", "required"],
    "server": ["Server"],
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is asked for; see `crossdock_conformance`."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
