"""Processes: they share a broker, die and stand still at any moment, and what the broker said stays true.

Other processes live by the system's clock, so these scenarios run in real time on every backend.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Literal, NamedTuple

from crossdock.spi import Ack, Broker, Delivery, Message, QueueSpec, Replay, State
from crossdock_conformance.child import (
    Answer,
    Child,
    Children,
    Close,
    Collect,
    Ended,
    Ending,
    Enqueue,
    Extend,
    Fork,
    Forked,
    Held,
    Join,
    Open,
    Order,
    Purge,
    Receive,
    Revive,
    Settle,
    held,
    retried,
)
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DEDUPLICATION, FENCING, PROCESSES, scenario


@asynccontextmanager
async def processes(lab: Lab) -> AsyncGenerator[tuple[Lab, Broker, Callable[[], Awaitable[Child]]]]:
    """A lab in real time, an open Broker in it, and how to start a process beside it; all use queue `q` with the lab's lease."""
    if lab.target.create is not None:
        raise NotRun("other processes cannot build this Broker: they know backends by their URL's scheme")
    async with lab.in_real_time() as real, Children(real.target.url, real.namespace) as children:
        broker = await real.open()
        yield real, broker, lambda: children.start(QueueSpec("q", lease=real.lease))


@scenario(needs=[PROCESSES])
async def enqueued_survives_its_producer(lab: Lab) -> None:
    """What `enqueue` has returned for is stored, though its process is killed at that very moment."""
    async with processes(lab) as (lab, broker, start):
        messages = lab.messages(20)
        producer = await start()
        assert not (await producer.ask(Enqueue(messages))).refused
        producer.kill()
        taken = await lab.take_exactly(broker, 20)
        assert [delivery.message for delivery in taken] == messages
        assert {delivery.delivery_count for delivery in taken} == {1}


@scenario(needs=[PROCESSES])
async def processes_share_a_queue(lab: Lab) -> None:
    """Of two processes that receive from one queue at the same time, each gets messages that the other does not get."""
    async with processes(lab) as (lab, broker, start):
        workers = [await start(), await start()]
        await lab.enqueue(broker, *lab.messages(300, queue="busy"))  # with leases of 30 s, so that a slow machine loses none
        seen: Counter[tuple[str, int]] = Counter()

        async def work(worker: Child) -> None:
            while sum(seen.values()) < 300:
                deliveries = (await worker.ask(Receive("busy", limit=7, wait=0.1))).deliveries
                seen.update((delivery.id, delivery.count) for delivery in deliveries)
                await worker.ask(Settle([Ending(delivery.id, "ack") for delivery in deliveries]))

        await asyncio.gather(*map(work, workers))
        assert set(seen.values()) == {1}
        assert {count for _, count in seen} == {1}
        await lab.holds(broker, {}, "busy")


@scenario(needs=[PROCESSES])
async def enqueue_in_another_process_wakes_a_receive(lab: Lab) -> None:
    """A receive that waits returns as soon as another process has stored a message, long before its wait ends."""
    async with processes(lab) as (lab, broker, start):
        producer = await start()
        async with lab.waiting(broker, wait=3600) as receive:
            await producer.ask(Enqueue([lab.message("m")]))
        assert [delivery.message.id for delivery in receive.result()] == ["m"]
        await producer.end()


@scenario(needs=[PROCESSES])
async def killed_receivers_are_replaced(lab: Lab) -> None:
    """What a process held when it was killed is delivered again when its lease is over, with a delivery count of 2."""
    async with processes(lab) as (lab, broker, start):
        await lab.enqueue(broker, *lab.messages(5))
        receiver = await start()
        lost = await _take(receiver, 5)
        receiver.kill()
        killed = time.monotonic()
        again = await _until_received(lab, broker, 5)
        assert time.monotonic() - killed <= lab.lease + lab.sweep + lab.slack
        assert [held(delivery) for delivery in again] == [Held(one.id, one.generation, one.body, 2) for one in lost]


