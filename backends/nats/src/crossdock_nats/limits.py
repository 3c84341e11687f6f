"""What this backend can store, and how much of it in one write. Pure."""

from __future__ import annotations

import re
from typing import Final

from crossdock.errors import EnqueueFailed, MessageTooLarge
from crossdock.spi import LEVELS, Message

_LEVELS: Final = frozenset(map(int, LEVELS))
MAX_GENERATION: Final = 2**63 - 1
LONGEST_MS: Final = 100 * 365 * 86_400_000
"""Longest delay: a hundred years, in milliseconds. The server reckons in 64 bits of nanoseconds."""
WINDOW: Final = 1000
"""Most messages in one write."""
WINDOW_BYTES: Final = 4 * 1024 * 1024
"""A write ends with the message that reaches this many bytes."""
_CLOCKS: Final = 1000
"""Milliseconds by which clocks may disagree about the longest delay."""


_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def is_id(text: str) -> bool:
    """Whether this can be the id of a message. Everything else has no place in a subject, least of all a wildcard."""
    return _ID.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether this can be the name of a queue."""
    return _NAME.fullmatch(text) is not None


def margin(lease: float) -> float:
    """Seconds by which a holder reckons its lease to end earlier than the server does."""
    return min(2.0, lease / 10)


def objection(message: Message, most: int, now_ms: int) -> EnqueueFailed | None:
    """Why this message cannot be stored, whatever is there already.

    Args:
        message: The message.
        most: Bytes that its body may have.
        now_ms: The server's clock.
    """
    if (
        len(message.body) <= most
        and message.priority in _LEVELS
        and 0 <= message.generation <= MAX_GENERATION
        and message.delay_ms <= LONGEST_MS
        and message.eta_ms - now_ms <= LONGEST_MS + _CLOCKS
        and is_id(message.id)
        and is_name(message.queue)
    ):
        return None
    which = f"Message {message.id!r} for queue {message.queue!r}"
    if len(message.body) > most:
        return MessageTooLarge(
            f"{which} has a body of {len(message.body)} bytes; with the max_payload of this NATS server it may have {most}.",
            message,
        )
    if int(message.priority) not in _LEVELS:
        return EnqueueFailed(f"{which} has the priority {int(message.priority)}, which is no level.", message)
    if not 0 <= message.generation <= MAX_GENERATION:
        return EnqueueFailed(
            f"{which} has the generation {message.generation}; the NATS broker counts to {MAX_GENERATION}.", message
        )
    if not is_id(message.id):
        return EnqueueFailed(f"{which} has an id that breaks the rule: 1 to 64 letters, digits, '-' or '_'.", message)
    if not is_name(message.queue):
        return EnqueueFailed(f"{which} goes to a queue whose name breaks the rule: 1 to 63 letters, digits, '-' or '_'.", message)
    return EnqueueFailed(f"{which} is due in more than a hundred years, which is the longest delay here.", message)
