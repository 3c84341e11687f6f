"""Due times: never early, soon after, from milliseconds to years, whatever else waits."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any, Final

from crossdock.errors import BrokerUnavailable, EnqueueFailed
from crossdock.spi import LEVELS, Ack, Broker, Delivery, Message, Nack, Priority, State
from crossdock_conformance.child import Enqueue
from crossdock_conformance.lab import EARLY, Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import DELAY, PROCESSES, Hook, listing, scenario
from crossdock_conformance.scenarios.processes import processes

_HOUR: Final = 3600.0
_YEAR: Final = 365 * 24 * _HOUR
_FIELDS: Final = ("eta_ms", "delay_ms")
_WAYS: Final = (*_FIELDS, "give-back", "retry")
"""How a message comes to wait: by its enqueue, or by a Nack."""


def _at(lab: Lab, seconds: float) -> int:
    """The eta so many seconds from now."""
    return lab.clock.time_ms() + round(seconds * 1000)


def _timed(lab: Lab, field: str, seconds: float, id: str = "", **fields: Any) -> Message:
    """A message that is due in so many seconds."""
    when: dict[str, Any] = {field: _at(lab, seconds) if field == "eta_ms" else round(seconds * 1000)}
    return lab.message(id, **when, **fields)


async def _store(broker: Broker, lab: Lab, way: str, seconds: float, id: str = "m") -> tuple[float, float]:
    """Make a message wait. Returns the first and the last instant at which it may be due, by `clock.monotonic()`."""
    if way in _FIELDS:
        message = _timed(lab, way, seconds, id)
        before = lab.clock.monotonic()
        await lab.enqueue(broker, message)
    else:
        await lab.enqueue(broker, lab.message(id))
        delivery = await lab.take_one(broker)
        before = lab.clock.monotonic()
        await lab.settle(broker, Nack(delivery, seconds) if way == "give-back" else lab.retry(delivery, seconds))
    return before + seconds, lab.clock.monotonic() + seconds


# --- one message ---


@scenario(field=_FIELDS, after={"1 ms": 0.001, "0.1 s": 0.1, "0.5 s": 0.5}, needs=[DELAY])
async def never_early(broker: Broker, lab: Lab, field: str, after: float) -> None:
    """A message with an eta or a delay is not delivered before that, and at most `delay_lateness` after it to a receive that waits."""
    due = _at(lab, after)
    first, last = await _store(broker, lab, field, after)
    delivery = await lab.comes(broker, first - lab.early, last + lab.lateness)
    assert delivery.delivery_count == 1
    assert delivery.message.delay_ms == 0
    if field == "eta_ms":
        assert delivery.message.eta_ms == 0 or abs(delivery.message.eta_ms - due) <= lab.capabilities.delay_resolution * 1000


@scenario(way=_WAYS, after={"an hour": _HOUR, "ten years": 10 * _YEAR, "the longest": math.inf}, needs=[DELAY])
async def far_due_times(broker: Broker, lab: Lab, way: str, after: float) -> None:
    """A message may wait for anything up to `delay_longest`: it is SCHEDULED, delivered to nobody, and comes when it is due."""
    longest = lab.capabilities.delay_longest
    after = min(after, 100 * _YEAR if math.isinf(longest) else longest)
    due = _at(lab, after)
    first, last = await _store(broker, lab, way, after)
    await lab.holds(broker, {State.SCHEDULED: ["m"]})
    assert not await lab.take(broker)
    if State.SCHEDULED in lab.capabilities.listable:
        (entry,) = await lab.entries(broker, State.SCHEDULED)
        tolerance = lab.capabilities.delay_resolution + lab.slack
        assert entry.message.eta_ms == 0 or abs(entry.message.eta_ms - due) <= tolerance * 1000, "its due time was changed"
    if lab.virtual and math.ulp(after) < 0.0005:  # so far the clock tells milliseconds apart
        await lab.comes(broker, first, last + lab.lateness)


@scenario(field=_FIELDS, needs=[DELAY])
async def beyond_the_longest_delay(broker: Broker, lab: Lab, field: str) -> None:
    """A message that would have to wait longer than `delay_longest` is refused with `EnqueueFailed`, and holds up no other."""
    longest = lab.capabilities.delay_longest
    if math.isinf(longest):
        raise NotRun("no delay is too long for it")
    batch = [lab.message("before"), _timed(lab, field, longest + 60, "beyond"), lab.message("after")]
    refusals = await broker.enqueue(batch)
    lab.nothing_refused([refusal for refusal in refusals if refusal.index != 1])
    assert lab.errors(refusals) == {1: EnqueueFailed}
    await lab.holds(broker, {State.READY: ["before", "after"]})


@scenario(needs=[DELAY, listing(State.SCHEDULED)])
async def eta_is_kept(broker: Broker, lab: Lab) -> None:
    """Due times are kept to within `delay_resolution`, and listed in their order."""
    step = max(0.001, lab.capabilities.delay_resolution)
    etas = {f"m{number}": _at(lab, lab.far - 60 + number * step * 2) for number in (3, 0, 4, 1, 2)}
    await lab.enqueue(broker, *(lab.message(id, eta_ms=eta) for id, eta in etas.items()))
    entries = await lab.entries(broker, State.SCHEDULED)
    assert [entry.message.id for entry in entries] == sorted(etas)
    for entry in entries:
        assert entry.message.delay_ms == 0
        assert entry.message.eta_ms == 0 or abs(entry.message.eta_ms - etas[entry.message.id]) <= step * 1000


@scenario()
async def past_eta_is_ready_at_once(broker: Broker, lab: Lab) -> None:
    """An eta that is now or gone makes a message READY."""
    etas = {"now": _at(lab, 0), "past": _at(lab, -10), "epoch": 1}
    await lab.enqueue(broker, *(lab.message(id, eta_ms=eta) for id, eta in etas.items()))
    await lab.holds(broker, {State.READY: list(etas)}, in_order=False)
    assert {delivery.message.id for delivery in await lab.take_exactly(broker, 3)} == set(etas)


@scenario(needs=[DELAY])
async def due_at_its_own_level(broker: Broker, lab: Lab) -> None:
    """What falls due is delivered at its level, also where it was put there by a replacement, among what was READY before."""
    first, *others = LEVELS
    await lab.enqueue(broker, lab.message("retried", priority=Priority.LOW))
    await lab.settle(broker, lab.retry(await lab.take_one(broker), lab.moment / 2, priority=first))
    await lab.enqueue(broker, _timed(lab, "delay_ms", lab.moment / 2, "due", priority=first))
    await lab.enqueue(broker, *(lab.message(level.name, priority=level) for level in others))
    await lab.pass_time(lab.moment / 2 + lab.lateness)
    taken = {delivery.message.id for delivery in await lab.take_exactly(broker, 2)}
    assert taken == {"retried", "due"}
    assert [delivery.message.id for delivery in await lab.take_exactly(broker, 3)] == [level.name for level in others]


@scenario(needs=[DELAY])
async def retry_of_a_scheduled_message_counts_anew(broker: Broker, lab: Lab) -> None:
    """A replacement with a delay is due by that delay alone, whatever the message waited for before."""
    await lab.enqueue(broker, _timed(lab, "eta_ms", lab.moment / 4))
    await lab.pass_time(lab.moment / 4)
    delivery = await lab.take_one(broker)
    before = lab.clock.monotonic()
    await lab.settle(broker, lab.retry(delivery, lab.moment / 2))
    last = lab.clock.monotonic() + lab.moment / 2 + lab.lateness
    assert (await lab.comes(broker, before + lab.moment / 2 - lab.early, last)).message.generation == 1


@scenario(way=["delay_ms", "give-back"], skew={"ahead": _HOUR, "behind": -_HOUR}, needs=[DELAY])
async def delays_go_by_the_brokers_clock(broker: Broker, lab: Lab, way: str, skew: float) -> None:
    """Where the broker has a clock, a delay is as long as it should be for a Broker on a machine whose clock is wrong."""
    if lab.capabilities.clock == "client":
        raise NotRun("it has no clock but those of its clients")
    astray = lab.build(skew=skew)
    await astray.open()
    first, last = await _store(astray, lab, way, lab.moment / 2)
    assert (await lab.comes(broker, first - lab.early, last + lab.lateness)).message.id == "m"


# --- a receive that waits ---


@scenario(stored={"before": (), "meanwhile": ("same",), "meanwhile by another Broker": ("other",)}, needs=[DELAY])
async def due_time_wakes_a_waiting_receive(broker: Broker, lab: Lab, stored: Sequence[str]) -> None:
    """A waiting receive returns a message when it falls due, also one that was stored after the wait began."""
    other = await lab.open()
    message = _timed(lab, "delay_ms", lab.moment / 2, "m")
    if not stored:
        await lab.enqueue(broker, message)
    async with lab.waiting(broker, wait=_HOUR) as receive:
        if stored:
            await lab.enqueue(broker if stored == ("same",) else other, message)
        await lab.pass_time(lab.moment / 2 + lab.lateness)
    assert [delivery.message.id for delivery in receive.result()] == ["m"]


@scenario(needs=[DELAY])
async def earlier_newcomer_wakes_a_waiting_receive(broker: Broker, lab: Lab) -> None:
    """A receive that waits for one due time also sees an earlier one that is stored later."""
    await lab.enqueue(broker, _timed(lab, "delay_ms", 10 * lab.moment, "late"))
    async with lab.waiting(broker, wait=_HOUR) as receive:
        await lab.enqueue(broker, _timed(lab, "delay_ms", lab.moment / 2, "soon"))
        await lab.pass_time(lab.moment / 2 + lab.lateness)
    assert [delivery.message.id for delivery in receive.result()] == ["soon"]


@scenario(way=_WAYS, needs=[DELAY])
async def lateness_is_bounded(broker: Broker, lab: Lab, way: str) -> None:
    """Of many due times in quick succession, whatever the order of storing, none is early and none is later than `delay_lateness`."""
    offsets = {f"m{number}": 0.3 + number * 0.02 for number in range(50)}
    order = sorted(offsets, key=lambda id: int(id[1:]) % 7)
    if way in _FIELDS:
        first = lab.clock.monotonic()
        await lab.enqueue(broker, *(_timed(lab, way, offsets[id], id) for id in order))
    else:
        await lab.enqueue(broker, *map(lab.message, order))
        held = await lab.take_exactly(broker, len(order))
        delays = {delivery: offsets[delivery.message.id] for delivery in held}
        first = lab.clock.monotonic()
        await lab.settle(
            broker, *(Nack(one, delay) if way == "give-back" else lab.retry(one, delay) for one, delay in delays.items())
        )
    last = lab.clock.monotonic()
    came: dict[str, float] = {}
    while len(came) < len(offsets):
        taken = await _next_ones(broker, lab)
        now = lab.clock.monotonic()
        came |= {delivery.message.id: now for delivery in taken}
        assert now < last + 2 * lab.patience, f"of {len(offsets)} messages only {len(came)} came"
    early = max(first + offset - came[id] for id, offset in offsets.items())
    late = sorted(came[id] - last - offset for id, offset in offsets.items())
    assert early <= lab.early + 0.001, f"one came {early:.3f} s before its time"
    assert late[-1] <= lab.lateness + lab.slack, f"one came {late[-1]:.3f} s too late"
    assert late[len(late) // 2] <= lab.lateness, "half of them came too late"


async def _next_ones(broker: Broker, lab: Lab) -> Sequence[Delivery]:
    """What a receive brings next that waits for it; in virtual time, what one finds after some milliseconds."""
    if not lab.virtual:
        return await broker.receive(lab.lanes("q"), 100, lab.patience)
    await lab.pass_time(0.004)
    return await lab.take(broker)


# --- many messages ---


@scenario(needs=[DELAY])
async def due_order(broker: Broker, lab: Lab) -> None:
    """Messages come in the order of their due times, whatever the order of storing, also where all are overdue already."""
    gap = lab.lateness + EARLY
    order = [f"m{number}" for number in range(5)]
    messages = {id: _timed(lab, "eta_ms", gap * number, id) for number, id in enumerate(order, 1)}
    for number in (3, 1, 4, 0, 2):
        await lab.enqueue(broker, messages[order[number]])
    await lab.pass_time(gap * 3)
    received = [delivery.message.id for delivery in await lab.take_exactly(broker, 2)]
    await lab.pass_time(gap * 3)
    received += [delivery.message.id for delivery in await lab.take_exactly(broker, 3)]
    assert received == order


@scenario(way=_WAYS, needs=[DELAY])
async def long_waits_hold_up_no_short_one(broker: Broker, lab: Lab, way: str) -> None:
    """A message that is due in a moment does not wait for those that were stored before it and are due in an hour."""
    await lab.enqueue(
        broker, *(_timed(lab, field, lab.far, priority=level) for field in _FIELDS for level in LEVELS for _ in range(50))
    )
    await _store(broker, lab, way, lab.far, "long")
    first, last = await _store(broker, lab, way, lab.moment / 2, "short")
    delivery = await lab.comes(broker, first - lab.early, last + lab.lateness)
    assert delivery.message.id == "short"
    assert not await lab.take(broker)
    scheduled = (await lab.stats(broker)).scheduled
    assert scheduled in (None, 401)


@scenario(needs=[DELAY])
async def thousands_at_once(broker: Broker, lab: Lab) -> None:
    """Thousands that fall due together are all delivered, each once, and none early."""
    due = lab.clock.monotonic() + lab.moment
    messages = [_timed(lab, "eta_ms", lab.moment + number % 10 / 1000, queue="busy") for number in range(6000)]
    for start in range(0, 6000, 1000):
        await lab.enqueue(broker, *messages[start : start + 1000])
    deliveries = [await lab.comes(broker, due - lab.early, max(due + 0.01, lab.clock.monotonic()) + lab.lateness, "busy")]
    await lab.pass_time(0.01)
    while len(deliveries) < 6000:
        batch = await lab.take_exactly(broker, min(500, 6000 - len(deliveries)), "busy")
        await lab.settle(broker, *map(Ack, batch))
        deliveries += batch
    assert {delivery.message.id for delivery in deliveries} == {message.id for message in messages}
    await lab.settle(broker, Ack(deliveries[0]))
    await lab.holds(broker, {}, "busy")


@scenario(needs=[DELAY])
async def due_messages_are_somewhere_at_every_moment(broker: Broker, lab: Lab) -> None:
    """While messages fall due each is SCHEDULED or READY at every moment, whoever looks."""
    count, step = 10, 0.1
    other = await lab.open()
    await lab.enqueue(broker, *(_timed(lab, "eta_ms", step * number) for number in range(1, count + 1)))
    end = lab.clock.monotonic() + step * count + lab.lateness

    async def counted(observer: Broker) -> int:
        stats = await lab.stats(observer)
        return count if stats.scheduled is None else stats.ready + stats.scheduled

    while lab.clock.monotonic() < end:
        # A server that is asked for one state after the other may miss a message that moves between; it is there when asked again.
        for observer in (broker, other):
            seen = await counted(observer)
            if not lab.virtual and seen < count:
                seen = await counted(observer)
            assert seen >= count, f"of {count} messages {count - seen} were neither scheduled nor ready"
        await lab.pass_time(0.02)
    assert len(await lab.take_exactly(broker, count)) == count


@scenario(needs=[DELAY])
async def cancelled_receive_loses_nothing_due(lab: Lab) -> None:
    """Cancelled at any moment, a receive that finds a message due returns it or leaves it there, with its count unchanged."""
    queues = [f"q{number}" for number in range(25)]
    broker = await lab.open(queues=queues)
    await lab.enqueue(broker, *(_timed(lab, "delay_ms", lab.moment / 2, queue=queue) for queue in queues))
    await lab.pass_time(lab.moment / 2 + lab.lateness)
    began = time.monotonic()
    await lab.take_exactly(broker, 1, queues[0])
    usual = time.monotonic() - began
    for step, queue in enumerate(queues[1:]):
        receive = broker.receive(lab.lanes(queue), 10, _HOUR)
        taken = await lab.interrupted(receive, usual * 1.5 * step / len(queues)) or await lab.take_exactly(broker, 1, queue)
        assert [delivery.delivery_count for delivery in taken] == [1]


# --- without those who stored them ---


@scenario(way=_WAYS, needs=[DELAY])
async def outlives_who_stored_it(lab: Lab, way: str) -> None:
    """What waits for its time waits in the broker: whoever stored it may close its Broker, and another one is delivered it in time."""
    owner = await lab.open()
    first, last = await _store(owner, lab, way, lab.moment / 2)
    await owner.close()
    heir = await lab.open()
    assert (await lab.comes(heir, first - lab.early, last + lab.lateness)).message.id == "m"


@scenario(needs=[DELAY])
async def due_while_nobody_is_there(lab: Lab) -> None:
    """What falls due while no Broker is open is delivered to the first that comes."""
    owner = await lab.open()
    await _store(owner, lab, "delay_ms", lab.moment / 4, "delayed")
    await _store(owner, lab, "give-back", lab.moment / 4, "given-back")
    await owner.close()
    await lab.pass_time(lab.moment / 2 + lab.lateness)
    taken = await lab.take_exactly(await lab.open(), 2)
    assert {delivery.message.id: delivery.delivery_count for delivery in taken} == {"delayed": 1, "given-back": 1}


@scenario(needs=[PROCESSES, DELAY], hooks=[Hook.SERVER])
async def outlives_a_kill_of_the_server(broker: Broker, lab: Lab) -> None:
    """What waits for its time is there when the server was killed and is back: it comes in time, or at once if it fell due meanwhile."""
    server = lab.target.server
    assert server is not None
    parts = {"soon": 0.1, "later": 3.0}
    due = {id: await _store(broker, lab, "delay_ms", part * lab.moment, id) for id, part in parts.items()}
    await asyncio.to_thread(server.kill)
    await asyncio.to_thread(server.start)
    heir = lab.build()

    async def opens() -> bool:
        try:
            await heir.open()
        except BrokerUnavailable:
            return False
        return True

    await lab.until(opens, "a Broker could be opened again")
    back = lab.clock.monotonic()
    for id, (first, last) in due.items():
        latest = max(last, back) + lab.lateness + lab.target.late_after_a_kill
        delivery = await lab.comes(heir, first - lab.early, latest)
        assert delivery.message.id == id
        await lab.settle(heir, Ack(delivery))


@scenario(needs=[PROCESSES, DELAY])
async def outlives_the_process_that_stored_it(lab: Lab) -> None:
    """What waits for its time is delivered in time though the process that stored it was killed."""
    async with processes(lab) as (lab, broker, start):
        producer = await start()
        before = lab.clock.monotonic()
        answer = await producer.ask(Enqueue([_timed(lab, "delay_ms", lab.moment, "m")]))
        last = lab.clock.monotonic() + lab.moment + lab.lateness
        assert not answer.refused
        producer.kill()
        assert (await lab.comes(broker, before + lab.moment - lab.early, last)).message.id == "m"
