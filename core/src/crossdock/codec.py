"""Envelope <-> bytes: what core reads in a message's body, and what it refuses.

The wire format is documented in `docs/reference/wire-format.md`. We write MessagePack; we read MessagePack and JSON, told apart by
the first byte. Limits are checked before anything is decoded.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

import msgspec

from crossdock.errors import ConfigurationError, Undecodable, UnsupportedVersion
from crossdock.retry import Backoff

WIRE_VERSION: Final = 1
"""Major version of the envelope. Fields may be added within it; readers keep fields they do not know."""
MAX_BODY: Final = 1024 * 1024
"""Largest body in bytes that is enqueued."""
MAX_DEPTH: Final = 64
"""Deepest nesting of lists and maps that is enqueued or decoded, the envelope itself included."""
MAX_ELEMENTS: Final = 100_000
"""Most values and keys in a body that is enqueued."""
HISTORY_BYTES: Final = 64 * 1024
"""By how much a body may outgrow `MAX_BODY` after it was enqueued: each failed attempt adds to its history."""
HISTORY_ELEMENTS: Final = 1000
"""Likewise for `MAX_ELEMENTS`."""

_JSON_START = frozenset([b"{", b" ", b"\t", b"\r", b"\n"])
_NO_ARGUMENTS = msgspec.Raw(b"\x80")
_NO_JSON_ARGUMENTS = msgspec.Raw(b"{}")

# Every number is bounded, so that it can be raised by one and written again in either format.
TaskName = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_999)]
"""Since the Unix epoch, up to the year 9999."""
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e10)]


class Failure(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One failed attempt, as the envelope carries it to the next."""

    attempt: PositiveInt
    at_ms: Milliseconds
    error_type: str
    text: str = ""
    worker: str = ""


class Envelope(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, rename={"version": "v"}):
    """What a message's body says."""

    version: PositiveInt
    task: TaskName
    args: msgspec.Raw = _NO_ARGUMENTS
    """Arguments by parameter name, still encoded; each task has its own decoder."""
    enqueued_ms: Milliseconds = 0
    attempt: PositiveInt = 1
    """1 + failures recorded so far."""
    expires_ms: Milliseconds = 0
    """Useless after this instant; 0 = never."""
    timeout: Seconds | None = None
    retry: Backoff | None = None
    headers: dict[str, str] = {}
    failures: list[Failure] = []
    """Oldest first; of many, the first and the latest are kept."""
    unknown_since_ms: Milliseconds = 0
    """When a worker first had no task of this name; 0 = never."""
    replays: Count = 0
    """How often it came back from the dead letters."""


class _VersionOnly(msgspec.Struct, rename={"version": "v"}):
    version: int


_encode = msgspec.msgpack.Encoder().encode
_decode_msgpack = msgspec.msgpack.Decoder(Envelope).decode
_decode_json = msgspec.json.Decoder(Envelope).decode


def encode(envelope: Envelope) -> bytes:
    """Return the MessagePack form."""
    return _encode(envelope)


def is_json(body: bytes) -> bool:
    """Tell whether a body is written in JSON rather than MessagePack."""
    return body[:1] in _JSON_START


def decode(body: bytes) -> Envelope:
    """Read a body.

    Raises:
        UnsupportedVersion: It was written by a newer major version.
        Undecodable: Anything else is wrong with it.
    """
    check_limits(body)
    json = body[:1] in _JSON_START
    try:
        envelope = _decode_json(body) if json else _decode_msgpack(body)
    except (msgspec.MsgspecError, ConfigurationError, ValueError, RecursionError) as error:
        _refuse_newer_version(body)
        raise Undecodable(f"the body is no envelope: {error}") from error
    if envelope.version > WIRE_VERSION:
        _refuse_newer_version(body)
    if json and envelope.args is _NO_ARGUMENTS:
        return msgspec.structs.replace(envelope, args=_NO_JSON_ARGUMENTS)
    return envelope


def _refuse_newer_version(body: bytes) -> None:
    try:
        version = _loads(body, _VersionOnly).version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return
    if version > WIRE_VERSION:
        raise UnsupportedVersion(
            f"the envelope has version {version}; this crossdock reads up to {WIRE_VERSION}: upgrade the worker"
        )


def _loads(body: bytes, type: Any) -> Any:
    return msgspec.json.decode(body, type=type) if is_json(body) else msgspec.msgpack.decode(body, type=type)


def revise(body: bytes, **changes: Any) -> bytes:
    """Return the body with some envelope fields changed. All else stays, byte for byte, fields we do not know included.

    Args:
        body: A decodable body; its format, MessagePack or JSON, is kept.
        changes: Wire names and new values.
    """
    dumps = msgspec.json.encode if is_json(body) else msgspec.msgpack.encode
    fields: dict[str, msgspec.Raw]
    try:
        fields = _loads(body, dict[str, msgspec.Raw])
    except UnicodeDecodeError:  # the name of some field is no text, so it is nobody's: only the known ones are kept
        fields = _loads(dumps(decode(body)), dict[str, msgspec.Raw])
    for name, value in changes.items():
        fields[name] = msgspec.Raw(dumps(value))
    return dumps(fields)


