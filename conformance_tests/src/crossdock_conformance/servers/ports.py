"""Loopback ports for servers."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from crossdock_conformance.servers.recipe import HOST

_TRIES = 100


class Ports:
    """Free ports by name, ours until `close()`, also while no server listens on them.

    On Linux each is kept by a socket that is bound to it and never listens. The server can bind beside it, as both say that they
    share the address; nobody else is given the port, neither another test process nor an outgoing connection. Without that a
    client that tries to reconnect to a stopped server may be given the very port that it calls, and reach itself.

    Args:
        names: The ports that are wanted, wherever they are free.
        above: Further ports, each so far above the first of `names`: some servers allow no other choice.
    """

    def __init__(self, names: Iterable[str], above: Mapping[str, int] = MappingProxyType({})) -> None:
        held = _together(list(names), above)
        self.numbers: Mapping[str, int] = MappingProxyType({name: each.getsockname()[1] for name, each in held.items()})
        self._held = list(held.values())
        if sys.platform != "linux":  # elsewhere nobody can bind beside us
            self.close()

    def close(self) -> None:
        """Give them back."""
        while self._held:
            self._held.pop().close()


def _together(names: list[str], above: Mapping[str, int]) -> dict[str, socket.socket]:
    """A socket bound to each of these ports; tries another first one while what must lie above it is taken, or is no port."""
    for tries_left in reversed(range(_TRIES)):
        held: dict[str, socket.socket] = {}
        try:
            for name in names:
                held[name] = _bound_socket()
            for name, distance in above.items():
                held[name] = _bound_socket(held[names[0]].getsockname()[1] + distance)
        except (OSError, OverflowError):
            for each in held.values():
                each.close()
            if not tries_left:
                raise
        else:
            return held
    raise AssertionError("unreachable")


def _bound_socket(port: int = 0) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((HOST, port))
    except (OSError, OverflowError):
        bound.close()
        raise
    return bound
