"""Leases: who holds one is left alone, who lost one is refused, and what nobody holds any more comes again."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Final

from crossdock.errors import LeaseLost
from crossdock.spi import Ack, Broker, Lane, Nack, QueueSpec, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import FENCING, removing, scenario

_LONG: Final = 600.0
"""Seconds of a lease that no scenario outlives."""


# --- a lease ends ---


@scenario(holder=["silent", "busy", "closed"])
async def expired_lease_is_delivered_again(broker: Broker, lab: Lab, holder: str) -> None:
    """What its holder neither settles nor extends is delivered again, the same and with its count raised by one: not before the
    lease is over and at most a sweep after that, whether the holder is silent, goes on with other work or has closed its Broker."""
    message = lab.message()
    await lab.enqueue(broker, message)
    owner = await lab.open(queues=["q", "other"])
    held = await lab.take_one(owner)
    last = lab.clock.monotonic() + lab.lease + lab.sweep
    async with AsyncExitStack() as work:
        if holder == "closed":
            await owner.close()
        elif holder == "busy":
            await work.enter_async_context(lab.waiting(owner, wait=3600, queue="other"))
        again = await lab.comes(broker, held.lease_until, last)
        await lab.enqueue(broker, lab.message(queue="other"))  # ends the receive of who is busy
    assert again.message == message
    assert again.delivery_count == 2, f"delivered after one loss, its count is {again.delivery_count}"


@scenario()
async def every_loss_is_counted(broker: Broker, lab: Lab) -> None:
    """Each lost lease raises the delivery count by one and a give-back does not; each hand-over has a receipt of its own."""
    messages = lab.messages(20)
    lost = {message.id for message in messages[:10]}
    receipts: set[object] = set()
    await lab.enqueue(broker, *messages)
    for count in (1, 2, 3):
        if count > 1:
            await lab.lease_over()
        taken = await lab.take_exactly(broker, 20)
        assert {each.message.id: each.delivery_count for each in taken} == {
            message.id: count if message.id in lost else 1 for message in messages
        }
        receipts |= {delivery.receipt for delivery in taken}
        await lab.settle(broker, *(Nack(delivery) for delivery in taken if delivery.message.id not in lost))
    assert len(receipts) == 60


@scenario()
async def one_heir(broker: Broker, lab: Lab) -> None:
    """Of several receivers that wait for it, one is delivered a message whose lease is over."""
    heirs = [await lab.open() for _ in range(5)]
    await lab.enqueue(broker, lab.message("m"))
    await lab.take_one(broker)
    receives = [asyncio.ensure_future(heir.receive(lab.lanes("q"), 10, lab.lease * 1.2 + lab.sweep)) for heir in heirs]
    await lab.turns()
    await lab.lease_over()
    await lab.until(lambda: any(receive.done() for receive in receives), "a waiting receive was woken")
    await lab.pass_time(lab.lease / 2)
    deliveries = [delivery for taken in await asyncio.gather(*receives) for delivery in taken]
    assert [(delivery.message.id, delivery.delivery_count) for delivery in deliveries] == [("m", 2)]


@scenario()
async def cancelled_receive_keeps_counts(lab: Lab) -> None:
    """Cancelled at any moment, a receive that takes what others lost returns it or leaves it there, with that one loss counted."""
    queues = [f"q{number}" for number in range(25)]
    holder, broker = await lab.open(queues=queues), await lab.open(queues=queues)
    await lab.enqueue(broker, *(lab.message(queue=queue) for queue in queues))
    await lab.take_exactly(holder, len(queues), lanes=lab.lanes(*queues))
    await lab.lease_over()
    began = time.monotonic()
    await lab.take_exactly(broker, 1, queues[0])
    usual = time.monotonic() - began
    for step, queue in enumerate(queues[1:]):
        receive = broker.receive(lab.lanes(queue), 10, 3600)
        taken = await lab.interrupted(receive, usual * 1.5 * step / len(queues)) or await lab.take_exactly(broker, 1, queue)
        assert [delivery.delivery_count for delivery in taken] == [2]


@scenario(skew={"ahead": 3600.0, "behind": -3600.0})
async def leases_go_by_the_brokers_clock(broker: Broker, lab: Lab, skew: float) -> None:
    """Where the broker has a clock, a lease is as long as it should be for a Broker on a machine whose clock is wrong."""
    if lab.capabilities.clock == "client":
        raise NotRun("it has no clock but those of its clients")
    astray = lab.build(skew=skew)
    await astray.open()
    await lab.declare(astray, QueueSpec("q", lease=lab.lease))
    await lab.enqueue(astray, lab.message("m"))
    held = await lab.take_one(astray)
    last = lab.clock.monotonic() + lab.lease + lab.sweep
    assert held.lease_until > lab.clock.monotonic() + lab.lease / 2
    assert (await lab.comes(broker, held.lease_until, last)).delivery_count == 2


# --- who lost a lease ---


@scenario(heir=["same broker", "another broker"], needs=[FENCING])
async def late_settlements_are_refused(broker: Broker, lab: Lab, heir: str) -> None:
    """Once a message was delivered again, nothing done with the old delivery changes anything, before and after the new one ends."""
    await lab.enqueue(broker, lab.message("m"))
    late = await lab.take_one(broker)
    other = broker if heir == "same broker" else await lab.open()
    await lab.lease_over()
    new = await lab.take_one(other)
    await lab.lost(broker, late)
    await lab.holds(broker, {State.LEASED: ["m"]})
    await lab.settle(other, lab.retry(new))
    await lab.lost(broker, late)
    await lab.holds(broker, {State.READY: ["m"]})
    assert (await lab.take_one(other)).message.generation == 1


@scenario()
async def late_settlements_that_nobody_overtook(broker: Broker, lab: Lab) -> None:
    """After the end of a lease and before the next delivery, a settlement or an extension is either done or refused, never half."""
    settled = ["ack", "give-back", "retry", "dead"]
    ids = [*settled, "extend"]
    await lab.enqueue(broker, *map(lab.message, ids))
    late = {delivery.message.id: delivery for delivery in await lab.take_exactly(broker, len(ids))}
    await lab.lease_over()
    refused = lab.errors(await broker.settle([lab.ending(kind, late[kind]) for kind in settled]))
    not_extended = lab.errors(await broker.extend([late["extend"]]))
    assert {*refused.values(), *not_extended.values()} <= {LeaseLost}
    lost = [settled[index] for index in refused] + ["extend"] * len(not_extended)
    expected = {"give-back": (1, 0), "retry": (1, 1)} | dict.fromkeys(lost, (2, 0))
    taken = await lab.take_exactly(broker, len(expected))
    assert {each.message.id: (each.delivery_count, each.message.generation) for each in taken} == expected
    dead = [] if "dead" in lost else ["dead"]
    await lab.holds(broker, {State.LEASED: [*{*expected, "extend"}], State.DEAD: dead}, in_order=False)


@scenario(taken_over={"taken over": True, "not taken over": False}, needs=[removing(State.READY), FENCING])
async def late_settlement_of_what_was_removed(broker: Broker, lab: Lab, taken_over: bool) -> None:
    """A message that was removed after its lease had ended is gone for its late holder, too."""
    await broker.remove("q", State.READY, ["nobody"])
    await lab.enqueue(broker, lab.message("m"))
    late = await lab.take_one(broker)
    await lab.lease_over()
    if taken_over:
        await lab.settle(broker, Nack(await lab.take_one(broker)))
    if lab.errors(await broker.remove("q", State.READY, ["m"])) and not taken_over:
        raise NotRun("it notices the end of a lease only when somebody receives")
    await lab.holds(broker, {})
    await lab.lost(broker, late)
    await lab.holds(broker, {})


@scenario(needs=[FENCING])
async def late_settlement_spares_a_namesake(broker: Broker, lab: Lab) -> None:
    """An old receipt means nothing to a message that was enqueued later under the same id."""
    await lab.enqueue(broker, lab.message("m"))
    late = await lab.take_one(broker)
    await lab.lease_over()
    await lab.settle(broker, Ack(await lab.take_one(broker)))
    remembered = bool(lab.capabilities.deduplication_window)
    await lab.enqueue(broker, lab.message("m", generation=int(remembered)))
    await lab.lost(broker, late)
    await lab.holds(broker, {State.READY: ["m"]})
    assert (await lab.take_one(broker)).delivery_count == 1


# --- who extends ---


@scenario()
async def extended_lease_lives_on(broker: Broker, lab: Lab) -> None:
    """Extended in time, a delivery is held for many times its lease and delivered to nobody else, and then it is settled."""
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    other = await lab.open()
    rounds, part = (12, 0.95) if lab.virtual else (5, 0.5)
    async with lab.waiting(other, wait=3600) as receive:
        for _ in range(rounds):
            await lab.pass_time(part * lab.lease)
            await lab.turns()
            lab.nothing_refused(await broker.extend([delivery]))
            await lab.holds(broker, {State.LEASED: ["m"]})
        await lab.settle(broker, Ack(delivery))
        await lab.enqueue(broker, lab.message("end"))
    assert [delivery.message.id for delivery in receive.result()] == ["end"]


@scenario(change={"shorter": 0.4, "longer": 1.5})
async def extension_has_the_lease_declared_last(broker: Broker, lab: Lab, change: float) -> None:
    """An extension runs for the queue's lease as it is declared by then; a receive that waits for its end follows it, be that
    sooner or later."""
    await lab.enqueue(broker, lab.message("m"))
    owner = await lab.open()
    before = lab.clock.monotonic()
    delivery = await lab.take_one(owner)
    margin = before + lab.lease - delivery.lease_until
    lease = change * lab.lease
    ended: list[float] = []
    async with lab.waiting(broker, wait=3600) as receive:
        receive.add_done_callback(lambda _: ended.append(lab.clock.monotonic()))
        await lab.pass_time(lab.lease / 2)
        await lab.declare(owner, QueueSpec("q", lease=lease))
        began = lab.clock.monotonic()
        lab.nothing_refused(await owner.extend([delivery]))
        extended = lab.clock.monotonic()
        if lab.virtual:
            await lab.pass_time(lease - margin - 0.1)
            await lab.holds(owner, {State.LEASED: ["m"]})
        await lab.pass_time(extended + lease + lab.sweep - lab.clock.monotonic())
    assert [delivery.delivery_count for delivery in receive.result()] == [2]
    assert ended[0] >= began + lease - margin, "it was delivered again before its lease was over"
    assert ended[0] <= extended + lease + lab.sweep + lab.slack + 0.01, "it was delivered again too late"


@scenario()
async def extension_saves_only_what_it_names(broker: Broker, lab: Lab) -> None:
    """Items of an extension are independent: what was settled is refused, others live on, and what is not named runs out."""
    await lab.enqueue(broker, *(lab.message(id) for id in "abc"))
    a, b, _ = sorted(await lab.take_exactly(broker, 3), key=lambda delivery: delivery.message.id)
    await lab.settle(broker, Ack(b))
    await lab.pass_time(lab.lease * 0.6)
    assert lab.errors(await broker.extend([a, b])) == {1: LeaseLost}
    await lab.pass_time(lab.lease * 0.4 + lab.sweep)
    (again,) = await lab.take_exactly(broker, 1)
    assert again.message.id == "c"
    await lab.holds(broker, {State.LEASED: ["a", "c"]}, in_order=False)
    await lab.settle(broker, Ack(a), Ack(again))


@scenario()
async def extended_and_settled_at_once(broker: Broker, lab: Lab) -> None:
    """An extension that is under way with a settlement of the same delivery is done or refused, and the settlement is done."""
    await lab.enqueue(broker, *lab.messages(20))
    deliveries = await lab.take_exactly(broker, 20)
    extensions = [broker.extend([delivery]) for delivery in deliveries]
    acks = [broker.settle([Ack(delivery)]) for delivery in deliveries]
    extended, acked = await asyncio.gather(asyncio.gather(*extensions), asyncio.gather(*acks))
    assert {error for refusals in extended for error in lab.errors(refusals).values()} <= {LeaseLost}
    assert not any(acked)
    await lab.holds(broker, {})


# --- how long a lease is ---


@scenario()
async def leases_are_the_queues_own(broker: Broker, lab: Lab) -> None:
    """Each queue has the lease that was declared for it; deliveries tell until when they are surely held."""
    await lab.declare(broker, QueueSpec("short", lease=lab.lease), QueueSpec("long", lease=_LONG))
    await lab.enqueue(broker, lab.message("s", "short"), lab.message("l", "long"))
    lanes: list[Lane] = lab.lanes("short", "long")
    before = lab.clock.monotonic()
    long, short = sorted(await lab.take_exactly(broker, 2, lanes=lanes), key=lambda delivery: delivery.message.id)
    now = lab.clock.monotonic()
    assert before + lab.lease / 2 < short.lease_until <= now + lab.lease
    assert before + _LONG / 2 < long.lease_until <= now + _LONG
    await lab.lease_over()
    assert [each.message.id for each in await lab.take_exactly(broker, 1, lanes=lanes)] == ["s"]
    assert not await lab.take(broker, queue="long")
    await lab.settle(broker, Ack(long))


@scenario()
async def shorter_lease_overtakes_longer_ones(broker: Broker, lab: Lab) -> None:
    """What is received after a shorter lease was declared is delivered again before what was received under a longer one."""
    await lab.declare(broker, QueueSpec("q", lease=_LONG))
    await lab.enqueue(broker, lab.message("long"))
    await lab.take_one(broker)
    await lab.declare(broker, QueueSpec("q", lease=lab.lease))
    await lab.enqueue(broker, lab.message("short"))
    await lab.take_one(broker)
    await lab.lease_over()
    assert [delivery.message.id for delivery in await lab.take_exactly(broker, 1)] == ["short"]
    await lab.holds(broker, {State.LEASED: ["short", "long"]}, in_order=False)
