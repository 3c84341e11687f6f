"""Where a store may lie: from a URL to a file, and the reasons why a file or its folder cannot be used."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from crossdock.errors import ConfigurationError
from crossdock.spi import redact

Durability = Literal["full", "relaxed"]

MOUNTS: Final = Path("/proc/self/mountinfo")
"""Linux's list of what is mounted where; see proc(5)."""

_NETWORK: Final = re.compile(
    r"nfs\d?|cifs|smb\d?|smbfs|9p|afs|ceph|coda|lustre|beegfs|gfs2|ocfs2|gpfs|ncpfs|vboxsf|vmhgfs|prl_fs"
    r"|fuse\.(sshfs|glusterfs|s3fs|rclone|gcsfuse|goofys|ceph|curlftpfs|davfs2?|mount\.davfs|vmhgfs-fuse|smbnetfs|juicefs|mfs)"
)
"""File systems whose files other hosts may have open: SQLite's locks and its shared memory do not reach that far."""


class Location(NamedTuple):
    """What a broker URL says."""

    path: Path
    """The file; absolute, with symbolic links resolved."""
    durability: Durability


def parse(url: str, options: Mapping[str, str]) -> Location:
    """Read a broker URL.

    Args:
        url: `sqlite:///relative.db` or `sqlite:////absolute.db`, percent-encoded where needed.
        options: Its query: `durability=full` (the default) or `durability=relaxed`.

    Raises:
        ConfigurationError: It names no file, or has an option that is not known.
    """
    parts = urlsplit(url)
    path = unquote(parts.path).removeprefix("/")
    if parts.netloc or parts.fragment or not path or path.endswith("/") or "\0" in path:
        raise ConfigurationError(
            f"The broker URL {redact(url)!r} names no file: write sqlite:///relative.db or sqlite:////absolute/path.db, "
            "with %23 for '#' and %3F for '?'."
        )
    if path == ":memory:":
        raise ConfigurationError("SQLite's :memory: cannot be shared between connections: use memory:// instead.")
    for name in options:
        if name != "durability":
            raise ConfigurationError(f"sqlite:// has no option {name!r}; the only one is durability=full or durability=relaxed.")
    match options.get("durability", "full"):
        case "full" | "relaxed" as durability:
            return Location(Path(os.path.realpath(path)), durability)
        case _:
            raise ConfigurationError("The option durability of a sqlite:// URL must be 'full' or 'relaxed'.")


def prepare(path: Path, mounts: Path = MOUNTS) -> None:
    """Make sure that there is a file at `path`, made with mode 0600 if it is new, and that SQLite can share it.

    Raises:
        ConfigurationError: The file or its folder cannot be used.
    """
    _check_folder(path, mounts)
    try:
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        _check_file(path)
    except OSError as error:
        raise ConfigurationError(f"The SQLite file {str(path)!r} cannot be created: {_why(error)}.") from error
    else:
        os.fchmod(made, 0o600)  # whatever the umask; SQLite gives the files beside it the same mode
        os.close(made)


def _check_folder(path: Path, mounts: Path) -> None:
    folder = path.parent
    cannot = f"The SQLite file {str(path)!r} cannot be used: its folder {str(folder)!r}"
    try:
        mode = folder.stat().st_mode
    except FileNotFoundError as error:
        raise ConfigurationError(f"{cannot} does not exist; create it, or correct the URL.") from error
    except OSError as error:
        raise ConfigurationError(f"{cannot} cannot be reached: {_why(error)}.") from error
    if not stat.S_ISDIR(mode):
        raise ConfigurationError(f"{cannot} is not a folder; correct the URL.")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise ConfigurationError(f"{cannot} may be written by every user, who could replace the file; run 'chmod o-w' on it.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigurationError(
            f"{cannot} is read-only for this user, and SQLite must create files there; change its permissions."
        )
    system = file_system_of(folder, mounts)
    if system is not None and _NETWORK.fullmatch(system):
        raise ConfigurationError(
            f"{cannot} is on a network file system ({system}), where SQLite's locks do not hold; use a local disk, or a broker server."
        )


def _check_file(path: Path) -> None:
    cannot = f"The SQLite file {str(path)!r} cannot be used:"
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise ConfigurationError(f"{cannot} it is {what}; name a file in the URL.")
    if not os.access(path, os.R_OK | os.W_OK):
        raise ConfigurationError(f"{cannot} this user may not read and write it; change its permissions.")


def file_system_of(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """Return the type of the file system that holds a folder, such as `ext4` or `nfs4`; None where the system does not tell."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    longest, system = -1, None
    for line in lines:
        mount, _, source = line.partition(" - ")
        point = Path(_unescape(mount.split()[4]))
        # Of two mounts on one point the later hides the earlier.
        if folder.is_relative_to(point) and len(point.parts) >= longest:
            longest, system = len(point.parts), source.split()[0]
    return system


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()
