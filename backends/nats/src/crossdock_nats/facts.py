"""Facts: what a server can promise, by its version and by how its streams are kept. Pure."""

from __future__ import annotations

from typing import Final

from crossdock.spi import Ability, Capabilities, QueueSpec, State, Support, Survives
from crossdock_nats.address import Address
from crossdock_nats.limits import LONGEST_MS
from crossdock_nats.record import LETTER_ROOM
from crossdock_nats.topology import Features

SWEEP: Final = 0.5
"""Seconds after the end of a lease within which its message is delivered again."""
LATENESS: Final = 0.25
"""Seconds a due message may be late: the server looks at its schedules four times a second."""

_NATIVE: Final = Ability(Support.NATIVE)


def capabilities(version: str, max_payload: int, address: Address) -> Capabilities:
    """What a Broker on this server can promise."""
    features = Features.of(version)
    survives, note = durability(features, address)
    at_rest = frozenset({State.READY, State.SCHEDULED, State.DEAD})
    return Capabilities(
        server="NATS JetStream",
        version=version,
        survives=survives,
        durability_note=note,
        clock="broker",
        fencing=Ability(
            Support.EMULATED,
            "By a deadline that each holder keeps; and whoever takes a message over has it stored anew, so that nothing a late holder "
            "says means anything to the server.",
        ),
        takeover=QueueSpec("").lease + SWEEP,
        delay=_NATIVE
        if features.schedules
        else Ability(Support.EMULATED, "Brokers that receive move what falls due. NATS 2.12 has schedules of its own."),
        delay_resolution=0.001,
        delay_lateness=LATENESS,
        delay_longest=LONGEST_MS / 1000,
        deduplication=_NATIVE
        if features.schedules
        else Ability(
            Support.EMULATED,
            "By a look before each enqueue; the same id enqueued twice at the same moment with different levels or due times may be "
            "stored twice. NATS 2.12 is exact.",
        ),
        deduplication_window=0.0,
        listable=at_rest,
        removable=at_rest if features.pauses else at_rest - {State.READY},
        purgeable=at_rest,
        by_id=_NATIVE,
        list_queues=_NATIVE,
        signals=Ability(Support.UNSUPPORTED, "The NATS broker brings no signals yet."),
        max_body=max_payload - LETTER_ROOM,
    )


def durability(features: Features, address: Address) -> tuple[frozenset[Survives], str]:
    """The faults that a stored message survives, and a sentence on what that rests on."""
    replicated = address.replicas >= 3
    survives: set[Survives] = set()
    if address.storage == "memory":
        kept = "in memory"
        lost = "what a server holds is gone when its process ends"
    else:
        survives.add(Survives.PROCESS)
        kept = "in files"
        lost = (
            "power loss may take what was acknowledged in the last two minutes, which is the default sync_interval of the server: "
            + (
                "set sync_interval: always, or replicas=3 on a cluster"
                if features.version >= (2, 10)
                else "NATS 2.10 can sync always, and replicas=3 on a cluster survives the loss of a server"
            )
        )
    if replicated:
        survives |= {Survives.PROCESS, Survives.POWER, Survives.NODE}
        note = (
            f"New streams are kept {kept} on {address.replicas} servers, and a majority has a message before it is answered. "
            f"Of a single server, {lost}."
        )
    else:
        servers = "one server" if address.replicas == 1 else f"{address.replicas} servers"
        note = f"New streams are kept {kept} on {servers}: {lost}."
    return frozenset(survives), note
