"""Ack, Nack and Dead: each ends a delivery once, and only in the hands that hold it."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Sequence

import msgspec

from crossdock.errors import LeaseLost
from crossdock.spi import LEVELS, Ack, Broker, Lane, Message, Nack, Priority, Settlement, State
from crossdock_conformance.lab import ENDINGS, Lab
from crossdock_conformance.scenario import DELAY, Need, listing, scenario


def _needs(kind: str) -> Sequence[Need]:
    return [DELAY] if ENDINGS[kind] is State.SCHEDULED else []


def _left(kind: str, id: str) -> dict[State, list[str]]:
    """What a queue holds whose only message was settled so."""
    state = ENDINGS[kind]
    return {state: [id]} if state else {}


@scenario()
async def ack_forgets(broker: Broker, lab: Lab) -> None:
    """An acked message is nowhere any more, and a later one may bear its id."""
    message = lab.message()
    await lab.enqueue(broker, message)
    await lab.settle(broker, Ack(await lab.take_one(broker)))
    await lab.holds(broker, {})
    await lab.enqueue(broker, msgspec.structs.replace(message, generation=1))
    assert (await lab.take_one(broker)).delivery_count == 1


@scenario()
async def give_back_keeps_bytes_and_count(broker: Broker, lab: Lab) -> None:
    """However often a message is given back, it is delivered again the same, with the same count."""
    message = lab.message()
    await lab.enqueue(broker, message)
    for _ in range(3):
        delivery = await lab.take_one(broker)
        assert delivery.message == message
        assert delivery.delivery_count == 1, f"given back and never lost, its count is {delivery.delivery_count}"
        await lab.settle(broker, Nack(delivery))
        await lab.holds(broker, {State.READY: [message.id]})


@scenario()
async def give_back_keeps_counted_losses(broker: Broker, lab: Lab) -> None:
    """A give-back takes back its own hand-over only, not those whose leases were lost before."""
    await lab.enqueue(broker, lab.message())
    await lab.take_one(broker)
    await lab.lease_over()
    for _ in range(2):
        delivery = await lab.take_one(broker)
        assert delivery.delivery_count == 2
        await lab.settle(broker, Nack(delivery))


@scenario()
async def replacement_restarts_the_count(broker: Broker, lab: Lab) -> None:
    """A replacement is stored in the message's place with its own body, level and generation, and delivered as a first delivery."""
    await lab.enqueue(broker, lab.message("m"))
    await lab.take_one(broker)
    await lab.lease_over()
    delivery = await lab.take_one(broker)
    assert delivery.delivery_count == 2
    replacement = Message("m", "q", Priority.LOW, b"\x00anew", generation=9)
    await lab.settle(broker, Nack(delivery, replacement=replacement))
    await lab.holds(broker, {State.READY: ["m"]})
    again = await lab.take_one(broker)
    assert (again.message, again.delivery_count) == (replacement, 1)


@scenario(level={level.name.lower(): level for level in LEVELS})
async def replacement_may_change_its_level(broker: Broker, lab: Lab, level: Priority) -> None:
    """A replacement of another level is delivered at that one, and at no other any more."""
    old = Priority.LOW if level is Priority.HIGH else Priority.HIGH
    await lab.enqueue(broker, lab.message("m", priority=old))
    await lab.settle(broker, lab.retry(await lab.take_one(broker), priority=level))
    wrong = await lab.take(broker, lanes=[Lane("q", other, 1) for other in LEVELS if other is not level])
    assert not wrong, f"a replacement for {level.name} was delivered as {wrong[0].message.priority.name}"
    (delivery,) = await lab.take_exactly(broker, 1, lanes=[Lane("q", level, 1)])
    assert delivery.message.priority is level


