"""What a forked child must forget. It never closes what it inherited: sockets, files and threads belong to the parent."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    """Has state that a forked child must not use."""

    def forget(self) -> None:
        """Drop what was inherited, without closing it."""
        ...


_registered: weakref.WeakSet[Forgetful] = weakref.WeakSet()
_inherited: list[object] = []


def forget_after_fork(subject: Forgetful) -> None:
    """Call `subject.forget()` in every forked child, as long as `subject` lives."""
    _registered.add(subject)


def keep_inherited(*subjects: object) -> None:
    """Keep inherited objects alive for ever, so that no destructor closes what the parent still uses."""
    _inherited.extend(subjects)


def _in_child() -> None:
    for subject in list(_registered):
        subject.forget()


os.register_at_fork(after_in_child=_in_child)
