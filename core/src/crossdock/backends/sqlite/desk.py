"""The work of the thread that uses the file: commit in groups, and let receives wait without a lock.

Whatever is in the inbox is run in one transaction and answered together; while one commit is on its way to the disk the next group
gathers. If that transaction fails, each command is tried alone, so that one that cannot be done spoils nothing for the others.

A receive that finds nothing stays here. It joins every transaction, and without one it looks again, taking no lock, when another
connection has committed and when something falls due. SQLite counts commits; the count is asked for every millisecond after something
happened, and hardly ever once nothing has for a while and the system promises to say when somebody writes. The pauses are real,
whatever clock is in use; what is due is judged by the clock.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Any, Final

from crossdock.backends.sqlite.command import Answer, Command, Inbox, Loss, Note, Receive, give_back
from crossdock.backends.sqlite.database import Fate, is_full
from crossdock.backends.sqlite.store import Store
from crossdock.backends.sqlite.watch import Watch
from crossdock.errors import BrokerClosed, BrokerUnavailable, CrossdockError
from crossdock.spi import BrokerEvent, Clock, Connected, Disconnected, StateLost

_SHORTEST: Final = 0.001
"""Seconds between two questions of a waiting receive, right after something happened."""
_QUIET: Final = 100
"""Questions without an answer after which nothing is expected any more."""
_LONGEST: Final = 0.006
"""Seconds between them from then on, where the system does not say that somebody writes."""
_WATCHED: Final = 0.05
"""Seconds between them from then on, where it does."""
_QUESTIONS_PER_CHECK: Final = 16
"""How often, until then, to check also that the file and the event loop are still there; from then on at each question."""
_NAP: Final = 60.0
"""Seconds between checks of the event loop when no receive waits."""


class Desk:
    """Does commands until there are no more.

    Args:
        store: Open; closed when the work is over.
        inbox: Where commands come from.
        clock: For deadlines and due times.
        answer: Takes answers to where somebody waits for them; returns whether anybody can still be there.
        tell: Takes events there.
        watch: Puts `Note.WRITTEN` into the inbox.
    """

    def __init__(
        self,
        store: Store,
        inbox: Inbox,
        clock: Clock,
        answer: Callable[[Sequence[Answer]], bool],
        tell: Callable[[BrokerEvent], None],
        watch: Watch,
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._clock = clock
        self._answer = answer
        self._tell = tell
        self._watch = watch
        self._watched = False
        self._waiting: list[Receive] = []
        self._questions = 0  # in a row, with nothing happening
        self._fate = Fate.INTACT
        self._disconnected = False  # and told so

    def work(self) -> None:
        """Return when the inbox has said that there is no more, or nobody is left to answer to."""
        while self._turn():
            pass
        closed = BrokerClosed("The SQLite broker was closed while a receive waited.")
        self._answer([Answer(receive, None, closed) for receive in self._waiting])
        with self._store.in_use:
            self._store.close()

    def _turn(self) -> bool:
        commands = self._collect()
        try:
            with self._store.in_use:
                return self._do(commands)
        except Exception as error:  # a fault of ours, but nobody shall wait for ever because of it
            failed = [command for command in commands if isinstance(command, Command)]
            self._answer([self._failed(command, error, perhaps=True) for command in {*failed, *self._waiting}])
            self._waiting = []
            return Note.END not in commands

    def _do(self, commands: Sequence[Command[Any] | Note]) -> bool:
        """Do what was collected, and what receives wait for; returns whether to go on."""
        group = [command for command in commands if isinstance(command, Command) and not isinstance(command, Receive)]
        self._waiting += [command for command in commands if isinstance(command, Receive)]
        self._waiting = [receive for receive in self._waiting if not receive.unwanted]
        answers = self._transact([*group, *(self._waiting if group else self._worth_trying())])
        answers = self._without_those_who_wait(answers)
        if not self._answer(answers):
            for command, value, _ in answers:
                if isinstance(command, Receive) and value:
                    self._transact([give_back(value)])
            return False
        return Note.END not in commands

    def _collect(self) -> list[Command[Any] | Note]:
        """Wait for commands and return all there are; or return none, if it is time for a waiting receive to look again."""
        while True:
            try:
                first = self._inbox.get(timeout=self._pause())
            except Empty:
                self._questions += 1
            else:
                self._questions = 0
                if first is not Note.WRITTEN:
                    return self._all_from(first)
                self._watched = False
            if self._time_to_check() and not self._answer(()):
                return [Note.END]
            with self._store.in_use:
                if self._something_happened():
                    return []

    def _all_from(self, first: Command[Any] | Note) -> list[Command[Any] | Note]:
        found = [first]
        with contextlib.suppress(Empty):
            while True:
                found.append(self._inbox.get_nowait())
        if Note.WRITTEN in found:
            self._watched = False
        return found

    # --- waiting receives ---

    def _pause(self) -> float:
        """Seconds until a waiting receive has to ask again."""
        if not self._waiting:
            return _NAP
        longest = _SHORTEST
        if self._watched:
            longest = _WATCHED
        elif self._questions >= _QUIET:
            self._watched = self._watch.arm()  # somebody may just have written, so ask once more before relying on it
            longest = _SHORTEST if self._watched else _LONGEST
        next_ms = min(receive.look_at_ms for receive in self._waiting)
        deadline = min(receive.deadline for receive in self._waiting)
        nearest = min((next_ms - self._clock.time_ms()) / 1000, deadline - self._clock.monotonic())
        return max(_SHORTEST, min(longest, nearest))

    def _time_to_check(self) -> bool:
        return not self._waiting or self._questions > _QUIET or self._questions % _QUESTIONS_PER_CHECK == 0

    def _something_happened(self) -> bool:
        """Ask whether a waiting receive has a reason to look again. This is what an idle worker does all day."""
        ms, seconds = self._clock.time_ms(), self._clock.monotonic()
        for receive in self._waiting:
            if receive.look_at_ms <= ms or receive.deadline <= seconds:
                return True
        if self._time_to_check():
            if not self._file_is_there():
                self._look_at_once()
                return True
            if any(receive.unwanted for receive in self._waiting):
                return True
        try:
            changed = self._store.refresh()
        except sqlite3.Error:
            changed = True  # a transaction will say what is wrong
        if changed:
            self._questions = 0
            self._look_at_once()
        return changed

    def _look_at_once(self) -> None:
        for receive in self._waiting:
            receive.look_at_ms = -math.inf

    def _worth_trying(self) -> list[Receive]:
        """Those of the waiting receives for which a transaction may find something."""
        found: list[Receive] = []
        now = self._clock.time_ms()
        for receive in self._waiting:
            if receive.look_at_ms <= now:
                there, next_ms = True, None
                if self._fate is Fate.INTACT:
                    try:
                        self._store.refresh()
                        there, next_ms = self._store.deliveries.look(receive.lanes)
                    except sqlite3.Error:
                        pass  # as above
                receive.look_at_ms = math.inf if next_ms is None else next_ms
                if there:
                    found.append(receive)
        return found

    def _without_those_who_wait(self, answers: Sequence[Answer]) -> list[Answer]:
        """Take out the answers of receives that found nothing, unless they may not wait any longer; these are answered in any case."""
        final = [
            answer for answer in answers if not isinstance(answer.command, Receive) or answer.value or answer.error is not None
        ]
        answered = {answer.command for answer in final}
        now = self._clock.monotonic()
        waiting = [receive for receive in self._waiting if receive not in answered]
        self._waiting = [receive for receive in waiting if receive.deadline > now]
        if answers:  # something was done, so something may have come, or come nearer
            self._look_at_once()
        return final + [Answer(receive, ()) for receive in waiting if receive.deadline <= now]

    # --- transactions ---

    def _transact(self, group: Sequence[Command[Any]]) -> list[Answer]:
        """Do commands in one transaction, or each in its own if that fails."""
        if not group:
            return []
        try:
            self._begin()
        except BrokerUnavailable as error:
            return [Answer(command, None, error) for command in group]
        committing = False
        try:
            values = [command.run(self._store) for command in group]
            committing = True
            self._store.commit()
        except Exception as error:
            self._store.rollback()
            perhaps = committing and not is_full(error)
            if len(group) > 1 and not perhaps:
                return [answer for command in group for answer in self._transact([command])]
            return [self._failed(command, error, perhaps) for command in group]
        if self._file_is_there():
            return [Answer(command, value) for command, value in zip(group, values, strict=True)]
        if self._fate is Fate.REPLACED:  # all this went nowhere: do it in the new file
            return self._transact(group)
        return [self._excuse(command, Loss(self._without_log(), perhaps=True)) for command in group]

    def _begin(self) -> None:
        if self._store.database.closed or self._fate is not Fate.INTACT:
            with self._store.opening():
                self._open_again()
        try:
            self._store.begin()
        except sqlite3.Error as error:
            self._store.rollback()
            raise self._store.database.unavailable(error) from error

    def _failed(self, command: Command[Any], error: Exception, perhaps: bool) -> Answer:
        if isinstance(error, CrossdockError):  # it was asked for something that cannot be
            return Answer(command, None, error)
        if isinstance(error, sqlite3.Error):
            return self._excuse(command, Loss(self._store.database.unavailable(error), perhaps))
        unavailable = BrokerUnavailable(f"The SQLite broker cannot do what it was asked: {type(error).__name__}: {error}")
        unavailable.__cause__ = error
        return self._excuse(command, Loss(unavailable, perhaps))

    def _excuse(self, command: Command[Any], loss: Loss) -> Answer:
        if command.excuse is None:
            return Answer(command, None, loss.error)
        return Answer(command, command.excuse(loss))

    # --- the file ---

    def _file_is_there(self) -> bool:
        if self._fate is Fate.INTACT:
            self._fate = self._store.database.fate()
        return self._fate is Fate.INTACT

    def _open_again(self) -> None:
        """Go on with the file after a fork, or with a new one where ours was removed or replaced. Raises `BrokerUnavailable`."""
        try:
            if self._file_is_there():
                self._store.wake()
            elif self._fate is Fate.REPLACED:
                self._store.reopen()
                self._fate = Fate.INTACT
                path = str(self._store.database.path)
                self._tell(StateLost(f"The SQLite file {path!r} was removed or replaced while it was open; a new one is in use."))
            else:
                raise self._without_log()
        except (CrossdockError, sqlite3.Error) as error:
            text = self._store.database.explain(error) if isinstance(error, sqlite3.Error) else str(error)
            if not self._disconnected:
                self._disconnected = True
                self._tell(Disconnected(text))
            raise BrokerUnavailable(text) from error
        if self._disconnected:
            self._disconnected = False
            self._tell(Connected())

    def _without_log(self) -> BrokerUnavailable:
        path = str(self._store.database.path)
        return BrokerUnavailable(
            f"The file {path + '-wal'!r} was removed while {path!r} was in use; stop every program that uses it, then start them again."
        )
