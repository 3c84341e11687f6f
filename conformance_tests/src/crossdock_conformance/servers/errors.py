"""What can go wrong with a server for tests.

CrossdockError
└── ServerError
    ├── ServerNotFound     none of this kind (and version) can be had here; says what was looked for
    ├── ServerFailed       one was found and does not do what it was told to; shows the end of its log
    └── NotControllable    it was given by its URL: it is not ours to start, stop or empty
"""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.errors import CrossdockError


class ServerError(CrossdockError):
    """A server for tests cannot be used."""


class ServerNotFound(ServerError):
    """No server of this kind and version can be had on this machine. The text says what was looked for and what to install."""

    def __init__(self, text: str, kind: str, version: str | None = None, found: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.kind = kind
        self.version = version
        """The version that was asked for, by prefix; None if any would have done."""
        self.found = tuple(found)
        """The versions of this kind that are here instead."""


class ServerFailed(ServerError):
    """The server does not start, answer or end within its deadline, or is not what it was taken for."""


class NotControllable(ServerError):
    """The server was given by its URL. It is not ours to start, stop, kill, pause or empty."""
