"""The tap: what comes in is divided between us and aiormq, however it is cut."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterable

import pytest

from crossdock_rabbitmq import wire
from crossdock_rabbitmq.tap import Tap

pytestmark = pytest.mark.asyncio


class Told:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.all: list[tuple[object, ...]] = []
        self.flushes = 0

    def confirmed(self, tag: int, *, multiple: bool, stored: bool) -> None:
        self.all.append(("confirmed", tag, multiple, stored))

    def returned(self, key: bytes, header: bytes) -> None:
        self.all.append(("returned", key, wire.read_properties(header)[0]))

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes, arguments: bytes) -> None:
        self.all.append(("delivered", tag, redelivered, wire.read_properties(header)[0], body))

    def answered(self, method: bytes, arguments: bytes) -> None:
        self.all.append(("answered", method))

    def cancelled(self, consumer: str) -> None:
        self.all.append(("cancelled", consumer))

    def flush(self) -> None:
        self.flushes += 1

    def lost(self, reason: str) -> None:
        self.all.append(("lost", reason))


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def _message(channel: int, tag: int, id: str, body: bytes, most: int = 100) -> list[bytes]:
    method = wire.DELIVER + wire.short("c") + struct.pack(">QB", tag, 0) + wire.short("") + wire.short("key")
    content = wire.content(channel, wire.properties(id, 3, {"cd-n": tag}), body, most)
    frames: list[bytes] = []
    at = 0
    while at < len(content):
        size = 8 + struct.unpack_from(">I", content, at + 3)[0]
        frames.append(content[at : at + size])
        at += size
    return [_frame(1, channel, method), *frames]


def _tap() -> tuple[Tap, asyncio.StreamReader, list[str | None]]:
    reader = asyncio.StreamReader()
    blocked: list[str | None] = []
    return Tap(reader, blocked.append, lambda error: None), reader, blocked


async def _feed(tap: Tap, reader: asyncio.StreamReader, chunks: Iterable[bytes]) -> bytes:
    """Hand in data; returns what aiormq gets of it, without the heartbeats that it is shown."""
    for chunk in chunks:
        tap.data_received(chunk)
    reader.feed_eof()
    return (await reader.read()).replace(wire.HEARTBEAT, b"")


async def test_frames_are_divided_however_they_are_cut() -> None:
    """Messages whose frames come interleaved with those of other channels, in pieces of any size, come out whole and in order."""
    dice = random.Random(4)
    for size in (1, 2, 7, 8, 9, 100, 10_000):
        tap, reader, _ = _tap()
        one, two = Told(), Told()
        tap.sinks = {1: one, 2: two}
        first = [frame for tag in range(1, 6) for frame in _message(1, tag, f"a{tag}", b"x" * dice.randrange(400))]
        second = [frame for tag in range(1, 6) for frame in _message(2, tag, f"b{tag}", b"")]
        others = [_frame(1, 3, b"\0\x32\0\x0b" + bytes(9)), _frame(1, 0, b"\0\x0a\0\x32" + bytes(4))]
        lists, stream = [first, second, others], b""
        while any(lists):
            stream += dice.choice([frames for frames in lists if frames]).pop(0)
        rest = await _feed(tap, reader, (stream[at : at + size] for at in range(0, len(stream), size)))
        assert [each[3] for each in one.all] == [f"a{tag}" for tag in range(1, 6)]
        assert [each[3] for each in two.all] == [f"b{tag}" for tag in range(1, 6)]
        assert rest == _frame(1, 3, b"\0\x32\0\x0b" + bytes(9)) + _frame(1, 0, b"\0\x0a\0\x32" + bytes(4))


async def test_confirms_and_answers_are_ours() -> None:
    """Confirms, refusals and answers of our channels are told; one flush follows what came at once."""
    tap, reader, _ = _tap()
    told = Told()
    tap.sinks = {1: told}
    data = _frame(1, 1, wire.ACK + struct.pack(">QB", 7, 1)) + _frame(1, 1, wire.NACK + struct.pack(">QB", 8, 0))
    assert await _feed(tap, reader, [data + _frame(1, 1, wire.QOS_OK)]) == b""
    assert told.all == [("confirmed", 7, True, True), ("confirmed", 8, False, False), ("answered", wire.QOS_OK)]
    assert told.flushes == 1


async def test_what_ends_a_channel_is_told_to_both() -> None:
    """aiormq answers when the server ends a consumer or a channel, and we know; nothing more is told of that channel."""
    tap, reader, _ = _tap()
    told = Told()
    tap.sinks = {1: told}
    frames = [
        _frame(1, 1, wire.CANCEL + wire.short("c") + b"\x01"),
        _frame(1, 1, wire.CHANNEL_CLOSE + struct.pack(">H", 404) + wire.short("no queue 'x'") + bytes(4)),
        _frame(1, 1, wire.QOS_OK),
    ]
    assert await _feed(tap, reader, frames) == b"".join(frames)
    assert told.all == [("cancelled", "c"), ("lost", "no queue 'x'")]


async def test_alarms_are_seen() -> None:
    """Whether the server takes messages is seen, and aiormq is told, too."""
    tap, reader, blocked = _tap()
    frames = [_frame(1, 0, wire.BLOCKED + wire.short("low on memory")), _frame(1, 0, wire.UNBLOCKED)]
    assert await _feed(tap, reader, frames) == b"".join(frames)
    assert blocked == ["low on memory", None]


async def test_aiormq_is_shown_a_sign_of_life() -> None:
    """While only we hear something, aiormq sees a heartbeat, so that it does not take the server for dead."""
    tap, reader, _ = _tap()
    tap.sinks = {1: Told()}
    tap.data_received(_frame(1, 1, wire.QOS_OK))
    reader.feed_eof()
    assert await reader.read() == wire.HEARTBEAT
