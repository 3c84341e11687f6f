"""Namespaces isolate everything."""

from __future__ import annotations

from typing import Any

import pytest

from crossdock.errors import LeaseLost, NotFound
from crossdock.spi import Ack, Broker, QueueSpec, Replay, State

pytestmark = pytest.mark.asyncio


async def test_messages_stay_in_their_namespace(broker: Broker, lab: Any) -> None:
    """What is stored in one namespace is neither received, seen, counted nor removable in another, even under equal names."""
    other = await lab.open(namespace="other")
    await lab.bury(broker, lab.message("dead"))
    await broker.enqueue([lab.message("ready"), lab.message("later", delay_ms=1000)])
    assert not await other.stats()
    assert await lab.take(other) == []
    assert await lab.where(other) == {}
    for state in (State.READY, State.SCHEDULED, State.DEAD):
        assert await other.purge("q", state) == 0
    assert lab.errors(await other.remove("q", State.READY, ["ready"])) == {0: NotFound}
    assert lab.errors(await other.replay("q", [Replay("dead", lab.message("dead", generation=1))])) == {0: NotFound}
    assert await lab.where(broker) == {State.READY: ["ready"], State.SCHEDULED: ["later"], State.DEAD: ["dead"]}


async def test_ids_settings_and_receipts_are_apart(broker: Broker, lab: Any) -> None:
    """Ids, queue settings and receipts of one namespace mean nothing in another."""
    other = await lab.open(namespace="other")
    await other.declare([QueueSpec("q", max_ready=0, lease=1.0)])
    message = lab.message("m")
    await broker.enqueue([message])
    delivery = await lab.take_one(broker)
    assert delivery.lease_until > lab.clock.monotonic() + 10
    assert lab.errors(await other.settle([Ack(delivery)])) == {0: LeaseLost}
    await other.declare([QueueSpec("q")])
    assert not await other.enqueue([message])
    assert (await lab.take_one(other)).delivery_count == 1


async def test_similar_names_are_apart(broker: Broker, lab: Any) -> None:
    """Names that would meet if joined carelessly do not: (a, b-c) and (a-b, c)."""
    one, two = await lab.open(namespace="a"), await lab.open(namespace="a-b")
    three = await lab.open(namespace="A")
    await one.enqueue([lab.message("m", "b-c")])
    assert await lab.take(two, queue="c") == []
    assert await lab.take(three, queue="b-c") == []
    assert (await lab.take_one(one, "b-c")).message.id == "m"


async def test_enqueue_wakes_only_its_own(broker: Broker, lab: Any) -> None:
    """A receive that waits in one namespace is not served by an enqueue in another."""
    other = await lab.open(namespace="other")
    async with lab.waiting(broker, wait=5) as receive:
        await other.enqueue([lab.message("m")])
        await lab.advance(5)
    assert list(receive.result()) == []
    assert (await lab.take_one(other)).message.id == "m"
