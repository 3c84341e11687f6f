"""The wire format: what is read, what is refused, and that nothing else can happen."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossdock import App, RetryPolicy, codec
from crossdock.codec import Envelope, Failure
from crossdock.errors import CodecError, Undecodable, UnsupportedVersion
from crossdock.retry import Backoff
from crossdock.spi import Message, Priority

FULL = Envelope(
    1,
    "shop.pay",
    msgspec.Raw(msgspec.msgpack.encode({"order": "o-1", "cents": 1999})),
    1_767_225_600_000,
    attempt=3,
    expires_ms=1_767_225_700_000,
    timeout=2.5,
    retry=Backoff("fixed", 7, 1.5, 1.5, 3600.0),
    headers={"tenant": "blue", "ключ": "значение"},
    failures=[Failure(1, 5, "ValueError", "no", "w-1"), Failure(2, 6, "a.b.Error")],
    unknown_since_ms=7,
    replays=2,
)
IN_JSON = json.dumps({"v": 1, "task": "shop.pay", "args": {"order": "o-1"}}).encode()
IN_MSGPACK = codec.encode(Envelope(1, "shop.pay", msgspec.Raw(msgspec.msgpack.encode({"order": "o-1"}))))


def plain(envelope: Envelope) -> dict[str, Any]:
    """An envelope without its encoded part, to compare."""
    return {name: getattr(envelope, name) for name in envelope.__struct_fields__ if name != "args"}


# --- reading and writing --------------------------------------------------------------------------


def test_an_envelope_comes_back_as_it_was() -> None:
    """Every field survives the way through the bytes."""
    read = codec.decode(codec.encode(FULL))
    assert plain(read) == plain(FULL)
    assert bytes(read.args) == bytes(FULL.args)


def test_defaults_are_left_out() -> None:
    """A plain call costs few bytes, and a map of three is all that is needed."""
    body = codec.encode(Envelope(1, "t", msgspec.Raw(b"\x80"), 0))
    assert msgspec.msgpack.decode(body) in ({"v": 1, "task": "t"}, {"v": 1, "task": "t", "args": {}})
    read = codec.decode(msgspec.msgpack.encode({"v": 1, "task": "t"}))
    assert plain(read) == plain(Envelope(1, "t"))


@pytest.mark.parametrize("start", [b"", b" ", b"\n", b"\t\r\n "])
def test_json_says_the_same(start: bytes) -> None:
    """JSON with or without leading white space is read into the same envelope."""
    fields = {name: value for name, value in plain(FULL).items() if name != "version"}
    written = {"v": 1, "args": {"order": "o-1", "cents": 1999}, **msgspec.to_builtins(fields)}
    body = start + json.dumps(written).encode()
    read = codec.decode(body)
    assert codec.is_json(body)
    assert plain(read) == plain(FULL)
    assert codec.arguments(body) == {"order": "o-1", "cents": 1999}


def test_the_formats_are_told_apart_by_the_first_byte() -> None:
    """A map in MessagePack never begins like JSON."""
    assert codec.is_json(IN_JSON)
    assert not codec.is_json(IN_MSGPACK)
    assert not codec.is_json(b"")


@pytest.mark.parametrize("body", [b'{"v": 1, "task": "t"}', msgspec.msgpack.encode({"v": 1, "task": "t"})])
def test_arguments_may_be_left_out(body: bytes) -> None:
    """No arguments are the same as an empty map, in both formats."""
    assert codec.arguments(body) == {}
    assert codec.describe(body)["arguments"] == {}


def test_describe_shows_everything() -> None:
    """For people: the task and its arguments first, then every other field as plain values."""
    shown = codec.describe(codec.encode(FULL))
    assert list(shown)[:2] == ["task", "arguments"]
    assert shown["arguments"] == {"order": "o-1", "cents": 1999}
    assert shown["retry"] == msgspec.to_builtins(FULL.retry)
    assert shown["failures"][0]["error_type"] == "ValueError"
    assert json.dumps(shown)


@pytest.mark.parametrize("args", [b"3", b"null", b"[1]", b'"x"'])
def test_arguments_that_are_no_map_are_told_as_such(args: bytes) -> None:
    """The envelope can be read; its arguments cannot be shown."""
    body = b'{"v": 1, "task": "shop.pay", "args": %s}' % args
    codec.decode(body)
    with pytest.raises(Undecodable, match=r"the arguments of task 'shop.pay' are no map of names to values"):
        codec.arguments(body)


# --- revising -------------------------------------------------------------------------------------

UNKNOWN_MSGPACK = (
    b"\x85\xa1v\x01"
    b"\xa3new\x93\xcd\x00\x05\xd9\x01x\xc7\x02\x2aab"  # a number and a text longer than need be, an extension type
    b"\xa4task\xa1t"
    b"\xa4args\x81\xa1a\xcf\x00\x00\x00\x00\x00\x00\x00\x01"
    b"\xa5other\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00"
)
UNKNOWN_JSON = '{ "v":1,\n "new":[5.0, 1e2 ,"\\u00e9é"], "task":"t","args":{"a":  1.50},"other":{"x" : null}}'.encode()


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (UNKNOWN_MSGPACK, [b"\x93\xcd\x00\x05\xd9\x01x\xc7\x02\x2aab", b"\xcf\x00\x00\x00\x00\x00\x00\x00\x01"]),
        (UNKNOWN_JSON, ['[5.0, 1e2 ,"\\u00e9é"]'.encode(), b'{"a":  1.50}', b'{"x" : null}']),
    ],
    ids=["msgpack", "json"],
)
def test_a_revision_keeps_everything_else_byte_for_byte(body: bytes, kept: list[bytes]) -> None:
    """Fields that this version does not know, and the arguments, come out as they went in, whatever their spelling."""
    revised = codec.revise(body, attempt=2, failures=[Failure(1, 5, "ValueError")])
    for part in kept:
        assert part in revised
    assert codec.is_json(revised) == codec.is_json(body)
    assert codec.decode(revised).attempt == 2
    assert codec.decode(revised).failures == [Failure(1, 5, "ValueError")]
    again = codec.revise(revised, attempt=1, failures=[])
    assert codec.revise(again, attempt=2, failures=[Failure(1, 5, "ValueError")]) == revised


@pytest.mark.parametrize("body", [b'{"v":1,"task":"t","a":9,"\xff":1}', b"\x84\xa1v\x01\xa4task\xa1t\xa1a\x09\xa1\xff\x01"])
def test_a_field_whose_name_is_no_text_does_not_stop_a_revision(body: bytes) -> None:
    """A body that could be run can be retried, whatever else is in it."""
    revised = codec.decode(codec.revise(body, attempt=2))
    assert (revised.task, revised.attempt) == ("t", 2)


# --- what is refused ------------------------------------------------------------------------------


def with_field(name: str, value: object) -> list[bytes]:
    """A body with one field set, in both formats."""
    fields = {"v": 1, "task": "t", name: value}
    return [msgspec.msgpack.encode(fields), msgspec.json.encode(fields)]


WRONG_FIELDS = [
    ("v", 0), ("v", -1), ("v", "1"), ("v", None), ("v", 1.5), ("v", True), ("v", [1]),
    ("task", ""), ("task", "x" * 256), ("task", 5), ("task", None), ("task", ["t"]),
    ("enqueued_ms", -1), ("enqueued_ms", "now"), ("enqueued_ms", 2**62), ("enqueued_ms", None),
    ("attempt", 0), ("attempt", -5), ("attempt", 2**53 + 1), ("attempt", "1"),
    ("expires_ms", -1), ("expires_ms", 253_402_300_800_000),
    ("timeout", 0), ("timeout", -1.0), ("timeout", 1e11), ("timeout", "5"),
    ("retry", {"max_attempts": 0}), ("retry", {"kind": "random"}), ("retry", {"base": -1}), ("retry", {"give_up_after": -1}),
    ("retry", {"max_attempts": 2.5}), ("retry", 5), ("retry", {"max_backoff": 1e300}),
    ("headers", {"a": 1}), ("headers", ["a"]), ("headers", None), ("headers", "a"),
    ("failures", [{}]), ("failures", {}), ("failures", [{"attempt": 2**63, "at_ms": 1, "error_type": "E"}]),
    ("failures", [{"attempt": 1, "at_ms": -1, "error_type": "E"}]),
    ("unknown_since_ms", -1), ("replays", -1), ("replays", 2**53 + 1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS, ids=lambda part: ascii(part)[:30])
def test_a_field_of_a_wrong_type_or_range_is_refused(name: str, value: object) -> None:
    """No number gets in that could not be raised by one, written again or slept for."""
    for body in with_field(name, value):
        with pytest.raises(Undecodable, match="the body is no envelope: "):
            codec.decode(body)


def test_infinite_and_missing_numbers_are_refused() -> None:
    """NaN and infinity, which MessagePack can carry, never become a timeout or a delay."""
    for number in (float("nan"), float("inf"), float("-inf")):
        for field in ({"timeout": number}, {"retry": {"base": number}}, {"retry": {"give_up_after": number}}):
            with pytest.raises(Undecodable):
                codec.decode(msgspec.msgpack.encode({"v": 1, "task": "t", **field}))


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t",
    "nul": b"\x00",
    "a number": b"5",
    "a positive fixint that looks like a brace": b"\x7b",
    "a text": b'"hello"',
    "a list": b"[1, 2]",
    "an empty object": b"{}",
    "an empty map": b"\x80",
    "a list in MessagePack": b"\x92\x01\xa1t",
    "no task": b'{"v": 1}',
    "no version": b'{"task": "t"}',
    "truncated JSON": IN_JSON[:-2],
    "truncated MessagePack": IN_MSGPACK[:-2],
    "trailing JSON": IN_JSON + b"{}",
    "trailing MessagePack": IN_MSGPACK + b"\x80",
    "byte order mark": b"\xef\xbb\xbf" + IN_JSON,
    "UTF-16": IN_JSON.decode().encode("utf-16"),
    "NaN": b'{"v": 1, "task": "t", "args": {"x": NaN}}',
    "Infinity": b'{"v": 1, "task": "t", "args": {"x": -Infinity}}',
    "single quotes": b"{'v': 1, 'task': 't'}",
    "a comment": b'{"v": 1, /* hi */ "task": "t"}',
    "a trailing comma": b'{"v": 1, "task": "t",}',
    "leading zero": b'{"v": 01, "task": "t"}',
    "a huge version": b'{"v": %s, "task": "t"}' % (b"9" * 5000),
    "a huge attempt": b'{"v": 1, "task": "t", "attempt": %d}' % 2**70,
    "a huge exponent": b'{"v": 1, "task": "t", "timeout": 1e999}',
    "half a surrogate pair": b'{"v": 1, "task": "\\ud800"}',
    "the other half": b'{"v": 1, "task": "\\udc00t"}',
    "bytes that are no UTF-8": b'{"v": 1, "task": "\xff\xfe"}',
    "bytes that are no UTF-8, in MessagePack": b"\x82\xa1v\x01\xa4task\xa2\xff\xfe",
    "an unescaped line end": b'{"v": 1, "task": "a\nb"}',
    "a bad escape": b'{"v": 1, "task": "\\x41"}',
    "binary keys": b"\x82\xc4\x01v\x01\xc4\x04task\xa1t",
    "number keys": b"\x82\x01\x01\x02\xa1t",
    "the byte that means nothing": b"\x82\xa1v\x01\xa4task\xc1",
    "a task that is binary": b"\x82\xa1v\x01\xa4task\xc4\x01t",
    "an extension type": b"\xc7\x04\x2atest",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "an extension type as task": b"\x82\xa1v\x01\xa4task\xd4\x05\x00",
    "a map that promises 4 billion": b"\xdf\xff\xff\xff\xff\xa1v\x01",
    "a list that promises 4 billion": b"\xdd\xff\xff\xff\xff",
    "a text that promises 4 GiB": b"\x82\xa1v\x01\xa4task\xdb\xff\xff\xff\xff",
    "a binary that promises 4 GiB": b"\xc6\xff\xff\xff\xff",
    "a pickle": pickle.dumps({"v": 1, "task": "t"}),
    "an old pickle": pickle.dumps({"v": 1, "task": "t"}, protocol=0),
    "a deep list in MessagePack": b"\x83\xa1v\x01\xa4task\xa1t\xa4args" + b"\x91" * 10_000 + b"\xc0",
    "a deep map in MessagePack": b"\x81\xa1a" * 10_000 + b"\xc0",
    "a deep list in JSON": b'{"v": 1, "task": "t", "args": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "a deep object in JSON": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "an endless list in JSON": b"{" + b"[" * 200_000,
    "closing brackets": b"{" + b"]" * 200_000 + b"[" * 200_000,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(body: bytes) -> None:
    """Each is refused as undecodable in one short sentence, fast, whatever it is."""
    start = time.process_time()
    with pytest.raises(Undecodable) as caught:
        codec.decode(body)
    assert time.process_time() - start < 0.5
    assert len(str(caught.value)) < 300


def test_duplicate_keys_have_one_meaning() -> None:
    """The last one counts, for the envelope and for its revision alike."""
    body = b'{"v": 1, "task": "a", "attempt": 5, "task": "b", "args": {"x": 1}, "args": {"x": 2}}'
    assert codec.decode(body).task == "b"
    assert codec.arguments(body) == {"x": 2}
    assert codec.decode(codec.revise(body, attempt=6)).task == "b"
    assert codec.arguments(codec.revise(body, attempt=6)) == {"x": 2}


@pytest.mark.parametrize(
    "body",
    [
        b'{"' + b'\\"' * 400_000,  # one string without an end, full of possible starts
        b'{"a":"' + b'\\"' * 400_000 + b'",',
        b"{" + b'"' * 900_001,
        b'{"a":' + b"[" * 400_000 + b" " * 400_000,
        b"{" + b"[ " * 400_000,
        b"{" + b"\\" * 900_000,
        b'{"' + b"\\" * 900_001,
        b"{" + b"]" * 900_000,
        b"\xdf\x00\x0d\xbb\xa0" + b"\x80" * 900_000,
        b"\x91" * 1_000_000,
    ],
)
def test_a_large_hostile_body_costs_little(body: bytes) -> None:
    """The limits are checked in one pass: the time grows with the size, not with its square."""
    start = time.process_time()
    with pytest.raises(Undecodable):
        codec.decode(body)
    assert time.process_time() - start < 1.5


# --- versions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"v": 2, "task": "t"},
        {"v": 2},
        {"v": 3, "task": {"module": "shop", "name": "pay"}, "args": [1]},
        {"v": 2**40, "attempt": "first", "failures": 5, "retry": {"max_attempts": 0}},
        {"task": 5, "headers": None, "v": 2},
    ],
)
def test_a_newer_version_is_told_as_such(fields: dict[str, Any]) -> None:
    """Whatever other fields have become, the version says what is the matter."""
    for body in (msgspec.msgpack.encode(fields), json.dumps(fields).encode()):
        with pytest.raises(UnsupportedVersion, match=rf"version {fields['v']}; this crossdock reads up to 1: upgrade the worker"):
            codec.decode(body)


# --- limits, at their edges -----------------------------------------------------------------------

MAX_DECODED = codec.MAX_BODY + codec.HISTORY_BYTES
MAX_DECODED_ELEMENTS = codec.MAX_ELEMENTS + codec.HISTORY_ELEMENTS


def sized(size: int, *, as_json: bool) -> bytes:
    """A valid body of exactly this many bytes."""
    encode = msgspec.json.encode if as_json else msgspec.msgpack.encode
    text = "x" * (size - len(encode({"v": 1, "task": "t", "args": {"a": "x" * 70_000}})) + 70_000)
    return encode({"v": 1, "task": "t", "args": {"a": text}})


def nested(depth: int, *, as_json: bool) -> bytes:
    """A valid body nested to exactly this depth."""
    value: Any = []
    for _ in range(depth - 3):
        value = [value]
    encode = msgspec.json.encode if as_json else msgspec.msgpack.encode
    return encode({"v": 1, "task": "t", "args": {"a": value}})


def counted(elements: int, *, as_json: bool) -> bytes:
    """A valid body of exactly this many keys and values."""
    encode = msgspec.json.encode if as_json else msgspec.msgpack.encode
    return encode({"v": 1, "task": "t", "args": {"a": [1] * (elements - 9)}})


@pytest.mark.parametrize("as_json", [False, True], ids=["msgpack", "json"])
@pytest.mark.parametrize(
    ("make", "enqueued", "decoded", "said"),
    [
        (sized, codec.MAX_BODY, MAX_DECODED, "the body has 1,114,113 bytes, the limit is 1,114,112"),
        (nested, codec.MAX_DEPTH, codec.MAX_DEPTH, "nested 65 or more levels deep, the limit is 64"),
        (counted, codec.MAX_ELEMENTS, MAX_DECODED_ELEMENTS, "has 101,001 or more elements, the limit is 101,000"),
    ],
    ids=["size", "depth", "count"],
)
def test_limits_hold_exactly(make: Any, enqueued: int, decoded: int, said: str, as_json: bool) -> None:
    """At the limit all is well, one beyond is refused; what was enqueued at its limit has room for a history of failures."""
    assert codec.decode(make(decoded, as_json=as_json)).task == "t"
    with pytest.raises(Undecodable, match=said):
        codec.decode(make(decoded + 1, as_json=as_json))
    codec.check_limits(make(enqueued, as_json=as_json), enqueued=True)
    with pytest.raises(Undecodable):
        codec.check_limits(make(enqueued + 1, as_json=as_json), enqueued=True)


@pytest.mark.parametrize("as_json", [False, True], ids=["msgpack", "json"])
@pytest.mark.parametrize(("make", "limit"), [(sized, MAX_DECODED), (nested, codec.MAX_DEPTH), (counted, MAX_DECODED_ELEMENTS)])
def test_limits_are_checked_before_decoding(make: Any, limit: int, as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over a limit never reaches a decoder."""

    def never(*_: object, **__: object) -> Any:
        raise AssertionError("it was decoded")

    body = make(limit + 1, as_json=as_json)
    for name in ("_decode_json", "_decode_msgpack", "_loads"):
        monkeypatch.setattr(codec, name, never)
    with pytest.raises(Undecodable):
        codec.decode(body)


