"""What every server for tests can do, wherever it came from."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Set
from typing import Self

_POLL = 0.02


class Server(ABC):
    """A broker that tests may start, stop, kill, freeze and empty.

    All methods are synchronous, bounded in time and may be called from any thread; where an event loop must go on meanwhile, call
    them through `asyncio.to_thread`. Ours are for Redis, Valkey, NATS and RabbitMQ; the author of a backend for another broker
    writes a subclass.

    Every method that changes the server raises `ServerFailed` if that does not succeed in time, with the end of the server's log,
    and `NotControllable` if `controllable` is False.
    """

    kind: str
    """What it is: "redis", "valkey", "nats", "rabbitmq", or a word of yours."""

    version: str
    """The version that the server itself told; before it was started, the one that it was found under."""

    url: str
    """The broker URL to give to a backend. Stays the same across restarts."""

    controllable: bool = True
    """False for a server that was given by its URL: only `ping`, `residue` and `close` are possible."""

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether its process lives; also True while it is paused."""

    @abstractmethod
    def start(self) -> None:
        """Start it on the data it has, and return when it answers. Nothing happens if it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it in order, and return when all its processes are gone. Data, port and URL stay. Nothing happens if it does not run."""

    @abstractmethod
    def kill(self) -> None:
        """End all its processes at once, by SIGKILL. Data, port and URL stay. Nothing happens if it does not run."""

    @abstractmethod
    def pause(self) -> None:
        """Freeze all its processes: connections stay open and nothing answers."""

    @abstractmethod
    def resume(self) -> None:
        """Let it go on after `pause`, and return when it answers."""

    def restart(self, *, kill: bool = False) -> None:
        """End it, in order or by `kill`, and start it again on the same data and port."""
        if kill:
            self.kill()
        else:
            self.stop()
        self.start()

    @abstractmethod
    def wipe(self) -> None:
        """End it, remove all its data, and start it again on the same port."""

    @abstractmethod
    def close(self) -> None:
        """End it for good and remove its data. May be called again, also after the server died. A server given by its URL stays."""

    @abstractmethod
    def ping(self, timeout: float = 1.0) -> bool:
        """Whether it answers in its own protocol within `timeout` seconds, and is ready to work."""

    @abstractmethod
    def residue(self) -> set[str]:
        """The name of each thing stored in it or connected to it: `key 0 NAME`, `stream NAME`, `consumer STREAM NAME`,
        `queue VHOST NAME`, `exchange VHOST NAME`, `connection NUMBER ADDRESS NAME`, ... What the server brings by itself and the
        connection that asks are left out.

        Raises:
            ServerFailed: The server does not answer.
            NotControllable: It was given by its URL and cannot be asked without more; the text says what to set.
        """

    def new_residue(self, before: Set[str], *, within: float = 5.0) -> set[str]:
        """What `residue()` shows more than `before` had, once it shows nothing more or `within` seconds have passed.

        Servers notice a moment later that a client has gone, and delete some things in the background.
        """
        deadline = time.monotonic() + within
        while (new := self.residue() - before) and time.monotonic() < deadline:
            time.sleep(_POLL)
        return new

    def log_tail(self, lines: int = 20) -> str:
        """The last lines that the server wrote; empty if they cannot be had."""
        return ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{self.kind} {self.version} for tests>"
