"""One connection to one file: how it is opened, how it waits for others, what its errors mean, and whether the file is still there.

SQLite's own rules that matter here: one connection of all processes writes at a time; whoever only reads is never in the way; with
`synchronous=FULL` a commit returns when the write-ahead log has reached the disk.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Final

from crossdock.backends.sqlite import location, process, schema
from crossdock.backends.sqlite.location import Location
from crossdock.backends.sqlite.process import FileId
from crossdock.errors import BrokerUnavailable, ConfigurationError

PATIENCE: Final = 15.0
"""Seconds to wait while other processes write."""
_PAUSE: Final = (0.0002, 0.002)
"""Seconds between attempts, drawn at random so that several who wait do not march in step."""

_SIDE_FILES: Final = ("-wal", "-shm")


class Fate(Enum):
    """What became of the file while it was open."""

    INTACT = "intact"
    REPLACED = "replaced"
    """It was removed or replaced: what we write goes nowhere."""
    WITHOUT_LOG = "without log"
    """Its write-ahead log was removed under everybody who has it open."""


class Database:
    """An open file. Belongs to the thread that made it.

    Args:
        where: The file, made if it does not exist, and how durable a commit has to be.
        pause: Sleeps for so many seconds.

    Raises:
        ConfigurationError: The file, its folder or what is in it cannot be used.
        BrokerUnavailable: It cannot be opened now.
    """

    def __init__(self, where: Location, pause: Callable[[float], object]) -> None:
        self.path = where.path
        self.log = f"{where.path}-wal"
        """The write-ahead log: every commit is written to it first."""
        self._where = where
        self._pause = pause
        self.closed = True
        self._dice = random.Random(f"{os.getpid()} {id(self)}")
        schema.check_library()
        with process.opening:
            location.prepare(self.path)
            if not process.is_open(_file_id(self.path)):
                self._refuse_foreign()
            self._connect()

    def _connect(self) -> None:
        try:
            # timeout=0: SQLite's own waiting sleeps for up to 100 ms at a time. Another thread only ever closes it, before a fork.
            self._connection = sqlite3.connect(
                self.path, timeout=0, isolation_level=None, cached_statements=256, check_same_thread=False
            )
        except sqlite3.Error as error:
            raise self.unavailable(error) from error
        try:
            # The tables come first, under SQLite's older journal, so that they and our mark reach the main file in one step.
            schema.bring_up_to_date(self, self.path)
            self._configure(self._where)
            self._identity = self._identify()
            self._seen_version = -1
        except sqlite3.Error as error:
            self._connection.close()
            raise self.unavailable(error) from error
        except BaseException:
            self._connection.close()
            raise
        self.closed = False
        process.opened(self._identity[0])

    def _refuse_foreign(self) -> None:
        journal = Path(f"{self.path}-journal")
        waited = 0.0
        while schema.is_foreign(self.path) and journal.exists() and waited < PATIENCE:
            waited += self._rest()  # another process is just making the store
        if (what := schema.is_foreign(self.path)) is not None:
            raise ConfigurationError(f"The SQLite file {str(self.path)!r} is {what}; name another file in the URL.")

    def _configure(self, where: Location) -> None:
        mode = self.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise ConfigurationError(f"SQLite cannot keep a write-ahead log beside {str(self.path)!r}; use a local disk.")
        self.execute(f"PRAGMA synchronous = {'FULL' if where.durability == 'full' else 'NORMAL'}")
        self.execute("PRAGMA fullfsync = ON")  # macOS: otherwise its fsync stops at the disk's own cache
        self.execute("PRAGMA journal_size_limit = 16777216")
        self.execute("SELECT count(*) FROM store")  # a first read makes the -wal and -shm files

    # --- statements ---

    def execute(self, sql: str, parameters: Sequence[Any] | dict[str, Any] = (), *, ends: bool = False) -> sqlite3.Cursor:
        """Run one statement; outside a transaction, or where it ends one, wait up to `PATIENCE` for a lock that others hold.

        Raises `sqlite3.Error`.
        """
        waited = 0.0
        while True:
            try:
                return self._connection.execute(sql, parameters)
            except sqlite3.OperationalError as error:
                if not is_busy(error) or self._connection.in_transaction is not ends or waited >= PATIENCE:
                    raise
            waited += self._rest()

    def begin(self) -> None:
        """Begin a transaction that writes, once others have ended theirs. Raises `sqlite3.Error`."""
        self.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Commit it, durably. Raises `sqlite3.Error`.

        Under the older journal, in which the tables are made, readers are in the way of a commit. The transaction stays as it was then, so
        that COMMIT can be tried again (https://www.sqlite.org/lang_transaction.html).
        """
        self.execute("COMMIT", ends=True)

    def rollback(self) -> None:
        """End the transaction, if there is one, with nothing done."""
        if self._connection.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # then SQLite rolls it back by itself
                self._connection.execute("ROLLBACK")

    def changed(self) -> bool:
        """Whether another connection has committed since the last call, or this is the first. Raises `sqlite3.Error`."""
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        changed: bool = version != self._seen_version
        self._seen_version = version
        return changed

    def close(self) -> None:
        """Close it, if it is open. The last one to do so in any process folds the log into the file."""
        if not self.closed:
            self._connection.close()
            self.closed = True
            process.closed(self._identity[0])

    def wake(self) -> None:
        """Open it again if it was closed for a fork. Raises what `Database` raises."""
        if self.closed:
            with process.opening:
                self._connect()

    def _rest(self) -> float:
        seconds = self._dice.uniform(*_PAUSE)
        self._pause(seconds)
        return seconds

    # --- the file itself ---

    def fate(self) -> Fate:
        """Look whether the path still leads to the files that are open. Costs a few microseconds."""
        now = self._identify()
        if now == self._identity or (self.closed and now[0] == self._identity[0]):
            return Fate.INTACT
        return Fate.REPLACED if now[0] != self._identity[0] else Fate.WITHOUT_LOG

    def _identify(self) -> tuple[FileId | None, FileId | None]:
        return _file_id(self.path), _file_id(self.log)

    def abandon(self) -> None:
        """Close a file that was removed or replaced, so that a new one can be opened under its name.

        The old one, should it live on under another name, gets what is in its log. What lies beside the new one but belongs to the
        old one is removed, because SQLite would read it as the new one's. (It does not do that itself where the file has moved.)
        """
        if self.closed:
            return
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        if self._identity[1] is not None and _file_id(self.log) == self._identity[1]:
            for suffix in _SIDE_FILES:
                Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self.close()

    # --- errors ---

    def unavailable(self, error: sqlite3.Error) -> BrokerUnavailable:
        """Say in our words why nothing could be done."""
        unavailable = BrokerUnavailable(self.explain(error))
        unavailable.__cause__ = error
        return unavailable

    def explain(self, error: sqlite3.Error) -> str:
        """A sentence about a failed statement."""
        code = _code(error)
        if is_busy(error):
            why = f"other processes have kept it locked for {PATIENCE:.0f} s; see what writes for so long, and try again"
        elif code == sqlite3.SQLITE_FULL:
            why = "the disk is full; free some space, and it will go on by itself"
        elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN):
            why = "it can no longer be written; check it and its folder"
        elif code == sqlite3.SQLITE_IOERR:
            why = f"the disk or its quota failed ({getattr(error, 'sqlite_errorname', 'SQLITE_IOERR')}); check the disk"
        elif code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            why = "its contents are damaged; restore it from a backup"
        else:
            why = f"SQLite says {str(error)!r}"
        return f"The SQLite file {str(self.path)!r} cannot be used now: {why}."


def _file_id(path: str | Path) -> FileId | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error: sqlite3.Error) -> bool:
    """Whether the statement failed only because others hold a lock."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_full(error: Exception) -> bool:
    """Whether there was no space, so that nothing of the transaction can have been stored."""
    return isinstance(error, sqlite3.Error) and _code(error) == sqlite3.SQLITE_FULL
