"""What this backend can store, and how much of it in one request. Pure."""

from __future__ import annotations

from typing import Final

from crossdock.errors import EnqueueFailed, MessageTooLarge
from crossdock.spi import LEVELS, Message
from crossdock_redis.record import MAX_GENERATION

_LEVELS: Final = frozenset(map(int, LEVELS))
MAX_BODY: Final = 16 * 1024 * 1024
"""Bytes of a body. The server would take 512 MB, and stand still for all others while it does."""
LONGEST_MS: Final = 1000 * 365 * 86_400_000
"""Longest delay: a thousand years, in milliseconds. Due times stay far below 2^53, up to which a sorted set's scores are exact."""
BATCH: Final = 1000
"""Most messages in one request: a script's stack holds not many more arguments in one call."""
STORED_AT_ONCE: Final = 500
"""Most messages that one script stores for one queue: a thousand took the server 1.6 to 3 ms, in which it does nothing else."""
BATCH_BYTES: Final = 8 * 1024 * 1024
"""A request ends with the message that reaches this many bytes."""
_CLOCKS: Final = 1000
"""Milliseconds by which clocks may disagree about the longest delay."""
LOOK: Final = 0.15
"""Seconds after which a waiting receiver looks by itself. A server may end a BLPOP 0.1 s late, so in fact up to 0.25."""
MARGIN: Final = 0.05
"""Part of a lease by which its holder reckons it to end earlier than the server does."""


def objection(message: Message, now_ms: int = 0) -> EnqueueFailed | None:
    """Why this message cannot be stored, whatever is there already.

    Args:
        message: The message.
        now_ms: The server's clock; 0 where the message has no due time.
    """
    if (
        len(message.body) <= MAX_BODY
        and message.priority in _LEVELS
        and 0 <= message.generation <= MAX_GENERATION
        and message.delay_ms <= LONGEST_MS
        and message.eta_ms - now_ms <= LONGEST_MS + _CLOCKS
        and message.id.isascii()
    ):
        return None
    which = f"Message {message.id!r} for queue {message.queue!r}"
    if len(message.body) > MAX_BODY:
        return MessageTooLarge(
            f"{which} has a body of {len(message.body)} bytes; the Redis broker takes at most {MAX_BODY}.", message
        )
    if int(message.priority) not in _LEVELS:
        return EnqueueFailed(f"{which} has the priority {int(message.priority)}, which is no level.", message)
    if not 0 <= message.generation <= MAX_GENERATION:
        return EnqueueFailed(
            f"{which} has the generation {message.generation}; the Redis broker counts to {MAX_GENERATION}.", message
        )
    if not message.id.isascii():
        return EnqueueFailed(f"{which} has an id that breaks the rule: 1 to 64 letters, digits, '-' or '_'.", message)
    return EnqueueFailed(f"{which} is due in more than a thousand years, which is the longest delay here.", message)
