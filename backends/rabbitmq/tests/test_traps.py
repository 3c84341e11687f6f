"""What RabbitMQ does that nobody expects, each as a test on a real server that nothing comes of it; others are in the conformance suite."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager

import aiormq
import pytest
from aiormq.abc import AbstractChannel
from proxies import Proxy
from rabbitmq_nodes import control
from rabbitmq_traffic import PATIENCE, erase, lanes_of, message, new_namespace, opened, until

from crossdock.errors import QueueHeld
from crossdock.spi import Ack, Broker, Dead, DeadLetter, Delivery, Lane, Message, Nack, Priority, QueueSpec, Reason, Replay, State
from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(180)]


@asynccontextmanager
async def emptied(server: Server) -> AsyncGenerator[tuple[str, Broker]]:
    """A namespace of its own, and a Broker with a queue `q`; nothing is left in the end."""
    namespace = new_namespace()
    try:
        async with opened(server.url, namespace) as broker:
            yield namespace, broker
    finally:
        await erase(server.url, namespace)


@asynccontextmanager
async def operated(server: Server) -> AsyncGenerator[AbstractChannel]:
    """A channel by which somebody else acts on the server."""
    connection = await aiormq.connect(server.url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


def delayed(id: str, delay_ms: int, queue: str = "q", generation: int = 0) -> Message:
    return Message(id, queue, Priority.NORMAL, b"body", delay_ms=delay_ms, generation=generation)


async def take(broker: Broker, queue: str = "q") -> Delivery:
    """The next message."""
    deliveries = await broker.receive(lanes_of(queue), 1, PATIENCE)
    assert deliveries, "nothing came"
    return deliveries[0]


def letter_of(delivery: Delivery) -> Dead:
    return Dead(delivery, DeadLetter(delivery.message, Reason.REJECTED, time.time_ns() // 1_000_000, "task"))


@pytest.mark.parametrize("way", ["give-back", "retry", "replay"])
async def test_rounds_through_one_level_of_the_delay_lose_nothing(server: Server, way: str) -> None:
    """A message that waits in the same level of the delay again and again comes each time: with the headers of its last round (x-death),
    RabbitMQ 3.10 would confirm it and drop it in the second round as a cycle."""
    async with emptied(server) as (_, broker):
        assert not await broker.enqueue([delayed("m", 150)])
        for generation in range(1, 5):
            delivery = await take(broker)
            assert delivery.message.id == "m"
            match way:
                case "give-back":
                    assert not await broker.settle([Nack(delivery, 0.15)])
                case "retry":
                    assert not await broker.settle([Nack(delivery, 0.15, delayed("m", 0, generation=generation))])
                case _:
                    assert not await broker.settle([letter_of(delivery)])
                    assert not await broker.replay("q", [Replay("m", delayed("m", 150, generation=generation))])
        assert not await broker.settle([Ack(await take(broker))])


async def test_what_falls_due_for_a_queue_that_is_gone_holds_up_nobody(server: Server) -> None:
    """A delayed message whose queue was deleted goes to `cd.delay.lost` and stays there; without that, the server would try it again every
    180 seconds, and hold up what is behind it. Others come in time."""
    async with emptied(server) as (namespace, broker), operated(server) as channel:
        before = (await channel.queue_declare("cd.delay.lost", passive=True)).message_count or 0
        await broker.declare([QueueSpec("gone")])
        assert not await broker.enqueue([delayed(f"m{number}", 300, "gone") for number in range(40)])
        for level in (9, 6, 3, 0):
            await channel.queue_delete(f"cd.{namespace}.q.gone.p{level}")
        assert not await broker.enqueue([delayed("m", 400)])
        assert (await take(broker)).message.id == "m"
        deadline = time.monotonic() + PATIENCE
        while ((await channel.queue_declare("cd.delay.lost", passive=True)).message_count or 0) < before + 40:
            assert time.monotonic() < deadline, "it is nowhere"
            await asyncio.sleep(0.05)
        await channel.queue_purge("cd.delay.lost")
        await erase(server.url, namespace, ["gone"])


async def test_a_delay_whose_way_in_was_deleted_is_made_again(server: Server) -> None:
    """A publish to an exchange that is not there has the server close the channel, and all on it unanswered. What was for that exchange is
    certainly not stored; so the exchange is made again within the call, and the messages come."""
    async with emptied(server) as (_, broker), operated(server) as channel:
        await channel.exchange_delete("cd.delay")
        assert not await broker.enqueue([delayed("m", 150)])
        assert not await broker.settle([Ack(await take(broker))])


async def test_changing_windows_count_nothing_and_keep_the_order(server: Server) -> None:
    """While a quick worker's consumers are replaced by ones with larger windows, amid acks, every message comes once, counted once and in
    order: before RabbitMQ 4.3 a cancel while acks are under way counts messages that nobody saw."""
    count = 3000
    async with emptied(server) as (_, broker):
        assert not await broker.enqueue([message(f"m{number}") for number in range(count)])
        came: list[str] = []
        while len(came) < count:
            deliveries = await broker.receive(lanes_of("q", quota=5), 20, PATIENCE)
            assert deliveries, "some did not come"
            assert {delivery.delivery_count for delivery in deliveries} == {1}
            came += [delivery.message.id for delivery in deliveries]
            assert not await broker.settle(list(map(Ack, deliveries)))
        assert came == [f"m{number}" for number in range(count)]


async def test_a_second_operator_is_told_and_loses_nothing(server: Server) -> None:
    """While one operator looks at the dead letters, another is told `QueueHeld` within seconds instead of being shown half of them (quorum
    queues share their messages among consumers that asked to be alone); afterwards that one sees all."""
    async with emptied(server) as (namespace, one), opened(server.url, namespace) as other:
        ids = await _fill_with_letters(one, 20)
        async with _looked_at(one, ids):
            with pytest.raises(QueueHeld, match="Somebody else is looking at the dead letters of queue 'q'"):
                await other.peek("q", State.DEAD)
        assert await _letters_in_the_end(other) == ids
        await other.purge("q", State.DEAD)


async def test_letters_that_are_still_on_their_way_back_are_waited_for(server: Server) -> None:
    """A quorum queue has the letters of who looked at them before again only when it has written that down. While its disk hangs, nobody is
    shown a part of them, or none."""
    async with emptied(server) as (namespace, one), opened(server.url, namespace) as other:
        ids = await _fill_with_letters(one, 7)
        async with _looked_at(one, ids):
            await asyncio.to_thread(control, server, "eval", "sys:suspend(ra_log_wal).")
        await one.close()
        seen = asyncio.create_task(_letters_in_the_end(other))
        await asyncio.to_thread(control, server, "eval", "sys:resume(ra_log_wal).")
        assert await seen == ids
        await other.purge("q", State.DEAD)


async def test_a_cancelled_look_holds_no_letters(server: Server) -> None:
    """Whichever answer a look at the dead letters waits for when it is cancelled, others get to see them, though its Broker stays open."""
    with Proxy(server.url) as proxy:
        async with emptied(server) as (namespace, one), opened(proxy.url, namespace) as other:
            ids = await _fill_with_letters(one, 7)
            for request in itertools.count(1):
                proxy.withhold(request)
                looking = asyncio.create_task(other.peek("q", State.DEAD))
                await until(lambda task=looking: proxy.withholds or task.done(), "the look got so far")
                looking.cancel()
                await asyncio.wait([looking])
                proxy.release()
                assert await _letters_in_the_end(one) == ids
                if not looking.cancelled():
                    break
                await one.close()
                await one.open()
                await one.declare([QueueSpec("q")])
            assert request > 5
            await one.purge("q", State.DEAD)


async def _fill_with_letters(broker: Broker, count: int) -> list[str]:
    """Have so many dead letters in queue `q`; their ids."""
    ids = [f"m{number}" for number in range(count)]
    assert not await broker.enqueue(list(map(message, ids)))
    for _ in ids:
        assert not await broker.settle([letter_of(await take(broker))])
    return ids


@asynccontextmanager
async def _looked_at(broker: Broker, ids: Sequence[str]) -> AsyncGenerator[None]:
    """Meanwhile somebody looks at these letters again and again."""
    over = False

    async def look() -> None:
        while not over:
            assert [entry.message.id for entry in (await broker.peek("q", State.DEAD)).entries] == ids
            await asyncio.sleep(0.01)

    looking = asyncio.create_task(look())
    try:
        await broker.peek("q", State.DEAD)
        yield
        assert not looking.done()
    finally:
        over = True
        await looking


async def _letters_in_the_end(broker: Broker) -> list[str]:
    """The ids of the dead letters of queue `q`, once nobody else holds them."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return [entry.message.id for entry in (await broker.peek("q", State.DEAD)).entries]
        except QueueHeld:
            assert time.monotonic() < deadline, "it is held for ever"


async def test_a_level_whose_turn_comes_late_keeps_its_order(server: Server) -> None:
    """While a receive waits for a slow server, what was pushed ahead for a level whose turn has not come is not given back: before
    4.3 it would lose its place."""
    urgent, idle = Lane("q", Priority.HIGH, 1), Lane("q", Priority.LOW, 0)
    async with emptied(server) as (_, broker):
        messages = [message(f"urgent-{number}", priority=Priority.HIGH) for number in range(10)]
        messages += [message(f"idle-{number}", priority=Priority.LOW) for number in range(2)]
        assert not await broker.enqueue(messages)
        for number in range(10):
            server.pause()
            receiving = asyncio.create_task(broker.receive([urgent, idle], 1, PATIENCE))
            await asyncio.wait([receiving], timeout=0.15)  # in which it has nothing, or else nobody would be receiving
            server.resume()
            (delivery,) = await receiving
            assert delivery.message.id == f"urgent-{number}"
            assert not await broker.settle([Ack(delivery)])
        assert [(await take(broker)).message.id for _ in range(2)] == ["idle-0", "idle-1"]
