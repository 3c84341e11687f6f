"""What is special to JetStream: the traps of its consumers, and what may happen to streams and connections."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import flow
import nodes
import pytest

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, ConfigurationError, EnqueueFailed, MessageTooLarge, NotFound
from crossdock.plugins import create_broker
from crossdock.spi import (
    LEVELS,
    Ack,
    BrokerEvent,
    Connected,
    Dead,
    DeadLetter,
    Disconnected,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    Reason,
    Replay,
    State,
    StateLost,
)
from crossdock_conformance.servers.finding import BinarySource
from crossdock_nats import record, topology
from crossdock_nats.address import parse
from crossdock_nats.link import Link

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

Use = Callable[[nodes.Node], nodes.Node]


@pytest.fixture(scope="module")
def node(source: BinarySource) -> Iterator[nodes.Node]:
    """One server of each version for the tests that leave it running; they use namespaces of their own."""
    server = nodes.Node(source)
    yield server
    server.close()


_numbers = itertools.count()


@pytest.fixture
def namespace() -> str:
    """One that no other test uses."""
    return f"test{next(_numbers)}"


# --- who had a lease -------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [b"+ACK", b"-NAK", b"+TERM"])
async def test_late_words_do_nothing(node: nodes.Node, namespace: str, word: bytes) -> None:
    """Whatever a late holder says to the server itself, once its message was taken over, neither removes nor redelivers it."""
    async with (
        flow.opened(node.url, lease=2.0, namespace=namespace) as late,
        flow.opened(node.url, lease=2.0, namespace=namespace) as heir,
        flow.client(node.url) as driver,
    ):
        assert not await late.enqueue(flow.messages(1))
        receipt: Any = (await flow.take(late, 1))[0].receipt
        [held] = await flow.take(heir, 1)
        assert held.delivery_count >= 2
        await driver.publish(receipt.ack.decode(), word)
        await driver.flush()
        assert not await late.receive(flow.LANES, 1, 0.3), "a third worker got it while the second holds it"
        [stats] = await heir.stats(["q"])
        assert (stats.leased, stats.ready) == (1, 0)
        assert not await heir.settle([Ack(held)])
        [stats] = await heir.stats(["q"])
        assert (stats.leased, stats.ready) == (0, 0)


async def test_deliveries_are_not_limited(node: nodes.Node, namespace: str) -> None:
    """However often a message was lost, the server goes on delivering it, and counts on: the limit is core's to set."""
    async with flow.opened(node.url, lease=0.3, namespace=namespace) as broker:
        assert not await broker.enqueue(flow.messages(1))
        assert [(await flow.take(broker, 1))[0].delivery_count for _ in range(6)] == [1, 2, 3, 4, 5, 6]


async def test_a_shorter_lease_spares_those_that_were_promised_more(node: nodes.Node, namespace: str) -> None:
    """What another Broker holds under a longer lease stays with it when the queue's lease is made shorter."""
    async with (
        flow.opened(node.url, lease=60.0, namespace=namespace) as holder,
        flow.opened(node.url, lease=60.0, namespace=namespace) as other,
    ):
        assert not await holder.enqueue(flow.messages(1))
        held = await flow.take(holder, 1)
        async with flow.opened(node.url, lease=0.5, namespace=namespace):
            assert not await other.receive(flow.LANES, 1, 2.0), "it was delivered again though its lease runs"
        assert not await holder.settle([Ack(held[0])])


async def test_a_full_receiver_holds_nothing(node: nodes.Node, namespace: str) -> None:
    """What came while a receiver with one slot waited at every level, and it does not ask for, is soon with another."""
    async with (
        flow.opened(node.url, lease=30.0, namespace=namespace) as full,
        flow.opened(node.url, lease=30.0, namespace=namespace) as free,
    ):
        for attempt in range(5):
            waiting = asyncio.ensure_future(full.receive(flow.LANES, 1, 10.0))
            await asyncio.sleep(0.05)
            batch = [Message(f"{attempt}-{level.name}", "q", level, b"") for level in Priority]
            assert not await free.enqueue(batch)
            one = list(await waiting)
            began = time.monotonic()
            others = await flow.take(free, 3)
            assert time.monotonic() - began < 2.0
            assert {each.message.id for each in (*one, *others)} == {each.id for each in batch}
            assert {each.delivery_count for each in others} == {1}
            assert not await full.settle([Ack(each) for each in one])
            assert not await free.settle([Ack(each) for each in others])


