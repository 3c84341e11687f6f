"""Target: what is put to the test, and what may be done to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlsplit

from crossdock.clock import SystemClock
from crossdock.plugins import create_broker, load_backend
from crossdock.spi import BackendPlugin, Broker, BrokerEvent, BrokerSettings, Capabilities, Clock


@runtime_checkable
class ServerControl(Protocol):
    """A server that the suite may stop and start. Methods block, and return when it is done."""

    def stop(self) -> None:
        """Stop it gently; its data stay."""

    def kill(self) -> None:
        """End it as SIGKILL does; its data stay."""

    def start(self) -> None:
        """Start it again, with the same data at the same address; return when it serves."""

    def pause(self) -> None:
        """Freeze it, as SIGSTOP does: connections stay and nothing answers."""

    def resume(self) -> None:
        """Let it go on."""


@dataclass(frozen=True)
class Target:
    """A broker to test, by its URL, as an application would use it.

    Everything the suite does happens in namespaces with names that begin with `t` and sixteen random digits.
    """

    url: str
    """The broker URL."""
    create: Callable[[BrokerSettings], Broker] | None = None
    """Builds a Broker. None: the installed backend that serves the URL's scheme does, as in an application."""
    server: ServerControl | None = None
    """Its server. None: scenarios that need to stop or freeze it are not run, and the report says so."""
    cut: Callable[[], None] | None = None
    """Cuts every connection to the server, as a firewall would. None: as above."""
    residue: Callable[[], Iterable[str]] | None = None
    """Names everything that is stored in the server or connected to it. It must be the same before and after each scenario."""
    real_time: bool = False
    """Use the system's clock even where the backend lives by the clock it is given."""
    late_after_a_kill: float = 0.0
    """Real seconds by which more a message may be late that fell due while its server was down, or starting."""
    patience: float = 10.0
    """Real seconds after which something that must happen counts as not happening."""

    @cached_property
    def plugin(self) -> BackendPlugin | None:
        """The backend that serves the URL; None if `create` builds Brokers. Raises `ConfigurationError` if there is none."""
        return load_backend(self.url.partition(":")[0]) if self.create is None else None

    def make_broker(self, namespace: str, clock: Clock, report: Callable[[BrokerEvent], None] = lambda event: None) -> Broker:
        """Build a Broker that is not open yet. Raises `ConfigurationError`."""
        if self.create is None:
            return create_broker(self.url, namespace=namespace, clock=clock, report=report)
        options = dict(parse_qsl(urlsplit(self.url).query, keep_blank_values=True))
        return self.create(BrokerSettings(url=self.url, namespace=namespace, clock=clock, report=report, options=options))

    @cached_property
    def capabilities(self) -> Capabilities:
        """What a Broker declares once it is open, asked once. Raises what `Broker.open` raises."""
        return asyncio.run(self._probe())

    @property
    def virtual(self) -> bool:
        """Whether time is in the hands of the suite: the backend lives by the clock that it is given."""
        return self.capabilities.clock == "client" and not self.real_time

    async def _probe(self) -> Capabilities:
        broker = self.make_broker("t0000000000000000", SystemClock())
        await broker.open()
        try:
            return broker.capabilities
        finally:
            await broker.close()
