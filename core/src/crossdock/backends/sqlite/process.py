"""What the connections of one process owe each other, because POSIX gives file locks to processes, not to connections.

- Closing *any* descriptor of a file drops every lock this process has on it ("How To Corrupt An SQLite Database File", 2.2). So nobody
  here opens the file beside SQLite while a connection is open; SQLite itself knows, and puts its own closing off.
- A forked child inherits SQLite's memory of locks that the child does not have (same page, 2.6): a connection it then opens believes
  itself protected, and the last other process to close deletes the log under it. So connections are closed before a fork, and the
  parent opens its own again when it next needs them. `subprocess` does not fork in this sense and pays nothing.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from typing import Protocol


class Sleeper(Protocol):
    """Has a connection that must not be open during a fork."""

    in_use: threading.RLock
    """Held by whoever uses the connection."""

    def fall_asleep(self) -> None:
        """Close the connection; it is opened again when it is next needed. Called with `in_use` held."""
        ...


opening = threading.RLock()
"""Held while a connection is being opened, and during a fork."""

FileId = tuple[int, int]
"""Device and inode."""

_open: Counter[FileId | None] = Counter()
_sleepers: weakref.WeakSet[Sleeper] = weakref.WeakSet()
_held: list[Sleeper] = []


def opened(file: FileId | None) -> None:
    """There is a connection more to this file."""
    _open[file] += 1


def closed(file: FileId | None) -> None:
    """There is a connection less to this file."""
    _open[file] -= 1


def is_open(file: FileId | None) -> bool:
    """Whether this process has a connection to this file, so that nobody may open and close it otherwise."""
    return _open[file] > 0


def sleep_during_forks(sleeper: Sleeper) -> None:
    """Have its connection closed before every fork, as long as it lives."""
    _sleepers.add(sleeper)


def _before_fork() -> None:
    opening.acquire()
    for sleeper in list(_sleepers):
        sleeper.in_use.acquire()
        _held.append(sleeper)
        sleeper.fall_asleep()


def _after_fork() -> None:
    while _held:
        _held.pop().in_use.release()
    opening.release()


def _after_fork_in_child() -> None:
    _after_fork()
    _sleepers.clear()  # their threads are in the parent


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