# --- what others do to streams and consumers -------------------------------------------------------


async def test_a_consumer_that_is_deleted_is_made_again(node: nodes.Node, namespace: str) -> None:
    """When somebody deletes the consumers, a receive that waits goes on, held messages come again, and the loss is reported."""
    events: list[BrokerEvent] = []
    async with flow.opened(node.url, events, lease=30.0, namespace=namespace) as broker, flow.client(node.url) as driver:
        assert not await broker.enqueue(flow.messages(2))
        await flow.take(broker, 2)
        waiting = asyncio.ensure_future(broker.receive(flow.LANES, 2, 20.0))
        await asyncio.sleep(0.1)
        stream = f"CD={namespace}=q"
        for consumer in (await flow.api(driver, f"CONSUMER.NAMES.{stream}"))["consumers"]:
            await flow.api(driver, f"CONSUMER.DELETE.{stream}.{consumer}")
        again = list(await waiting)
        again += await flow.take(broker, 2 - len(again))
        assert {each.message.id for each in again} == {"m0", "m1"}
        assert any(isinstance(event, StateLost) for event in events) or min(each.delivery_count for each in again) > 1


async def test_a_stream_that_is_deleted_is_declared_again(node: nodes.Node, namespace: str) -> None:
    """When somebody deletes a stream, a receive that waits goes on, the queue is as it was declared, and that is reported once."""
    events: list[BrokerEvent] = []
    async with flow.opened(node.url, events, lease=3.0, namespace=namespace) as broker, flow.client(node.url) as driver:
        waiting = asyncio.ensure_future(broker.receive(flow.LANES, 1, 20.0))
        await asyncio.sleep(0.1)
        assert (await flow.api(driver, f"STREAM.DELETE.CD={namespace}=q"))["success"]
        await flow.until(lambda: any(isinstance(event, StateLost) for event in events), "the loss was reported")
        await flow.enqueue_for_good(broker, flow.messages(1))
        [delivery] = await waiting
        assert delivery.lease_until - time.monotonic() <= 3.0
        assert sum(isinstance(event, StateLost) for event in events) == 1


async def test_a_stream_of_somebody_else_is_left_alone(node: nodes.Node, namespace: str) -> None:
    """A stream that bears the name of ours and was not made by us is not touched; the error names it."""
    async with flow.client(node.url) as driver:
        await flow.api(driver, f"STREAM.CREATE.CD={namespace}=q", {"name": f"CD={namespace}=q", "subjects": [f"other.{namespace}"]})
        broker = flow.build(node.url, namespace=namespace)
        await broker.open()
        with pytest.raises(BrokerUnavailable, match=f"CD={namespace}=q was not made by crossdock"):
            await broker.enqueue(flow.messages(1))
        await broker.close()


async def test_the_server_does_as_it_is_told(node: nodes.Node, namespace: str) -> None:
    """Nothing of what streams and consumers are declared with is dropped, as old servers drop what they do not know."""
    async with flow.opened(node.url, lease=7.0, namespace=namespace) as broker, flow.client(node.url) as driver:
        assert not await broker.receive(flow.LANES, 1, 0.0)
        session: Any = broker
        subjects = session._session.queues.known("q").subjects
        stream = topology.queue_stream(namespace, QueueSpec("q", lease=7.0), subjects, parse("nats://h", {}))
        told = (await flow.api(driver, f"STREAM.INFO.{stream['name']}"))["config"]
        assert {name: told.get(name) for name in stream} == stream
        for level in Priority:
            consumer = topology.level_consumer(subjects, level, 7.0)
            told = (await flow.api(driver, f"CONSUMER.INFO.{stream['name']}.{consumer['durable_name']}"))["config"]
            assert {name: told.get(name) for name in consumer} == consumer