@scenario(kind=[kind for kind, state in ENDINGS.items() if state is State.SCHEDULED], needs=[DELAY])
async def delayed_nack_waits(broker: Broker, lab: Lab, kind: str) -> None:
    """After a Nack with a delay the message is SCHEDULED, and is delivered when the delay is over, not before."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    before = lab.clock.monotonic()
    await lab.settle(broker, Nack(delivery, lab.moment) if kind == "give-back later" else lab.retry(delivery, lab.moment))
    after = lab.clock.monotonic()
    await lab.holds(broker, {State.SCHEDULED: ["m"]})
    again = await lab.comes(broker, before + lab.moment - lab.early, after + lab.moment + lab.lateness)
    assert again.delivery_count == 1
    assert again.message.generation == (0 if kind == "give-back later" else 1)


@scenario(needs=[DELAY])
async def nack_forgets_the_messages_own_eta(broker: Broker, lab: Lab) -> None:
    """A message that waited for an eta and is given back is READY at once, or after the delay of the Nack alone."""
    wait = lab.moment / 2
    eta = lab.clock.time_ms() + round(wait * 1000)
    await lab.enqueue(broker, lab.message("m", eta_ms=eta))
    await lab.pass_time(wait)
    await lab.settle(broker, Nack(await lab.take_one(broker)))
    await lab.holds(broker, {State.READY: ["m"]})
    delivery = await lab.take_one(broker)
    before = lab.clock.monotonic()
    await lab.settle(broker, Nack(delivery, wait))
    after = lab.clock.monotonic()
    await lab.comes(broker, before + wait - lab.early, after + wait + lab.lateness)


@scenario(needs=[listing(State.DEAD)])
async def dead_keeps_message_and_letter(broker: Broker, lab: Lab) -> None:
    """A dead-lettered message stays with its whole letter, as the settlement has it, and is delivered to nobody."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    fixed = msgspec.structs.replace(delivery.message, body=b"\x00fixed")
    dead = lab.dead(delivery, message=fixed, story=bytes(range(256)), error_type="Größe")
    await lab.settle(broker, dead)
    (entry,) = await lab.entries(broker, State.DEAD)
    assert (entry.message, entry.letter) == (fixed, dead.letter)
    await lab.lease_over()
    assert not await lab.take(broker)
    await lab.holds(broker, {State.DEAD: ["m"]})


# --- said twice ---


@scenario(kind=list(ENDINGS), needs=_needs)
async def same_settlement_again_counts_as_done(broker: Broker, lab: Lab, kind: str) -> None:
    """The same settlement again, in one batch, at once or later, is no error and has no second effect."""
    await lab.enqueue(broker, lab.message("m"))
    settlement = lab.ending(kind, await lab.take_one(broker))
    lab.nothing_refused(await broker.settle([settlement, settlement]))
    for refusals in await asyncio.gather(broker.settle([settlement]), broker.settle([settlement])):
        lab.nothing_refused(refusals)
    await lab.holds(broker, _left(kind, "m"))


@scenario(kind=["give-back", "retry"])
async def same_settlement_again_spares_the_next_delivery(broker: Broker, lab: Lab, kind: str) -> None:
    """A settlement that is repeated after somebody else was delivered the message does not take it from them."""
    await lab.enqueue(broker, lab.message("m"))
    settlement = lab.ending(kind, await lab.take_one(broker))
    await lab.settle(broker, settlement)
    other = await lab.open()
    taken = await lab.take_one(other)
    await lab.settle(broker, settlement)
    await lab.holds(broker, {State.LEASED: ["m"]})
    await lab.settle(other, Ack(taken))
    await lab.settle(broker, settlement)
    await lab.holds(broker, {})