@scenario(needs=[PROCESSES])
async def a_crash_is_counted_where_it_happened(lab: Lab) -> None:
    """The crash of a process does not raise the delivery counts of messages that it was never handed."""
    async with processes(lab) as (lab, broker, start):
        await lab.enqueue(broker, *lab.messages(5))
        receiver = await start()
        lost = {delivery.id for delivery in await _take(receiver, 2)}
        receiver.kill()
        counts = {delivery.message.id: delivery.delivery_count for delivery in await _until_received(lab, broker, 5)}
        assert counts == {id: 2 if id in lost else 1 for id in counts}


@scenario(needs=[PROCESSES])
async def killed_while_waiting_takes_nothing_along(lab: Lab) -> None:
    """A process that is killed while its receive waits keeps no message from others."""
    async with processes(lab) as (lab, broker, start):
        receiver = await start()
        await receiver.ask(Receive(limit=10, wait=3600, aside=True))
        receiver.kill()
        await lab.enqueue(broker, *lab.messages(5))
        taken = await _until_received(lab, broker, 5)
        assert {delivery.delivery_count for delivery in taken} == {1}


@scenario(needs=[PROCESSES, FENCING])
async def a_frozen_holder_has_lost_its_lease(lab: Lab) -> None:
    """A process that stood still beyond its leases can settle and extend nothing that others have taken over since."""
    async with processes(lab) as (lab, broker, start):
        await lab.enqueue(broker, *lab.messages(5))
        sleeper = await start()
        ack, back, retry, dead, extend = [delivery.id for delivery in await _take(sleeper, 5)]
        sleeper.freeze()
        taken = await _until_received(lab, broker, 5)
        await lab.settle(broker, *(Ack(delivery) for delivery in taken if delivery.message.id == dead))
        sleeper.thaw()
        endings = [Ending(ack, "ack"), Ending(back, "give back"), Ending(retry, "retry"), Ending(dead, "dead-letter")]
        assert (await sleeper.ask(Settle(endings))).refused == dict.fromkeys(range(4), "LeaseLost")
        assert (await sleeper.ask(Extend([extend]))).refused == {0: "LeaseLost"}
        await lab.settle(broker, *(Ack(delivery) for delivery in taken if delivery.message.id != dead))
        await lab.holds(broker, {})
        await sleeper.end()


@scenario()
async def a_fork_harms_neither_process(lab: Lab) -> None:
    """A forked process opens a Broker of its own; its parent's goes on, waiting receives and leases too, and may be closed first."""
    async with processes(lab) as (lab, broker, start):
        await lab.declare(broker, *map(QueueSpec, ("mine", "once", "quiet")))
        await broker.close()  # so that no other process keeps alive what all of them share
        parent = await start()
        await parent.ask(Enqueue([lab.message("held"), lab.message("once", "once")]))
        await _take(parent, 1)
        await parent.ask(Receive("quiet", wait=lab.patience, aside=True))

        await parent.ask(Fork())
        forked = _Forked(parent)
        await forked.ask(Enqueue([lab.message("theirs", "mine")]))
        assert [one.id for one in (await forked.ask(Receive("mine", wait=1.0))).deliveries] == ["theirs"]
        twice = (await forked.ask(Receive("once"))).deliveries
        await (forked if PROCESSES.declared(lab.capabilities) else parent).ask(Enqueue([lab.message("wakes", "quiet")]))
        assert [(one.id, one.count) for one in (await parent.ask(Collect())).deliveries] == [("wakes", 1)]
        assert not (await parent.ask(Settle([Ending("held", "ack"), Ending("wakes", "ack")]))).refused
        twice += (await parent.ask(Receive("once"))).deliveries
        assert [one.id for one in twice] == ["once"], "a fork is no copy of what is stored"

        await parent.ask(Close())
        visitor = await start()
        await visitor.end()
        assert not (await forked.ask(Settle([Ending("theirs", "ack")]))).refused
        messages = lab.messages(20, queue="mine")
        await forked.ask(Enqueue(messages))
        await broker.open()
        if PROCESSES.declared(lab.capabilities):
            assert [delivery.message for delivery in await lab.take_exactly(broker, 20, "mine")] == messages
        assert (await parent.ask(Join())).count == 0, "the forked process ended badly"
        await parent.ask(Open())
        await parent.ask(Enqueue([lab.message("after", "mine")]))
        assert [one.id for one in (await parent.ask(Receive("mine", wait=1.0))).deliveries] == ["after"]
        await parent.end()