async def test_what_operators_changed_stays(node: nodes.Node, namespace: str) -> None:
    """A queue that is declared anew, with other settings and by a URL that keeps streams elsewhere, keeps what operators set on its
    stream, and stays where it is with all that is in it."""
    async with flow.opened(node.url, lease=7.0, namespace=namespace) as broker, flow.client(node.url) as driver:
        assert not await broker.enqueue(flow.messages(1))
        config = (await flow.api(driver, f"STREAM.INFO.CD={namespace}=q"))["config"]
        await flow.api(driver, f"STREAM.UPDATE.CD={namespace}=q", {**config, "max_bytes": 12_345_678})
        async with flow.opened(f"{node.url}?storage=memory", lease=9.0, namespace=namespace) as other:
            told = (await flow.api(driver, f"STREAM.INFO.CD={namespace}=q"))["config"]
            assert (told["max_bytes"], told["storage"]) == (12_345_678, "file")
            assert "lease=9.0" in told["description"]
            [taken] = await flow.take(other, 1)
            assert 7.0 < taken.lease_until - time.monotonic() <= 9.0


async def test_a_letter_that_is_replayed_twice_in_one_call(node: nodes.Node, namespace: str) -> None:
    """A dead letter that one call names twice is replayed once; the second time it is not found."""
    async with flow.opened(node.url, lease=30.0, namespace=namespace) as broker:
        assert not await broker.enqueue(flow.messages(1))
        [taken] = await flow.take(broker, 1)
        assert not await broker.settle([Dead(taken, DeadLetter(taken.message, Reason.REJECTED, 1))])
        again = [Replay("m0", Message("m0", "q", Priority.NORMAL, body, generation=1)) for body in (b"one", b"two")]
        assert [(refusal.index, type(refusal.error)) for refusal in await broker.replay("q", again)] == [(1, NotFound)]
        assert [each.message.body for each in await flow.take(broker, 1)] == [b"one"]
        assert not await broker.receive(flow.LANES, 1, 0.0)


async def test_purging_beside_a_receive_that_waits(node: nodes.Node, namespace: str) -> None:
    """A Broker may purge what is ready while a receive of its own waits at another level: each gets its own answers."""
    async with flow.opened(node.url, lease=30.0, namespace=namespace) as broker:
        waiting = asyncio.ensure_future(broker.receive([Lane("q", Priority.HIGH, 0)], 1, flow.PATIENCE))
        await asyncio.sleep(0)
        for _ in range(5):
            assert not await broker.enqueue(flow.messages(50))
            assert await broker.purge("q", State.READY) == 50
        assert not waiting.done()
        assert not await broker.enqueue([Message("wanted", "q", Priority.HIGH, b"")])
        assert [each.message.id for each in await waiting] == ["wanted"]


# --- what a server will not do ---------------------------------------------------------------------


async def test_jetstream_that_is_not_enabled(source: BinarySource, use: Use) -> None:
    """A server without JetStream is refused in a sentence that says what to do."""
    server = use(_without_jetstream(source))
    broker = flow.build(server.url)
    with pytest.raises(ConfigurationError, match="has no JetStream: start it with -js"):
        await broker.open()


def _without_jetstream(source: BinarySource) -> nodes.Node:
    """A server on which JetStream is there, but not for who comes without a name."""
    accounts = "A: { jetstream: disabled, users: [{ user: a, password: b }] }, B: { jetstream: enabled }"
    return nodes.Node(source, f"accounts {{ {accounts} }}\nno_auth_user: a\njetstream {{ store_dir: STORE }}")