def arguments(body: bytes) -> dict[str, Any]:
    """Return the arguments as plain values, for people and for changing them. Raises `CodecError`."""
    envelope = decode(body)
    loads = msgspec.json.decode if is_json(body) else msgspec.msgpack.decode
    try:
        return loads(envelope.args, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise Undecodable(f"the arguments of task {envelope.task!r} are no map of names to values: {error}") from error


def describe(body: bytes) -> dict[str, Any]:
    """Return all of an envelope as plain values, for people. Raises `CodecError`."""
    envelope = decode(body)
    plain: dict[str, Any] = {
        field: msgspec.to_builtins(getattr(envelope, field)) for field in envelope.__struct_fields__ if field != "args"
    }
    return {"task": plain.pop("task"), "arguments": arguments(body), **plain}


# --- limits -------------------------------------------------------------------------------------

_CONTAINERS = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])
_NOT_CONTAINERS = bytes(set(range(256)) - set(_CONTAINERS))
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# A string that does not end reaches to the end, and the quantifiers give nothing back: no input takes more than one pass.
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_JSON_EMPTY = re.compile(rb"[\[{][ \t\r\n]*+[\]}]")


def check_limits(body: bytes, *, enqueued: bool = False) -> None:
    """Refuse a body that is too large, too deep or has too many elements, without decoding it.

    The common case costs one pass at C speed: it counts bytes that *could* open a list or map, which is never less than the depth,
    and only a body that could be over a limit is walked.

    Args:
        body: What to check.
        enqueued: Whether it is about to be enqueued; else it may have grown by its history since.

    Raises:
        Undecodable: The text names the limit.
    """
    size = len(body)
    json = body[:1] in _JSON_START
    if not json and size <= MAX_ELEMENTS and len(body.translate(None, _NOT_CONTAINERS)) <= MAX_DEPTH:
        return
    max_size, max_elements = MAX_BODY, MAX_ELEMENTS
    if not enqueued:
        max_size, max_elements = MAX_BODY + HISTORY_BYTES, MAX_ELEMENTS + HISTORY_ELEMENTS
    if size > max_size:
        raise Undecodable(f"the body has {size:,} bytes, the limit is {max_size:,}")
    if json and size <= max_elements and body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth, elements = _measure_json(body) if json else _measure_msgpack(body, max_elements)
    if depth > MAX_DEPTH:
        raise Undecodable(f"the body is nested {depth:,} or more levels deep, the limit is {MAX_DEPTH}")
    if elements > max_elements:
        raise Undecodable(f"the body has {elements:,} or more elements, the limit is {max_elements:,}")


def _measure_json(body: bytes) -> tuple[int, int]:
    """Return (depth, elements) of a JSON text; elements are counted by their separators."""
    bare = _JSON_STRING.sub(b"0", body)
    depth = deepest = 0
    for byte in bare.translate(None, _NOT_BRACKETS):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    separators = sum(bare.count(byte) for byte in (b",", b":", b"[", b"{"))
    return deepest, 1 + separators - len(_JSON_EMPTY.findall(bare))


# MessagePack specification, "Formats": first byte -> bytes of payload after it, for what is no container and has a fixed size.
_FIXED = (
    {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8}
    | {0xCC + i: 1 << i for i in range(4)}
    | {0xD0 + i: 1 << i for i in range(4)}
    | {0xD4 + i: 1 + (1 << i) for i in range(5)}
)
# first byte -> (bytes of the length that follows, bytes to add to that length)
_SIZED = {
    0xC4: (1, 0),
    0xC5: (2, 0),
    0xC6: (4, 0),
    0xC7: (1, 1),
    0xC8: (2, 1),
    0xC9: (4, 1),
    0xD9: (1, 0),
    0xDA: (2, 0),
    0xDB: (4, 0),
}


def _measure_msgpack(body: bytes, max_elements: int) -> tuple[int, int]:
    """Return (depth, elements) of a MessagePack value, stopping at the first that is over its limit."""
    at, elements, deepest = 0, 0, 0
    left = [1]  # values still to come, per open container
    while left:
        if left[-1] == 0:
            left.pop()
            continue
        left[-1] -= 1
        if at >= len(body):
            raise Undecodable("the body ends in the middle of a value")
        first = body[at]
        at += 1
        elements += 1
        inside = -1
        if 0x80 <= first <= 0x8F:
            inside = 2 * (first & 0x0F)
        elif 0x90 <= first <= 0x9F:
            inside = first & 0x0F
        elif 0xDC <= first <= 0xDF:
            width = 2 if first in (0xDC, 0xDE) else 4
            inside = int.from_bytes(body[at : at + width], "big") * (2 if first >= 0xDE else 1)
            at += width
        elif 0xA0 <= first <= 0xBF:
            at += first & 0x1F
        elif first in _FIXED:
            at += _FIXED[first]
        elif first in _SIZED:
            width, extra = _SIZED[first]
            at += width + extra + int.from_bytes(body[at : at + width], "big")
        if inside >= 0:
            left.append(inside)
            deepest = max(deepest, len(left) - 1)
        if deepest > MAX_DEPTH or elements > max_elements:
            break
    return deepest, elements
