"""What a backend can do on the server it is connected to: one record, probed at `Broker.open()`.

Core, the conformance suite, the documentation's tables and the command line all read this record;
nothing branches on a backend's name.
"""

from __future__ import annotations

from enum import Enum
from typing import Literal

import msgspec

from crossdock.spi.values import State


class Support(Enum):
    """How an ability comes about."""

    NATIVE = "native"
    """The server does it."""
    EMULATED = "emulated"
    """The backend does it with other means; the note says how and at what cost."""
    UNSUPPORTED = "unsupported"
    """Asking for it raises `UnsupportedCapability`; the note says what would give it."""


class Survives(Enum):
    """A fault that an enqueued message survives once `enqueue` has returned."""

    PROCESS = "process"
    """Kill of the broker's process."""
    POWER = "power"
    """Power loss or operating system crash of one broker node."""
    NODE = "node"
    """Loss of one node for ever."""


class Ability(msgspec.Struct, frozen=True):
    """One ability and a sentence about it."""

    support: Support
    note: str = ""
    """How it is done, or what would give it."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a Broker and its server."""

    server: str
    """Product name, e.g. `SQLite`."""
    version: str
    """Server version as it reports it."""
    survives: frozenset[Survives]
    """The faults that an enqueue survives once it returned."""
    durability_note: str
    """What that rests on, and what is not survived, in a sentence."""
    clock: Literal["broker", "client"]
    """Whose clock decides when something is due and when a lease ends."""
    fencing: Ability
    """Refusing settlements from a lost lease."""
    takeover: float
    """Seconds after which a dead worker's messages are delivered again, at most: default lease + sweep."""
    delay: Ability
    """Messages with an eta or a delay."""
    delay_resolution: float
    """Seconds to which due times are kept."""
    delay_lateness: float
    """Seconds a due message may be late, at most, while a receiver with free slots waits."""
    delay_longest: float
    """Longest delay in seconds that is accepted."""
    deduplication: Ability
    """Storing an (id, generation) only once."""
    deduplication_window: float | None
    """Seconds for which an (id, generation) is remembered at least, also after the message is gone; 0.0 = exactly as long as
    the message is stored; None = not at all."""
    listable: frozenset[State]
    """States that `peek` can list."""
    removable: frozenset[State]
    """States that `remove` accepts."""
    purgeable: frozenset[State]
    """States that `purge` accepts; never LEASED."""
    by_id: Ability
    """`peek(ids=...)`; EMULATED = a scan."""
    list_queues: Ability
    """`stats(None)`: naming the queues that exist."""
    signals: Ability
    """Small control facts (`SupportsSignals`)."""
    max_body: int
    """Largest `Message.body` in bytes."""
