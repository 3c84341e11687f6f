"""Looking at what is stored, and repairing by hand: figures, listings, removing, replaying, purging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from crossdock.backends.sqlite.tables import STEP, Queue, Tables, as_json, objection
from crossdock.errors import ConfigurationError, CrossdockError, NotFound
from crossdock.spi import (
    LEVELS,
    Cursor,
    DeadLetter,
    Entry,
    Message,
    Page,
    Priority,
    QueueStats,
    Reason,
    Refusal,
    Replay,
    State,
)

_MAX_PAGE: Final = 1000

_ORDER: Final[Mapping[State, str]] = {
    State.READY: "ready.priority, ready.message",
    State.SCHEDULED: "due_ms, message",
    State.LEASED: "until_ms, message",
    State.DEAD: "died_ms, dead.id",
}
"""The two columns that order the listing of a state. The state's value is the name of its table."""

_OF_MESSAGE: Final[Mapping[State, str]] = {
    State.READY: "ready.queue = message.queue AND ready.priority = message.priority AND ready.message = message.key",
    State.SCHEDULED: "scheduled.message = message.key",
    State.LEASED: "leased.message = message.key",
    State.DEAD: "dead.message = message.key",
}
"""How to get from a message to its row in the table of a state. A CROSS JOIN makes SQLite begin on its left side."""

_BY_ID: Final = "message.queue = ? AND message.id IN (SELECT value FROM json_each(?))"

_Place = tuple[int, int | str]
"""A place in a listing: the values of these two columns."""


