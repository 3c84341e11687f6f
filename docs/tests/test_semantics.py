"""The state diagram is true: each of its arrows is walked on a broker, and it has every state that there is."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

import pytest
from pages import read_page

from crossdock.backends import memory
from crossdock.clock import VirtualClock
from crossdock.plugins import create_broker
from crossdock.spi import LEVELS, Ack, Broker, Dead, DeadLetter, Delivery, Lane, Message, Nack, Priority, Reason, Replay, State

SEMANTICS = read_page("docs/explanation/delivery-semantics.md")
OUTSIDE = "[*]"
"""What the diagram calls the place before the enqueue and after the end."""

DIAGRAM = next(fence.text for fence in SEMANTICS.fences if fence.language == "mermaid")
ARROWS = re.findall(r"^ +(\S+) --> (\S+) : (.+)$", DIAGRAM, re.MULTILINE)


class Walk:
    """One message on an open memory broker."""

    def __init__(self, broker: Broker, clock: VirtualClock) -> None:
        self.broker = broker
        self.clock = clock
        self.message = Message("m", "q", Priority.NORMAL, b"")
        self.later = Message("m", "q", Priority.NORMAL, b"", delay_ms=1000)

    async def state(self) -> str:
        """Where the message is, in the diagram's words."""
        for state in State:
            if (await self.broker.peek("q", state)).entries:
                return state.name
        return OUTSIDE

    async def delivery(self) -> Delivery:
        """Receive it."""
        (delivery,) = await self.broker.receive([Lane("q", level, 0) for level in LEVELS], 1, 0)
        return delivery

    async def go_to(self, state: str) -> Delivery | None:
        """Bring it into a state, by the shortest way; the delivery if it is leased now."""
        delivery = None
        if state != OUTSIDE:
            await self.broker.enqueue([self.later if state == "SCHEDULED" else self.message])
        if state in ("LEASED", "DEAD"):
            delivery = await self.delivery()
        if state == "DEAD":
            assert delivery is not None
            await self.broker.settle([Dead(delivery, DeadLetter(self.message, Reason.REJECTED, 1))])
        assert await self.state() == state
        return delivery


async def wait(walk: Walk, _: Delivery | None) -> object:
    """Nobody does anything."""
    walk.clock.advance(31)
    return ()


def settled(settlement: Callable[[Delivery], Ack | Nack | Dead]) -> Callable[[Walk, Delivery | None], Awaitable[object]]:
    """The worker settles."""

    async def settle(walk: Walk, delivery: Delivery | None) -> object:
        assert delivery is not None
        return await walk.broker.settle([settlement(delivery)])

    return settle


async def enqueue(walk: Walk, _: Delivery | None) -> object:
    return await walk.broker.enqueue([walk.message])


async def enqueue_later(walk: Walk, _: Delivery | None) -> object:
    return await walk.broker.enqueue([walk.later])


async def receive(walk: Walk, _: Delivery | None) -> object:
    await walk.delivery()
    return ()


async def replay(walk: Walk, _: Delivery | None) -> object:
    return await walk.broker.replay("q", [Replay("m", Message("m", "q", Priority.NORMAL, b"", generation=1))])


async def discard(walk: Walk, _: Delivery | None) -> object:
    return await walk.broker.remove("q", State.DEAD, ["m"])


WAYS: dict[str, Callable[[Walk, Delivery | None], Awaitable[object]]] = {
    "enqueue": enqueue,
    "enqueue with a delay": enqueue_later,
    "due": wait,
    "receive": receive,
    "ack": settled(Ack),
    "nack": settled(Nack),
    "nack with a delay": settled(lambda delivery: Nack(delivery, 1.0)),
    "lease expired": wait,
    "dead-letter": settled(lambda delivery: Dead(delivery, DeadLetter(delivery.message, Reason.REJECTED, 1))),
    "replay": replay,
    "discard": discard,
}
"""How each arrow of the diagram is walked. Each returns the broker's refusals."""


@pytest.mark.parametrize(("start", "end", "way"), ARROWS)
@pytest.mark.asyncio
async def test_each_arrow_of_the_diagram_can_be_walked(start: str, end: str, way: str) -> None:
    """From the state at its tail, what an arrow bears leads to the state at its head."""
    clock = VirtualClock()
    broker = create_broker("memory://states", clock=clock)
    await broker.open()
    try:
        walk = Walk(broker, clock)
        delivery = await walk.go_to(start)
        assert not await WAYS[way](walk, delivery)
        assert await walk.state() == end
    finally:
        await broker.close()
        memory.forget("states")


def test_the_diagram_has_every_state_and_every_way() -> None:
    """No state of the interface is missing, none is invented, and no way from one to another is left out."""
    assert {place for start, end, _ in ARROWS for place in (start, end)} == {*State.__members__, OUTSIDE}
    assert {way for *_, way in ARROWS} == set(WAYS)


def test_the_drawing_has_the_states_of_the_diagram() -> None:
    """The drawing in text shows the same states and no other."""
    drawing = next(fence.text for fence in SEMANTICS.fences if fence.language == "text")

    assert set(re.findall(r"\b[A-Z]{4,}\b", drawing)) == set(State.__members__)
    for way in ("enqueue", "due", "receive", "ack", "nack", "dead-letter", "lease expired", "replay", "discard"):
        assert way in drawing


def test_every_reason_is_explained() -> None:
    """The table of reasons is the enumeration."""
    section = SEMANTICS.section("Nothing is dropped for failing")

    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [reason.value for reason in Reason]
