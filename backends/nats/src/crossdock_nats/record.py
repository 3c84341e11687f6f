"""Records: how a message and a dead letter are stored, and frames of the protocol around them. Pure.

What we have to know of a message beyond its subject is in headers, only where it is not the default:

    cd-g    generation
    cd-n    hand-overs lost before it was stored under its present sequence
    cd-p    level, where the subject does not say it: of what is SCHEDULED or DEAD
    cd-due  due time of what is SCHEDULED, in milliseconds
    cd-at   of a dead letter: how many bytes its message's body has; the letter follows it in the payload, as a MessagePack array

The payload is the body, unchanged.
"""

from __future__ import annotations

import time
from typing import Final, NamedTuple

import msgspec

from crossdock.spi import DeadLetter, Entry, Message, Priority, Reason, State
from crossdock_nats.names import Subjects

EARLY_MS: Final = 40
"""Milliseconds by which a schedule is set before its due time: the server is never earlier than it was told, and up to 250 late."""
LETTER_ROOM: Final = 24 * 1024
"""Bytes that a dead letter may need beside its message's body, headers and all."""

_HEAD: Final = b"NATS/1.0\r\n"


class Stored(NamedTuple):
    """A message as the server has it."""

    subject: bytes
    seq: int
    time_ms: float
    """When it was stored, by the server's clock."""
    headers: bytes
    data: bytes


class _Letter(msgspec.Struct, array_like=True, frozen=True):
    reason: str
    died_ms: int
    task: str
    error_type: str
    fingerprint: str
    story: bytes
    count: int


_letter = msgspec.msgpack.Decoder(_Letter)


# --- frames ----------------------------------------------------------------------------------------


def publish(subject: bytes, reply: bytes, headers: bytes, body: bytes, mark: bytes = b"") -> bytes:
    """A frame that has a message stored.

    Args:
        subject: Where.
        reply: Where the answer is to go.
        headers: Lines, each with its end.
        body: The payload.
        mark: What the server knows a repetition of this write by; the default is the reply, which is drawn for this write alone.
    """
    head = b"%sNats-Msg-Id: %s\r\n%s\r\n" % (_HEAD, mark or reply, headers)
    size = len(head)
    return b"HPUB %s %s %d %d\r\n%s%s\r\n" % (subject, reply, size, size + len(body), head, body)


def plain(subject: bytes, reply: bytes, body: bytes) -> bytes:
    """A frame without headers."""
    return b"PUB %s %s %d\r\n%s\r\n" % (subject, reply, len(body), body)


def is_own(stored: Stored, mark: bytes) -> bool:
    """Whether this is what the frame with this mark has stored."""
    return b"\r\nNats-Msg-Id: %s\r\n" % mark in stored.headers


# --- headers ---------------------------------------------------------------------------------------


def expects(seq: int, pattern: bytes | None = None) -> bytes:
    """The condition that the last message of a pattern, or of the subject itself, has this sequence; 0 = there is none."""
    own = b"Nats-Expected-Last-Subject-Sequence: %d\r\n" % seq
    return own if pattern is None else b"%sNats-Expected-Last-Subject-Sequence-Subject: %s\r\n" % (own, pattern)


def follows(seq: int) -> bytes:
    """The condition that the last message of the whole stream has this sequence."""
    return b"Nats-Expected-Last-Sequence: %d\r\n" % seq


def generation(message: Message) -> bytes:
    """The header of its generation."""
    return b"cd-g: %d\r\n" % message.generation if message.generation else b""


def losses(count: int) -> bytes:
    """The header of hand-overs lost before."""
    return b"cd-n: %d\r\n" % count if count else b""


def due(message: Message, due_ms: int) -> bytes:
    """The headers of what has to wait."""
    return b"cd-p: %d\r\ncd-due: %d\r\n" % (message.priority, due_ms)


def schedule(due_ms: int, target: bytes) -> bytes:
    """The headers by which the server moves a message to its level when it is due."""
    seconds, ms = divmod(due_ms - EARLY_MS, 1000)
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return b"Nats-Schedule: @at %s.%03dZ\r\nNats-Schedule-Target: %s\r\n" % (at.encode(), ms, target)


def number(headers: bytes, name: bytes) -> int:
    """The value of one of our headers; 0 if it is not there."""
    at = headers.find(b"\r\n" + name + b": ")
    if at < 0:
        return 0
    at += len(name) + 4
    return int(headers[at : headers.index(b"\r\n", at)])


def field(headers: bytes, name: bytes) -> bytes:
    """The value of any header; empty if it is not there."""
    at = headers.find(b"\r\n" + name + b": ")
    if at < 0:
        return b""
    at += len(name) + 4
    return headers[at : headers.index(b"\r\n", at)]


def status(headers: bytes) -> int:
    """The status of an answer that is nothing but that, such as 503 where nobody is there; 0 if it is none."""
    return int(headers[9:12]) if headers[9:12].isdigit() else 0


# --- messages and letters --------------------------------------------------------------------------


def write_letter(message: Message, letter: DeadLetter, count: int) -> tuple[bytes, bytes]:
    """The headers and payload of a dead letter.

    Args:
        message: The message that died, as the letter has it.
        letter: The letter.
        count: How often it was delivered.
    """
    rest = msgspec.msgpack.encode(
        _Letter(letter.reason.value, letter.died_ms, letter.task, letter.error_type, letter.fingerprint, letter.story, count)
    )
    headers = b"cd-p: %d\r\ncd-at: %d\r\n%s" % (message.priority, len(message.body), generation(message))
    return headers, message.body + rest


def read(subjects: Subjects, queue: str, stored: Stored, state: State) -> Entry:
    """A stored message as a listing shows it."""
    place, id, key = subjects.read(stored.subject)
    level = number(stored.headers, b"cd-p") if state in (State.SCHEDULED, State.DEAD) else int(place)
    of_generation = number(stored.headers, b"cd-g")
    if state is not State.DEAD:
        eta_ms = (number(stored.headers, b"cd-due") or key) if state is State.SCHEDULED else 0
        message = Message(id, queue, Priority(level), stored.data, eta_ms=eta_ms, generation=of_generation)
        return Entry(message, state)
    size = number(stored.headers, b"cd-at")
    message = Message(id, queue, Priority(level), stored.data[:size], generation=of_generation)
    told = _letter.decode(stored.data[size:])
    letter = DeadLetter(message, Reason(told.reason), told.died_ms, told.task, told.error_type, told.fingerprint, told.story)
    return Entry(message, state, told.count, letter)


def died_ms(headers: bytes, data: bytes) -> int:
    """When the message of a dead letter died."""
    return _letter.decode(data[number(headers, b"cd-at") :]).died_ms
