"""Which folder a URL means, and whether it is ours."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from crossdock.errors import BrokerUnavailable, ConfigurationError, InvalidName
from crossdock.spi import redact
from crossdock_plainfiles import disk

MARKER: Final = "crossdock-plainfiles.1"
"""A file of this name says that the folder is ours and how it is laid out. A name is there or not: it cannot be half written."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")


def parse(url: str, options: Mapping[str, str]) -> Path:
    """Read a broker URL: `plainfiles:///relative/folder` or `plainfiles:////absolute/folder`.

    Raises:
        ConfigurationError: It names no folder, or has options.
    """
    parts = urlsplit(url)
    path = unquote(parts.path).removeprefix("/")
    if parts.netloc or parts.fragment or not path or "\0" in path:
        raise ConfigurationError(
            f"The broker URL {redact(url)!r} names no folder: write plainfiles:///relative/folder or plainfiles:////absolute/folder."
        )
    if options:
        raise ConfigurationError(f"plainfiles:// has no options: remove {', '.join(sorted(options))} from the broker URL.")
    return Path(os.path.realpath(path))


def claim(folder: Path) -> None:
    """Make the folder, or make sure that it is ours. A new or empty one becomes ours.

    Raises:
        ConfigurationError: It is somebody else's, or cannot be used.
    """
    try:
        disk.make_folder(folder)
        names = os.listdir(folder)
        if MARKER not in names:
            if names:
                raise ConfigurationError(
                    f"The folder {str(folder)!r} cannot be used: it has other things in it; name a new or an empty folder."
                )
            disk.write(folder / MARKER, b"This folder belongs to crossdock-plainfiles. Change nothing here by hand.\n")
            disk.sync(folder)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigurationError(f"The folder {str(folder)!r} cannot be used: this user may not write there.")
        if os.path.exists(folder / MARKER.upper()):
            raise ConfigurationError(f"The folder {str(folder)!r} cannot be used: its file system cannot tell a name from A NAME.")
    except OSError as error:
        raise ConfigurationError(f"The folder {str(folder)!r} cannot be used: {disk.why(error)}.") from error


def check_folder(folder: Path) -> None:
    """Make sure that the folder is still there.

    Raises:
        BrokerUnavailable: It was removed. It is not made again: perhaps only its disk is not mounted.
    """
    if not os.path.exists(folder / MARKER):
        raise BrokerUnavailable(f"The folder {str(folder)!r} was removed; bring it back.")


def check_name(name: str) -> str:
    """Return the name of a namespace or queue if it can be a directory's: others lead elsewhere, such as `..`.

    Raises:
        InvalidName: It cannot.
    """
    if not _NAME.fullmatch(name):
        raise InvalidName(f"{name!a:.99} names no queue or namespace: 1 to 63 letters, digits, '-' or '_' do, no '-' or '_' first.")
    return name
