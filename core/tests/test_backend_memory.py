"""What only the memory broker promises: its URLs, stores shared between loops and threads, nothing kept for nothing."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import uuid
from collections.abc import Mapping

import pytest

from crossdock.backends.memory import MemoryBroker, crossdock_backend, forget
from crossdock.clock import SystemClock, VirtualClock
from crossdock.errors import ConfigurationError
from crossdock.spi import Ack, BrokerSettings, Clock, Cursor, Delivery, Lane, Message, Nack, Priority, QueueSpec, State, Survives

LANES = [Lane("q", Priority.NORMAL, 0)]


def broker_at(url: str, options: Mapping[str, str] | None = None, clock: Clock | None = None) -> MemoryBroker:
    """Build a Broker as core does."""
    made = crossdock_backend().create(BrokerSettings(url=url, clock=clock or SystemClock(), options=options or {}))
    assert isinstance(made, MemoryBroker)
    return made


def message(id: str, body: bytes = b"") -> Message:
    return Message(id, "q", Priority.NORMAL, body)


# --- URLs ---


@pytest.mark.parametrize("url", ["memory://", "memory://a", "memory://My-store_2", "memory://" + "x" * 63])
def test_good_urls(url: str) -> None:
    """A name, or none, is all there is to a memory URL."""
    broker_at(url)


@pytest.mark.parametrize(
    "url",
    ["", "geheim", "redis://a", "memory:", "memory:///"]
    + [f"memory://{rest}" for rest in ("a/b", "a:1", "user:geheim@a", "-a", "a b", "a\n", "x" * 64, "ä", "a#b")],
)
def test_bad_urls(url: str) -> None:
    """Anything else is refused in a sentence that shows what can be written, and no password."""
    with pytest.raises(ConfigurationError, match=r"memory://NAME") as caught:
        broker_at(url)
    assert "geheim" not in str(caught.value)


def test_options_are_refused_by_name() -> None:
    """There are no options; one that is given is named, its value is not shown."""
    with pytest.raises(ConfigurationError, match="durability") as caught:
        broker_at("memory://a?durability=geheim", {"durability": "geheim"})
    assert "geheim" not in str(caught.value)


# --- stores ---


@pytest.mark.asyncio
async def test_name_decides_the_store() -> None:
    """Brokers of one name share a store beyond their lives, those of others do not see it; `forget` ends it."""
    name = uuid.uuid4().hex
    first = broker_at(f"memory://{name}")
    await first.open()
    await first.enqueue([message("m")])
    await first.close()
    again, other = broker_at(f"memory://{name}"), broker_at(f"memory://{name}x")
    await again.open()
    await other.open()
    assert [stats.ready for stats in await again.stats()] == [1]
    assert not await other.stats()
    forget(name)
    forget("never-there")
    new = broker_at(f"memory://{name}")
    await new.open()
    assert not await new.stats()
    assert [stats.ready for stats in await again.stats()] == [1]
    for each in (again, other, new):
        await each.close()
    forget(name)
    forget(name + "x")


@pytest.mark.asyncio
async def test_nothing_survives_and_it_says_so() -> None:
    """The memory broker claims no durability, and a takeover without a sweep."""
    broker = broker_at(f"memory://{uuid.uuid4().hex}")
    await broker.open()
    assert broker.capabilities.survives == frozenset[Survives]()
    assert broker.capabilities.takeover == 30.0
    await broker.close()


class CrowdedClock(SystemClock):
    """A clock that is read by whoever is at work in the store, and counts how often two were there at once."""

    def __init__(self) -> None:
        self.overlaps = 0
        self._reading = False

    def time_ms(self) -> int:
        self.overlaps += self._reading
        self._reading = True
        time.sleep(0)  # other threads, please
        self._reading = False
        return super().time_ms()


def test_loops_and_threads_share_a_store() -> None:
    """Producers and workers in loops of their own threads pass every message on exactly once, one at a time in the store."""
    name, clock = uuid.uuid4().hex, CrowdedClock()
    producers, workers, each = 2, 3, 1500
    done: list[str] = []
    lock = threading.Lock()

    async def produce(number: int) -> None:
        broker = broker_at(f"memory://{name}", clock=clock)
        await broker.open()
        for start in range(0, each, 10):
            assert not await broker.enqueue([message(f"p{number}-{start + offset}") for offset in range(10)])
        await broker.close()

    async def work() -> None:
        broker = broker_at(f"memory://{name}", clock=clock)
        await broker.open()
        while len(done) < producers * each:
            deliveries = await broker.receive(LANES, 7, 0.5)
            assert not await broker.settle([Ack(delivery) for delivery in deliveries])
            with lock:
                done.extend(delivery.message.id for delivery in deliveries)
        await broker.close()

    async def main() -> None:
        threads = [asyncio.to_thread(asyncio.run, produce(number)) for number in range(producers)]
        threads += [asyncio.to_thread(asyncio.run, work()) for _ in range(workers)]
        await asyncio.gather(*threads)

    asyncio.run(asyncio.wait_for(main(), 30))
    assert len(done) == len(set(done)) == producers * each
    assert clock.overlaps == 0
    forget(name)


def test_enqueue_wakes_a_receive_in_another_loop() -> None:
    """A receive that waits in another thread's loop is woken at once, not at the end of its wait."""
    name = uuid.uuid4().hex
    opened = threading.Event()
    received: list[Delivery] = []

    async def wait() -> None:
        broker = broker_at(f"memory://{name}")
        await broker.open()
        waiting = asyncio.ensure_future(broker.receive(LANES, 1, 20))
        for _ in range(10):
            await asyncio.sleep(0)
        opened.set()
        received.extend(await waiting)
        await broker.close()

    async def send() -> None:
        broker = broker_at(f"memory://{name}")
        await broker.open()
        await broker.enqueue([message("m")])
        await broker.close()

    thread = threading.Thread(target=asyncio.run, args=(wait(),))
    start = time.monotonic()
    thread.start()
    assert opened.wait(10)
    asyncio.run(send())
    thread.join(10)
    assert [delivery.message.id for delivery in received] == ["m"]
    assert time.monotonic() - start < 10
    forget(name)


