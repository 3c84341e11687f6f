"""The scenarios of restarts have teeth: clients that cope badly with an outage are each found out by the one meant for them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from crossdock.errors import BrokerUnavailable, EnqueueFailed, EnqueueUnknown, LeaseLost
from crossdock.spi import Ack, BrokerSettings, Delivery, Lane, Message, Page, QueueSpec, Refusal, Settlement, State
from crossdock_conformance import Target, all_scenarios
from crossdock_conformance.running import run

sys.path.insert(0, str(Path(__file__).with_name("remote")))  # there it is installed, as pip would have done it

from crossdock_remote import broker as client
from crossdock_remote.broker import RemoteBroker
from crossdock_remote.control import serving


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server, and little patience."""
    with serving(tmp_path_factory.mktemp("remote")) as target:
        yield replace(target, patience=4.0)


class CallsUnknownFailed(RemoteBroker):
    """Says that a message is certainly not stored when no answer came."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        text = "The message was certainly not stored, as there was no answer."
        return [
            Refusal(refusal.index, EnqueueFailed(text, messages[refusal.index]))
            if isinstance(refusal.error, EnqueueUnknown)
            else refusal
            for refusal in await super().enqueue(messages)
        ]


class SwallowsErrors(RemoteBroker):
    """Says that messages are stored when there is no connection."""

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        try:
            return await super().enqueue(messages)
        except BrokerUnavailable:
            return ()


class HidesABuffer(RemoteBroker):
    """Refuses messages while there is no connection, and sends them later all the same."""

    _buffer: tuple[Message, ...] = ()

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        try:
            refusals = await super().enqueue([*messages, *self._buffer])
        except BrokerUnavailable:
            self._buffer += tuple(messages)
            raise
        self._buffer = ()
        return [refusal for refusal in refusals if refusal.index < len(messages)]


class StoresTwice(RemoteBroker):
    """Stores a message again that is enqueued again."""

    _seen: set[str] = set()  # noqa: RUF012 - as the server would

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        again = [msgspec.structs.replace(one, id=f"{one.id}-2") if one.id in self._seen else one for one in messages]
        self._seen.update(message.id for message in messages)
        return await super().enqueue(again)

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, wait)
        return [
            msgspec.structs.replace(one, message=msgspec.structs.replace(one.message, id=one.message.id.removesuffix("-2")))
            for one in deliveries
        ]


class GoesDeaf(RemoteBroker):
    """Receives on its first connection only."""

    _first: object = None

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        self._first = self._first or self._link
        while wait and self._link is not self._first:
            await asyncio.sleep(0.01)
        return await super().receive(lanes, limit, wait)


class WaitsForEver(RemoteBroker):
    """Has no deadline for an answer."""

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(settings)
        client.ANSWER = math.inf  # type: ignore[misc]  # each test sets it anew


class ReportsNothing(RemoteBroker):
    """Keeps to itself that the connection was lost."""

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(msgspec.structs.replace(settings, report=lambda event: None))


class DeclaresOnce(RemoteBroker):
    """Does not declare queues again when the server lost them."""

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare(queues)
        self._declared.clear()


class SettlesBlindly(RemoteBroker):
    """Says that a settlement is done that the server refused."""

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[Refusal]:
        return [refusal for refusal in await super().settle(settlements) if not isinstance(refusal.error, LeaseLost)]


class CountsNoLosses(RemoteBroker):
    """Calls every delivery the first."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        return [msgspec.structs.replace(delivery, delivery_count=1) for delivery in await super().receive(lanes, limit, wait)]


class AcksAtReceive(RemoteBroker):
    """Forgets a message when it hands it over."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        deliveries = await super().receive(lanes, limit, wait)
        await super().settle([Ack(delivery) for delivery in deliveries])
        return deliveries


class ListsNothing(RemoteBroker):
    """Shows an empty page when there is no connection."""

    async def peek(self, queue: str, state: State, **options: Any) -> Page:
        try:
            return await super().peek(queue, state, **options)
        except BrokerUnavailable:
            return Page([])


class OpensWithForeignErrors(RemoteBroker):
    """Lets the error of the socket through."""

    async def open(self) -> None:
        try:
            await super().open()
        except BrokerUnavailable as error:
            raise OSError("connection refused") from error


class ClosesWithGoodbye(RemoteBroker):
    """Closes only once the server has answered for the last time."""

    async def close(self) -> None:
        while self._keeper is not None:
            with contextlib.suppress(BrokerUnavailable):
                await self.stats(["q"])
                break
            await asyncio.sleep(0.01)
        await super().close()


class GivesUpWaiting(RemoteBroker):
    """Ends a receive with an error of Python's when its connection is lost."""

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        receive: Awaitable[Sequence[Delivery]] = asyncio.ensure_future(super().receive(lanes, limit, wait))
        link = self._link
        while not receive.done():  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
            if self._link is not link:
                receive.cancel()  # type: ignore[attr-defined]
                raise ConnectionResetError
        return await receive


TRIALS = {
    CallsUnknownFailed: ("failed_enqueues_never_arrive", "certainly not stored, and delivered"),
    SwallowsErrors: ("stream[killed]", "stored, and lost|until all that was stored was delivered"),
    HidesABuffer: ("verbs_without_a_server[stopped]", "they were certainly not stored, it was said, and they were"),
    StoresTwice: ("stream_over_cut_connections", "stored twice"),
    GoesDeaf: ("many_restarts_leave_no_deaf_receiver[killed]", "until the receiver got a message"),
    WaitsForEver: ("verbs_without_a_server[paused]", "it hangs"),
    ReportsNothing: ("waiting_receive_outlives_its_connection", "until the loss was reported"),
    DeclaresOnce: ("lost_state_is_declared_again", "the declared lease does not hold"),
    SettlesBlindly: ("deliveries_outlive_the_server[killed]", "LeaseLost"),
    CountsNoLosses: ("deliveries_outlive_their_connection", "as if it had never been delivered"),
    AcksAtReceive: ("deliveries_outlive_the_server[stopped]", "refused"),
    ListsNothing: ("verbs_without_a_server[stopped]", "peek without a server returned"),
    OpensWithForeignErrors: ("open_without_a_server[stopped]", "without a server came up with OSError"),
    ClosesWithGoodbye: ("close_without_a_server[killed]", "it hangs"),
    GivesUpWaiting: ("waiting_receive_outlives_the_server[killed]", "the receive came up with ConnectionResetError"),
}
"""For each client the scenario that is meant for it, and what that says."""


@pytest.mark.parametrize("kind", TRIALS)
def test_convicted(kind: type[RemoteBroker], target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scenario that is meant for it finds out what is wrong with this client."""
    monkeypatch.setattr(client, "ANSWER", 1.0)
    name, grounds = TRIALS[kind]
    (meant,) = [each for each in all_scenarios() if each.id == f"restarts.{name}"]
    with pytest.raises(AssertionError, match=grounds):
        run(meant, replace(target, create=kind))
