"""Messages out: who may take them, who holds them, and how a delivery ends."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from crossdock.backends.sqlite.tables import Queue, Tables, as_json, milliseconds
from crossdock.errors import LeaseLost
from crossdock.spi import Ack, Dead, DeadLetter, Delivery, Lane, Message, Nack, Refusal, Settlement

MARGIN: Final = 0.05
"""Seconds by which a lease ends earlier for its holder than in the store: the wall clock and the monotonic one may drift apart."""
_REMEMBERED: Final = 20_000
"""How many settled receipts are remembered, at least; at most twice as many."""


class Receipt(NamedTuple):
    """The right to settle one delivery."""

    fence: int
    """Of the receive that took it."""
    key: int
    """Of the message."""


_NO_RECEIPT: Final = Receipt(0, 0)


class Deliveries:
    """Receives, extends and settles. Everything but `look` wants a transaction around it.

    Args:
        tables: Where messages are.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._mark: int | None = None  # what our fences begin with; drawn by the first receive
        self._mark_is_new = False  # it was drawn in the current transaction
        self._receives = 0
        self._settled = _Endings()

    def commit(self) -> None:
        """What was done in this transaction has happened."""
        self._mark_is_new = False
        self._settled.commit()

    def rollback(self) -> None:
        """What was done in this transaction has not happened."""
        if self._mark_is_new:
            self._mark, self._mark_is_new = None, False
        self._settled.rollback()

    def forget(self) -> None:
        """All receipts are void: the file they belong to is gone."""
        self._mark = None

    # --- receive ---

    def look(self, lanes: Sequence[Lane]) -> tuple[bool, int | None]:
        """Whether a receive might find something now; and when, by the clock, something will be due."""
        lanes, queues = self._there(lanes)
        found, next_ms = self._tables.database.execute(
            """
            SELECT
                EXISTS (
                    SELECT 1 FROM json_each(:lanes) AS lane JOIN queue ON queue.id = lane.value / 10 AND queue.ready > 0
                    WHERE EXISTS (SELECT 1 FROM ready WHERE queue = lane.value / 10 AND priority = lane.value % 10)
                ),
                (
                    SELECT min(at_ms) FROM (
                        SELECT (SELECT min(due_ms) FROM scheduled WHERE queue = value) AS at_ms FROM json_each(:queues)
                        UNION ALL
                        SELECT (SELECT min(until_ms) FROM leased WHERE queue = value) FROM json_each(:queues)
                    )
                )
            """,
            {"lanes": _lane_numbers(lanes, queues), "queues": as_json([queue.id for queue in queues.values()])},
        ).fetchone()
        return bool(found) or (next_ms is not None and next_ms <= self._tables.clock.time_ms()), next_ms

    def receive(self, lanes: Sequence[Lane], limit: int) -> list[Delivery]:
        """Hand over messages: by the lanes' quotas first, then whatever is left, both in the order of the lanes.

        Lanes without a quota are not looked at before something is left: a worker of hundreds of queues wants something of a few at a time.
        """
        started = self._tables.clock.monotonic()
        now = self._tables.clock.time_ms()
        taken: list[Delivery] = []
        fence = 0
        wanted = [lane for lane in lanes if lane.quota > 0]
        waiting = self._waiting(wanted, now)
        for by_quota in (True, False):
            if not by_quota and len(taken) < limit and len(wanted) < len(lanes):
                waiting = self._waiting(lanes, now)
            for lane, queue in waiting:
                most = min(lane.quota, limit - len(taken)) if by_quota else limit - len(taken)
                if most > 0:
                    fence = fence or self._new_fence()
                    taken += _deliveries(queue, lane, self._take(queue, lane, most, fence, now), fence, started)
        return taken

    def _waiting(self, lanes: Sequence[Lane], now: int) -> list[tuple[Lane, Queue]]:
        """Those of these lanes that have messages, in order."""
        lanes, queues = self._there(lanes)
        self._tables.catch_up(queues.values(), now)
        nonempty = self._tables.execute(
            """
            SELECT lane.key FROM json_each(?) AS lane JOIN queue ON queue.id = lane.value / 10 AND queue.ready > 0
            WHERE EXISTS (SELECT 1 FROM ready WHERE queue = lane.value / 10 AND priority = lane.value % 10)
            """,
            _lane_numbers(lanes, queues),
        )
        found: list[Lane] = [lanes[index] for (index,) in sorted(nonempty)]
        return [(lane, queues[lane.queue]) for lane in found]

    def _there(self, lanes: Sequence[Lane]) -> tuple[list[Lane], dict[str, Queue]]:
        """Those of these lanes whose queue exists, and their queues. No queue comes into being by being received from."""
        queues = self._tables.known({lane.queue for lane in lanes})
        return [lane for lane in lanes if lane.queue in queues], queues

    def _take(self, queue: Queue, lane: Lane, count: int, fence: int, now: int) -> list[tuple[Any, ...]]:
        """Lease up to `count` messages from the front of a lane."""
        where = (queue.id, int(lane.priority))
        rows = self._tables.execute(
            """
            SELECT message, id, generation, body, deliveries FROM ready CROSS JOIN message ON message.key = message
            WHERE ready.queue = ? AND ready.priority = ? ORDER BY message LIMIT ?
            """,
            *where,
            count,
        ).fetchall()
        if rows:
            last = rows[-1][0]
            self._tables.execute(
                """
                INSERT INTO leased SELECT message, queue, ?, ?, since_ms, deliveries + 1 FROM ready
                WHERE queue = ? AND priority = ? AND message <= ?
                """,
                now + queue.lease_ms,
                fence,
                *where,
                last,
            )
            self._tables.execute("DELETE FROM ready WHERE queue = ? AND priority = ? AND message <= ?", *where, last)
        return rows

    def _new_fence(self) -> int:
        if self._mark is None:
            sql = "UPDATE store SET receivers = receivers + 1 RETURNING receivers"
            self._mark = int(self._tables.execute(sql).fetchall()[0][0])
            self._mark_is_new = True
        self._receives += 1
        return (self._mark << 40) + self._receives

    # --- extend and settle ---

    def _held(self, deliveries: Iterable[Delivery]) -> set[Receipt]:
        """Those of these deliveries' receipts that still give the right to settle. Their messages are LEASED when this returns.

        A lease that expired is lost only when somebody takes the message: until then its late holder gets it back.
        """
        by_fence: defaultdict[int, set[int]] = defaultdict(set)
        for delivery in deliveries:
            receipt = _receipt(delivery)
            if receipt.fence >> 40 == self._mark:
                by_fence[receipt.fence].add(receipt.key)
        held: set[Receipt] = set()
        for fence, unordered in by_fence.items():
            keys = sorted(unordered)
            found = self._leased(fence, keys)
            if len(found) < len(keys):
                self._lease_again(fence, as_json(keys))
                found = self._leased(fence, keys)
            held.update(Receipt(fence, key) for key in found)
        return held

    def _leased(self, fence: int, keys: Sequence[int]) -> list[int]:
        sql = "SELECT message FROM leased WHERE message IN (SELECT value FROM json_each(?)) AND fence = ?"
        return msgspec.json.decode(self._tables.keys(sql, as_json(keys), fence, limit=len(keys)), type=list[int])

    def _lease_again(self, fence: int, keys: str) -> None:
        late = {"fence": fence, "keys": keys, "now": self._tables.clock.time_ms()}
        self._tables.database.execute(
            """
            INSERT INTO leased SELECT message.key, ready.queue, :now, fence, since_ms, deliveries FROM json_each(:keys) AS late
            CROSS JOIN message ON message.key = late.value
            CROSS JOIN ready ON ready.queue = message.queue AND ready.priority = message.priority AND ready.message = message.key
            WHERE fence = :fence
            """,
            late,
        )
        self._tables.database.execute(
            """
            DELETE FROM ready WHERE fence = :fence AND (queue, priority, message) IN
                (SELECT queue, priority, key FROM message WHERE key IN (SELECT value FROM json_each(:keys)))
            """,
            late,
        )

    def extend(self, deliveries: Sequence[Delivery]) -> list[Refusal]:
        """Renew leases."""
        now = self._tables.clock.time_ms()
        held = self._held(deliveries)
        renewed: list[int] = []
        refusals: list[Refusal] = []
        for index, delivery in enumerate(deliveries):
            receipt = _receipt(delivery)
            if receipt in held:
                renewed.append(receipt.key)
            else:
                refusals.append(Refusal(index, _lease_lost(delivery)))
        self._tables.execute(
            """
            UPDATE leased SET until_ms = ? + (SELECT lease_ms FROM queue WHERE id = leased.queue)
            WHERE message IN (SELECT value FROM json_each(?))
            """,
            now,
            as_json(renewed),
        )
        return refusals

    def settle(self, settlements: Sequence[Settlement]) -> list[Refusal]:
        """End deliveries."""
        now = self._tables.clock.time_ms()
        held = self._held(settlement.delivery for settlement in settlements)
        refusals: list[Refusal] = []
        acked: list[int] = []
        given_back: defaultdict[int, list[int]] = defaultdict(list)
        for index, settlement in enumerate(settlements):
            delivery = settlement.delivery
            receipt = _receipt(delivery)
            ending = _ending(settlement)
            done = self._settled.get(receipt)
            if done is not None or receipt not in held:
                if done != ending:
                    refusals.append(Refusal(index, _lease_lost(delivery)))
                continue
            self._settled.add(receipt, ending)
            match settlement:
                case Ack():
                    acked.append(receipt.key)
                case Nack(delay=delay, replacement=replacement):
                    again_ms = now + milliseconds(delay)
                    if replacement is None:
                        given_back[again_ms].append(receipt.key)
                    else:
                        self._replace(receipt.key, delivery, replacement, again_ms, now)
                case Dead(letter=letter):
                    self._bury(receipt.key, delivery, letter, now)
        if acked:
            keys = as_json(acked)
            self._tables.delete("leased", keys)
            self._tables.forget(keys)
        for due_ms, returned in given_back.items():
            self._give_back(as_json(returned), due_ms, now)
        return refusals

    def _give_back(self, keys: str, due_ms: int, now: int) -> None:
        """End leases as if they had never been: each message in its old place, or SCHEDULED."""
        if due_ms <= now:
            self._tables.execute(
                """
                INSERT INTO ready SELECT leased.queue, priority, message, since_ms, deliveries - 1, 0
                FROM leased JOIN message ON message.key = message WHERE message IN (SELECT value FROM json_each(?))
                """,
                keys,
            )
        else:
            self._tables.execute(
                """
                INSERT INTO scheduled SELECT message, queue, ?, deliveries - 1 FROM leased
                WHERE message IN (SELECT value FROM json_each(?))
                """,
                due_ms,
                keys,
            )
        self._tables.delete("leased", keys)

    def _replace(self, key: int, delivery: Delivery, replacement: Message, due_ms: int, now: int) -> None:
        queue = self._end_lease(key, delivery)
        behind = self._tables.last_key() + 1
        self._rewrite(key, behind, replacement)
        if due_ms <= now:
            self._tables.insert("ready", [(queue.id, int(replacement.priority), behind, now, 0, 0)])
        else:
            self._tables.insert("scheduled", [(behind, queue.id, due_ms, 0)])

    def _bury(self, key: int, delivery: Delivery, letter: DeadLetter, now: int) -> None:
        queue = self._end_lease(key, delivery)
        if letter.message != delivery.message:
            self._rewrite(key, key, letter.message)
        died = (key, queue.id, letter.died_ms, letter.message.id, delivery.delivery_count, letter.reason.value)
        self._tables.insert("dead", [(*died, letter.task, letter.error_type, letter.fingerprint, letter.story)])
        self._tables.retain(queue, now)

    def _end_lease(self, key: int, delivery: Delivery) -> Queue:
        name = delivery.message.queue
        self._tables.execute("DELETE FROM leased WHERE message = ?", key)
        return self._tables.used([name])[name]

    def _rewrite(self, key: int, new_key: int, message: Message) -> None:
        self._tables.execute(
            "UPDATE message SET key = ?, generation = ?, priority = ?, body = ? WHERE key = ?",
            new_key,
            message.generation,
            int(message.priority),
            message.body,
            key,
        )