@pytest.mark.parametrize("as_json", [False, True], ids=["msgpack", "json"])
@pytest.mark.parametrize(("make", "limit"), [(sized, codec.MAX_BODY), (counted, codec.MAX_ELEMENTS)], ids=["size", "count"])
def test_the_fullest_history_fits_into_the_room_for_it(make: Any, limit: int, as_json: bool) -> None:
    """A task enqueued at a limit can fail as often as its policy allows, with the longest texts, and still be read."""
    failures = [Failure(2**53, 253_402_300_799_999, "Ä" * 200, "💥" * 230, "w" * 100)] * 20
    body = codec.revise(make(limit, as_json=as_json), attempt=2**53, failures=failures, unknown_since_ms=253_402_300_799_999)
    assert codec.decode(body).failures == failures


def test_brackets_inside_texts_do_not_count() -> None:
    """Only real nesting and real elements are measured."""
    text = '[{":,' * 20_000 + '\\"[[' * 50
    body = msgspec.json.encode({"v": 1, "task": "t", "args": {"a": text, "b[[": '"'}})
    assert codec.arguments(body)["a"] == text
    packed = msgspec.msgpack.encode({"v": 1, "task": "t", "args": {"a": b"\x91" * 99_000, "b": "\x81" * 500}})
    assert codec.arguments(packed)["a"] == b"\x91" * 99_000


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('[]{}",:\\'), max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text('a[{"\\:,é', max_size=4), inner, max_size=6),
    max_leaves=20,
)