class _Forked:
    """The process that another one has forked."""

    def __init__(self, parent: Child) -> None:
        self._parent = parent

    async def ask(self, order: Order) -> Answer:
        answer = await self._parent.ask(Forked(order))
        assert not answer.refused, f"refused: {answer.refused}"
        return answer


# --- killed in the middle --------------------------------------------------------------------------


class Fate(NamedTuple):
    """What may have become of a message."""

    where: Literal["alive", "dead", "gone"]
    generation: int = 0


_GONE: Final = Fate("gone")


class Ledger:
    """What is known of every message: the fates it may have had, one once a verb was answered, two while it is under way."""

    def __init__(self) -> None:
        self._fates: dict[str, set[Fate]] = {}

    def begin(self, changes: Mapping[str, Fate]) -> None:
        """A verb was called that changes these messages so."""
        for id, fate in changes.items():
            self._fates.setdefault(id, {_GONE}).add(fate)

    def end(self, changes: Mapping[str, Fate]) -> None:
        """It was answered: the changes are certain."""
        self._fates.update((id, {fate}) for id, fate in changes.items())

    def ids(self, where: str) -> list[str]:
        """The messages that are certainly there."""
        return [id for id, fates in self._fates.items() if [fate.where for fate in fates] == [where]]

    def judge(self, alive: Sequence[Delivery], dead: Sequence[Message], *, doubles: bool) -> None:
        """Compare with what is there in the end: nothing is lost, nothing is doubled, nothing is back that ended.

        Args:
            alive: What is delivered.
            dead: The dead letters.
            doubles: Where an (id, generation) is not stored once only: what was on its way at a kill may be there twice, and so may what
                became of either of them.
        """
        found = [(delivery.message.id, Fate("alive", delivery.message.generation)) for delivery in alive]
        found += [(message.id, Fate("dead", message.generation)) for message in dead]
        for one, times in Counter(found).items():
            assert times == 1 or doubles, f"{one} is there {times} times"
        lost_acks = {delivery.message.id for delivery in alive if delivery.delivery_count > 1}  # which the interface allows
        for id, fates in self._fates.items():
            there = {fate for owner, fate in found if owner == id} or {_GONE}
            allowed = there <= fates or (_GONE in fates and id in lost_acks) or (doubles and (_GONE in fates or there & fates))
            assert allowed, f"{id} is {_sentence(there)}, and should be {_sentence(fates)}"
        assert {id for id, _ in found} <= self._fates.keys(), "there are messages that nobody enqueued"


def _sentence(fates: set[Fate]) -> str:
    return " or ".join("gone" if fate == _GONE else f"{fate.where} at generation {fate.generation}" for fate in sorted(fates))


class Storm:
    """Orders in close succession to a process that is killed in the middle of one.

    Args:
        child: The process.
        after: It is killed when it has answered so many orders and is at work on the next.
        dice: Says how far it gets with that.
    """

    def __init__(self, child: Child, after: int, dice: random.Random) -> None:
        self._child = child
        self._left = after
        self._dice = dice

    async def ask(self, order: Order) -> Answer:
        """Give an order. Raises `Ended` when the process was killed before it answered."""
        self._left -= 1
        asking = asyncio.ensure_future(self._child.ask(order))
        if self._left < 0:
            await asyncio.wait([asking], timeout=self._dice.uniform(0, 0.004))
            self._child.kill()
        return await asking

    async def change(self, order: Order, ledger: Ledger, changes: Mapping[str, Fate]) -> None:
        """Give an order that changes messages so."""
        ledger.begin(changes)
        answer = await self.ask(order)
        assert not answer.refused, f"refused: {answer.refused}"
        ledger.end(changes)


async def _enqueue_storm(lab: Lab, storm: Storm, ledger: Ledger) -> None:
    while True:
        batch = lab.messages(7)
        await storm.change(Enqueue(batch), ledger, {message.id: Fate("alive") for message in batch})