@scenario(kind=list(ENDINGS), needs=_needs)
async def second_thoughts_are_refused(broker: Broker, lab: Lab, kind: str) -> None:
    """A delivery that was settled in one way can neither be settled in another nor extended."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    await lab.settle(broker, lab.ending(kind, delivery))
    others = [lab.ending(other, delivery) for other in lab.endings if other != kind]
    assert lab.errors(await broker.settle(others)) == dict.fromkeys(range(len(others)), LeaseLost)
    assert lab.errors(await broker.extend([delivery])) == {0: LeaseLost}
    await lab.holds(broker, _left(kind, "m"))


@scenario(calls=["one call", "two calls at once"])
async def one_of_two_contradictions_is_done(broker: Broker, lab: Lab, calls: str) -> None:
    """Of two different settlements of one delivery, said at the same time, one is done and the other refused."""
    pairs = list(itertools.permutations(lab.endings, 2))
    await lab.enqueue(broker, *lab.messages(len(pairs), queue="busy"))  # with leases of 30 s, so that a slow machine loses none
    deliveries = await lab.take_exactly(broker, len(pairs), "busy")
    one, two = ([lab.ending(pair[place], each) for pair, each in zip(pairs, deliveries, strict=True)] for place in (0, 1))
    if calls == "one call":
        refused = lab.errors(await broker.settle(one + two))
    else:
        first, second = await asyncio.gather(broker.settle(one), broker.settle(two))
        refused = lab.errors(first) | {len(one) + index: error for index, error in lab.errors(second).items()}
    assert set(refused.values()) == {LeaseLost}
    assert sorted(index % len(pairs) for index in refused) == list(range(len(pairs))), "of some pair both were done, or none"
    done = [settlement for index, settlement in enumerate(one + two) if index not in refused]
    await lab.holds(broker, _places(done), "busy", in_order=False)


def _places(done: Sequence[Settlement]) -> dict[State, list[str]]:
    """Where messages are whose deliveries ended so."""
    places: dict[State, list[str]] = defaultdict(list)
    for settlement in done:
        match settlement:
            case Ack():
                continue
            case Nack(delay=delay):
                state = State.SCHEDULED if delay else State.READY
            case _:
                state = State.DEAD
        places[state].append(settlement.delivery.message.id)
    return places


# --- batches ---


@scenario()
async def refused_items_hold_up_no_other(broker: Broker, lab: Lab) -> None:
    """One refused settlement holds up no other of its batch, and is named by its index."""
    await lab.enqueue(broker, *(lab.message(id) for id in "abcde"))
    a, b, c, d, e = sorted(await lab.take_exactly(broker, 5), key=lambda delivery: delivery.message.id)
    await lab.settle(broker, Nack(c))
    assert lab.errors(await broker.settle([Ack(a), Nack(b), Ack(c), lab.retry(d), lab.dead(e)])) == {2: LeaseLost}
    await lab.holds(broker, {State.READY: ["b", "c", "d"], State.DEAD: ["e"]}, in_order=False)


@scenario()
async def a_thousand_in_one_batch(broker: Broker, lab: Lab) -> None:
    """A batch of 1,000 settlements of every kind, among them some said before and some contradicting what was said before,
    is done or refused item by item, and so it is when it is repeated."""
    await lab.enqueue(broker, *lab.messages(1000, queue="busy"))  # with leases of 30 s, so that a slow machine loses none
    deliveries = await lab.take_exactly(broker, 1000, "busy")
    kinds = list(itertools.islice(itertools.cycle(lab.endings), 1001))
    batch = [lab.ending(kind, delivery) for kind, delivery in zip(kinds, deliveries, strict=False)]
    said_before = range(100, 200)
    contradicted = {index: lab.ending(kinds[index + 1], deliveries[index]) for index in range(500, 600)}
    await lab.settle(broker, *(batch[index] for index in said_before), *contradicted.values())
    done = _places([contradicted.get(index, settlement) for index, settlement in enumerate(batch)])
    for _ in range(2):
        assert lab.errors(await broker.settle(batch)) == dict.fromkeys(contradicted, LeaseLost)
        await lab.holds(broker, done, "busy", in_order=False)


@scenario()
async def receipts_of_another_broker_are_refused(broker: Broker, lab: Lab) -> None:
    """A receipt means something only to the Broker that returned it: no other settles or extends with it."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    other = await lab.open()
    await lab.lost(other, delivery)
    await lab.holds(broker, {State.LEASED: ["m"]})
    await lab.settle(broker, Ack(delivery))


@scenario()
async def settling_does_not_wait_for_a_receive(broker: Broker, lab: Lab) -> None:
    """While a receive of the same Broker waits, deliveries are extended and settled, one by one and all at once."""
    await lab.enqueue(broker, *lab.messages(20))
    deliveries = await lab.take_exactly(broker, 20)
    async with lab.waiting(broker, wait=3600, queue="quiet") as receive:
        extension = asyncio.ensure_future(broker.extend(deliveries))
        await lab.until(extension.done, "deliveries were extended")
        acks = asyncio.gather(*(broker.settle([Ack(delivery)]) for delivery in deliveries))
        await lab.until(acks.done, "deliveries were settled")
        for refusals in (extension.result(), *acks.result()):
            lab.nothing_refused(refusals)
        await lab.holds(broker, {})
        assert not receive.done()
        await lab.enqueue(broker, lab.message("end", "quiet"))
    assert [delivery.message.id for delivery in receive.result()] == ["end"]