def model(value: Any) -> tuple[int, int]:
    """(depth, elements) by walking decoded values: every value is one, and so is every key."""
    if isinstance(value, list):
        inside = [model(each) for each in value]
    elif isinstance(value, dict):
        inside = [part for key, each in value.items() for part in (model(key), model(each))]
    else:
        return 0, 1
    return 1 + max((depth for depth, _ in inside), default=0), 1 + sum(elements for _, elements in inside)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
def test_the_measures_agree_with_a_plain_walk(value: Any, ascii_only: bool, indent: int | None) -> None:
    """Depth and count taken from the bytes are those of the decoded value, in both formats and any spelling of JSON."""
    assert codec._measure_msgpack(msgspec.msgpack.encode(value), 10**9) == model(value)
    if not isinstance(value, str):  # a text alone is no JSON body of ours, and has no separators to count
        assert codec._measure_json(json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()) == model(value)


FORMATS = {
    "fixint": b"\x7f", "negative": b"\xe0", "nil": b"\xc0", "false": b"\xc2", "true": b"\xc3",
    "bin8": b"\xc4\x02\x91\x91", "bin16": b"\xc5\x00\x02\x91\x91", "bin32": b"\xc6\x00\x00\x00\x02\x91\x91",
    "ext8": b"\xc7\x02\x05\x91\x91", "ext16": b"\xc8\x00\x02\x05\x91\x91", "ext32": b"\xc9\x00\x00\x00\x02\x05\x91\x91",
    "float32": b"\xca" + b"\x91" * 4, "float64": b"\xcb" + b"\x91" * 8,
    "uint8": b"\xcc\x91", "uint16": b"\xcd" + b"\x91" * 2, "uint32": b"\xce" + b"\x91" * 4, "uint64": b"\xcf" + b"\x91" * 8,
    "int8": b"\xd0\x91", "int16": b"\xd1" + b"\x91" * 2, "int32": b"\xd2" + b"\x91" * 4, "int64": b"\xd3" + b"\x91" * 8,
    "fixext1": b"\xd4\x05\x91", "fixext2": b"\xd5\x05" + b"\x91" * 2, "fixext4": b"\xd6\x05" + b"\x91" * 4,
    "fixext8": b"\xd7\x05" + b"\x91" * 8, "fixext16": b"\xd8\x05" + b"\x91" * 16,
    "fixstr": b"\xa2\x91\x91", "str8": b"\xd9\x02\x91\x91", "str16": b"\xda\x00\x02\x91\x91", "str32": b"\xdb\x00\x00\x00\x02\x91\x91",
}  # fmt: skip
CONTAINERS = {
    "fixarray": b"\x92", "array16": b"\xdc\x00\x02", "array32": b"\xdd\x00\x00\x00\x02",
    "fixmap": b"\x81", "map16": b"\xde\x00\x01", "map32": b"\xdf\x00\x00\x00\x01",
}  # fmt: skip