async def test_no_space_left(source: BinarySource, use: Use) -> None:
    """Where the server's storage is used up, an enqueue fails with a sentence that says so, and what is stored comes."""
    server = use(nodes.Node(source, "jetstream { store_dir: STORE, max_file_store: 300KB }"))
    async with flow.opened(server.url) as broker:
        stored, errors = 0, list[Exception]()
        for number in range(40):
            refusals = await broker.enqueue([Message(f"m{number}", "q", Priority.NORMAL, b"x" * 20_000)])
            stored += not refusals
            errors += [refusal.error for refusal in refusals]
        assert stored
        assert {type(error) for error in errors} == {EnqueueFailed}
        assert "no space left" in str(errors[0])
        await flow.ack_for_good(broker, await flow.take(broker, stored))


async def test_the_accounts_limits(source: BinarySource, use: Use) -> None:
    """Where the account's storage or its number of streams is used up, the error says so, and what is stored comes."""
    limits = "jetstream: { max_file: 300KB, max_streams: 2 }, users: [{ user: a, password: b }]"
    server = use(nodes.Node(source, f"accounts {{ A: {{ {limits} }} }}\njetstream {{ store_dir: STORE }}"))
    async with flow.opened(f"nats://a:b@{server.url.removeprefix('nats://')}?timeout=5") as broker:
        stored, errors = 0, list[Exception]()
        for number in range(40):
            refusals = await broker.enqueue([Message(f"m{number}", "q", Priority.NORMAL, b"x" * 20_000)])
            stored += not refusals
            errors += [refusal.error for refusal in refusals]
        assert stored
        assert {type(error) for error in errors} == {EnqueueFailed}
        assert "The account's storage is used up" in str(errors[0])
        await flow.ack_for_good(broker, await flow.take(broker, stored))
        await broker.declare([QueueSpec("another")])
        with pytest.raises(BrokerUnavailable, match="The account may have no more streams"):
            await broker.declare([QueueSpec("one-too-many")])


async def test_who_does_not_keep_up_is_cut_off_and_comes_back(source: BinarySource, use: Use) -> None:
    """A worker that is too slow to read is cut off by the server. It is told, connects again, and gets everything."""
    server = use(nodes.Node(source, 'max_pending: 1MB\nwrite_deadline: "100ms"\njetstream { store_dir: STORE }'))
    events: list[BrokerEvent] = []
    async with flow.opened(server.url, events, lease=3.0) as broker:
        for number in range(20):
            assert not await broker.enqueue([Message(f"m{number}", "q", Priority.NORMAL, bytes(900_000))])
        [held] = await flow.take(broker, 1)
        receiving = asyncio.ensure_future(broker.receive(flow.LANES, 19, 5.0))
        while not receiving.done() and "Slow Consumer" not in server.log_tail(100):
            await asyncio.sleep(0)
            time.sleep(0.3)  # it is the worker's loop that is too slow
        came = {held.message.id, *(each.message.id for each in await receiving)}
        while len(came) < 20:
            came.update(each.message.id for each in await flow.take(broker, 1))
        lost = [event.reason for event in events if isinstance(event, Disconnected)]
        assert lost
        assert "too slow" in lost[0] or "reset" in lost[0]


async def test_the_servers_own_limit_of_a_message(source: BinarySource, use: Use) -> None:
    """What the server takes at once limits a body; a longer one is refused before it is sent, which would end the connection."""
    server = use(nodes.Node(source, "max_payload: 2MB\njetstream { store_dir: STORE }"))
    events: list[BrokerEvent] = []
    async with flow.opened(server.url, events) as broker:
        most = broker.capabilities.max_body
        assert 2_000_000 < most < 2 * 1024 * 1024
        refusals = await broker.enqueue([Message(str(size), "q", Priority.NORMAL, bytes(size)) for size in (most, most + 1)])
        assert [(refusal.index, type(refusal.error)) for refusal in refusals] == [(1, MessageTooLarge)]
        assert not any(isinstance(event, Disconnected) for event in events)


# --- connections -----------------------------------------------------------------------------------


