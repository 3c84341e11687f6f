"""One Redis or Valkey that is set up as a test needs it, and several that are one broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from crossdock_conformance.servers import ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.keeper import descendants
from crossdock_conformance.servers.local import LocalServer
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Redis, Setup, Valkey

_RECIPES = {recipe.kind: recipe for recipe in (Redis, Valkey)}
_ANSWER_WITHIN = 10.0
_POLL = 0.02


class Node(LocalServer):
    """A server of its own, running. It is what `start_server` gives, and can be asked anything.

    Raises:
        ServerFailed: It does not start; shows the end of its log.
    """

    def __init__(self, source: BinarySource, setup: Setup | None = None, folder: Path | None = None) -> None:
        self._redis = _RECIPES[source.kind](setup)
        super().__init__(self._redis, source.binary, source.version, folder)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def port(self) -> int:
        """Its port on loopback."""
        return self._ports.numbers["client"]

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{HOST}:{self.port}"

    def call(self, *command: str | int) -> Any:
        """The answer to one command, asked with all rights: bytes, a whole number, None or a list of these.

        Raises:
            OSError: It does not answer.
            ServerFailed: It answers with an error.
        """
        with self._redis.connection(self._reach, _ANSWER_WITHIN) as connection:
            return connection.call(*map(str, command))

    def info(self, section: str) -> dict[str, str]:
        """One section of INFO. Raises as `call` does."""
        return fields(self.call("INFO", section))

    def follow(self, master: Node | None) -> None:
        """Become a replica of this server, or a master, and remain so after a restart. Raises as `call` does."""
        self.call("REPLICAOF", *((HOST, master.port) if master else ("NO", "ONE")))
        self.call("CONFIG", "REWRITE")

    @property
    def paused(self) -> bool:
        """Whether it is frozen."""
        return self._paused

    @property
    def processes(self) -> list[int]:
        """Every process that is there because of it, first the one that ends it with ours."""
        keeper = self._processes._keeper.pid  # pyright: ignore[reportPrivateUsage]
        return [keeper, *descendants(keeper)]

    @property
    def is_replica_in_step(self) -> bool:
        """Whether it is a replica whose master has handed over all it had, and that has it in its own file as well: one that is
        made a master and killed before that loses it."""
        told = self.info("replication")
        if told["role"] != "slave" or told["master_link_status"] != "up":
            return False
        told = self.info("persistence")
        return told["aof_rewrite_in_progress"] == told["aof_rewrite_scheduled"] == "0"

    @property
    def master_port(self) -> int | None:
        """The port of the master that it follows; None if it is a master."""
        told = self.info("replication").get("master_port")
        return None if told is None else int(told)

    def __repr__(self) -> str:
        return f"<{self.kind} {self.version} at {self.address}>"


class Group:
    """Servers that are one broker together: it is stopped, killed and frozen as a whole, each of `nodes` also by itself."""

    url: str
    """The broker URL to give to a backend."""
    serves_within: ClassVar[float] = 30.0
    """Seconds until it must serve."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    @property
    def running(self) -> Sequence[Node]:
        """The nodes that run, also those that are frozen."""
        return [node for node in self.nodes if node.running]

    @property
    def awake(self) -> Sequence[Node]:
        """The nodes that run and are not frozen."""
        return [node for node in self.running if not node.paused]

    @property
    def serves(self) -> bool:
        """Whether everything that is awake is in step with the rest. Raises OSError where one does not answer."""
        raise NotImplementedError

    @property
    def is_as_made(self) -> bool:
        """Whether everything runs, serves and has the part that it had at first; the data and settings may be others."""
        return all(node.running and not node.paused for node in self.nodes) and self.serves

    def start(self) -> None:
        """Start what does not run, let go on what is frozen, and return when it serves: all is well then, whatever a test left."""
        for node in self.nodes:
            if node.running:
                node.resume()
            else:
                node.start()
        self.wait_until_it_serves()

    def stop(self) -> None:
        """End all in order; their data stay."""
        for node in self.running:
            node.resume()  # a master waits for its replicas
        for node in self.nodes:
            node.stop()

    def kill(self) -> None:
        """Kill all; their data stay."""
        for node in self.nodes:
            node.kill()

    def pause(self) -> None:
        """Freeze all that run."""
        for node in self.running:
            node.pause()

    def resume(self) -> None:
        """Let all go on that run, and return when it serves."""
        for node in self.running:
            node.resume()
        self.wait_until_it_serves()

    def close(self) -> None:
        """End all for good, and remove their data."""
        for node in self.nodes:
            node.close()

    def residue(self) -> set[str]:
        """See `Server.residue`; each name begins with the port of its node. Connections among the nodes are left out."""
        return {f"{node.port} {name}" for node in self.running for name in node.residue()}

    def wait_until_it_serves(self) -> None:
        """Return when it serves. Raises ServerFailed if it does not in time."""
        wait_until(lambda: self.serves, f"{type(self).__name__} of {self.nodes} serves", self.serves_within)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_until(fact: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Wait for a fact. A server that does not answer meanwhile is asked again.

    Raises:
        ServerFailed: It did not come true in time; says `what`.
    """
    deadline = time.monotonic() + seconds
    while True:
        reason = ""
        try:
            if fact():
                return
        except OSError as error:
            reason = f": {error}"
        if time.monotonic() > deadline:
            raise ServerFailed(f"not true within {seconds:g} s: {what}{reason}")
        time.sleep(_POLL)


def fields(told: bytes) -> dict[str, str]:
    """The `name:value` lines of INFO and CLUSTER INFO."""
    return dict(line.split(":", 1) for line in told.decode().splitlines() if ":" in line)