@pytest.mark.parametrize("value", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_every_format_of_messagepack_is_measured(container: bytes, value: bytes) -> None:
    """Whatever a value's bytes are, the next value begins behind them: none of the 0x91 in it counts as a list."""
    assert codec._measure_msgpack(container + value + container + value + b"\x05", 10**9) == (2, 5)


@given(VALUES, st.binary(max_size=40), st.integers(0, 300))
def test_the_measures_survive_damage(value: Any, junk: bytes, at: int) -> None:
    """On any bytes the walk ends, with numbers or with Undecodable."""
    for body in (msgspec.msgpack.encode(value), json.dumps(value).encode()):
        damaged = body[:at] + junk + body[at + 1 :]
        codec._measure_json(damaged)
        with contextlib.suppress(Undecodable):
            codec._measure_msgpack(damaged, 10**9)


# --- fuzz -----------------------------------------------------------------------------------------

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(0, 3), max_size=2)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        name: like | SIMPLE
        for name, like in {
            "v": st.sampled_from([1, 1, 1, 2]),
            "task": st.just("t"),
            "args": st.dictionaries(st.text(max_size=3), SIMPLE, max_size=3),
            "enqueued_ms": st.integers(0, 2**41),
            "attempt": st.integers(1, 9),
            "expires_ms": st.integers(0, 2**41),
            "timeout": st.floats(),
            "retry": st.fixed_dictionaries({}, optional={"kind": st.text(), "max_attempts": st.integers(), "base": st.floats()}),
            "headers": st.dictionaries(st.text(), st.text(), max_size=3),
            "failures": st.lists(st.just({"attempt": 1, "at_ms": 1, "error_type": "E"}) | SIMPLE, max_size=3),
            "replays": st.integers(),
            "extra": SIMPLE,
        }.items()
    },
)


