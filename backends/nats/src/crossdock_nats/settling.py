"""Settling: how deliveries end.

An ack is a word to the consumer. A message that goes back at once, as it was or replaced, is written in its own place, on the condition
that it is still what was delivered. One that goes elsewhere (to its schedule, to another level, to the dead letters) is written there
first, on the condition that nothing of its id is newer than what was delivered, and then acked. So a late holder's writes are refused by
the server; a late ack names a sequence that is gone, since whoever takes over has it stored anew. That the answer is right, too, is up
to the deadline that each receipt bears.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from crossdock.errors import BrokerError, CrossdockError, LeaseLost, MessageTooLarge, SettleUnknown
from crossdock.spi import Ack, Clock, Dead, Nack, Refusal, Settlement, State
from crossdock_nats import record
from crossdock_nats.alarms import Alarms
from crossdock_nats.api import WRONG_SEQUENCE, Api, problem
from crossdock_nats.leases import Leases, lease_lost
from crossdock_nats.letters import Letters
from crossdock_nats.limits import LONGEST_MS
from crossdock_nats.link import Answer, Link
from crossdock_nats.names import DEAD, SCHEDULED
from crossdock_nats.queues import Level, Queue, Queues, explain
from crossdock_nats.receipt import Fate, Receipt
from crossdock_nats.record import Stored
from crossdock_nats.servertime import ServerTime

_ATTEMPTS: Final = 3


class _Item(NamedTuple):
    """A settlement that is under way."""

    at: int
    """Its place in the batch."""
    settlement: Settlement
    receipt: Receipt


class _Write(NamedTuple):
    """Where a message goes."""

    item: _Item
    subject: bytes
    headers: bytes
    """Without the condition."""
    body: bytes
    in_place: bool
    """Whether it replaces what was delivered."""


class Settling:
    """Settles, for one Broker while it is open.

    Args:
        owner: What receipts of this Broker name as theirs.
        link: The connection.
        api: JetStream on it.
        queues: Their streams and consumers.
        letters: Looks after what is dead.
        alarms: Keeps due times where the server does not.
        time: The server's time.
        leases: What is held.
        clock: For their ends.
        largest: Tells how many bytes the server takes in one message.
    """

    def __init__(
        self,
        owner: object,
        link: Link,
        api: Api,
        queues: Queues,
        letters: Letters,
        alarms: Alarms,
        time: ServerTime,
        leases: Leases,
        clock: Clock,
        largest: Callable[[], int],
    ) -> None:
        self._owner = owner
        self._link = link
        self._api = api
        self._queues = queues
        self._letters = letters
        self._alarms = alarms
        self._time = time
        self._leases = leases
        self._clock = clock
        self._largest = largest

    # --- settle ---

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        """As `Broker.settle`."""
        refusals: list[Refusal] = []
        mine, theirs = self._begin(settlements, refusals)
        try:
            await self._end(mine, refusals)
        finally:
            for item in mine:
                if item.receipt.fate is Fate.UNDER_WAY:  # cancelled, or what else may be
                    item.receipt.end(Fate.UNKNOWN)
        for item in theirs:
            await self._same_again(item, refusals)
        return refusals

    def _begin(self, settlements: Sequence[Settlement], refusals: list[Refusal]) -> tuple[list[_Item], list[_Item]]:
        """Sort out what is to be done here, and what somebody is doing already."""
        now = self._clock.monotonic()
        mine: list[_Item] = []
        theirs: list[_Item] = []
        for index, settlement in enumerate(settlements):
            receipt = settlement.delivery.receipt
            if type(receipt) is not Receipt or receipt.owner is not self._owner:
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
                continue
            ending = Ack if type(settlement) is Ack else _ending(settlement)
            if receipt.ending is not None and receipt.ending != ending:
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            elif receipt.fate is Fate.DONE:
                continue
            elif receipt.fate is Fate.UNDER_WAY:
                theirs.append(_Item(index, settlement, receipt))
            elif receipt.fate is Fate.LOST or now >= receipt.deadline:
                receipt.ending = ending
                receipt.end(Fate.LOST)
                refusals.append(Refusal(index, lease_lost(settlement.delivery)))
            else:
                receipt.ending = ending
                receipt.fate = Fate.UNDER_WAY
                mine.append(_Item(index, settlement, receipt))
        return mine, theirs

    async def _same_again(self, item: _Item, refusals: list[Refusal]) -> None:
        """Wait for the outcome of a settlement that somebody else is at."""
        receipt = item.receipt
        while receipt.fate is Fate.UNDER_WAY:
            if receipt.ended is None:
                receipt.ended = asyncio.get_running_loop().create_future()
            await asyncio.shield(receipt.ended)
        if receipt.fate is Fate.LOST:
            refusals.append(Refusal(item.at, lease_lost(item.settlement.delivery)))
        elif receipt.fate is not Fate.DONE:
            refusals.append(Refusal(item.at, _unknown(item, "another call for it got no answer")))

    async def _end(self, items: Sequence[_Item], refusals: list[Refusal]) -> None:
        acks: list[_Item] = []
        others: list[_Item] = []
        for item in items:
            (acks if type(item.settlement) is Ack else others).append(item)
        if others and self._time.stale and any(type(item.settlement) is Nack and item.settlement.delay > 0 for item in others):
            await self._queues.tell_time(others[0].receipt.level.queue)
        writes = [write for item in others if (write := self._planned(item, refusals)) is not None]
        outcomes = await asyncio.gather(
            self._ack(acks, refusals) if acks else _nothing(),
            self._write(writes, refusals) if writes else _nothing(),
            return_exceptions=True,
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors and len(items) and all(item.receipt.fate is Fate.UNDER_WAY for item in items):
            for item in items:
                item.receipt.fate, item.receipt.ending = Fate.OPEN, None  # nothing was written
            raise errors[0]
        for error in errors:
            if not isinstance(error, BrokerError):
                raise error
            for item in items:
                if item.receipt.fate is Fate.UNDER_WAY:
                    self._refuse(item, _unknown(item, str(error)), refusals)

    # --- acks ---

    async def _ack(self, items: Sequence[_Item], refusals: list[Refusal]) -> None:
        """Acks of one consumer are handled in order: the answer to the last one proves the others. With replicas, each is asked."""
        reply = self._link.reply_to()
        last: dict[Level, int] = {item.receipt.level: index for index, item in enumerate(items)}
        asking = set(last.values()) if all(level.queue.replicas == 1 for level in last) else set(range(len(items)))
        silent: list[bytes] = []
        frames: list[bytes] = []
        answerable: list[int] = []
        for index, item in enumerate(items):
            if index in asking:
                frames.append(b"PUB %s %s.%d 4\r\n+ACK\r\n" % (item.receipt.ack, reply, len(frames)))
                answerable.append(index)
            else:
                silent.append(b"PUB %s 4\r\n+ACK\r\n" % item.receipt.ack)
        answers, answered = await self._link.exchange(reply, frames, silent=b"".join(silent))
        if not answers and all(answered):
            for item in items:
                item.receipt.end(Fate.DONE)
            return
        by_level = {items[index].receipt.level: place for place, index in enumerate(answerable)}
        gone = await self._leases.vanished([items[answerable[place]].receipt.level for place in answers])
        for index, item in enumerate(items):
            place = answerable.index(index) if index in asking else by_level[item.receipt.level]
            self._conclude(item, bool(answered[place]), answers.get(place), gone, refusals)

    def _conclude(self, item: _Item, answered: bool, answer: Answer | None, gone: set[Level], refusals: list[Refusal]) -> None:
        """Judge the answer to an ack: empty = done, 503 = the consumer is not there."""
        if not answered:
            self._refuse(item, _unknown(item, "the NATS server gave no answer"), refusals)
        elif answer is None:
            item.receipt.end(Fate.DONE)
        elif item.receipt.level in gone:
            self._refuse(item, lease_lost(item.settlement.delivery), refusals)
        else:
            self._refuse(item, _unknown(item, explain(problem(answer))), refusals)

    # --- writes ---

    def _planned(self, item: _Item, refusals: list[Refusal]) -> _Write | None:
        """Where a message goes, and as what."""
        receipt, settlement = item.receipt, item.settlement
        level = receipt.level
        subjects = level.subjects
        delivery = settlement.delivery
        if isinstance(settlement, Dead):
            letter = settlement.letter
            headers, body = record.write_letter(letter.message, letter, delivery.delivery_count)
            if len(body) + 1024 > self._largest():
                text = f"The letter for message {letter.message.id!r} has {len(body)} bytes, more than the NATS server takes."
                self._refuse(item, MessageTooLarge(text), refusals)
                return None
            return _Write(item, subjects.keyed_place(DEAD, letter.message.id, letter.died_ms), headers, body, in_place=False)
        assert isinstance(settlement, Nack)
        message = settlement.replacement or delivery.message
        headers = record.generation(message)
        if settlement.replacement is None:
            headers += record.losses(delivery.delivery_count - 1)
        elif len(message.body) + record.LETTER_ROOM > self._largest():
            text = f"The replacement for message {message.id!r} has {len(message.body)} bytes, more than the NATS server takes."
            self._refuse(item, MessageTooLarge(text), refusals)
            return None
        delay_ms = min(settlement.delay * 1000, LONGEST_MS)
        if delay_ms <= record.EARLY_MS:
            target = subjects.level(message.priority, message.id)
            return _Write(item, target, headers, message.body, in_place=message.priority == level.priority)
        due_ms = receipt.due_ms = receipt.due_ms or self._time.now_ms() + round(delay_ms)
        headers += record.due(message, due_ms)
        if subjects.keyed:
            headers += record.schedule(due_ms, subjects.level(message.priority, message.id))
        return _Write(item, subjects.keyed_place(SCHEDULED, message.id, due_ms), headers, message.body, in_place=False)

    async def _write(self, writes: Sequence[_Write], refusals: list[Refusal]) -> None:
        """Write each where it goes, and ack what went elsewhere."""
        waiting = [write for write in writes if write.item.receipt.due_ms and not write.item.receipt.level.subjects.keyed]
        if waiting:
            await self._alarms.set(
                [(w.item.receipt.level.subjects, w.item.settlement.delivery.message.id, w.item.receipt.due_ms) for w in waiting]
            )
        expected = [write.item.receipt.seq for write in writes]
        left = list(range(len(writes)))
        leftovers: list[tuple[Queue, int]] = []
        stored: list[_Write] = []
        for _ in range(_ATTEMPTS):
            if not left:
                break
            contested = await self._store(writes, left, expected, stored, refusals)
            left = list[int]()
            for index, last in contested:
                if last is None:
                    self._refuse(writes[index].item, lease_lost(writes[index].item.settlement.delivery), refusals)
                else:  # of a holder who died between its write and its ack
                    leftovers.append((writes[index].item.receipt.level.queue, last.seq))
                    expected[index] = last.seq
                    left.append(index)
        for index in left:
            self._refuse(writes[index].item, _unknown(writes[index].item, "others write there at the same time"), refusals)
        for queue, seq in leftovers:
            await self._api.delete(queue.stream, [seq])
        for write in stored:
            if write.in_place:
                write.item.receipt.end(Fate.DONE)
        moved = [write.item for write in stored if not write.in_place]
        if moved:
            await self._ack(moved, refusals)
        dead = {item.receipt.level.queue for item in moved if isinstance(item.settlement, Dead)}
        for queue in dead:
            await self._letters.stored(queue)

    async def _store(
        self, writes: Sequence[_Write], left: Sequence[int], expected: Sequence[int], stored: list[_Write], refusals: list[Refusal]
    ) -> list[tuple[int, Stored | None]]:
        """One try. Returns those that were refused because of what is there: None = it belongs to somebody else."""
        reply = self._link.reply_to()
        frames: list[bytes] = []
        for place, index in enumerate(left):
            write = writes[index]
            receipt = write.item.receipt
            subjects = receipt.level.subjects
            receipt.mark = receipt.mark or b"%s.%d" % (reply, place)
            condition = b""
            if write.in_place:
                condition = record.expects(expected[index])
            elif subjects.keyed:
                condition = record.expects(expected[index], subjects.anywhere(write.item.settlement.delivery.message.id))
            frames.append(
                record.publish(write.subject, b"%s.%d" % (reply, place), condition + write.headers, write.body, receipt.mark)
            )
        answers, answered = await self._link.exchange(reply, frames)
        contested: list[tuple[int, Stored | None]] = []
        for place, index in enumerate(left):
            write = writes[index]
            if not answered[place]:
                self._refuse(write.item, _unknown(write.item, "the NATS server gave no answer"), refusals)
            elif place not in answers:
                stored.append(write)
            else:
                told = problem(answers[place])
                if told.err_code in WRONG_SEQUENCE:
                    own, last = await self._contested(write)
                    if own:
                        stored.append(write)
                    else:
                        contested.append((index, last))
                elif told.code == 503 and write.item.receipt.level in await self._leases.vanished([write.item.receipt.level]):
                    contested.append((index, None))
                else:
                    self._refuse(write.item, _unknown(write.item, explain(told)), refusals)
        return contested

    async def _contested(self, write: _Write) -> tuple[bool, Stored | None]:
        """Whether it is stored already; else what else there is of its id, if the message is still ours."""
        receipt = write.item.receipt
        level = receipt.level
        subjects = level.subjects
        id = write.item.settlement.delivery.message.id
        places = [write.subject.decode(), level.subject(id).decode()]
        if subjects.keyed:
            places.append(subjects.anywhere(id).decode())
        exact = level.queue.replicas > 1
        found = await self._api.get(level.queue.stream, [{"last_by_subj": place} for place in places], exact=exact)
        there, leased, last = found[0], found[1], found[-1]
        if there is not None and record.is_own(there, receipt.mark):
            return True, None
        if last is not None and record.is_own(last, receipt.mark):
            return True, None
        if write.in_place or leased is None or leased.seq != receipt.seq or last is None or last.seq == receipt.seq:
            return False, None
        return False, last if subjects.read(last.subject).state in (State.SCHEDULED, State.DEAD) else None

    def _refuse(self, item: _Item, error: CrossdockError, refusals: list[Refusal]) -> None:
        if isinstance(error, LeaseLost):
            item.receipt.end(Fate.LOST)
        elif isinstance(error, SettleUnknown):
            item.receipt.end(Fate.UNKNOWN)
        else:
            item.receipt.ending = None
            item.receipt.end(Fate.OPEN)
        refusals.append(Refusal(item.at, error))


async def _nothing() -> None:
    """Do nothing."""


def _ending(settlement: Settlement) -> object:
    """What tells two settlements of one delivery apart."""
    match settlement:
        case Ack():
            return Ack
        case Nack(delay=delay, replacement=replacement):
            return delay, replacement
        case Dead(letter=letter):
            return letter


def _unknown(item: _Item, why: str) -> SettleUnknown:
    message = item.settlement.delivery.message
    return SettleUnknown(
        f"Whether message {message.id!r} of queue {message.queue!r} was settled is not known: {why.rstrip('.')}. Try again."
    )