class Repairs:
    """The verbs of tools and people. All want a transaction around them.

    Args:
        tables: Where messages are.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def _look_at(self, name: str) -> Queue | None:
        """A queue as it stands now, letters beyond their retention dropped; None if it does not exist."""
        queue = self._tables.known([name]).get(name)
        if queue is not None:
            now = self._tables.clock.time_ms()
            self._tables.catch_up([queue], now)
            self._tables.retain(queue, now)
        return queue

    # --- looking ---

    def stats(self, names: Sequence[str] | None) -> list[QueueStats]:
        """The figures of some queues, in their order, or of all."""
        tables = self._tables
        now = tables.clock.time_ms()
        if names is None:
            rows = tables.execute("SELECT name FROM queue WHERE namespace = ? ORDER BY name", tables.namespace)
            names = [name for (name,) in rows.fetchall()]
        queues = tables.known(set(names)).values()
        tables.catch_up(queues, now)
        for queue in queues:
            tables.retain(queue, now)
        rows = tables.execute(
            """
            SELECT name, ready, scheduled, leased, dead, dead_dropped, (
                SELECT min(since_ms) FROM (
                    SELECT (SELECT since_ms FROM ready WHERE queue = queue.id AND priority = level.value ORDER BY message LIMIT 1)
                        AS since_ms
                    FROM json_each(?) AS level
                )
            )
            FROM queue WHERE namespace = ? AND name IN (SELECT value FROM json_each(?))
            """,
            as_json([int(level) for level in LEVELS]),
            tables.namespace,
            as_json(names),
        )
        figures = {row[0]: row for row in rows}
        return [_stats(figures.get(name, (name, 0, 0, 0, 0, 0, None)), now) for name in names]

    def peek(self, name: str, state: State, ids: Sequence[str], after: Cursor | None, limit: int) -> Page:
        """A page of a listing. Raises `ConfigurationError` for a cursor that is none."""
        place = None if after is None else _place(after, name, state)
        queue = self._look_at(name)
        if queue is None:
            return Page(())
        if ids:
            found = {row[0]: row for row in self._list(state, _from_message(state), _BY_ID, queue.id, as_json(ids))}
            return Page([_entry(name, state, found[id]) for id in ids if id in found])
        limit = max(1, min(limit, _MAX_PAGE))
        rows = self._ready_beyond(queue, place, limit + 1) if state is State.READY else self._beyond(queue, state, place, limit + 1)
        return Page(
            [_entry(name, state, row) for row in rows[:limit]], _cursor(name, state, rows[limit - 1]) if len(rows) > limit else None
        )

    def _ready_beyond(self, queue: Queue, place: _Place | None, limit: int) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        for level in LEVELS:
            if place is None or level <= place[0]:
                beyond = place[1] if place is not None and level == place[0] else 0
                condition = "ready.queue = ? AND ready.priority = ? AND ready.message > ? ORDER BY ready.message LIMIT ?"
                rows += self._list(
                    State.READY, _from_state(State.READY), condition, queue.id, int(level), beyond, limit - len(rows)
                )
        return rows

    def _beyond(self, queue: Queue, state: State, place: _Place | None, limit: int) -> list[tuple[Any, ...]]:
        order = _ORDER[state]
        if place is None:
            condition = f"{state.value}.queue = ? ORDER BY {order} LIMIT ?"
            return self._list(state, _from_state(state), condition, queue.id, limit)
        condition = f"{state.value}.queue = ? AND ({order}) > (?, ?) ORDER BY {order} LIMIT ?"
        return self._list(state, _from_state(state), condition, queue.id, *place, limit)

    def _list(self, state: State, source: str, condition: str, *parameters: object) -> list[tuple[Any, ...]]:
        letter = ", reason, task, error_type, fingerprint, story" if state is State.DEAD else ""
        return self._tables.execute(
            f"""
            SELECT message.id, generation, message.priority, body, deliveries, {_ORDER[state]} {letter}
            FROM {source} WHERE {condition}
            """,
            *parameters,
        ).fetchall()

    # --- repairing ---

    def remove(self, name: str, state: State, ids: Sequence[str]) -> list[Refusal]:
        """Delete messages by id."""
        keys: dict[str, int] = {}
        queue = self._look_at(name)
        if queue is not None:
            sql = f"SELECT message.id, key FROM {_from_message(state)} WHERE {_BY_ID}"
            keys = dict(self._tables.execute(sql, queue.id, as_json(ids)).fetchall())
        refusals: list[Refusal] = []
        removed: list[int] = []
        for index, id in enumerate(ids):
            if id in keys:
                removed.append(keys.pop(id))
            else:
                refusals.append(Refusal(index, NotFound(f"No {state.value} message {id!r} is in queue {name!r}.")))
        self._tables.delete(state.value, as_json(removed))
        self._tables.forget(as_json(removed))
        return refusals

    def replay(self, name: str, replays: Sequence[Replay]) -> list[Refusal]:
        """Bring dead letters back to life."""
        queue = self._look_at(name)
        refusals: list[Refusal] = []
        for index, replay in enumerate(replays):
            error = self._replay(queue, replay)
            if error is not None:
                refusals.append(Refusal(index, error))
        return refusals

    def _replay(self, source: Queue | None, replay: Replay) -> CrossdockError | None:
        tables, message = self._tables, replay.message
        sql = f"SELECT key FROM {_from_message(State.DEAD)} WHERE message.queue = ? AND message.id = ?"
        letter = None if source is None else tables.execute(sql, source.id, replay.id).fetchone()
        if source is None or letter is None:
            return NotFound(f"No dead letter {replay.id!r} is there to be replayed.")
        now = tables.clock.time_ms()
        target = tables.used([message.queue])[message.queue]
        tables.catch_up([target], now)
        held = tables.generations(target, [message.id]).get(message.id)
        if (target.id, message.id) == (source.id, replay.id):  # the letter itself, which is about to make room
            held = None
        stored_already = held is not None and held >= message.generation
        error = None if stored_already else objection(message, held, now)
        if error is None:
            tables.delete("dead", as_json(letter))
            tables.forget(as_json(letter))
            if not stored_already:
                tables.store([(target, message)], now)
        return error

    def purge(self, name: str, state: State) -> int:
        """Delete up to `STEP` messages; fewer mean that no more are left."""
        queue = self._look_at(name)
        if queue is None:
            return 0
        keys = self._tables.keys(f"SELECT message FROM {state.value} WHERE queue = ?", queue.id, limit=STEP)
        purged = self._tables.delete(state.value, keys)
        self._tables.forget(keys)
        return purged

    def erase(self, name: str) -> bool:
        """Delete a queue, step by step; returns whether there is more to do."""
        queue = self._look_at(name)
        if queue is None:
            return False
        for state in State:
            keys = self._tables.keys(f"SELECT message FROM {state.value} WHERE queue = ?", queue.id, limit=STEP)
            if self._tables.delete(state.value, keys):
                self._tables.forget(keys)
                return True
        self._tables.execute("DELETE FROM queue WHERE id = ?", queue.id)
        self._tables.forget_queues()
        return False


def _from_message(state: State) -> str:
    return f"message CROSS JOIN {state.value} ON {_OF_MESSAGE[state]}"


def _from_state(state: State) -> str:
    return f"{state.value} CROSS JOIN message ON message.key = {state.value}.message"


# --- values from rows ---


def _stats(row: tuple[Any, ...], now: int) -> QueueStats:
    name, ready, scheduled, leased, dead, dead_dropped, since_ms = row
    age = 0.0 if since_ms is None else max(0, now - since_ms) / 1000
    return QueueStats(name, ready, scheduled, leased, dead, oldest_ready_age=age, dead_dropped=dead_dropped)


def _entry(queue: str, state: State, row: tuple[Any, ...]) -> Entry:
    id, generation, priority, body, deliveries, first, _, *letter = row
    eta_ms = first if state is State.SCHEDULED else 0
    message = Message(id, queue, Priority(priority), body, eta_ms, generation=generation)
    return Entry(message, state, deliveries, DeadLetter(message, Reason(letter[0]), first, *letter[1:]) if letter else None)


def _cursor(queue: str, state: State, row: tuple[Any, ...]) -> Cursor:
    return Cursor(msgspec.json.encode((queue, state.value, row[5], row[6])).hex())


def _place(cursor: Cursor, queue: str, state: State) -> _Place:
    wrong = ConfigurationError(
        f"This is no cursor of a listing of {state.value} messages in queue {queue!r}; start again without one."
    )
    try:
        *listed, first, second = msgspec.json.decode(bytes.fromhex(cursor), type=tuple[str, str, int, int | str])
    except (ValueError, msgspec.DecodeError) as error:
        raise wrong from error
    if listed != [queue, state.value] or isinstance(second, str) is not (state is State.DEAD):
        raise wrong
    return first, second