def decode_or_refuse(body: bytes) -> None:
    """What is promised of any bytes: an Envelope that can be revised and described, or a CodecError."""
    try:
        envelope = codec.decode(body)
    except CodecError:
        return
    assert type(envelope) is Envelope
    revised = codec.decode(codec.revise(body, attempt=envelope.attempt, failures=envelope.failures))
    assert plain(revised) == plain(envelope)
    codec.encode(envelope)
    with contextlib.suppress(CodecError):
        codec.describe(body)


@given(
    st.binary(max_size=200)
    | st.binary(max_size=80).map(lambda tail: b"{" + tail)
    | st.binary(max_size=80).map(lambda t: b"\x83" + t)
)
@settings(max_examples=400)
def test_any_bytes_are_an_envelope_or_a_codec_error(body: bytes) -> None:
    """Random bytes never raise anything else."""
    decode_or_refuse(body)


@given(FIELDS)
@settings(max_examples=300)
def test_any_fields_are_an_envelope_or_a_codec_error(fields: dict[str, Any]) -> None:
    """Known fields with arbitrary values never raise anything else, in either format."""
    with contextlib.suppress(OverflowError):  # what MessagePack cannot write it need not read
        decode_or_refuse(msgspec.msgpack.encode(fields))
    decode_or_refuse(json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))


