"""Limits: a queue that holds its `max_ready` refuses more, and nothing else is held back."""

from __future__ import annotations

import asyncio

from crossdock.errors import QueueFull
from crossdock.spi import LEVELS, Ack, Broker, Nack, QueueSpec, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.scenario import DEDUPLICATION, DELAY, scenario


async def _limit(broker: Broker, lab: Lab, most: int | None, queue: str = "q") -> None:
    await lab.declare(broker, QueueSpec(queue, lease=lab.lease, max_ready=most))


async def _fill_up(broker: Broker, lab: Lab, queue: str = "q") -> list[str]:
    """Enqueue, one by one, until the queue says that it is full; where a limit is soft that may take a while. Returns what it took."""
    taken: list[str] = []

    async def full() -> bool:
        message = lab.message(queue=queue)
        errors = lab.errors(await broker.enqueue([message]))
        if not errors:
            taken.append(message.id)
        assert errors in ({}, {0: QueueFull})
        return bool(errors)

    await lab.until(full, "a queue with a limit refused a message")
    return taken


@scenario()
async def a_full_queue_refuses(broker: Broker, lab: Lab) -> None:
    """A queue takes `max_ready` messages, and soon refuses more with `QueueFull`; what it refused is certainly not stored."""
    await _limit(broker, lab, 3)
    messages = lab.messages(3)
    await lab.enqueue(broker, *messages)
    stored = [*(message.id for message in messages), *await _fill_up(broker, lab)]
    await lab.holds(broker, {State.READY: stored})
    assert [delivery.message.id for delivery in await lab.take(broker)] == stored


@scenario()
async def the_limit_is_exact_in_a_batch(broker: Broker, lab: Lab) -> None:
    """Where the limit is exact, of a batch that is too long the first messages are stored, up to `max_ready` of all levels."""
    await _limit(broker, lab, 3)
    batch = [lab.message(priority=level) for level in (*LEVELS, LEVELS[0])]
    assert lab.errors(await broker.enqueue(batch)) == {3: QueueFull, 4: QueueFull}
    await lab.holds(broker, {State.READY: [message.id for message in batch[:3]]})
    await lab.take_exactly(broker, 2)
    assert lab.errors(await broker.enqueue(lab.messages(3))) == {2: QueueFull}


@scenario()
async def the_limit_is_exact_among_many(broker: Broker, lab: Lab) -> None:
    """Many Brokers that enqueue at the same time do not overfill a queue; a server that tells no message from another counts softly, and
    there each may do so by what it had under way."""
    brokers = [broker, *[await lab.open(queues=[]) for _ in range(3)]]
    for each in brokers:
        await _limit(each, lab, 10)
    results = await asyncio.gather(*(each.enqueue([lab.message()]) for each in brokers for _ in range(5)))
    stored = sum(not refusals for refusals in results)
    assert 10 <= stored <= (10 if DEDUPLICATION.declared(lab.capabilities) else 10 + len(brokers))
    await lab.eventually(lambda: _has_ready(broker, lab, stored))
    assert lab.errors(await broker.enqueue([lab.message()])) == {0: QueueFull}


@scenario()
async def a_limit_of_nothing(broker: Broker, lab: Lab) -> None:
    """A queue with a `max_ready` of 0 takes nothing that would be READY."""
    await _limit(broker, lab, 0)
    assert lab.errors(await broker.enqueue(lab.messages(2))) == {0: QueueFull, 1: QueueFull}
    await lab.holds(broker, {})


@scenario()
async def what_is_taken_makes_room(broker: Broker, lab: Lab) -> None:
    """LEASED messages and dead letters do not count."""
    await _limit(broker, lab, 2, "long")
    for _ in range(3):
        await lab.enqueue(broker, *lab.messages(2, queue="long"))
        held = await lab.take_exactly(broker, 2, "long")
        await lab.settle(broker, lab.dead(held[0]))
    await lab.enqueue(broker, *lab.messages(2, queue="long"))
    await lab.eventually(lambda: _has_ready(broker, lab, 2, "long"))


@scenario()
async def what_comes_back_is_taken(broker: Broker, lab: Lab) -> None:
    """A full queue takes what is given back, retried, or replayed."""
    dead = lab.message("dead", "long")
    await lab.bury(broker, dead)
    await lab.enqueue(broker, lab.message("a", "long"), lab.message("b", "long"))
    a, b = await lab.take_exactly(broker, 2, "long")
    await _limit(broker, lab, 1, "long")
    await lab.enqueue(broker, lab.message("c", "long"))
    await lab.settle(broker, Nack(a), lab.retry(b))
    await lab.replay(broker, lab.revived(dead), queue="long")
    taken = await lab.take_exactly(broker, 4, "long")
    assert sorted(delivery.message.id for delivery in taken) == ["a", "b", "c", "dead"]


@scenario(needs=[DELAY])
async def what_is_due_later_is_taken(broker: Broker, lab: Lab) -> None:
    """A full queue takes what is due later, which becomes READY beyond the limit and counts then."""
    await _limit(broker, lab, 1)
    await lab.enqueue(broker, lab.message("first"))
    await lab.enqueue(broker, lab.message("later", delay_ms=round(lab.moment * 1000)), lab.message("much-later", delay_ms=60_000))
    await lab.pass_time(lab.moment + lab.lateness)
    await lab.eventually(lambda: _has_ready(broker, lab, 2))
    await _fill_up(broker, lab)
    await lab.settle(broker, *map(Ack, await lab.take(broker)))
    await lab.holds(broker, {State.SCHEDULED: ["much-later"]})


@scenario(needs=[DEDUPLICATION])
async def what_is_stored_already_is_taken(broker: Broker, lab: Lab) -> None:
    """In a full queue an (id, generation) that is stored already counts as done."""
    await _limit(broker, lab, 1)
    message = lab.message()
    await lab.enqueue(broker, message)
    await _fill_up(broker, lab)
    await lab.enqueue(broker, message)


@scenario()
async def a_limit_may_change(broker: Broker, lab: Lab) -> None:
    """The last declaration wins: more is taken where the limit was raised; where it was lowered, what is stored stays."""
    await _limit(broker, lab, 2)
    await _limit(broker, lab, None)
    messages = lab.messages(5)
    await lab.enqueue(broker, *messages)
    await _limit(broker, lab, 4)
    stored = [*(message.id for message in messages), *await _fill_up(broker, lab)]
    await lab.holds(broker, {State.READY: stored})
    await _limit(broker, lab, len(stored) + 1)
    await lab.enqueue(broker, lab.message("one-more"))
    await lab.holds(broker, {State.READY: [*stored, "one-more"]})


@scenario()
async def a_limit_is_of_one_queue(broker: Broker, lab: Lab) -> None:
    """A full queue holds back no other, also not in one batch."""
    await _limit(broker, lab, 0)
    batch = [lab.message("a"), lab.message("b", "q2"), lab.message("c"), lab.message("d", "q2")]
    assert lab.errors(await broker.enqueue(batch)) == {0: QueueFull, 2: QueueFull}
    await lab.enqueue(broker, lab.message("e", "q2"))
    await lab.holds(broker, {State.READY: ["b", "d", "e"]}, "q2")


async def _has_ready(broker: Broker, lab: Lab, count: int, queue: str = "q") -> None:
    ready = (await lab.stats(broker, queue)).ready
    assert ready == count, f"{ready} messages are READY, not {count}"
