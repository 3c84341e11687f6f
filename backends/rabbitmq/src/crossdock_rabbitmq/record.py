"""Records: a message as properties and headers, and back. Pure.

    message_id   the id
    priority     the level
    cd-gen       the generation, if it is not 0
    cd-n         hand-overs that were lost before the message was stored again, if there were any

A dead letter also has `cd-prio`, `cd-reason`, `cd-died` (ms), and, where they say something, `cd-task`, `cd-error`, `cd-fp` and `cd-story`.
"""

from __future__ import annotations

import time
from typing import Any, Final

from crossdock.spi import LEVELS, DeadLetter, Message, Priority, Reason
from crossdock_rabbitmq import wire

_LEVELS: Final = {int(level): level for level in LEVELS}
_LARGEST: Final = (1 << 63) - 1


def properties(message: Message, losses: int = 0) -> bytes:
    """The properties to store a message with."""
    if not losses and not message.generation:
        return wire.properties(message.id, message.priority, {})
    headers: dict[str, wire.Value] = {}
    if message.generation:
        headers["cd-gen"] = message.generation
    if losses:
        headers["cd-n"] = losses
    return wire.properties(message.id, message.priority, headers)


def message(header: bytes, body: bytes, queue: str, priority: Priority) -> tuple[Message, int]:
    """The message that came with this header, and how many of its hand-overs were lost.

    What another program has put into our queue is a message too, if only one without a generation; core says what it thinks of its body.
    """
    id, headers = _read(header)
    if not headers:
        return Message(id, queue, priority, body), 0
    generation = _number(headers, b"cd-gen")
    losses = _number(headers, b"cd-n") + _number(headers, b"x-delivery-count")
    return Message(id, queue, priority, body, 0, 0, generation), losses


def letter_properties(letter: DeadLetter) -> bytes:
    """The properties to store a dead letter with."""
    headers: dict[str, wire.Value] = {
        "cd-prio": int(letter.message.priority),
        "cd-reason": letter.reason.value,
        "cd-died": letter.died_ms,
    }
    if letter.message.generation:
        headers["cd-gen"] = letter.message.generation
    told = {"cd-task": letter.task, "cd-error": letter.error_type, "cd-fp": letter.fingerprint}
    headers.update({name: value for name, value in told.items() if value})
    if letter.story:
        headers["cd-story"] = letter.story
    return wire.properties(letter.message.id, letter.message.priority, headers)


def letter(header: bytes, body: bytes, queue: str) -> DeadLetter:
    """The dead letter that came with this header; one that the server has put there by itself is told by its `x-death`."""
    id, headers = _read(header)
    priority = _LEVELS.get(_number(headers, b"cd-prio", 3), Priority.NORMAL)
    deaths: Any = headers.get(b"x-death")
    if b"cd-reason" in headers:
        reason = _reason(_text(headers, b"cd-reason"))
        died_ms = _number(headers, b"cd-died")
    else:
        reason = _SERVER_REASONS.get(_text(headers, b"x-first-death-reason"), Reason.REJECTED)
        died_ms = _died_ms(deaths)
        priority = _level_of(deaths)
    generation = _number(headers, b"cd-gen")
    story: Any = headers.get(b"cd-story", b"")
    return DeadLetter(
        Message(id, queue, priority, body, 0, 0, generation),
        reason,
        died_ms,
        _text(headers, b"cd-task"),
        _text(headers, b"cd-error"),
        _text(headers, b"cd-fp"),
        story if isinstance(story, bytes) else b"",
    )


_SERVER_REASONS: Final = {"expired": Reason.EXPIRED, "delivery_limit": Reason.POISON}
"""What RabbitMQ calls a reason; "maxlen" and "rejected" are rejections."""


def _read(header: bytes) -> tuple[str, dict[bytes, Any]]:
    try:
        return wire.read_properties(header)
    except ValueError:
        return "", {}


def _reason(text: str) -> Reason:
    try:
        return Reason(text)
    except ValueError:
        return Reason.REJECTED


def _number(headers: dict[bytes, Any], name: bytes, default: int = 0) -> int:
    value = headers.get(name, default)
    return value if isinstance(value, int) and 0 <= value <= _LARGEST else default


def _text(headers: dict[bytes, Any], name: bytes) -> str:
    value = headers.get(name, b"")
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def _first_death(deaths: Any) -> Any:
    try:
        last = deaths[-1]
        return last if b"queue" in last else {}
    except (TypeError, IndexError, KeyError):  # nobody says what other programs write there
        return {}


def _died_ms(deaths: Any) -> int:
    seconds = _number(_first_death(deaths), b"time")
    return seconds * 1000 or time.time_ns() // 1_000_000


def _level_of(deaths: Any) -> Priority:
    """The level of the queue that a message died in, by the end of its name."""
    level = _text(_first_death(deaths), b"queue").rpartition(".p")[2]
    return _LEVELS.get(int(level), Priority.NORMAL) if level.isdecimal() else Priority.NORMAL