async def test_a_half_open_connection_is_noticed(node: nodes.Node, namespace: str) -> None:
    """A connection over which nothing passes any more is noticed within some `timeout`, and a receive that waits goes on over a new one."""
    events: list[BrokerEvent] = []
    with nodes.Proxy(node.url) as proxy:
        async with flow.opened(f"{proxy.url}?timeout=0.5", events, namespace=namespace) as broker:
            waiting = asyncio.ensure_future(broker.receive(flow.LANES, 1, 30.0))
            await asyncio.sleep(0.1)
            proxy.stalled = True
            await flow.until(lambda: any(isinstance(event, Disconnected) for event in events), "the loss was noticed")
            proxy.cut()
            proxy.stalled = False
            await flow.until(lambda: isinstance(events[-1], Connected), "it came back")
            async with flow.opened(node.url, namespace=namespace) as other:
                await flow.enqueue_for_good(other, flow.messages(1))
            try:
                taken = list(await waiting)
            except BrokerUnavailable:
                taken = await flow.take(broker, 1)
            assert [each.message.id for each in taken] == ["m0"]


async def test_closing_amid_a_loss(node: nodes.Node, namespace: str) -> None:
    """A Broker that is closed in the very moment in which it notices that its connection is lost leaves nothing open."""
    closing: list[asyncio.Future[None]] = []

    def report(event: BrokerEvent) -> None:
        if isinstance(event, Disconnected):
            closing.append(asyncio.ensure_future(broker.close()))

    with nodes.Proxy(node.url) as proxy:
        broker = create_broker(proxy.url, namespace=namespace, clock=SystemClock(), report=report)
        await broker.open()
        proxy.cut()
        await flow.until(lambda: bool(closing), "the loss was noticed")
        await closing[0]
    gc.collect()  # which warns of what is left, and warnings are errors


async def test_forty_restarts(source: BinarySource, use: Use) -> None:
    """After each of forty restarts, gentle or not, a worker that was there all along gets what comes; nothing stored is lost."""
    server = use(nodes.Node(source))
    events: list[BrokerEvent] = []
    async with flow.opened(f"{server.url}?timeout=2", events) as worker, flow.opened(f"{server.url}?timeout=2") as producer:
        heard: Counter[str] = Counter()
        over = False

        async def work() -> None:
            while not over:
                try:
                    taken = await worker.receive(flow.LANES, 20, 0.5)
                except BrokerUnavailable:
                    continue
                heard.update(each.message.id for each in taken)
                await flow.ack_for_good(worker, taken)

        working = asyncio.ensure_future(work())
        for restart in range(40):
            batch = flow.messages(10, f"r{restart}-")
            storing = asyncio.ensure_future(flow.enqueue_for_good(producer, batch))
            await asyncio.to_thread(server.restart, kill=restart % 2 == 1)
            await storing
            await flow.until(lambda batch=batch: all(each.id in heard for each in batch) or working.done(), "the worker got it")  # type: ignore[misc]
        over = True
        await working
    assert sum(heard.values()) <= 2 * 400, "more came twice than forgotten acks of killed servers explain"


# --- schedules -------------------------------------------------------------------------------------


async def test_due_times_while_others_are_far(node: nodes.Node, namespace: str) -> None:
    """Among thousands that wait for an hour, each of a hundred is due in time, and nothing is held by whoever waits for them."""
    async with flow.opened(node.url, namespace=namespace) as broker:
        for start in range(0, 5000, 1000):
            assert not await broker.enqueue(flow.messages(1000, f"far{start}-", delay_ms=3_600_000))
        began = time.monotonic()
        offsets = {f"soon{number}": 0.5 + number * 0.01 for number in range(100)}
        assert not await broker.enqueue(
            [Message(id, "q", Priority.NORMAL, b"", delay_ms=round(offset * 1000)) for id, offset in offsets.items()]
        )
        stored = time.monotonic()
        late: list[float] = []
        while len(late) < 100:
            taken = await broker.receive(flow.LANES, 100, flow.PATIENCE)
            now = time.monotonic()
            assert taken
            for each in taken:
                assert now - began >= offsets[each.message.id] - 0.05, "it came too early"
                late.append(now - stored - offsets[each.message.id])
            await flow.ack_for_good(broker, taken)
        late.sort()
        assert late[50] <= 0.25
        [stats] = await broker.stats(["q"])
        assert (stats.scheduled, stats.leased, stats.ready) == (5000, 0, 0)


