"""Cursors: a place in a listing as URL-safe text. Pure."""

from __future__ import annotations

import msgspec

from crossdock.errors import ConfigurationError
from crossdock.spi import Cursor, State

Place = tuple[int, str]
"""READY: a level and a sequence. SCHEDULED and DEAD: milliseconds and an id."""

_Written = tuple[str, str, int, str]


def write(queue: str, state: State, place: Place) -> Cursor:
    """The cursor of a place."""
    return Cursor(msgspec.json.encode((queue, state.value, *place)).hex())


def read(cursor: Cursor, queue: str, state: State) -> Place:
    """The place of a cursor.

    Raises:
        ConfigurationError: It is none of this listing.
    """
    try:
        of_queue, of_state, number, text = msgspec.json.decode(bytes.fromhex(cursor), type=_Written)
        if state is State.READY and (number not in (9, 6, 3, 0) or not text.isdecimal()):
            raise ValueError(cursor)
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        raise _wrong(queue, state) from error
    if (of_queue, of_state) != (queue, state.value):
        raise _wrong(queue, state)
    return number, text


def _wrong(queue: str, state: State) -> ConfigurationError:
    return ConfigurationError(
        f"This is no cursor of a listing of {state.value} messages in queue {queue!r}; start again without one."
    )