class _Endings:
    """How the last receipts were used, so that the same settlement again is known as done. Follows the transactions."""

    def __init__(self) -> None:
        self._younger: dict[Receipt, object] = {}
        self._older: dict[Receipt, object] = {}
        self._uncommitted: list[Receipt] = []

    def commit(self) -> None:
        self._uncommitted.clear()
        if len(self._younger) >= _REMEMBERED:
            self._older, self._younger = self._younger, {}

    def rollback(self) -> None:
        for receipt in self._uncommitted:
            del self._younger[receipt]
        self._uncommitted.clear()

    def add(self, receipt: Receipt, ending: object) -> None:
        self._younger[receipt] = ending
        self._uncommitted.append(receipt)

    def get(self, receipt: Receipt) -> object:
        """None = it was not used."""
        return self._younger.get(receipt) or self._older.get(receipt)


def _lane_numbers(lanes: Sequence[Lane], queues: Mapping[str, Queue]) -> str:
    """Lanes as a JSON list of integers: ten times the queue's id, plus the level."""
    return as_json([queues[lane.queue].id * 10 + int(lane.priority) for lane in lanes])


def _deliveries(queue: Queue, lane: Lane, rows: Iterable[tuple[Any, ...]], fence: int, started: float) -> list[Delivery]:
    lease_until = started + queue.lease_ms / 1000 - MARGIN
    return [
        Delivery(
            Message(id, queue.name, lane.priority, body, generation=generation), deliveries + 1, lease_until, Receipt(fence, key)
        )
        for key, id, generation, body, deliveries in rows
    ]


def _receipt(delivery: Delivery) -> Receipt:
    receipt = delivery.receipt
    return receipt if isinstance(receipt, Receipt) else _NO_RECEIPT


def _ending(settlement: Settlement) -> object:
    """What tells two settlements of one delivery apart: small, because it is remembered, and never false."""
    match settlement:
        case Ack():
            return Ack
        case Nack(delay=delay, replacement=replacement):
            return Nack, hash((delay, replacement))
        case Dead(letter=letter):
            return Dead, hash(letter)


def _lease_lost(delivery: Delivery) -> LeaseLost:
    message = delivery.message
    return LeaseLost(f"The lease on message {message.id!r} of queue {message.queue!r} is over; nothing was changed.")
