"""The version of the tables, and how a file comes to have it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from crossdock.errors import ConfigurationError

APPLICATION_ID: Final = int.from_bytes(b"xdok")
"""Marks a SQLite file as ours, in its header."""
MIGRATIONS: Final = ("schema.sql",)
"""The script at place n makes version n + 1 out of version n. A released script is never changed."""

_OLDEST_SQLITE: Final = (3, 35, 0)  # for RETURNING


class Session(Protocol):
    """As much of a connection as this module needs."""

    def execute(self, sql: str) -> sqlite3.Cursor:
        """Run one statement."""
        ...

    def begin(self) -> None:
        """Begin a transaction that writes, waiting for others to end theirs."""
        ...

    def commit(self) -> None:
        """Commit it."""
        ...


def check_library() -> None:
    """Raises `ConfigurationError` if Python's SQLite library is too old."""
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        wanted = ".".join(map(str, _OLDEST_SQLITE))
        raise ConfigurationError(
            f"Python's sqlite3 module uses SQLite {sqlite3.sqlite_version}, but sqlite:// needs {wanted} or newer; update SQLite."
        )


def is_foreign(path: Path) -> str | None:
    """Say what a file is if it is no store of ours; None if it is one, or empty. Only reads its header, so nothing is changed."""
    with path.open("rb") as file:
        header = file.read(100)
    if not header:
        return None
    if not header.startswith(b"SQLite format 3\0"):
        return "not a SQLite database"
    return None if int.from_bytes(header[68:72]) == APPLICATION_ID else "a SQLite database of another program"


def bring_up_to_date(session: Session, path: Path) -> None:
    """Give a file the tables of this version, in one transaction. Several processes may do it at once.

    Raises:
        ConfigurationError: A newer crossdock wrote it.
    """
    if _version(session, path) == len(MIGRATIONS):
        return
    session.begin()
    for version in range(_version(session, path), len(MIGRATIONS)):
        for statement in _statements((Path(__file__).parent / MIGRATIONS[version]).read_text(encoding="utf-8")):
            session.execute(statement)
    session.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    session.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    session.commit()


def _version(session: Session, path: Path) -> int:
    version = int(session.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise ConfigurationError(
            f"The SQLite file {str(path)!r} has version {version}, and this crossdock knows versions up to {len(MIGRATIONS)}; "
            "update crossdock here too, or use another file."
        )
    return version


def _statements(script: str) -> Iterator[str]:
    """Cut a script into statements: `executescript` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
