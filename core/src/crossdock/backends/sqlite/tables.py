"""What all verbs need of the tables: the queues of a namespace, storing, and the moves that time brings about.

Two habits, here and in the modules above. A batch is one statement, its keys or ids passed as one JSON list: Python gives up its
global lock at each statement, and beside a busy thread it may wait long to get it back. And nothing scans or counts what is stored.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Final

import msgspec

from crossdock.backends.sqlite.database import Database
from crossdock.errors import EnqueueFailed, MessageTooLarge
from crossdock.spi import LEVELS, Clock, Message, QueueSpec

MAX_BODY: Final = 16 * 1024 * 1024
STEP: Final = 5_000
"""Most messages that time or a purge moves in one transaction, so that it holds nobody up and the log stays small."""

LONGEST_DELAY: Final = 1e12
"""Seconds: some thirty thousand years."""
_MAX_INTEGER: Final = 2**61


class Queue(msgspec.Struct, frozen=True, gc=False):
    """A row of `queue`, without its figures."""

    id: int
    name: str
    lease_ms: int
    max_ready: int | None
    dead_max_age_ms: int | None
    dead_max_count: int | None


class Tables:
    """The tables of a file, as one namespace uses them. All but `known` and `forget_queues` want a transaction around them.

    Args:
        database: The file. May be exchanged for another one between transactions.
        namespace: Whose queues these are.
        clock: For all that is due.
    """

    def __init__(self, database: Database, namespace: str, clock: Clock) -> None:
        self.database = database
        self.namespace = namespace
        self.clock = clock
        self._queues: dict[str, Queue] = {}  # as last read; good until another connection commits

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        """Run one statement. Raises `sqlite3.Error`."""
        return self.database.execute(sql, parameters)

    def keys(self, select: str, *parameters: Any, limit: int = STEP) -> str:
        """The keys of messages that a query finds, as a JSON list."""
        return str(self.execute(f"SELECT json_group_array(message) FROM ({select} LIMIT {limit})", *parameters).fetchone()[0])

    # --- queues ---

    def declare(self, specs: Iterable[QueueSpec]) -> None:
        """Make queues, or change their settings."""
        for spec in specs:
            self.execute(
                """
                INSERT INTO queue (namespace, name, lease_ms, max_ready, dead_max_age_ms, dead_max_count) VALUES (?, ?, ?, ?, ?, ?)
                ON CONFLICT DO UPDATE SET lease_ms = excluded.lease_ms, max_ready = excluded.max_ready,
                    dead_max_age_ms = excluded.dead_max_age_ms, dead_max_count = excluded.dead_max_count
                """,
                self.namespace,
                spec.name,
                milliseconds(spec.lease),
                spec.max_ready,
                None if spec.dead_max_age is None else milliseconds(spec.dead_max_age),
                spec.dead_max_count,
            )
            self._queues.pop(spec.name, None)

    def known(self, names: Collection[str]) -> dict[str, Queue]:
        """Those of these queues that exist, by name."""
        queues = self._queues
        missing = [name for name in names if name not in queues]
        if missing:
            rows = self.execute(
                """
                SELECT id, name, lease_ms, max_ready, dead_max_age_ms, dead_max_count FROM queue
                WHERE namespace = ? AND name IN (SELECT value FROM json_each(?))
                """,
                self.namespace,
                as_json(missing),
            )
            queues.update((row[1], Queue(*row)) for row in rows)
        return {name: queues[name] for name in names if name in queues}

    def used(self, names: Collection[str]) -> dict[str, Queue]:
        """These queues, by name. One that does not exist comes into being, with default settings."""
        queues = self.known(names)
        if len(queues) < len(names):
            self.declare(QueueSpec(name) for name in names if name not in queues)
            queues = self.known(names)
        return queues

    def forget_queues(self) -> None:
        """Read queues anew when they are needed: another connection may have changed them."""
        self._queues.clear()

    # --- messages in and out ---

    def generations(self, queue: Queue, ids: Sequence[str]) -> dict[str, int]:
        """The generations of those of these messages that the queue holds, in whatever state, by id."""
        rows = self.execute(
            "SELECT id, generation FROM message WHERE queue = ? AND id IN (SELECT value FROM json_each(?))", queue.id, as_json(ids)
        )
        return dict(rows.fetchall())

    def store(self, messages: Sequence[tuple[Queue, Message]], now: int) -> None:
        """Store messages that nothing speaks against, as READY or SCHEDULED, behind all others."""
        if not messages:
            return
        rows = [(queue.id, message.id, message.generation, int(message.priority), message.body) for queue, message in messages]
        last = self.insert("message (queue, id, generation, priority, body)", rows)
        first = last - len(rows) + 1  # SQLite numbers on from the highest key
        ready: list[tuple[int, ...]] = []
        scheduled: list[tuple[int, ...]] = []
        for key, (queue, message) in enumerate(messages, first):
            due = due_ms(message, now)
            if due > now:
                scheduled.append((key, queue.id, due, 0))
            else:
                ready.append((queue.id, int(message.priority), key, now, 0, 0))
        self.insert("ready", ready)
        self.insert("scheduled", scheduled)

    def insert(self, into: str, rows: Sequence[tuple[object, ...]]) -> int:
        """Insert rows, up to a hundred by one statement; returns the key of the last."""
        at = last = 0
        for size in (100, 10, 1):
            while len(rows) - at >= size:
                marks = ",".join(["(" + ",".join("?" * len(rows[0])) + ")"] * size)
                values = [value for row in rows[at : at + size] for value in row]
                last = self.database.execute(f"INSERT INTO {into} VALUES {marks}", values).lastrowid or 0
                at += size
        return last

    def delete(self, table: str, keys: str) -> int:
        """Take messages out of a state; returns how many were in it."""
        which = "message IN (SELECT value FROM json_each(?))"
        if table == "ready":
            found = "SELECT queue, priority, key FROM message WHERE key IN (SELECT value FROM json_each(?))"
            which = f"(queue, priority, message) IN ({found})"
        return self.execute(f"DELETE FROM {table} WHERE {which}", keys).rowcount

    def forget(self, keys: str) -> None:
        """Delete messages that were taken out of their state."""
        self.execute("DELETE FROM message WHERE key IN (SELECT value FROM json_each(?))", keys)

    def last_key(self) -> int:
        """The highest key; 0 if nothing is stored."""
        return self.execute("SELECT max(key) FROM message").fetchone()[0] or 0

    # --- time ---

    def catch_up(self, queues: Iterable[Queue], now: int) -> None:
        """Make READY what is due, and take back what is held beyond its lease."""
        stale = self.database.execute(
            """
            SELECT value FROM json_each(:queues)
            WHERE EXISTS (SELECT 1 FROM scheduled WHERE queue = value AND due_ms <= :now)
               OR EXISTS (SELECT 1 FROM leased WHERE queue = value AND until_ms <= :now)
            """,
            {"queues": as_json([queue.id for queue in queues]), "now": now},
        )
        for (queue,) in stale.fetchall():
            self._make_due_ready(queue, now)
            self._take_back_lost(queue, now)

    def _make_due_ready(self, queue: int, now: int) -> None:
        due = self.keys("SELECT message FROM scheduled WHERE queue = ? AND due_ms <= ? ORDER BY due_ms, message", queue, now)
        behind = self.last_key() + 1
        self.execute("UPDATE message SET key = ? + due.key FROM json_each(?) AS due WHERE message.key = due.value", behind, due)
        self.execute(
            """
            INSERT INTO ready SELECT scheduled.queue, priority, message.key, due_ms, deliveries, 0 FROM json_each(?) AS due
            CROSS JOIN scheduled ON scheduled.message = due.value CROSS JOIN message ON message.key = ? + due.key
            """,
            due,
            behind,
        )
        self.delete("scheduled", due)

    def _take_back_lost(self, queue: int, now: int) -> None:
        lost = self.keys("SELECT message FROM leased WHERE queue = ? AND until_ms <= ? ORDER BY until_ms, message", queue, now)
        self.execute(
            """
            INSERT INTO ready SELECT leased.queue, priority, message, since_ms, deliveries, fence
            FROM leased JOIN message ON message.key = message WHERE message IN (SELECT value FROM json_each(?))
            """,
            lost,
        )
        self.delete("leased", lost)

    def retain(self, queue: Queue, now: int) -> None:
        """Drop the oldest letters: those beyond `dead_max_age`, then those beyond `dead_max_count`."""
        if queue.dead_max_age_ms is not None:
            oldest_ms = now - queue.dead_max_age_ms
            old = self.keys("SELECT message FROM dead WHERE queue = ? AND died_ms < ? ORDER BY died_ms", queue.id, oldest_ms)
            self._drop(queue, old)
        if queue.dead_max_count is not None:
            excess = self.execute("SELECT dead FROM queue WHERE id = ?", queue.id).fetchone()[0] - queue.dead_max_count
            if excess > 0:
                sql = "SELECT message FROM dead WHERE queue = ? ORDER BY died_ms, id"
                self._drop(queue, self.keys(sql, queue.id, limit=min(excess, STEP)))

    def _drop(self, queue: Queue, letters: str) -> None:
        dropped = self.delete("dead", letters)
        if dropped:
            self.forget(letters)
            self.execute("UPDATE queue SET dead_dropped = dead_dropped + ? WHERE id = ?", dropped, queue.id)


def as_json(values: object) -> str:
    """JSON as SQLite takes it."""
    return msgspec.json.encode(values).decode()


def milliseconds(seconds: float) -> int:
    """A duration, at most `LONGEST_DELAY`."""
    return round(min(seconds, LONGEST_DELAY) * 1000)


def due_ms(message: Message, now: int) -> int:
    """When a message that is stored now becomes due."""
    return now + message.delay_ms if message.delay_ms > 0 else message.eta_ms


def objection(message: Message, held: int | None, now: int) -> EnqueueFailed | None:
    """Why a message cannot be stored in its queue now, where an older one of generation `held` bears the same id."""
    where = f"queue {message.queue!r}"
    if len(message.body) > MAX_BODY:
        return MessageTooLarge(
            f"Message {message.id!r} for {where} has a body of {len(message.body)} bytes; the SQLite broker takes at most {MAX_BODY}.",
            message,
        )
    if int(message.priority) not in LEVELS:
        return EnqueueFailed(
            f"Message {message.id!r} for {where} has the priority {int(message.priority)}, which is no level.", message
        )
    if due_ms(message, now) - now > LONGEST_DELAY * 1000 or message.generation > _MAX_INTEGER:
        return EnqueueFailed(f"Message {message.id!r} for {where} has an eta, a delay or a generation beyond all use.", message)
    if held is not None:
        return EnqueueFailed(
            f"{where.capitalize()} still holds message {message.id!r} at generation {held}, so generation {message.generation} "
            "was not stored; settle, replay or remove that one first.",
            message,
        )
    return None
