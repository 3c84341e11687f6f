"""Everything a backend author imports, and all they import from crossdock.

Stability: `API_VERSION` names this interface. Within a version, names and meanings stay; a plugin written for another version is
refused at load. This package depends on nothing else of crossdock but `crossdock.errors`.

Start at `Broker` (the twelve verbs), then `values` (what they take and return), `Capabilities` (what a backend declares) and
`BackendPlugin` (how it is found). `urls` reads what the broker URLs of servers have in common.
"""

from crossdock.spi import urls
from crossdock.spi.broker import Broker, SupportsErase
from crossdock.spi.capabilities import Ability, Capabilities, Support, Survives
from crossdock.spi.hooks import hookimpl
from crossdock.spi.redaction import redact
from crossdock.spi.settings import (
    API_VERSION,
    BackendPlugin,
    Blocked,
    BrokerEvent,
    BrokerSettings,
    Clock,
    ClockSkew,
    Connected,
    Disconnected,
    StateLost,
    Unblocked,
)
from crossdock.spi.values import (
    LEVELS,
    MAX_STORY_BYTES,
    Ack,
    Cursor,
    Dead,
    DeadLetter,
    Delivery,
    Entry,
    Lane,
    Message,
    Nack,
    Page,
    Priority,
    QueueSpec,
    QueueStats,
    Reason,
    Refusal,
    Replay,
    Settlement,
    State,
)

__all__ = [
    "API_VERSION",
    "LEVELS",
    "MAX_STORY_BYTES",
    "Ability",
    "Ack",
    "BackendPlugin",
    "Blocked",
    "Broker",
    "BrokerEvent",
    "BrokerSettings",
    "Capabilities",
    "Clock",
    "ClockSkew",
    "Connected",
    "Cursor",
    "Dead",
    "DeadLetter",
    "Delivery",
    "Disconnected",
    "Entry",
    "Lane",
    "Message",
    "Nack",
    "Page",
    "Priority",
    "QueueSpec",
    "QueueStats",
    "Reason",
    "Refusal",
    "Replay",
    "Settlement",
    "State",
    "StateLost",
    "Support",
    "SupportsErase",
    "Survives",
    "Unblocked",
    "hookimpl",
    "redact",
    "urls",
]