def test_damaged_bodies_are_an_envelope_or_a_codec_error() -> None:
    """Cut, flipped, doubled and glued bodies never raise anything else."""
    rng = random.Random(5)
    seeds = [codec.encode(FULL), IN_JSON, IN_MSGPACK, UNKNOWN_JSON, UNKNOWN_MSGPACK, struct.pack(">d", 1.5)]
    for _ in range(4000):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body) + 1)
            match rng.randrange(4):
                case 0:
                    del body[at:]
                case 1:
                    body[at : at + 1] = rng.randbytes(1)
                case 2:
                    body[at:at] = rng.choice(seeds)[: rng.randrange(20)]
                case _:
                    body[at : at + rng.randrange(4)] = b""
        decode_or_refuse(bytes(body))


# --- producers in other languages -----------------------------------------------------------------

PRODUCER = """
import json
print(json.dumps({
    "v": 1,
    "task": "mail",
    "args": {"to": "ada@example.com", "copies": 2, "note": "Gr\\u00fc\\u00dfe \\U0001f680"},
    "enqueued_ms": 1767225600000,
    "retry": {"kind": "fixed", "max_attempts": 2, "base": 10},
    "headers": {"tenant": "blue"},
    "x-mine": {"keep": [1.5, True]},
}))
"""


