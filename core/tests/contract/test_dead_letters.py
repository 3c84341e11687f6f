"""The dead letters of a queue: listed, found, removed, replayed, kept as long as asked."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from crossdock.errors import EnqueueFailed, MessageTooLarge, NotFound
from crossdock.spi import Broker, Entry, Message, Priority, QueueSpec, Reason, Replay, State

pytestmark = pytest.mark.asyncio


def revived(message: Message, **changes: Any) -> Replay:
    """An order to replay a message, one generation on."""
    changes = {"generation": message.generation + 1, **changes}
    return Replay(message.id, msgspec.structs.replace(message, **changes))


# --- listing ---


async def test_listed_by_time_of_death_then_id(broker: Broker, lab: Any) -> None:
    """Dead letters come in order of dying, then of id, whatever the order of settling."""
    now = lab.clock.time_ms()
    for id, died_ms in (("c", now), ("late", now + 5), ("a", now), ("early", now - 5), ("b", now)):
        await lab.bury(broker, lab.message(id), died_ms=died_ms)
    assert await lab.ids(broker, State.DEAD) == ["early", "a", "b", "c", "late"]


@pytest.mark.parametrize("reason", Reason)
async def test_letter_comes_back_whole(broker: Broker, lab: Any, reason: Reason) -> None:
    """Every field of a letter is kept, whatever text is in it."""
    fields = {"task": "mañana\u200b.run", "error_type": "a.B", "fingerprint": "f" * 64, "story": bytes(range(256)) * 64}
    await lab.bury(broker, lab.message("m"), reason=reason, **fields)
    (entry,) = await lab.entries(broker, State.DEAD)
    assert (entry.state, entry.letter.reason) == (State.DEAD, reason)
    assert {name: getattr(entry.letter, name) for name in fields} == fields


async def test_letters_have_no_part_in_deliveries(broker: Broker, lab: Any) -> None:
    """Other states never show a letter."""
    await broker.enqueue([lab.message("ready"), lab.message("later", delay_ms=1000)])
    await lab.take(broker, limit=1)
    await broker.enqueue([lab.message("ready2")])
    for state in (State.READY, State.SCHEDULED, State.LEASED):
        (entry,) = await lab.entries(broker, state)
        assert isinstance(entry, Entry)
        assert (entry.state, entry.letter) == (state, None)


# --- removing ---


async def test_remove(broker: Broker, lab: Any) -> None:
    """A removed letter is gone for good; one that is not there is named, and holds up no other."""
    await lab.bury(broker, *[lab.message(id) for id in "abc"])
    await broker.enqueue([lab.message("ready")])
    refusals = await broker.remove("q", State.DEAD, ["a", "nobody", "ready", "c", "a"])
    assert lab.errors(refusals) == {1: NotFound, 2: NotFound, 4: NotFound}
    assert await lab.where(broker) == {State.READY: ["ready"], State.DEAD: ["b"]}
    assert (await lab.stats(broker)).dead_dropped == 0


async def test_purge(broker: Broker, lab: Any) -> None:
    """A purge says how many it removed, and removes nothing else."""
    await lab.bury(broker, *[lab.message() for _ in range(5)])
    await broker.enqueue([lab.message("ready")])
    assert await broker.purge("q", State.DEAD) == 5
    assert await broker.purge("q", State.DEAD) == 0
    assert await lab.where(broker) == {State.READY: ["ready"]}


# --- replaying ---


async def test_replay(broker: Broker, lab: Any) -> None:
    """A replayed letter is a fresh message: as given, count 1, its letter gone."""
    message = lab.message("m")
    await lab.bury(broker, message, lab.message("other"))
    replay = revived(message, body=b"fixed", priority=Priority.CRITICAL)
    assert not await broker.replay("q", [replay])
    assert await lab.where(broker) == {State.READY: ["m"], State.DEAD: ["other"]}
    delivery = await lab.take_one(broker)
    assert (delivery.message, delivery.delivery_count) == (replay.message, 1)


async def test_replay_of_what_lost_its_lease_before(broker: Broker, lab: Any) -> None:
    """The count of the former life is forgotten."""
    message = lab.message("m")
    await broker.enqueue([message])
    for _ in range(3):
        delivery = await lab.take_one(broker)
        await lab.advance(broker.capabilities.takeover)
    delivery = await lab.take_one(broker)
    assert delivery.delivery_count == 4
    await broker.settle([lab.dead(delivery)])
    await broker.replay("q", [revived(message)])
    assert (await lab.take_one(broker)).delivery_count == 1


async def test_replay_with_a_due_time(broker: Broker, lab: Any) -> None:
    """A replay may be due later."""
    a, b = lab.message("a"), lab.message("b")
    await lab.bury(broker, a, b)
    await broker.replay("q", [revived(a, delay_ms=1000), revived(b, eta_ms=lab.clock.time_ms() + 2000)])
    assert await lab.where(broker) == {State.SCHEDULED: ["a", "b"]}
    await lab.advance(1)
    assert (await lab.take_one(broker)).message.id == "a"
    await lab.advance(1)
    assert (await lab.take_one(broker)).message.id == "b"


async def test_replay_to_another_queue(broker: Broker, lab: Any) -> None:
    """A replay may go to another queue, which need not exist; max_ready does not hold it back."""
    await broker.declare([QueueSpec("fixed", max_ready=0)])
    messages = [lab.message("a"), lab.message("b")]
    await lab.bury(broker, *messages)
    assert not await broker.replay("q", [revived(messages[0], queue="fixed"), revived(messages[1], queue="brand-new")])
    assert await lab.where(broker) == {}
    assert (await lab.take_one(broker, "fixed")).message.id == "a"
    assert (await lab.take_one(broker, "brand-new")).message.id == "b"


async def test_replay_wakes_a_waiting_receive(broker: Broker, lab: Any) -> None:
    """A waiting receive gets what is replayed."""
    message = lab.message("m")
    await lab.bury(broker, message)
    async with lab.waiting(broker, wait=3600) as receive:
        await broker.replay("q", [revived(message)])
    assert [delivery.message.generation for delivery in receive.result()] == [1]


async def test_replay_again_finds_no_letter(broker: Broker, lab: Any) -> None:
    """A replay done twice stores once; the second is told that the letter is gone, and others are not held up."""
    message, other = lab.message("m"), lab.message("other")
    await lab.bury(broker, message, other)
    assert not await broker.replay("q", [revived(message)])
    refusals = await broker.replay("q", [revived(message), revived(lab.message("nobody")), revived(other)])
    assert lab.errors(refusals) == {0: NotFound, 1: NotFound}
    assert await lab.where(broker) == {State.READY: ["m", "other"]}


@pytest.mark.parametrize("held", [1, 2], ids=["same-generation", "later-generation"])
async def test_replay_to_where_it_is_already(broker: Broker, lab: Any, held: int) -> None:
    """Where the target holds the id at the same or a later generation, only the letter goes: a cut replay can be repeated."""
    message = lab.message("m")
    await lab.bury(broker, message)
    await broker.enqueue([lab.message("m", "target", generation=held, body=b"there")])
    assert not await broker.replay("q", [revived(message, queue="target")])
    assert await lab.where(broker) == {}
    assert (await lab.take_one(broker, "target")).message.body == b"there"


async def test_replay_refused_keeps_the_letter(broker: Broker, lab: Any) -> None:
    """Where the new message cannot be stored the letter stays."""
    message = lab.message("m", generation=4)
    await lab.bury(broker, message)
    await broker.enqueue([lab.message("m", "target")])
    assert lab.errors(await broker.replay("q", [revived(message, queue="target")])) == {0: EnqueueFailed}
    too_large = revived(message, body=bytes(broker.capabilities.max_body + 1))
    assert lab.errors(await broker.replay("q", [too_large])) == {0: MessageTooLarge}
    assert await lab.where(broker) == {State.DEAD: ["m"]}


async def test_die_replay_die(broker: Broker, lab: Any) -> None:
    """A message may die and be replayed many times, and is always one."""
    await broker.enqueue([lab.message("m")])
    for generation in range(5):
        await broker.settle([lab.dead(await lab.take_one(broker))])
        (entry,) = await lab.entries(broker, State.DEAD)
        assert entry.message.generation == generation
        await broker.replay("q", [revived(entry.message)])
    assert await lab.where(broker) == {State.READY: ["m"]}


# --- retention ---


async def test_retention_by_count(broker: Broker, lab: Any) -> None:
    """Beyond `dead_max_count` the oldest letters go, and are counted."""
    await broker.declare([QueueSpec("q", dead_max_count=2)])
    for id in "abcd":
        await lab.bury(broker, lab.message(id))
        await lab.advance(1)
    assert await lab.ids(broker, State.DEAD) == ["c", "d"]
    assert (await lab.stats(broker)).dead_dropped == 2
    assert not await broker.enqueue([lab.message("a", generation=1)])


async def test_retention_frees_the_id(broker: Broker, lab: Any) -> None:
    """Retention is applied when the next message dies, without anybody looking: the dropped id is free then."""
    await broker.declare([QueueSpec("q", dead_max_count=1)])
    await lab.bury(broker, lab.message("a"))
    await lab.advance(1)
    assert lab.errors(await broker.enqueue([lab.message("a", generation=1)])) == {0: EnqueueFailed}
    await lab.bury(broker, lab.message("b"))
    assert not await broker.enqueue([lab.message("a", generation=1)])


async def test_retention_by_age(broker: Broker, lab: Any) -> None:
    """Letters older than `dead_max_age` go by the next look, and are counted."""
    await broker.declare([QueueSpec("q", dead_max_age=60.0)])
    await lab.bury(broker, lab.message("a"))
    await lab.advance(30)
    await lab.bury(broker, lab.message("b"))
    await lab.advance(29)
    assert await lab.ids(broker, State.DEAD) == ["a", "b"]
    await lab.advance(1)
    assert (await lab.stats(broker)).dead_dropped == 1
    assert await lab.ids(broker, State.DEAD) == ["b"]
    await lab.advance(30)
    assert await lab.ids(broker, State.DEAD) == []
    assert (await lab.stats(broker)).dead_dropped == 2


async def test_retention_declared_later(broker: Broker, lab: Any) -> None:
    """Retention holds for the letters that are there when it is declared; without it they stay for ever."""
    await lab.bury(broker, *[lab.message() for _ in range(5)])
    await lab.advance(10 * 365 * 24 * 3600)
    assert (await lab.stats(broker)).dead == 5
    await broker.declare([QueueSpec("q", dead_max_count=3)])
    assert (await lab.stats(broker)).dead == 3
    assert (await lab.stats(broker)).dead_dropped == 2
