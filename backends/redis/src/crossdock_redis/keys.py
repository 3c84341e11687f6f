"""The names of everything that is stored: where to look when reading the database by hand.

Every key of a queue begins with the same prefix, `cd:{namespace:queue}:`. The braces are a Redis Cluster's hash tag: they put all keys
of a queue into one slot, which is what lets one script change several of them at once. Behind the prefix:

    b           hash    id -> stored value (see `record`). Who is in it exists; whoever is not does not
    r9 r6 r3 r0 list    ids that are READY, by level, the next one first
    s           zset    level and id of what is SCHEDULED, by the instant it is due
    d           zset    ids of dead letters, by the instant of death
    l           set     ids that are LEASED
    g<batch>    set     those of them that one receive took, as far as they have not ended; the batch is that request's token
    x           zset    batches, by the instant their lease is over; once a part of a batch was extended, <batch>~<id> for each of it
    gh          hash    ghosts: ids that were removed while READY and are still in a list -> the level
    q           hash    settings of the queue and counters: named, lease_ms, max_ready, dead_max_age_ms, dead_max_count, dropped,
                        h<level> (what has left the head of a ready list), ghosts
    w9 w6 w3 w0 list    one token, if a receiver that waits for this level is to be woken
    u<lane>     list    a token by which one connection ends its own wait
    m<lane>     string  the last request of one connection and its answer, for 60 seconds

While an id is in `b`, it is in exactly one of r*, s, d and l. All instants are milliseconds since the Unix epoch, by the server's clock.
One key belongs to a namespace: `cd:{namespace}:queues`, the set of its queues' names.
"""

from __future__ import annotations

from binascii import crc_hqx
from typing import Final

LEVELS: Final = (9, 6, 3, 0)
"""Priority levels as they are in the names of keys, most urgent first."""

_FIXED: Final = ("b", "r9", "r6", "r3", "r0", "s", "d", "l", "x", "gh", "q", "w9", "w6", "w3", "w0")


def prefix(namespace: str, queue: str) -> str:
    """What the names of all keys of a queue begin with."""
    return f"cd:{{{namespace}:{queue}}}:"


def fixed(prefix: str) -> list[str]:
    """The keys of a queue that have no token in their names."""
    return [prefix + name for name in _FIXED]


def ready(prefix: str, level: int) -> str:
    """The list of the ids that are READY at this level."""
    return f"{prefix}r{level}"


def token(prefix: str, level: int) -> str:
    """The list in which a token waits for a receiver of this level."""
    return f"{prefix}w{level}"


def bell(prefix: str, lane: str) -> str:
    """The list by which a connection that waits is woken by its own side."""
    return f"{prefix}u{lane}"


def registry(namespace: str) -> str:
    """The set of the names of the namespace's queues."""
    return f"cd:{{{namespace}}}:queues"


def queue_and_level(token: str) -> tuple[str, int]:
    """Whose the list of a token is: the inverse of `token` for a namespace that is known."""
    return token[token.index(":", token.index("{")) + 1 : token.index("}")], int(token[-1])


def slot(key: str) -> int:
    """The slot of a Redis Cluster that a key is in: a checksum of what stands between its braces."""
    inside = key[key.index("{") + 1 : key.index("}")]
    return crc_hqx(inside.encode(errors="replace"), 0) % 16_384
