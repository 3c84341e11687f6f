"""The stored value: what stands for one message or dead letter in the hash `b`. Pure; the scripts read the same sixteen bytes.

    byte 1        level, an ASCII digit: 9, 6, 3 or 0
    byte 2        1 where the next field but one is a due time that the message has, else 0
    bytes 3-4     hand-overs that were lost since it was stored, at most 65,535
    bytes 5-8     generation
    bytes 9-16    milliseconds since the Unix epoch: when it was, or will be, due; when it was stored, if it had no due time
    then          the body; of a dead letter, MessagePack: [body, reason, died_ms, task, error_type, fingerprint, story]

Numbers are unsigned and big-endian.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from crossdock.spi import DeadLetter, Message, Priority, Reason

_HEAD: Final = struct.Struct(">BBHIQ")
MAX_GENERATION: Final = 2**32 - 1
MAX_LOST: Final = 2**16 - 1
_DIGIT: Final = {level: ord(str(int(level))) for level in Priority}
_LEVEL: Final = {digit: level for level, digit in _DIGIT.items()}


class _Letter(msgspec.Struct, frozen=True, array_like=True):
    body: bytes
    reason: Reason
    died_ms: int
    task: str
    error_type: str
    fingerprint: str
    story: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Letter).decode


def pack(message: Message, due_ms: int, now_ms: int) -> bytes:
    """The value of a message.

    Args:
        message: The message.
        due_ms: When it is due; 0 where it has no due time, or one that the script puts in.
        now_ms: The server's clock.
    """
    return _HEAD.pack(_DIGIT[message.priority], due_ms > 0, 0, message.generation, due_ms or now_ms) + message.body


def pack_letter(letter: DeadLetter, delivery_count: int, now_ms: int) -> bytes:
    """The value of a dead letter."""
    message = letter.message
    eta = message.eta_ms
    head = _HEAD.pack(
        _DIGIT[message.priority],
        1 if eta > 0 else 0,
        min(delivery_count, MAX_LOST),
        message.generation,
        eta if eta > 0 else now_ms,
    )
    body = _Letter(message.body, letter.reason, letter.died_ms, letter.task, letter.error_type, letter.fingerprint, letter.story)
    return head + _encode(body)


def unpack(id: str, queue: str, value: bytes) -> tuple[Message, int]:
    """The message of a value and how many hand-overs were lost."""
    digit, has_eta, lost, generation, since = _HEAD.unpack_from(value)
    return Message(id, queue, _LEVEL[digit], value[16:], since if has_eta else 0, 0, generation), lost


def unpack_letter(id: str, queue: str, value: bytes) -> tuple[DeadLetter, int]:
    """The dead letter of a value and how often its message was delivered."""
    digit, has_eta, count, generation, since = _HEAD.unpack_from(value)
    letter = _decode(memoryview(value)[16:])
    message = Message(id, queue, _LEVEL[digit], letter.body, since if has_eta else 0, 0, generation)
    return (
        DeadLetter(message, letter.reason, letter.died_ms, letter.task, letter.error_type, letter.fingerprint, letter.story),
        count,
    )