@pytest.fixture
def written_elsewhere(tmp_path: Path) -> bytes:
    """A body from a process that imports nothing of crossdock."""
    return subprocess.run([sys.executable, "-I", "-c", PRODUCER], capture_output=True, check=True, cwd=tmp_path).stdout


@pytest.mark.asyncio
async def test_a_producer_in_plain_json(written_elsewhere: bytes) -> None:
    """A program that knows nothing of crossdock writes a body; a worker runs it, retries it by its own policy, and keeps its format."""
    app = App("memory://")
    ran: list[tuple[str, int, str, int]] = []

    @app.task(name="mail", retry=RetryPolicy.fixed(9, 999.0))
    async def mail(to: str, copies: int, note: str, priority: int = 3) -> None:
        ran.append((to, copies, note, priority))
        raise ConnectionError("no mail today")

    async with app.testing() as t:
        broker = app.make_broker()
        await broker.open()
        assert not await broker.enqueue([Message("mail-1", "default", Priority.NORMAL, written_elsewhere)])
        await broker.close()
        await t.run_until_idle()
        assert ran == [("ada@example.com", 2, "Grüße 🚀", 3)]
        await t.advance(seconds=10)
        assert len(ran) == 2, "its own policy: once more after 10 s"
        (letter,) = t.dead_letters()
    assert letter.task == "mail"
    assert codec.is_json(letter.message.body)
    assert b'{"keep": [1.5, true]}' in letter.message.body
    assert codec.describe(letter.message.body)["headers"] == {"tenant": "blue"}
