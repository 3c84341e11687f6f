"""Cursors: a place in a listing of dead letters as URL-safe text. Pure."""

from __future__ import annotations

import msgspec

from crossdock.errors import ConfigurationError
from crossdock.spi import Cursor, State

Place = tuple[int, str]
"""The instant of death and the id of the last letter that was shown."""


def write(queue: str, place: Place) -> Cursor:
    """The cursor of a place."""
    return Cursor(msgspec.json.encode((queue, *place)).hex())


def read(cursor: Cursor, queue: str) -> Place:
    """The place of a cursor.

    Raises:
        ConfigurationError: It is none of this listing.
    """
    try:
        of_queue, died_ms, id = msgspec.json.decode(bytes.fromhex(cursor), type=tuple[str, int, str])
        if of_queue != queue:
            raise ValueError(cursor)
    except (ValueError, TypeError, msgspec.DecodeError) as error:
        raise ConfigurationError(
            f"This is no cursor of a listing of {State.DEAD.value} messages in queue {queue!r}; start again without one."
        ) from error
    return died_ms, id
