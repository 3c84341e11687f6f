"""Wire: the few frames of AMQP 0-9-1 that every message costs, as bytes. Pure.

A frame is its type, the channel, the length and then so many bytes, and an end byte. A message is three of them: the method, the header
with the properties, and the body in as many frames as it takes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

Value = str | bytes | int
"""What we write into header tables; other clients may write more."""

METHOD: Final = 1
HEADER: Final = 2
BODY: Final = 3
END: Final = 0xCE
HEARTBEAT: Final = b"\x08\0\0\0\0\0\0\xce"

# Methods, by class and number.
CONNECTION_CLOSE: Final = b"\0\x0a\0\x32"
BLOCKED: Final = b"\0\x0a\0\x3c"
UNBLOCKED: Final = b"\0\x0a\0\x3d"
CHANNEL_CLOSE: Final = b"\0\x14\0\x28"
DECLARE_OK: Final = b"\0\x32\0\x0b"
QOS_OK: Final = b"\0\x3c\0\x0b"
CONSUME_OK: Final = b"\0\x3c\0\x15"
CANCEL: Final = b"\0\x3c\0\x1e"
CANCEL_OK: Final = b"\0\x3c\0\x1f"
RETURN: Final = b"\0\x3c\0\x32"
DELIVER: Final = b"\0\x3c\0\x3c"
GET_OK: Final = b"\0\x3c\0\x47"
GET_EMPTY: Final = b"\0\x3c\0\x48"
ACK: Final = b"\0\x3c\0\x50"
NACK: Final = b"\0\x3c\0\x78"

_PUBLISH: Final = b"\0\x3c\0\x28\0\0"
_FRAME: Final = struct.Struct(">BHI")
_CONTENT: Final = struct.Struct(">BHIHHQ")
_TAGGED: Final = struct.Struct(">BHIHHQBB")
_HEADERS, _DELIVERY_MODE, _PRIORITY, _MESSAGE_ID = 0x2000, 0x1000, 0x0800, 0x0080
_PERSISTENT: Final = 2


def short(text: str) -> bytes:
    """A text of at most 255 bytes."""
    raw = text.encode()
    return bytes((len(raw),)) + raw


def _method(channel: int, payload: bytes) -> bytes:
    return _FRAME.pack(METHOD, channel, len(payload)) + payload + b"\xce"


# --- what we say -----------------------------------------------------------------------------------


def publish(channel: int, exchange: str, key: str) -> bytes:
    """The method of a mandatory publish: what no queue takes comes back."""
    return _method(channel, _PUBLISH + short(exchange) + short(key) + b"\x01")


def properties(message_id: str, priority: int, headers: Mapping[str, Value]) -> bytes:
    """The properties of a persistent message. Headers are written from nothing: a copied `x-death` has RabbitMQ 3.10 drop a message."""
    if not headers:
        return b"\x18\x80" + bytes((_PERSISTENT, priority)) + short(message_id)
    return (
        struct.pack(">H", _HEADERS | _DELIVERY_MODE | _PRIORITY | _MESSAGE_ID)
        + table(headers)
        + bytes((_PERSISTENT, priority))
        + short(message_id)
    )


def content(channel: int, properties: bytes, body: bytes, most: int) -> bytes:
    """Header and body of a message, `most` bytes of the body in a frame."""
    size = len(body)
    head = _CONTENT.pack(HEADER, channel, len(properties) + 12, 60, 0, size) + properties
    if not size:
        return head + b"\xce"
    if size <= most:
        return b"".join((head, b"\xce", _FRAME.pack(BODY, channel, size), body, b"\xce"))
    parts = [head, b"\xce"]
    for start in range(0, size, most):
        part = body[start : start + most]
        parts += (_FRAME.pack(BODY, channel, len(part)), part, b"\xce")
    return b"".join(parts)


def ack(channel: int, tag: int, *, multiple: bool = False) -> bytes:
    """An ack of one delivery, or of all up to it."""
    return _TAGGED.pack(METHOD, channel, 13, 60, 80, tag, multiple, END)


def nack(channel: int, tag: int) -> bytes:
    """A negative ack that puts the message back."""
    return _TAGGED.pack(METHOD, channel, 13, 60, 120, tag, 2, END)


def reject(channel: int, tag: int) -> bytes:
    """A reject that puts the message back."""
    return _TAGGED.pack(METHOD, channel, 13, 60, 90, tag, 1, END)


def get(channel: int, queue: str) -> bytes:
    """Ask for one message."""
    return _method(channel, b"\0\x3c\0\x46\0\0" + short(queue) + b"\0")


def qos(channel: int, prefetch: int) -> bytes:
    """How much a consumer that is made afterwards may hold."""
    return _method(channel, struct.pack(">HHIHB", 60, 10, 0, prefetch, 0))


def consume(channel: int, queue: str, tag: str) -> bytes:
    """Make a consumer."""
    return _method(channel, b"\0\x3c\0\x14\0\0" + short(queue) + short(tag) + b"\0\0\0\0\0")


def count(channel: int, queue: str) -> bytes:
    """Ask how many messages of a queue are READY. Where there is no such queue, the server closes the channel."""
    return _method(channel, b"\0\x32\0\x0a\0\0" + short(queue) + b"\x01\0\0\0\0")


def cancel(channel: int, tag: str) -> bytes:
    """End a consumer."""
    return _method(channel, b"\0\x3c\0\x1e" + short(tag) + b"\0")


def table(pairs: Mapping[str, Value]) -> bytes:
    """A table of fields."""
    parts: list[bytes] = []
    for name, value in pairs.items():
        match value:
            case int():
                parts += (short(name), b"l", struct.pack(">q", value))
            case str():
                raw = value.encode()
                parts += (short(name), b"S", struct.pack(">I", len(raw)), raw)
            case _:
                parts += (short(name), b"x", struct.pack(">I", len(value)), value)
    joined = b"".join(parts)
    return struct.pack(">I", len(joined)) + joined


# --- what we hear ----------------------------------------------------------------------------------


def message_count(declare_ok: bytes) -> int:
    """How many messages are READY, in the arguments of the answer to `count`."""
    at = 1 + declare_ok[0]
    return int.from_bytes(declare_ok[at : at + 4], "big")


def routing_key(deliver: bytes) -> str:
    """The routing key in the arguments of a delivery to a consumer."""
    at = 10 + deliver[0]  # behind the consumer, the tag and the flag
    at += 1 + deliver[at]  # behind the exchange
    return deliver[at + 1 : at + 1 + deliver[at]].decode(errors="replace")


def read_properties(header: bytes) -> tuple[str, dict[bytes, Any]]:
    """Message id and headers of the payload of a header frame, whoever wrote it.

    Raises:
        ValueError: It is none.
    """
    try:
        return _read_properties(header)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError("these are no properties of a message") from error


def _read_properties(header: bytes) -> tuple[str, dict[bytes, Any]]:
    flags = int.from_bytes(header[12:14], "big")
    at = 14
    if flags == 0x1880:  # ours, without headers
        return header[17 : 17 + header[16]].decode(), {}
    headers: dict[bytes, Any] = {}
    for bit in (0x8000, 0x4000):  # content type and encoding
        if flags & bit:
            at += 1 + header[at]
    if flags & _HEADERS:
        end = at + 4 + int.from_bytes(header[at : at + 4], "big")
        headers = _read_table(header, at + 4, end)
        at = end
    at += bool(flags & _DELIVERY_MODE) + bool(flags & _PRIORITY)
    for bit in (0x0400, 0x0200, 0x0100):  # correlation id, reply-to, expiration
        if flags & bit:
            at += 1 + header[at]
    if not flags & _MESSAGE_ID:
        return "", headers
    return header[at + 1 : at + 1 + header[at]].decode(), headers


def _read_table(raw: bytes, at: int, end: int) -> dict[bytes, Any]:
    pairs: dict[bytes, Any] = {}
    while at < end:
        name = raw[at + 1 : at + 1 + raw[at]]
        pairs[name], at = _read_field(raw, at + 1 + raw[at])
    return pairs


_NUMBERS: Final = {
    ord(kind): struct.Struct(f">{code}")
    for kind, code in {
        "t": "?",
        "b": "b",
        "B": "B",
        "s": "h",
        "u": "H",
        "I": "i",
        "i": "I",
        "l": "q",
        "L": "q",
        "T": "Q",
        "f": "f",
        "d": "d",
    }.items()
}


def _read_field(raw: bytes, at: int) -> tuple[Any, int]:
    kind = raw[at]
    at += 1
    if (number := _NUMBERS.get(kind)) is not None:
        return number.unpack_from(raw, at)[0], at + number.size
    if kind == 0x56:  # V, nothing
        return None, at
    if kind == 0x44:  # D, a decimal: nobody here wants one
        return None, at + 5
    end = at + 4 + int.from_bytes(raw[at : at + 4], "big")
    at += 4
    if end > len(raw):
        raise IndexError(end)
    if kind == 0x41:  # A, an array
        items: list[Any] = []
        while at < end:
            item, at = _read_field(raw, at)
            items.append(item)
        return items, end
    if kind == 0x46:  # F, a table
        return _read_table(raw, at, end), end
    return raw[at:end], end  # S, x: texts and bytes
