"""One queue on the disk: its directories, what a Broker remembers of them, and how they heal.

::

    NAMESPACE/QUEUE/
        ready/ scheduled/ leased/ dead/     a file per message
        new/                                files that are being written
        about.json                          what was declared, and how many dead letters retention removed
        lock                                who has locked it may change the queue; in it, the number of the last change

**Numbers.** Every change takes the next number and writes it down before it begins. So whoever finds the number that they know from
before knows that nothing has changed; whoever finds another one lists the directories. The numbers also order the messages and fence
the leases. They start anywhere, so that no receipt from before an erase fits what came after it.

**Healing.** A process may be killed between any two steps. It leaves the lock free and the number changed, so the next one lists:

=========================================  ========================================================================
killed                                     what the next one finds, and does
=========================================  ========================================================================
while a queue is made                      no lock file, which comes last: so there is no queue yet; it is made again
while a file is written                    a draft in `new/`: deleted, since nobody else writes while we have the lock
between renames and deletions              each message where it was or where it goes: nothing is to be done
after a newer file of a message was put    two files with one id: the one with the higher number counts, the other
in place, before the older one is deleted  is deleted (retry, dead-letter, replay within a queue)
after `about.json` has the names of the    these names: what is left of them is deleted; they are counted already
letters to drop, before all are deleted
while a queue is erased                    a directory with a dot: deleted when a queue of that name is erased again
=========================================  ========================================================================
"""

from __future__ import annotations

import math
import os
import secrets
from bisect import bisect_left, bisect_right, insort
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

import msgspec

from crossdock.errors import BrokerUnavailable
from crossdock.spi import Clock, DeadLetter, Entry, Message, Priority, QueueSpec, State
from crossdock_plainfiles import disk
from crossdock_plainfiles.record import Record, parse

NEW: Final = "new"
ABOUT: Final = "about.json"
LOCK: Final = "lock"

T = TypeVar("T")


class About(msgspec.Struct, frozen=True):
    """What is known of a queue beside its messages."""

    spec: QueueSpec | None = None
    """What was declared; None if nothing was."""
    dropped: int = 0
    """How many dead letters retention removed."""
    doomed: Sequence[str] = ()
    """File names of the last ones of them, which may still be there."""