async def _settle_storm(lab: Lab, storm: Storm, ledger: Ledger) -> None:
    while True:
        taken = (await storm.ask(Receive(limit=8, wait=1.0))).deliveries
        endings: list[Ending] = []
        changes: dict[str, Fate] = {}
        for number, one in enumerate(taken):
            match number % 4:
                case 0:
                    endings.append(Ending(one.id, "ack"))
                    changes[one.id] = _GONE
                case 1:
                    endings.append(Ending(one.id, "retry"))
                    changes[one.id] = Fate("alive", one.generation + 1)
                case 2:
                    endings.append(Ending(one.id, "dead-letter"))
                    changes[one.id] = Fate("dead", one.generation)
                case _:
                    endings.append(Ending(one.id, "give back"))
        await storm.change(Settle(endings), ledger, changes)


async def _replay_storm(lab: Lab, storm: Storm, ledger: Ledger) -> None:
    while batch := ledger.ids("dead")[:3]:
        replays = [Replay(id, retried(lab.message(id))) for id in batch]
        await storm.change(Revive(replays), ledger, {id: Fate("alive", 1) for id in batch})


async def _purge_storm(lab: Lab, storm: Storm, ledger: Ledger) -> None:
    while True:
        batch = lab.messages(50)
        await storm.change(Enqueue(batch), ledger, {message.id: Fate("alive") for message in batch})
        await storm.change(Purge(), ledger, {message.id: _GONE for message in batch})


@scenario(
    needs=[PROCESSES],
    verb={"enqueue": _enqueue_storm, "settle": _settle_storm, "replay": _replay_storm, "purge": _purge_storm},
)
async def killed_in_the_middle(lab: Lab, verb: Callable[[Lab, Storm, Ledger], Awaitable[None]]) -> None:
    """A process killed in the middle of a verb tears nothing: what was answered is done, the rest is done or not, item by item."""
    async with processes(lab) as (lab, broker, start):
        ledger, dice = Ledger(), random.Random(7)
        await _prepare(lab, broker, verb, ledger)
        for after in (1, 6, 15):
            storm = Storm(await start(), after, dice)
            with suppress(Ended):
                await verb(lab, storm, ledger)
        if verb is _settle_storm:
            await lab.lease_over()
        alive = await lab.take(broker, limit=10_000)
        dead = [entry.message for entry in await lab.entries(broker, State.DEAD)]
        ledger.judge(alive, dead, doubles=not DEDUPLICATION.declared(lab.capabilities))


async def _prepare(lab: Lab, broker: Broker, verb: object, ledger: Ledger) -> None:
    if verb is _settle_storm:
        messages = lab.messages(120)
        await lab.enqueue(broker, *messages)
        ledger.end({message.id: Fate("alive") for message in messages})
    elif verb is _replay_storm:
        messages = lab.messages(90)
        await lab.enqueue(broker, *messages)
        await lab.settle(broker, *map(lab.dead, await lab.take_exactly(broker, 90)))
        ledger.end({message.id: Fate("dead") for message in messages})


# --- shorthands ------------------------------------------------------------------------------------


async def _take(child: Child, count: int) -> list[Held]:
    """Have a process receive so many messages."""
    taken: list[Held] = []
    while len(taken) < count:
        more = (await child.ask(Receive(limit=count - len(taken), wait=5.0))).deliveries
        assert more, f"only {len(taken)} of {count} messages came"
        taken += more
    return taken


async def _until_received(lab: Lab, broker: Broker, count: int) -> list[Delivery]:
    """Receive until there are so many, and keep them; fails where it takes longer than a lease, a sweep and the target's patience."""
    taken: list[Delivery] = []
    end = time.monotonic() + lab.lease + lab.sweep + lab.patience
    while len(taken) < count:
        assert time.monotonic() < end, f"only {len(taken)} of {count} messages came"
        taken += await broker.receive(lab.lanes("q"), count - len(taken), min(0.5, lab.lease / 4))
        await broker.extend(taken)
    return taken
