"""Ack, Nack and Dead: each ends a delivery once, and only in the hands that hold it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from crossdock.errors import LeaseLost
from crossdock.spi import Ack, Broker, Message, Nack, Priority, State

pytestmark = pytest.mark.asyncio


async def test_ack_forgets(broker: Broker, lab: Any) -> None:
    """An acked message is nowhere any more, and its id can be used again."""
    message = lab.message()
    await broker.enqueue([message])
    assert not await broker.settle([Ack(await lab.take_one(broker))])
    assert await lab.where(broker) == {}
    assert not await broker.enqueue([message])
    assert (await lab.take_one(broker)).delivery_count == 1


async def test_give_back_keeps_bytes_and_count(broker: Broker, lab: Any) -> None:
    """However often a message is given back, it comes again the same, with the same count."""
    message = lab.message()
    await broker.enqueue([message])
    for _ in range(3):
        delivery = await lab.take_one(broker)
        assert (delivery.message, delivery.delivery_count) == (message, 1)
        assert not await broker.settle([Nack(delivery)])
        assert await lab.where(broker) == {State.READY: [message.id]}


async def test_give_back_after_a_lost_lease_keeps_the_higher_count(broker: Broker, lab: Any) -> None:
    """A give-back takes back its own hand-over only, not those that were lost before."""
    await broker.enqueue([lab.message()])
    await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    for _ in range(2):
        delivery = await lab.take_one(broker)
        assert delivery.delivery_count == 2
        await broker.settle([Nack(delivery)])


async def test_replacement_restarts_the_count(broker: Broker, lab: Any) -> None:
    """A retry is stored in the message's place, with its own body and level, as a first delivery."""
    await broker.enqueue([lab.message("m")])
    await lab.take_one(broker)
    await lab.advance(broker.capabilities.takeover)
    delivery = await lab.take_one(broker)
    assert delivery.delivery_count == 2
    nack = lab.retry(delivery, priority=Priority.LOW)
    assert not await broker.settle([nack])
    assert await lab.where(broker) == {State.READY: ["m"]}
    again = await lab.take_one(broker)
    assert (again.message, again.delivery_count) == (nack.replacement, 1)


@pytest.mark.parametrize("kind", ["give-back", "retry"])
async def test_nack_with_delay(broker: Broker, lab: Any, kind: str) -> None:
    """A delayed Nack is SCHEDULED until its time, and not received before."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    await broker.settle([Nack(delivery, 10.0) if kind == "give-back" else lab.retry(delivery, 10.0)])
    assert await lab.where(broker) == {State.SCHEDULED: ["m"]}
    await lab.advance(9.9)
    assert await lab.take(broker) == []
    await lab.advance(0.1)
    assert (await lab.take_one(broker)).delivery_count == 1


async def test_nack_forgets_the_messages_own_eta(broker: Broker, lab: Any) -> None:
    """A message that waited for an eta and is given back is READY at once, or after the delay of the Nack alone."""
    await broker.enqueue([lab.message("m", eta_ms=lab.clock.time_ms() + 1000)])
    await lab.advance(1)
    await broker.settle([Nack(await lab.take_one(broker))])
    assert await lab.where(broker) == {State.READY: ["m"]}
    await broker.settle([Nack(await lab.take_one(broker), 2.0)])
    await lab.advance(2)
    assert (await lab.take_one(broker)).message.id == "m"


async def test_dead_keeps_message_and_letter(broker: Broker, lab: Any) -> None:
    """A dead-lettered message stays with its whole letter and is delivered to nobody."""
    await broker.enqueue([lab.message("m")])
    dead = lab.dead(await lab.take_one(broker), story=bytes(range(256)), error_type="Größe")
    assert not await broker.settle([dead])
    assert await lab.where(broker) == {State.DEAD: ["m"]}
    (entry,) = await lab.entries(broker, State.DEAD)
    assert (entry.message, entry.letter) == (dead.letter.message, dead.letter)
    await lab.advance(3600)
    assert await lab.take(broker) == []


@pytest.mark.parametrize("kind", ["ack", "give-back", "delayed", "retry", "dead"])
async def test_same_settlement_again_counts_as_done(broker: Broker, lab: Any, kind: str) -> None:
    """Settling twice in the same way, in one batch or two, is no error and has no second effect."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    settlement = {
        "ack": Ack(delivery),
        "give-back": Nack(delivery),
        "delayed": Nack(delivery, 5.0),
        "retry": lab.retry(delivery),
        "dead": lab.dead(delivery),
    }[kind]
    assert not await broker.settle([settlement, settlement])
    after = await lab.where(broker)
    assert not await broker.settle([settlement])
    assert await lab.where(broker) == after


async def test_same_settlement_again_spares_the_next_delivery(broker: Broker, lab: Any) -> None:
    """Repeating a give-back after somebody else took the message does not take it from them."""
    await broker.enqueue([lab.message("m")])
    nack = Nack(await lab.take_one(broker))
    await broker.settle([nack])
    other = await lab.open()
    taken = await lab.take_one(other)
    await broker.settle([nack])
    assert await lab.where(broker) == {State.LEASED: ["m"]}
    assert not await other.settle([Ack(taken)])


async def test_second_thoughts_are_refused(broker: Broker, lab: Any) -> None:
    """A delivery that was settled in one way cannot be settled in another, nor extended."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    await broker.settle([Nack(delivery)])
    assert lab.errors(await broker.settle([Ack(delivery), lab.dead(delivery)])) == {0: LeaseLost, 1: LeaseLost}
    assert lab.errors(await broker.extend([delivery])) == {0: LeaseLost}
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_items_are_independent(broker: Broker, lab: Any) -> None:
    """One refused settlement holds up no other, and is named by its index."""
    await broker.enqueue([lab.message(id) for id in "abcde"])
    a, b, c, d, e = await lab.take(broker)
    await broker.settle([Nack(c)])
    batch = [Ack(a), Nack(b), Ack(c), lab.retry(d), lab.dead(e)]
    assert lab.errors(await broker.settle(batch)) == {2: LeaseLost}
    where = await lab.where(broker)
    assert {state: sorted(ids) for state, ids in where.items()} == {State.READY: ["b", "c", "d"], State.DEAD: ["e"]}


async def test_receipt_of_another_broker_is_refused(broker: Broker, lab: Any) -> None:
    """A receipt means something only to the Broker that returned it."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    other = await lab.open()
    assert lab.errors(await other.extend([delivery])) == {0: LeaseLost}
    assert lab.errors(await other.settle([Ack(delivery)])) == {0: LeaseLost}
    assert not await broker.settle([Ack(delivery)])


async def test_settled_message_is_what_core_wrote(broker: Broker, lab: Any) -> None:
    """What a replacement and a letter say is stored, whatever the delivery said before."""
    await broker.enqueue([lab.message("r"), lab.message("d")])
    r, d = await lab.take(broker)
    replacement = Message("r", "q", Priority.CRITICAL, b"\x00new", generation=9)
    buried = msgspec.structs.replace(d.message, body=b"\x00fixed")
    await broker.settle([Nack(r, 0.0, replacement), lab.dead(d, message=buried)])
    assert [entry.message for entry in await lab.entries(broker, State.READY)] == [replacement]
    assert [entry.message for entry in await lab.entries(broker, State.DEAD)] == [buried]