class Queue:
    """A queue, as this process knows it. That is right inside `with queue.locked()`, where everything but `glance` belongs.

    Args:
        folder: Its folder; it need not exist.
    """

    @staticmethod
    def at(folder: Path) -> Queue:
        """Return the one object for a folder, so that the Brokers of a process share what they know of it."""
        return shared.setdefault(folder, Queue(folder))

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.exists = False
        self.now, self.now_ms = 0.0, 0
        """When it was locked: monotonic seconds, and milliseconds since the Unix epoch."""
        self._folder = folder
        self._lock = disk.LockFile(folder / LOCK)
        self._forget_everything()

    def _forget_everything(self) -> None:
        self.about = About()
        self.number = 0  # of the last change; 0 = nothing is known
        self._by_id: dict[str, Record] = {}
        self._by_name: dict[State, dict[str, Record]] = {state: {} for state in State}
        self._in_order: dict[State, list[Record]] = {state: [] for state in State}
        self._older: list[Record] = []
        self._unflushed: set[Path] = set()

    # --- the lock, and what is found then ---

    @contextmanager
    def locked(self, clock: Clock, *, make: bool = False) -> Generator[Queue]:
        """Hold the lock, and yield the queue as it is now; an empty one, of no effect, if it does not exist.

        Args:
            clock: Tells what is due.
            make: Make it if it does not exist.
        """
        exists = self._lock.acquire()
        while make and not exists:
            self._make()
            exists = self._lock.acquire()
        if not exists:
            yield Queue(self._folder)
            return
        try:
            self.exists = True
            self.now, self.now_ms = clock.monotonic(), clock.time_ms()
            self._find_out()
            self._let_time_pass()
            yield self
        except BaseException:
            self.number = 0  # something went wrong half-way: list the directories next time
            raise
        finally:
            self._lock.release()

    def _make(self) -> None:
        disk.make_folder(self._folder.parent)
        with suppress(FileNotFoundError):  # erased between two steps: once more
            for name in ("", NEW, *(state.value for state in State)):
                disk.make_folder(self._folder / name)
            disk.make_file(self._folder / LOCK)

    def _find_out(self) -> None:
        """Make what is remembered right, and heal what was left half done."""
        number = self._lock.read()
        if number == self.number != 0:
            return
        has_about = (self._folder / ABOUT).exists()
        self.about = self._decode(ABOUT, About) if has_about else About()
        for draft in os.listdir(self._folder / NEW):
            disk.unlink(self._folder / NEW / draft)
        for name in self.about.doomed:
            disk.unlink(self._folder / State.DEAD.value / name)
        listed = {state: set(os.listdir(self._folder / state.value)) for state in State}
        for state, known in self._by_name.items():  # all that is gone from one directory, before what is new in another
            for name in known.keys() - listed[state]:
                self._forget(known[name])
        for state, known in self._by_name.items():
            for record in [parse(state, name) for name in listed[state] - known.keys()]:
                if record is not None:
                    self._learn(record)
        if self._older:
            self._unflushed |= {self._folder / state.value for state in State}
            self.flush()
        highest = max((max(record.number, record.fence) for record in self._by_id.values()), default=0)
        self.number = max(number, highest) or secrets.randbits(40)
        self._lock.write(self.number)

    def _let_time_pass(self) -> None:
        """Make READY what is due, and what is held beyond its lease. Where a power loss undoes that, it is done again."""
        for state in (State.SCHEDULED, State.LEASED):
            waiting = self._in_order[state]
            while waiting and waiting[0].since_ms <= self.now_ms:
                # What is due goes behind the others; what a worker lost keeps its place.
                number = self.next_number() if state is State.SCHEDULED else waiting[0].number
                self.move(waiting[0], state=State.READY, number=number)

    def _learn(self, record: Record) -> None:
        other = self._by_id.get(record.id)
        if other is not None:
            if other.number > record.number:
                self._older.append(record)
                return
            self._forget(other)
            self._older.append(other)
        self._by_id[record.id] = self._by_name[record.state][record.name] = record
        insort(self._in_order[record.state], record, key=Record.key)

    def _forget(self, record: Record) -> None:
        del self._by_id[record.id], self._by_name[record.state][record.name]
        records = self._in_order[record.state]
        del records[bisect_left(records, record.key(), key=Record.key)]

    # --- looking ---

    def glance(self) -> int:
        """The number of the last change, without the lock; 0 if there is no queue."""
        return self._lock.glance()

    @property
    def spec(self) -> QueueSpec:
        """What was declared, or the defaults."""
        return self.about.spec or QueueSpec(self.name)

    def get(self, id: str, *states: State) -> Record | None:
        """The record of a message, if there is one in one of these states."""
        record = self._by_id.get(id)
        return record if record is not None and record.state in (states or State) else None

    def all(self, state: State) -> Sequence[Record]:
        """The records of a state, in order."""
        return self._in_order[state]

    def beyond(self, state: State, key: tuple[int | str, ...], most: int) -> Sequence[Record]:
        """The first records of a state that stand behind a key; () stands before all."""
        records = self._in_order[state]
        start = bisect_right(records, key, key=Record.key)
        return records[start : start + max(0, most)]

    def ready(self, priority: Priority, most: int) -> Sequence[Record]:
        """The first READY records of a level."""
        return [record for record in self.beyond(State.READY, (-priority,), most) if record.priority == priority]

    def next_change_ms(self) -> float:
        """When time alone will change something; infinity if never."""
        firsts = [self._in_order[state][0] for state in (State.SCHEDULED, State.LEASED) if self._in_order[state]]
        return min((record.since_ms for record in firsts), default=math.inf)

    def read(self, record: Record) -> Entry:
        """Read a message's file."""
        if record.state is State.DEAD:
            letter = self._decode(record.path, DeadLetter)
            return Entry(letter.message, record.state, record.delivery_count, letter)
        message = self._decode(record.path, Message)
        if record.state is State.SCHEDULED:  # perhaps by a Nack with a delay, which changes the name only
            message = msgspec.structs.replace(message, eta_ms=record.since_ms)
        return Entry(message, record.state, record.delivery_count)

    def _decode(self, path: str, type: type[T]) -> T:
        try:
            return msgspec.json.decode((self._folder / path).read_bytes(), type=type)
        except msgspec.DecodeError as error:
            raise BrokerUnavailable(f"The file {str(self._folder / path)!r} is damaged: move it away.") from error

    # --- changing: each message in one step, durably once `flush` has returned ---

    def next_number(self) -> int:
        """Take the next number, before that which it is for."""
        self.number += 1
        self._lock.write(self.number)
        return self.number

    def waiting(self, due_ms: int) -> tuple[State, int]:
        """The state of what is due then, and since or until when it is in it."""
        return (State.SCHEDULED, due_ms) if due_ms > self.now_ms else (State.READY, self.now_ms)

    def store(self, content: Message | DeadLetter, state: State, since_ms: int, delivery_count: int = 0) -> None:
        """Put a message in place, behind the others. An older file of it no longer counts, and goes at the next flush."""
        message = content if isinstance(content, Message) else content.message
        if isinstance(content, Message) and state is State.SCHEDULED:
            content = msgspec.structs.replace(content, eta_ms=since_ms, delay_ms=0)
        number = self.next_number()
        record = Record(state, message.id, number, message.priority, since_ms, delivery_count, 0, message.generation)
        self._put(content, record.name, record.path)
        self._learn(record)

    def move(self, record: Record, **changes: Any) -> Record:
        """Change what the name says, the state included."""
        self.next_number()
        moved = msgspec.structs.replace(record, **changes)
        disk.rename(self._folder / record.path, self._folder / moved.path)
        self._forget(record)
        self._learn(moved)
        self._unflushed |= {self._folder / record.state.value, self._folder / moved.state.value}
        return moved

    def drop(self, record: Record) -> None:
        """Delete a message."""
        self.next_number()
        disk.unlink(self._folder / record.path)
        self._forget(record)
        self._unflushed.add(self._folder / record.state.value)

    def describe(self, about: About) -> None:
        """Change what is known of the queue beside its messages."""
        self.next_number()
        self._put(about, ABOUT, ABOUT)
        self.about = about
        self.flush()

    def retain(self) -> None:
        """Drop the dead letters beyond the queue's retention: first they are counted and named, so that a kill changes no count."""
        letters, spec = self._in_order[State.DEAD], self.spec
        too_many = 0 if spec.dead_max_count is None else len(letters) - spec.dead_max_count
        too_old = -math.inf if spec.dead_max_age is None else self.now_ms - spec.dead_max_age * 1000
        doomed = [record for index, record in enumerate(letters) if index < too_many or record.since_ms < too_old]
        if doomed:
            names = [record.name for record in doomed]
            self.describe(About(self.about.spec, self.about.dropped + len(doomed), names))
            for record in doomed:
                self.drop(record)
            self.flush()

    def erase(self) -> None:
        """Delete the queue."""
        disk.erase(self._folder)
        self._forget_everything()

    def flush(self) -> None:
        """Make every change durable: first all that was put in place, and only then older files are deleted."""
        self._sync()
        for record in self._older:
            disk.unlink(self._folder / record.path)
            self._unflushed.add(self._folder / record.state.value)
        self._older.clear()
        self._sync()

    def _sync(self) -> None:
        for folder in sorted(self._unflushed):
            disk.sync(folder)
        self._unflushed.clear()

    def _put(self, content: Message | DeadLetter | About, draft: str, path: str) -> None:
        disk.write(self._folder / NEW / draft, msgspec.json.encode(content))
        disk.rename(self._folder / NEW / draft, self._folder / path)
        self._unflushed.add((self._folder / path).parent)


shared: Final[WeakValueDictionary[Path, Queue]] = WeakValueDictionary()
os.register_at_fork(after_in_child=shared.clear)  # a lock may have been held
