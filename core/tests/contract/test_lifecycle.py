"""Open, close, declare, capabilities: a Broker that is not open does nothing, a closed one leaves nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from crossdock.errors import BrokerClosed
from crossdock.spi import (
    API_VERSION,
    Ack,
    Broker,
    Capabilities,
    Delivery,
    Lane,
    Priority,
    QueueSpec,
    Replay,
    State,
    Support,
    Survives,
)

pytestmark = pytest.mark.asyncio

VERBS: dict[str, Callable[[Broker, Any, Delivery], Awaitable[object]]] = {
    "declare": lambda broker, lab, delivery: broker.declare([QueueSpec("q")]),
    "enqueue": lambda broker, lab, delivery: broker.enqueue([lab.message()]),
    "enqueue-nothing": lambda broker, lab, delivery: broker.enqueue([]),
    "receive": lambda broker, lab, delivery: broker.receive([Lane("q", Priority.NORMAL, 1)], 1, 0),
    "receive-waiting": lambda broker, lab, delivery: broker.receive([Lane("q", Priority.NORMAL, 1)], 1, 3600),
    "extend": lambda broker, lab, delivery: broker.extend([delivery]),
    "settle": lambda broker, lab, delivery: broker.settle([Ack(delivery)]),
    "stats": lambda broker, lab, delivery: broker.stats(),
    "stats-named": lambda broker, lab, delivery: broker.stats(["q"]),
    "peek": lambda broker, lab, delivery: broker.peek("q", State.READY),
    "remove": lambda broker, lab, delivery: broker.remove("q", State.READY, ["m"]),
    "replay": lambda broker, lab, delivery: broker.replay("q", [Replay("m", lab.message())]),
    "purge": lambda broker, lab, delivery: broker.purge("q", State.READY),
}


@pytest.mark.parametrize("verb", VERBS)
async def test_not_open(broker: Broker, lab: Any, verb: str) -> None:
    """Before open and after close every verb raises BrokerClosed, with a sentence, and does nothing."""
    await broker.enqueue([lab.message("m")])
    delivery = await lab.take_one(broker)
    fresh = lab.build()
    with pytest.raises(BrokerClosed, match=r"\w+ \w+"):
        await VERBS[verb](fresh, lab, delivery)
    await fresh.open()
    await fresh.close()
    with pytest.raises(BrokerClosed, match=r"\w+ \w+"):
        await VERBS[verb](fresh, lab, delivery)
    assert await lab.where(broker) == {State.LEASED: ["m"]}


async def test_open_and_close_are_idempotent(lab: Any) -> None:
    """Opening twice, closing twice, closing before opening and opening again are all fine."""
    broker = lab.build()
    await broker.close()
    await broker.open()
    await broker.open()
    await broker.enqueue([lab.message("m")])
    await broker.close()
    await broker.close()
    await broker.open()
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_close_wakes_a_waiting_receive(broker: Broker, lab: Any) -> None:
    """A receive that waits when its Broker is closed raises BrokerClosed; what comes later goes to others."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await broker.close()
    assert isinstance(receive.exception(), BrokerClosed)
    await other.enqueue([lab.message("m")])
    assert (await lab.take_one(other)).delivery_count == 1


async def test_close_during_a_hand_over_loses_nothing(broker: Broker, lab: Any) -> None:
    """Closed while a message is on its way to a waiting receive, that returns it or leaves it with its count unchanged."""
    other = await lab.open()
    async with lab.waiting(broker, wait=3600) as receive:
        await other.enqueue([lab.message("m")])
        await broker.close()
    if receive.exception() is None:
        assert [delivery.message.id for delivery in receive.result()] == ["m"]
        assert await lab.where(other) == {State.LEASED: ["m"]}
    else:
        assert (await lab.take_one(other)).delivery_count == 1


async def test_deliveries_outlive_their_broker(broker: Broker, lab: Any) -> None:
    """Deliveries returned before a close keep their leases, run out, and come again with a higher count."""
    await broker.enqueue([lab.message("m")])
    await lab.take_one(broker)
    await broker.close()
    other = await lab.open()
    assert await lab.where(other) == {State.LEASED: ["m"]}
    assert await lab.take(other) == []
    await lab.advance(other.capabilities.takeover)
    assert (await lab.take_one(other)).delivery_count == 2


async def test_everything_outlives_its_broker(broker: Broker, lab: Any) -> None:
    """What one Broker stored another one finds, in every state."""
    await lab.bury(broker, lab.message("dead"))
    await broker.enqueue([lab.message("leased")])
    await lab.take_one(broker)
    await broker.enqueue([lab.message("ready"), lab.message("scheduled", delay_ms=1000)])
    await broker.close()
    other = await lab.open()
    assert await lab.where(other) == {state: [state.value] for state in State}


async def test_declare_is_idempotent_and_keeps_messages(broker: Broker, lab: Any) -> None:
    """Declaring again, with the same or other settings, leaves what is stored."""
    await broker.enqueue([lab.message("m")])
    for spec in (QueueSpec("q"), QueueSpec("q"), QueueSpec("q", lease=5.0, max_ready=1, dead_max_age=1.0, dead_max_count=1)):
        await broker.declare([spec, QueueSpec("q2")])
    assert await lab.where(broker) == {State.READY: ["m"]}


async def test_plugin_describes_itself(lab: Any) -> None:
    """The plugin states a name, this API version, its schemes and a URL that works with one of them."""
    plugin = lab.plugin
    assert plugin.name
    assert plugin.api_version == API_VERSION
    assert lab.url.partition(":")[0] in plugin.schemes
    assert plugin.example_url.partition(":")[0] in plugin.schemes


async def test_capabilities_are_consistent(broker: Broker, lab: Any) -> None:
    """What a Broker declares of itself makes sense, with a sentence where it says no."""
    capabilities = broker.capabilities
    assert isinstance(capabilities, Capabilities)
    assert capabilities.server
    assert capabilities.version
    assert capabilities.durability_note
    assert capabilities.survives <= frozenset(Survives)
    assert capabilities.takeover >= QueueSpec("q").lease
    assert 0 <= capabilities.delay_resolution <= capabilities.delay_lateness <= capabilities.delay_longest
    assert State.LEASED not in capabilities.removable | capabilities.purgeable
    assert capabilities.max_body >= 1024 * 1024
    for ability in ("fencing", "delay", "deduplication", "by_id", "list_queues", "signals"):
        value = getattr(capabilities, ability)
        assert value.support is Support.NATIVE or value.note
