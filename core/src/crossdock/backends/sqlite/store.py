"""A store: its file, its transactions, and what the verbs do inside them. Synchronous, for one thread.

`tables` has what all verbs share, `deliveries` receives and settles, `repairs` is for tools and people.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

from crossdock.backends.sqlite import process
from crossdock.backends.sqlite.database import Database
from crossdock.backends.sqlite.deliveries import Deliveries
from crossdock.backends.sqlite.repairs import Repairs
from crossdock.backends.sqlite.tables import Queue, Tables, due_ms, objection
from crossdock.errors import QueueFull
from crossdock.spi import Clock, Message, QueueSpec, Refusal


class Store:
    """One namespace of one file. Verbs are called between `begin` and `commit`.

    Args:
        open_database: Opens the file; called again when it was replaced.
        namespace: Isolates everything.
        clock: For all that is due.

    Raises:
        ConfigurationError, BrokerUnavailable: What `open_database` raises.
    """

    def __init__(self, open_database: Callable[[], Database], namespace: str, clock: Clock) -> None:
        self._open_database = open_database
        self._declared: dict[str, QueueSpec] = {}
        self.database = open_database()
        self._tables = Tables(self.database, namespace, clock)
        self.deliveries = Deliveries(self._tables)
        self.repairs = Repairs(self._tables)
        self.in_use = threading.RLock()
        """Held while the file is used; a fork waits for it and finds the file closed."""
        process.sleep_during_forks(self)

    @contextmanager
    def opening(self) -> Generator[None, None, None]:
        """Hold what opening a file takes. A fork takes that lock first and `in_use` second, so `in_use` is given up for a moment."""
        self.in_use.release()
        process.opening.acquire()
        self.in_use.acquire()
        try:
            yield
        finally:
            process.opening.release()

    def fall_asleep(self) -> None:
        """Close the file for a fork; `wake` opens it again."""
        self.database.close()

    def wake(self) -> None:
        """Open the file again after a fork, if that is needed. Raises what `Database` raises."""
        self.database.wake()

    # --- transactions ---

    def begin(self) -> None:
        """Begin. Raises `sqlite3.Error`."""
        self.database.begin()
        self.refresh()

    def commit(self) -> None:
        """Make durable what was done since `begin`. Raises `sqlite3.Error`."""
        self.database.commit()
        self.deliveries.commit()

    def rollback(self) -> None:
        """Undo what was done since `begin`, also what was remembered of it."""
        self.database.rollback()
        self._tables.forget_queues()
        self.deliveries.rollback()

    def refresh(self) -> bool:
        """Notice what other connections have committed. Returns whether they have."""
        changed = self.database.changed()
        if changed:
            self._tables.forget_queues()
        return changed

    def reopen(self) -> None:
        """Go on with the file that now lies where ours was; what was declared is declared again.

        Raises:
            ConfigurationError, BrokerUnavailable, sqlite3.Error: It cannot be used (yet).
        """
        self.database.abandon()
        self.database = self._tables.database = self._open_database()
        self._tables.forget_queues()
        self.deliveries.forget()
        self.begin()
        self._tables.declare(self._declared.values())
        self.commit()

    def close(self) -> None:
        """Close the file."""
        self.database.close()

    # --- verbs ---

    def declare(self, queues: Sequence[QueueSpec]) -> None:
        """Make queues, or change their settings."""
        self._tables.declare(queues)
        self._declared.update((spec.name, spec) for spec in queues)

    def erase(self, queue: str) -> bool:
        """Delete a queue, step by step; returns whether there is more to do."""
        self._declared.pop(queue, None)
        return self.repairs.erase(queue)

    def enqueue(self, messages: Sequence[Message]) -> list[Refusal]:
        """Store messages, but for those that are stored already or that something speaks against."""
        now = self._tables.clock.time_ms()
        by_queue: defaultdict[str, list[tuple[int, Message]]] = defaultdict(list)
        for index, message in enumerate(messages):
            by_queue[message.queue].append((index, message))
        queues = self._tables.used(by_queue)
        self._tables.catch_up(queues.values(), now)
        accepted: list[tuple[Queue, Message]] = []
        refusals: list[Refusal] = []
        for name, items in by_queue.items():
            fit, unfit = self._sift(queues[name], items, now)
            accepted += [(queues[name], message) for message in fit]
            refusals += unfit
        self._tables.store(accepted, now)
        return refusals

    def _sift(self, queue: Queue, items: Sequence[tuple[int, Message]], now: int) -> tuple[list[Message], list[Refusal]]:
        """Tell what is to be stored in a queue from what cannot be; what is stored already is neither."""
        held = self._tables.generations(queue, [message.id for _, message in items])
        room = self._room(queue)
        fit: list[Message] = []
        unfit: list[Refusal] = []
        for index, message in items:
            generation = held.get(message.id)
            if generation is not None and generation >= message.generation:
                continue
            takes_room = room is not None and due_ms(message, now) <= now
            error = objection(message, generation, now)
            if error is None and takes_room and room == 0:
                error = _queue_full(queue, message)
            if error is not None:
                unfit.append(Refusal(index, error))
                continue
            held[message.id] = message.generation
            fit.append(message)
            if room is not None and takes_room:
                room -= 1
        return fit, unfit

    def _room(self, queue: Queue) -> int | None:
        """How many messages an enqueue may make READY; None = any number."""
        if queue.max_ready is None:
            return None
        (ready,) = self._tables.execute("SELECT ready FROM queue WHERE id = ?", queue.id).fetchone()
        return max(0, queue.max_ready - int(ready))


def _queue_full(queue: Queue, message: Message) -> QueueFull:
    return QueueFull(
        f"Queue {queue.name!r} is full: it holds its max_ready of {queue.max_ready} messages; {message.id!r} was not stored.",
        message,
    )
