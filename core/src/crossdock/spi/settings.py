"""What a Broker is built from, what it reports while it lives, and the record a plugin hands to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import msgspec

from crossdock.spi.redaction import redact

API_VERSION: Final = 1
"""Version of this interface. A plugin states the one it was written for; another one is refused at load."""


class Clock(Protocol):
    """The only source of time for core and the embedded backends, so that tests can turn it."""

    def time_ms(self) -> int:
        """Wall-clock milliseconds since the Unix epoch."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back, from an arbitrary start."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds` of this clock; at once, after one turn of the loop, for 0 or less."""
        ...


class Connected(msgspec.Struct, frozen=True):
    """The Broker can be used (again)."""


class Disconnected(msgspec.Struct, frozen=True):
    """The connection is lost; the backend goes on trying, with jitter."""

    reason: str


class Blocked(msgspec.Struct, frozen=True):
    """The server is there but takes no messages."""

    reason: str


class Unblocked(msgspec.Struct, frozen=True):
    """The server takes messages again."""


class StateLost(msgspec.Struct, frozen=True):
    """The server lost definitions or messages it had; what was declared is declared again."""

    what: str


class ClockSkew(msgspec.Struct, frozen=True):
    """The server's clock differs from ours."""

    seconds: float
    """Server minus local."""


BrokerEvent = Connected | Disconnected | Blocked | Unblocked | StateLost | ClockSkew


def ignore(event: BrokerEvent) -> None:
    """Do nothing: the default for `BrokerSettings.report`."""


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a backend needs to build a Broker."""

    url: str
    """The broker URL as the user gave it, with its secrets and its query. Show it only through `spi.redact`."""
    namespace: str = "default"
    """Isolates everything: same grammar as a queue name."""
    clock: Clock
    """All time comes from here."""
    report: Callable[[BrokerEvent], None] = ignore
    """Called in the Broker's loop; returns quickly and does not raise."""
    options: Mapping[str, str] = {}
    """The URL's query, decoded. A backend refuses an option it does not know with `ConfigurationError`."""

    def __repr__(self) -> str:
        return f"BrokerSettings(url={redact(self.url)!r}, namespace={self.namespace!r})"


class BackendPlugin(msgspec.Struct, frozen=True, kw_only=True):
    """What a plugin's `crossdock_backend` hook returns."""

    name: str
    """For people: `SQLite`."""
    api_version: int
    """`API_VERSION` of the interface the plugin was written for, as a literal."""
    schemes: tuple[str, ...]
    """URL schemes served; each is also the name of an entry point in the group `crossdock.backends`."""
    create: Callable[[BrokerSettings], object]
    """Builds an unopened `Broker`. Imports the driver here, not at the top; raises `ConfigurationError` for a bad URL."""
    example_url: str
    """A URL to show to people."""
