"""A backend for the tests of the suite: a SQLite store behind a socket, with a server that can be killed, frozen and cut off.

`wire` is what travels, `server` the process that owns the store, `broker` the client, `control` starts and stops the server.
"""

from __future__ import annotations

from crossdock.spi import BackendPlugin, BrokerSettings, hookimpl


@hookimpl
def crossdock_backend() -> BackendPlugin:
    """Describe the backend."""
    return BackendPlugin(name="remote", api_version=1, schemes=("remote",), create=_create, example_url="remote://localhost:7000")


def _create(settings: BrokerSettings) -> object:
    from crossdock_remote.broker import RemoteBroker

    return RemoteBroker(settings)
