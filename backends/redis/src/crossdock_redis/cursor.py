"""Cursors: a place in a listing as URL-safe text. Pure."""

from __future__ import annotations

import msgspec

from crossdock.errors import ConfigurationError
from crossdock.spi import Cursor, State

_Place = tuple[str, str, str, str]


def write(queue: str, state: State, place: tuple[str, str]) -> Cursor:
    """The cursor of a place: two texts that mean something to `peek.lua`."""
    return Cursor(msgspec.json.encode((queue, state.value, *place)).hex())


def read(cursor: Cursor, queue: str, state: State) -> tuple[str, str]:
    """The place of a cursor.

    Raises:
        ConfigurationError: It is none of this listing.
    """
    try:
        of_queue, of_state, first, second = msgspec.json.decode(bytes.fromhex(cursor), type=_Place)
        if state is not State.READY:
            float(first)
        elif first not in ("9", "6", "3", "0") or not second.lstrip("-").isdecimal():
            raise ValueError(cursor)
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        raise _wrong(queue, state) from error
    if (of_queue, of_state) != (queue, state.value):
        raise _wrong(queue, state)
    return first, second


def _wrong(queue: str, state: State) -> ConfigurationError:
    return ConfigurationError(
        f"This is no cursor of a listing of {state.value} messages in queue {queue!r}; start again without one."
    )
