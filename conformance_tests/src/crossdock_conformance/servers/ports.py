"""Loopback ports for servers."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from crossdock_conformance.servers.recipe import HOST


class Ports:
    """Free ports by name, ours until `close()`, also while no server listens on them.

    On Linux each is kept by a socket that is bound to it and never listens. The server can bind beside it, as both say that they
    share the address; nobody else is given the port, neither another test process nor an outgoing connection. Without that a
    client that tries to reconnect to a stopped server may be given the very port that it calls, and reach itself.
    """

    def __init__(self, names: Iterable[str]) -> None:
        held = {name: _bound_socket() for name in names}
        self.numbers: Mapping[str, int] = MappingProxyType({name: each.getsockname()[1] for name, each in held.items()})
        self._held = list(held.values())
        if sys.platform != "linux":  # elsewhere nobody can bind beside us
            self.close()

    def close(self) -> None:
        """Give them back."""
        while self._held:
            self._held.pop().close()


def _bound_socket() -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, 0))
    except OSError:
        bound.close()
        raise
    return bound