async def test_retries_far_away_starve_nobody(node: nodes.Node, namespace: str) -> None:
    """Thousands given back for later take no place at the consumer: what is fresh comes at once."""
    async with flow.opened(node.url, lease=30.0, namespace=namespace) as broker:
        assert not await broker.enqueue(flow.messages(1000))
        taken = await flow.take(broker, 1000)
        assert not await broker.settle([Nack(each, 3600.0) for each in taken])
        [stats] = await broker.stats(["q"])
        assert (stats.scheduled, stats.leased) == (1000, 0)
        assert not await broker.enqueue(flow.messages(1, "fresh"))
        began = time.monotonic()
        assert [each.message.id for each in await flow.take(broker, 1)] == ["fresh0"]
        assert time.monotonic() - began < 1.0
        assert len((await broker.peek("q", State.SCHEDULED, limit=1000)).entries) == 1000


async def test_a_purge_waits_for_a_level_that_delivers_nothing_for_a_moment(node: nodes.Node) -> None:
    """As while its consumer is paused, or has no leader: what is counted as ready is purged all the same."""
    if not topology.Features.of(node.version).pauses:
        pytest.skip("consumers of a server below 2.11 cannot be paused")
    async with flow.opened(node.url, namespace="halt") as broker, flow.client(node.url) as driver:
        await flow.enqueue_for_good(broker, flow.messages(5))
        await flow.ack_for_good(broker, await flow.take(broker, 1))  # the level has its consumer now
        until = (datetime.now(UTC) + timedelta(seconds=1)).isoformat().replace("+00:00", "Z")
        for consumer in (await flow.api(driver, "CONSUMER.NAMES.CD=halt=q"))["consumers"]:
            await flow.api(driver, f"CONSUMER.PAUSE.CD=halt=q.{consumer}", {"pause_until": until})
        assert await broker.purge("q", State.READY) == 4


async def test_empty_levels_cost_no_more_beside_a_full_one(node: nodes.Node, namespace: str) -> None:
    """A receive from all levels is not slowed down by what waits at one of them: 2.9 looked through it for each of the others."""
    async with flow.opened(node.url, lease=60.0, namespace=namespace) as broker:
        for start in range(0, 20_000, 1000):
            assert not await broker.enqueue(flow.messages(1000, f"m{start}-"))
        lanes = [Lane("q", level, 25) for level in LEVELS]

        async def median(lanes: list[Lane]) -> float:
            took: list[float] = []
            for _ in range(21):
                began = time.perf_counter()
                deliveries = await broker.receive(lanes, 10, 5.0)
                took.append(time.perf_counter() - began)
                assert len(deliveries) == 10
            return sorted(took)[len(took) // 2]

        alone = await median([lane for lane in lanes if lane.priority is Priority.NORMAL])
        assert await median(lanes) < 4 * alone + 0.008


async def test_absence_proves_nothing_of_what_was_sent_before(node: nodes.Node) -> None:
    """That nobody is there is the answer to what is sent once; to a write that was sent before, and perhaps heard, it is none."""
    link, other = (Link(parse(node.url, {"timeout": "3"}), lambda _: None, lambda: None) for _ in range(2))
    heard: list[bytes] = []

    def hear(subject: bytes, _reply: bytes, _headers: bytes, _data: bytes) -> None:
        heard.append(subject)
        other.unsubscribe(sid)

    await link.open()
    await other.open()
    sid = other.subscribe(b"somebody", hear)
    assert other.wire is not None
    await other.wire.echo()

    for subject, stores, is_answered in ((b"nobody", True, True), (b"somebody", True, False)):
        reply = link.reply_to()
        _, answered = await link.exchange(reply, [record.plain(subject, b"%s.0" % reply, b"hello")], stores=stores)
        assert bool(answered[0]) is is_answered

    assert heard == [b"somebody"]
    await link.close()
    await other.close()