def run_program(program: str) -> None:
    """Run a program of its own, which has Brokers by `broker()` and messages by `message(id)`."""
    prelude = """
        import asyncio, os
        from crossdock.backends.memory import crossdock_backend
        from crossdock.clock import SystemClock
        from crossdock.spi import BrokerSettings, Lane, Message, Priority

        LANES = [Lane("q", Priority.NORMAL, 0)]

        async def broker():
            made = crossdock_backend().create(BrokerSettings(url="memory://", clock=SystemClock()))
            await made.open()
            return made

        def message(id):
            return Message(id, "q", Priority.NORMAL, b"")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(program)], check=True, timeout=30)


def test_loop_closed_over_a_waiting_receive() -> None:
    """A loop that was closed while a receive waited in it harms nobody who enqueues later."""
    run_program("""
        dead = asyncio.new_event_loop()
        waiting = dead.create_task(dead.run_until_complete(broker()).receive(LANES, 1, 3600))
        for _ in range(10):
            dead.run_until_complete(asyncio.sleep(0))
        dead.close()

        async def send():
            alive = await broker()
            assert not await alive.enqueue([message("m")])
            assert len(await alive.receive(LANES, 1, 0)) == 1

        asyncio.run(send())
        assert not waiting.done()
        os._exit(0)
    """)


def test_forked_child_starts_without_stores() -> None:
    """What the parent holds is not held a second time by its children."""
    run_program("""
        async def ready_after(ids):
            alive = await broker()
            await alive.enqueue([message(id) for id in ids])
            return [stats.ready for stats in await alive.stats()]

        assert asyncio.run(ready_after(["a", "b"])) == [2]
        child = os.fork()
        if child == 0:
            os._exit(0 if asyncio.run(ready_after([])) == [] else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert asyncio.run(ready_after([])) == [2]
    """)


@pytest.mark.asyncio
@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize(
    "text", ["", "x", "ä", "7b7d", '["ready",0,"x"]', '["dead",0,[1]]', '["leased",0,5]', '["scheduled"]', "[[]]"]
)
async def test_what_is_no_cursor_is_refused(state: State, text: str) -> None:
    """A cursor that no listing of that state gave out is refused in a sentence."""
    broker = broker_at(f"memory://{uuid.uuid4().hex}")
    await broker.open()
    for cursor in (text, text.encode().hex()):
        with pytest.raises(ConfigurationError, match="cursor"):
            await broker.peek("q", state, after=Cursor(cursor))
    await broker.close()


# --- nothing for nothing ---


@pytest.mark.asyncio
async def test_unwanted_messages_wake_nobody() -> None:
    """A waiting receive sleeps on when something comes that it does not want: another queue, another level."""
    clock = VirtualClock()
    name = uuid.uuid4().hex
    waiter, other = broker_at(f"memory://{name}", clock=clock), broker_at(f"memory://{name}", clock=clock)
    await waiter.open()
    await other.open()
    sleeps: list[float] = []
    sleep = clock.sleep

    async def counted(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(seconds)

    clock.sleep = counted  # type: ignore[method-assign]
    waiting = asyncio.ensure_future(waiter.receive(LANES, 1, 60))
    for number in range(5):
        await other.enqueue([Message(f"m{number}", "q", Priority.HIGH, b""), Message(f"m{number}", "q2", Priority.NORMAL, b"")])
        await other.enqueue([Message(f"later{number}", "q", Priority.NORMAL, b"", delay_ms=3_600_000)])
    assert sleeps == [60]
    await other.enqueue([message("wanted")])
    assert [delivery.message.id for delivery in await waiting] == ["wanted"]
    await waiter.close()
    await other.close()
    forget(name)


@pytest.mark.asyncio
async def test_wait_ends_despite_rounding() -> None:
    """A wait that is interrupted and resumed ends with the clock, though sums of floats miss its end by a hair."""
    clock = VirtualClock()
    name = uuid.uuid4().hex
    broker = broker_at(f"memory://{name}", clock=clock)
    await broker.open()
    clock.advance(0.1)
    waiting = asyncio.ensure_future(broker.receive(LANES, 1, 1.3))
    await broker.enqueue([Message("m", "q", Priority.NORMAL, b"", delay_ms=300)])
    await broker.remove("q", State.SCHEDULED, ["m"])
    for seconds in (0.3, 1.0):
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        clock.advance(seconds)
    assert clock.monotonic() < 0.1 + 1.3
    assert not await asyncio.wait_for(waiting, 10)
    await broker.close()
    forget(name)


@pytest.mark.asyncio
async def test_settled_messages_are_freed() -> None:
    """Ten thousand lives, some removed before their time or extended, leave nothing behind, also while one task runs all along."""
    clock = VirtualClock()
    name = uuid.uuid4().hex
    broker = broker_at(f"memory://{name}", clock=clock)
    await broker.open()
    await broker.enqueue([message("long")])
    (long,) = await broker.receive(LANES, 1, 0)
    await broker.declare([QueueSpec("q", lease=60.0)])

    async def lives(rounds: int) -> None:
        for start in range(0, rounds * 100, 100):
            ids = [f"m{number}" for number in range(start, start + 100)]
            await broker.enqueue([message(id, b"x" * 1000) for id in ids[:80]])
            await broker.enqueue([Message(id, "q", Priority.NORMAL, b"x" * 1000, delay_ms=3_600_000) for id in ids[80:]])
            deliveries = await broker.receive(LANES, 80, 0)
            await broker.extend(deliveries)
            await broker.settle([Nack(delivery) for delivery in deliveries[:10]])
            await broker.settle([Ack(delivery) for delivery in deliveries])
            await broker.remove("q", State.READY, ids[:10])
            await broker.purge("q", State.SCHEDULED)

    def size() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    await lives(10)
    tracemalloc.start()
    try:
        before = size()
        await lives(100)
        assert size() - before < 100_000
    finally:
        tracemalloc.stop()
    assert not await broker.settle([Ack(long)])
    await broker.close()
    forget(name)


@pytest.mark.asyncio
async def test_acked_delivery_leaves_no_cycle() -> None:
    """Values of the interface are invisible to the garbage collector, so an ended delivery must be free by counting alone."""

    name = uuid.uuid4().hex
    broker = broker_at(f"memory://{name}", clock=VirtualClock())
    await broker.open()
    body = bytes(1000)
    before = sys.getrefcount(body)
    gc.collect()
    gc.disable()
    try:
        await broker.enqueue([message("m", body)])
        (delivery,) = await broker.receive(LANES, 1, 0)
        await broker.settle([Ack(delivery)])
        del delivery
        assert sys.getrefcount(body) == before
    finally:
        gc.enable()
    await broker.close()
    forget(name)
