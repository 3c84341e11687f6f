"""What travels between client and server: frames of MessagePack, each behind its length in four bytes."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import msgspec

from crossdock.spi import (
    Capabilities,
    Cursor,
    DeadLetter,
    Lane,
    Message,
    Page,
    QueueSpec,
    QueueStats,
    Replay,
    State,
)


class Request(msgspec.Struct, array_like=True):
    """One call of a verb."""

    number: int
    verb: str
    arguments: msgspec.Raw


class Reply(msgspec.Struct, array_like=True):
    """What came of it."""

    number: int
    value: msgspec.Raw
    error: tuple[str, str] | None = None
    """Type and text of what it raised."""


class Receipt(msgspec.Struct, frozen=True, array_like=True):
    """The right to settle one delivery."""

    life: str
    """Of the session at the server: after a restart of the server it is another one."""
    number: int


class Handed(msgspec.Struct, array_like=True):
    """One delivery."""

    message: Message
    count: int
    remaining: float
    """Seconds of its lease when the answer was made."""
    receipt: Receipt


class Received(msgspec.Struct, array_like=True):
    """What came of a receive."""

    deliveries: list[Handed]
    waited: float
    """Seconds for which the server had it."""


class Ending(msgspec.Struct, array_like=True):
    """One settlement: with a letter a `Dead`, with a delay a `Nack`, else an `Ack`."""

    receipt: Receipt
    delay: float | None = None
    replacement: Message | None = None
    letter: DeadLetter | None = None


class Refused(msgspec.Struct, array_like=True):
    """One refusal."""

    index: int
    error: str
    text: str


class Welcome(msgspec.Struct, array_like=True):
    """Answer to a greeting."""

    capabilities: Capabilities
    store: str
    """Identity of what the server stores: another one if it lost everything."""


ARGUMENTS: Final[dict[str, Any]] = {
    "hello": tuple[str, str],
    "cancel": tuple[int],
    "bye": tuple[()],
    "declare": tuple[list[QueueSpec]],
    "enqueue": tuple[list[Message]],
    "receive": tuple[list[Lane], int, float],
    "extend": tuple[list[Receipt]],
    "settle": tuple[list[Ending]],
    "stats": tuple[list[str] | None],
    "peek": tuple[str, State, list[str], Cursor | None, int],
    "remove": tuple[str, State, list[str]],
    "replay": tuple[str, list[Replay]],
    "purge": tuple[str, State],
    "erase": tuple[list[str]],
}
REFUSING: Final = frozenset({"enqueue", "extend", "settle", "remove", "replay"})
"""Verbs that answer with refusals."""
VALUES: Final[dict[str, Any]] = {
    **dict.fromkeys(REFUSING, list[Refused]),
    **dict.fromkeys(("cancel", "bye", "declare", "erase"), None),
    "hello": Welcome,
    "receive": Received,
    "stats": list[QueueStats],
    "peek": Page,
    "purge": int,
}

encode = msgspec.msgpack.encode
decode = msgspec.msgpack.decode


def frame(message: Request | Reply) -> bytes:
    """The bytes of a message."""
    body = encode(message)
    return len(body).to_bytes(4, "big") + body


async def read(reader: asyncio.StreamReader) -> bytes:
    """The next message. Raises `OSError` or `EOFError` if the connection ends."""
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
