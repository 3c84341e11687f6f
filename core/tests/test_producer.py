"""Producers: what a broker is asked, what callers are told, and what loops, threads and closing do to it."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from crossdock import App, AsyncTask, EnqueueNext, Middleware, Outgoing, Queue, codec
from crossdock.backends import memory
from crossdock.batching import MAX_BYTES
from crossdock.blocking import PrivateLoop
from crossdock.clock import SystemClock
from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    CrossdockError,
    EnqueueError,
    EnqueueFailed,
    EnqueueManyError,
    EnqueueUnknown,
    MessageTooLarge,
    NotFound,
    QueueFull,
    SyncInAsyncContext,
)
from crossdock.events import Event
from crossdock.forks import _registered
from crossdock.producer import chunks
from crossdock.spi import Ability, BrokerSettings, Message, Priority, QueueSpec, Refusal, State, Support

_names = (f"producer-{number}" for number in itertools.count())


class Noted(memory.MemoryBroker):
    """A memory broker that notes its calls, and answers as a test wants."""

    def __init__(self, settings: BrokerSettings) -> None:
        super().__init__(settings)
        self.batches: list[list[str]] = []
        self.declared: list[QueueSpec] = []
        self.opened = 0
        self.closed = 0
        self.is_open = False
        self.answer: Callable[[Sequence[Message]], Any] = lambda messages: None
        """Called with each batch: raises, or returns refusals for what it does not want stored, or something to wait for."""

    async def open(self) -> None:
        await super().open()
        self.opened += 1
        self.is_open = True

    async def close(self) -> None:
        await super().close()
        self.closed += 1
        self.is_open = False

    async def declare(self, queues: Sequence[QueueSpec]) -> None:
        await super().declare(queues)
        self.declared += queues

    async def enqueue(self, messages: Sequence[Message]) -> Sequence[Refusal]:
        self.batches.append([message.id for message in messages])
        refusals = self.answer(messages) or ()
        if asyncio.iscoroutine(refusals):
            await refusals
            refusals = ()
        refused = {refusal.index for refusal in refusals}
        there = [message for index, message in enumerate(messages) if index not in refused]
        return [*refusals, *await super().enqueue(there)]


class Site:
    """An App on a store of its own, and every Broker that was made for it."""

    def __init__(self, **settings: Any) -> None:
        self.name = next(_names)
        self.brokers: list[Noted] = []
        self.answer: Callable[[Sequence[Message]], Any] = lambda messages: None
        self.app = App(f"memory://{self.name}", **settings)
        self.app.environment.make_broker = self.make

        @self.app.task(name="job")
        async def job(data: Any = None) -> None: ...

        self.job: AsyncTask[[Any], None] = job

    def make(self) -> Noted:
        broker = Noted(BrokerSettings(url=f"memory://{self.name}", clock=SystemClock()))
        broker.answer = lambda messages: self.answer(messages)
        self.brokers.append(broker)
        return broker

    @property
    def broker(self) -> Noted:
        """The only one."""
        (broker,) = self.brokers
        return broker

    def messages(self, ids: Sequence[str], data: Any = None) -> list[Any]:
        return [self.job.options(id=id).message(data) for id in ids]

    async def stored(self) -> list[str]:
        """Ids in the store, in order."""
        broker = memory.MemoryBroker(BrokerSettings(url=f"memory://{self.name}", clock=SystemClock()))
        await broker.open()
        ids: list[str] = []
        page = await broker.peek("default", State.READY, limit=1000)
        while True:
            ids += [entry.message.id for entry in page.entries]
            if page.next is None:
                await broker.close()
                return ids
            page = await broker.peek("default", State.READY, after=page.next, limit=1000)


@pytest.fixture
def site() -> Iterator[Site]:
    """One for a test with loops of its own."""
    site = Site()
    yield site
    memory.forget(site.name)


@pytest_asyncio.fixture
async def open_site(site: Site) -> AsyncIterator[Site]:
    """One for a test in the test's loop, closed afterwards."""
    yield site
    await site.app.close()


def ids(count: int) -> list[str]:
    return [f"m{number}" for number in range(count)]


async def under_way(site: Site) -> None:
    """Return when the broker has a batch, and everybody who was about to enqueue has done so."""
    async with asyncio.timeout(10):
        while not site.brokers or not site.broker.batches:
            await asyncio.sleep(0)
    for _ in range(5):
        await asyncio.sleep(0)


# --- group commit ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_concurrent_enqueues_share_batches(open_site: Site) -> None:
    """A hundred at once are a few steps for the broker, and each caller gets its own handle."""
    site = open_site
    await site.app.__aenter__()
    handles = await asyncio.gather(*(site.job.options(id=id).enqueue() for id in ids(100)))
    assert [handle.id for handle in handles] == ids(100)
    assert len(site.broker.batches) <= 2
    assert sorted(await site.stored()) == sorted(ids(100))
    assert all(handle.queue == "default" and handle.task == "job" for handle in handles)


@pytest.mark.asyncio
async def test_a_lonely_enqueue_waits_for_nobody(open_site: Site) -> None:
    """One after the other, each goes at once, alone."""
    for id in ids(5):
        await open_site.job.options(id=id).enqueue()
    assert open_site.broker.batches == [[id] for id in ids(5)]


@pytest.mark.asyncio
async def test_what_comes_during_a_flush_makes_one_batch(open_site: Site) -> None:
    """While the broker is slow everything is collected, and nothing is told as stored before it is."""
    site, gate, begun = open_site, asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        begun.set()
        await gate.wait()

    site.answer = lambda messages: slow()
    first = asyncio.create_task(site.job.options(id="first").enqueue())
    await begun.wait()
    others = [asyncio.create_task(site.job.options(id=id).enqueue()) for id in ids(50)]
    for _ in range(5):
        await asyncio.sleep(0)
    assert site.broker.batches == [["first"]]
    assert not first.done()
    gate.set()
    await asyncio.gather(first, *others)
    assert site.broker.batches == [["first"], ids(50)]


@pytest.mark.asyncio
async def test_a_caller_that_gives_up_takes_nobody_along(open_site: Site) -> None:
    """Cancelling one enqueue leaves the others of its batch alone."""
    site, gate = open_site, asyncio.Event()
    site.answer = lambda messages: gate.wait()
    calls = [asyncio.create_task(site.job.options(id=id).enqueue()) for id in ids(4)]
    await under_way(site)
    calls[2].cancel()
    await asyncio.wait([calls[2]])
    site.answer = lambda messages: None
    gate.set()
    assert [handle.id for handle in await asyncio.gather(calls[0], calls[1], calls[3])] == ["m0", "m1", "m3"]
    assert {"m0", "m1", "m3"} <= set(await site.stored())


@pytest.mark.asyncio
async def test_a_lonely_caller_that_gives_up_holds_nobody_back(open_site: Site) -> None:
    """Cancelled while its message is on its way, it lets those go that came meanwhile."""
    site = open_site
    site.answer = lambda messages: asyncio.Event().wait()
    first = asyncio.create_task(site.job.options(id="first").enqueue())
    await under_way(site)
    others = [asyncio.create_task(site.job.options(id=id).enqueue()) for id in ids(2)]
    await under_way(site)
    site.answer = lambda messages: None
    first.cancel()
    await asyncio.gather(*others)
    assert site.broker.batches == [["first"], ids(2)]
    with pytest.raises(asyncio.CancelledError):
        await first


# --- what callers are told ------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_one_refused_message_fails_only_its_own_caller(open_site: Site) -> None:
    """Each caller gets the error about its message, which it carries."""
    open_site.answer = lambda messages: [
        Refusal(index, QueueFull(f"no room for {message.id}"))
        for index, message in enumerate(messages)
        if message.id in ("m1", "m3")
    ]
    outcomes = await asyncio.gather(*(open_site.job.options(id=id).enqueue() for id in ids(5)), return_exceptions=True)
    for id, outcome in zip(ids(5), outcomes, strict=True):
        if id in ("m1", "m3"):
            assert type(outcome) is QueueFull
            assert str(outcome) == f"no room for {id}"
            assert outcome.message is not None
            assert outcome.message.id == id
        else:
            assert not isinstance(outcome, BaseException)
    assert sorted(await open_site.stored()) == ["m0", "m2", "m4"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "error", [BrokerUnavailable("it is away"), BrokerClosed("it is closed"), EnqueueFailed("no"), EnqueueUnknown("?")]
)
async def test_an_error_about_a_whole_batch_is_told_to_everybody(open_site: Site, error: CrossdockError) -> None:
    """In an object of their own each, of the same class; the original is its cause."""

    def refuse(_: Sequence[Message]) -> None:
        raise error

    gate = asyncio.Event()
    open_site.answer = lambda messages: gate.wait()
    first = asyncio.create_task(open_site.job.options(id="first").enqueue())
    calls = [asyncio.create_task(open_site.job.options(id=name).enqueue()) for name in ids(3)]
    await under_way(open_site)
    open_site.answer = refuse
    gate.set()
    await first
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert open_site.broker.batches == [["first"], ids(3)]
    assert [type(outcome) for outcome in outcomes] == [type(error)] * 3
    assert len({id(outcome) for outcome in outcomes}) == 3
    for outcome, name in zip(outcomes, ids(3), strict=True):
        assert str(outcome) == str(error)
        assert isinstance(outcome, CrossdockError)
        assert outcome.__cause__ is error
        if isinstance(outcome, EnqueueError):
            assert outcome.message is not None
            assert outcome.message.id == name


class Particular(BrokerUnavailable):
    """An error of a stranger's backend, with a constructor of its own."""

    def __init__(self, host: str, *, port: int) -> None:
        super().__init__(f"{host}:{port} is away")
        self.port = port


@pytest.mark.asyncio
async def test_a_strangers_error_class_is_passed_on(open_site: Site) -> None:
    """Whatever its constructor takes."""

    def refuse(_: Sequence[Message]) -> None:
        raise Particular("broker-1", port=5)

    open_site.answer = refuse
    with pytest.raises(Particular, match="broker-1:5 is away") as caught:
        await asyncio.wait_for(open_site.job.enqueue(), 10)
    assert caught.value.port == 5


@pytest.mark.asyncio
async def test_a_backend_that_breaks_its_promise_keeps_nobody_waiting(open_site: Site) -> None:
    """A foreign exception from a backend means: perhaps stored. It is told as the backend's bug, and the next enqueue works."""

    def break_down(_: Sequence[Message]) -> None:
        raise ZeroDivisionError("a driver's own, with secret=hunter2 in it")

    open_site.answer = break_down
    calls = [open_site.job.options(id=id).enqueue() for id in ids(3)]
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
    for outcome in outcomes:
        assert isinstance(outcome, EnqueueUnknown)
        assert "the backend failed with ZeroDivisionError" in str(outcome)
        assert "hunter2" not in str(outcome)
        assert isinstance(outcome.__cause__, ZeroDivisionError)
    with pytest.raises(EnqueueManyError) as caught:
        await open_site.app.enqueue_many(open_site.messages(["a", "b"]))
    assert [unknown.message.id for unknown in caught.value.unknown if unknown.message] == ["a", "b"]
    open_site.answer = lambda messages: None
    await asyncio.wait_for(open_site.job.options(id="later").enqueue(), 10)
    assert await open_site.stored() == ["later"]


@pytest.mark.asyncio
@pytest.mark.parametrize(("support", "safe"), [(Support.NATIVE, True), (Support.EMULATED, True), (Support.UNSUPPORTED, False)])
async def test_unknown_outcomes_say_whether_repeating_is_safe(open_site: Site, support: Support, safe: bool) -> None:
    """It is, where the broker deduplicates; the error carries the message to repeat."""
    await open_site.app.__aenter__()
    capabilities = msgspec.structs.replace(open_site.broker.capabilities, deduplication=Ability(support))
    open_site.broker.capabilities = capabilities
    open_site.answer = lambda messages: [Refusal(0, EnqueueUnknown("no answer"))]
    with pytest.raises(EnqueueUnknown) as caught:
        await open_site.job.options(id="m").enqueue()
    assert caught.value.safe_to_repeat is safe
    assert caught.value.message is not None
    assert codec.decode(caught.value.message.body).task == "job"


# --- enqueue_many ---------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_many_go_in_chunks(open_site: Site) -> None:
    """Of a thousand at most, each one step for the broker; handles and messages in order."""
    handles = await open_site.app.enqueue_many(iter(open_site.messages(ids(2500))))
    assert [len(batch) for batch in open_site.broker.batches] == [1000, 1000, 500]
    assert [handle.id for handle in handles] == ids(2500) == await open_site.stored()
    assert await open_site.app.enqueue_many([]) == []
    assert len(open_site.broker.batches) == 3


def test_chunks_end_at_a_mebibyte_too() -> None:
    """A chunk ends with the message that reaches it."""

    def message(size: int) -> Message:
        return Message("m", "q", Priority.NORMAL, b"x" * size)

    half = MAX_BYTES // 2
    cut = chunks([message(size) for size in (half, half, half, half - 1, 5, MAX_BYTES, 1)])
    assert [[len(each.body) for each in chunk] for chunk in cut] == [[half, half], [half, half - 1, 5], [MAX_BYTES], [1]]
    assert chunks([]) == []
    assert [len(chunk) for chunk in chunks([message(1)] * 1000)] == [1000]


@pytest.mark.asyncio
async def test_many_with_refusals_tells_what_became_of_each(open_site: Site) -> None:
    """Stored, certainly not stored, perhaps stored; later chunks are still tried, and only what is stored is told to observers."""
    told: list[Event] = []
    open_site.app.on("task_enqueued")(told.append)

    def refuse(messages: Sequence[Message]) -> list[Refusal]:
        errors: dict[str, CrossdockError] = {
            "m10": QueueFull("full"),
            "m20": EnqueueUnknown("no answer"),
            "m1500": MessageTooLarge("large"),
            "m2400": NotFound("an error of another kind"),
            "m2450": EnqueueError("neither failed nor unknown"),
        }
        return [Refusal(index, errors[message.id]) for index, message in enumerate(messages) if message.id in errors]

    open_site.answer = refuse
    with pytest.raises(EnqueueManyError) as caught:
        await open_site.app.enqueue_many(open_site.messages(ids(2500)))
    error = caught.value
    assert len(open_site.broker.batches) == 3
    assert [failed.message.id for failed in error.failed if failed.message] == ["m10", "m1500", "m2400", "m2450"]
    assert [type(failed) for failed in error.failed] == [QueueFull, MessageTooLarge, EnqueueFailed, EnqueueFailed]
    assert isinstance(error.failed[2].__cause__, NotFound)
    assert [unknown.message.id for unknown in error.unknown if unknown.message] == ["m20"]
    assert list(error.stored) == [id for id in ids(2500) if id not in ("m10", "m20", "m1500", "m2400", "m2450")]
    assert str(error) == "2495 messages were stored, 4 certainly not, 1 perhaps; the first: full"
    assert [event.id for event in told] == list(error.stored) == await open_site.stored()


@pytest.mark.asyncio
async def test_many_on_a_broker_that_is_away(open_site: Site) -> None:
    """If nothing was attempted, that is what is raised, at once."""

    def refuse(_: Sequence[Message]) -> None:
        raise BrokerUnavailable("it is away")

    open_site.answer = refuse
    with pytest.raises(BrokerUnavailable, match="it is away"):
        await open_site.app.enqueue_many(open_site.messages(ids(2500)))
    assert len(open_site.broker.batches) == 1


@pytest.mark.asyncio
async def test_many_on_a_broker_that_goes_away(open_site: Site) -> None:
    """What was stored before is told, the rest is certainly not stored, and is not tried in vain."""

    def refuse(messages: Sequence[Message]) -> None:
        if messages[0].id != "m0":
            raise BrokerUnavailable("it is away")

    open_site.answer = refuse
    with pytest.raises(EnqueueManyError) as caught:
        await open_site.app.enqueue_many(open_site.messages(ids(3500)))
    assert list(caught.value.stored) == ids(1000)
    assert [failed.message.id for failed in caught.value.failed if failed.message] == ids(3500)[1000:]
    assert all(isinstance(failed.__cause__, BrokerUnavailable) for failed in caught.value.failed)
    assert len(open_site.broker.batches) == 2


@pytest.mark.asyncio
async def test_many_through_middleware_share_batches() -> None:
    """A chain around each message does not cost a round trip each; a broker that is away is told as such."""

    class Marks(Middleware):
        async def enqueue(self, outgoing: Outgoing, call_next: EnqueueNext) -> None:
            outgoing.headers["marked"] = "yes"
            await call_next(outgoing)

    site = Site(middleware=[Marks()])
    try:
        await site.app.enqueue_many(site.messages(ids(2500)))
        assert await site.stored() == ids(2500)
        assert len(site.broker.batches) <= 6
        refusal = [Refusal(0, QueueFull("full"))]
        site.answer = lambda messages: refusal
        with pytest.raises(EnqueueManyError) as caught:
            await site.app.enqueue_many(site.messages(["x", "y"]))
        assert (caught.value.stored, type(caught.value.failed[0])) == (["y"], QueueFull)

        def refuse(_: Sequence[Message]) -> None:
            raise BrokerUnavailable("it is away")

        site.answer = refuse
        with pytest.raises(BrokerUnavailable, match="it is away"):
            await site.app.enqueue_many(site.messages(["x", "y"]))
    finally:
        await site.app.close()
        memory.forget(site.name)


# --- limits ---------------------------------------------------------------------------------------


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x" * codec.MAX_BODY, "the limit is 1,048,576"),
        (nested(63), "nested 65 or more levels deep, the limit is 64"),
        ([0] * codec.MAX_ELEMENTS, "or more elements, the limit is 100,000"),
    ],
    ids=["size", "depth", "count"],
)
async def test_what_is_too_large_is_refused_before_anything_is_sent(site: Site, data: object, said: str) -> None:
    """Alone and among others, by size, depth and number of values: what a worker would not read is never sent."""
    with pytest.raises(MessageTooLarge, match=said) as caught:
        await site.job.options(id="big").enqueue(data)
    assert "a call of 'job', is too large" in str(caught.value)
    assert caught.value.message is not None
    assert caught.value.message.id == "big"
    with pytest.raises(MessageTooLarge):
        await site.app.enqueue_many([*site.messages(["a"]), *site.messages(["big"], data)])
    assert site.brokers == [], "no broker was even made"


@pytest.mark.asyncio
async def test_what_is_just_small_enough_is_sent(open_site: Site) -> None:
    """At the limits all is well."""
    plain = open_site.job.message("x" * 70_000).to_message(open_site.app.now_ms())
    text = "x" * (codec.MAX_BODY - len(plain.body) + 70_000)
    for data in (text, nested(62), [0] * (codec.MAX_ELEMENTS - 11)):
        await open_site.job.enqueue(data)
    for data in (text + "x", nested(63), [0] * (codec.MAX_ELEMENTS - 10)):
        with pytest.raises(MessageTooLarge):
            await open_site.job.enqueue(data)
    assert len(open_site.broker.batches) == 3


# --- opening and closing --------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_first_enqueues_open_one_broker() -> None:
    """However many come at once; the queues of the settings are declared."""
    site = Site(queues=[Queue("emails", max_ready=5), Queue("default", lease=45)])
    await asyncio.gather(*(site.job.enqueue() for _ in range(20)))
    assert site.broker.opened == 1
    assert [(spec.name, spec.max_ready, spec.lease) for spec in site.broker.declared] == [
        ("emails", 5, 30.0),
        ("default", None, 45.0),
    ]
    await site.app.close()
    memory.forget(site.name)


@pytest.mark.asyncio
async def test_a_broker_that_cannot_be_opened_is_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody who waited is told; the next enqueue starts anew."""

    async def refuse(self: Noted) -> None:
        raise BrokerUnavailable("it is away")

    with monkeypatch.context() as patch:
        patch.setattr(Noted, "open", refuse)
        outcomes = await asyncio.gather(*(site.job.enqueue() for _ in range(5)), return_exceptions=True)
        assert [str(outcome) for outcome in outcomes] == ["it is away"] * 5
        assert len(site.brokers) == 1
    await site.job.enqueue()
    await site.job.enqueue()
    assert len(site.brokers) == 2
    await site.app.close()


@pytest.mark.asyncio
async def test_a_broker_that_cannot_be_prepared_is_closed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """If declaring fails, nothing is left open."""

    async def refuse(self: Noted, queues: Sequence[QueueSpec]) -> None:
        raise BrokerUnavailable("it went away")

    monkeypatch.setattr(Noted, "declare", refuse)
    with pytest.raises(BrokerUnavailable, match="it went away"):
        await site.job.enqueue()
    assert not site.broker.is_open
    assert site.broker.closed


@pytest.mark.asyncio
async def test_close_waits_for_what_is_under_way(site: Site) -> None:
    """Nothing that was accepted is cut off, and nothing is left open."""
    gate = asyncio.Event()
    site.answer = lambda messages: gate.wait()
    call = asyncio.create_task(site.job.enqueue())
    async with asyncio.timeout(10):
        while not site.brokers or not site.broker.batches:
            await asyncio.sleep(0)
    closing = asyncio.create_task(site.app.close())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not closing.done()
    site.answer = lambda messages: None
    gate.set()
    await closing
    assert (await call).task == "job"
    assert not site.broker.is_open


@pytest.mark.asyncio
async def test_an_app_can_be_closed_twice_and_used_again(site: Site) -> None:
    """Closing is idempotent and harmless before the first use; a later enqueue opens another connection."""
    await site.app.close()
    await site.job.enqueue()
    await site.app.close()
    await site.app.close()
    assert not site.broker.is_open
    await site.job.enqueue()
    assert [broker.is_open for broker in site.brokers] == [False, True]
    await site.app.close()
    async with site.app as same:
        assert same is site.app
        assert len(site.brokers) == 3
        await site.job.enqueue()
    assert not any(broker.is_open for broker in site.brokers)
    assert len(await site.stored()) == 3


# --- loops ----------------------------------------------------------------------------------------


def test_each_loop_has_a_broker_of_its_own(site: Site) -> None:
    """Loops in several threads at once: each opens one, uses only its own and closes it."""
    together = threading.Barrier(4)

    async def work(number: int) -> None:
        together.wait(10)
        await asyncio.gather(*(site.job.options(id=f"{number}-{n}").enqueue() for n in range(20)))
        together.wait(10)
        await site.app.close()

    threads = [threading.Thread(target=lambda n=n: asyncio.run(work(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(site.brokers) == 4
    for broker in site.brokers:
        assert len({id.partition("-")[0] for batch in broker.batches for id in batch}) == 1
        assert (broker.opened, broker.is_open) == (1, False)
    assert len(asyncio.run(site.stored())) == 80


def test_a_program_that_forgets_to_close_is_closed_with_its_loop(site: Site) -> None:
    """asyncio.run ends the connection before it ends the loop; the next loop opens another."""

    async def main() -> None:
        await site.job.enqueue()

    asyncio.run(main())
    assert [broker.is_open for broker in site.brokers] == [False]
    asyncio.run(main())
    assert [broker.is_open for broker in site.brokers] == [False, False]
    assert len(asyncio.run(site.stored())) == 2


def test_an_enqueue_cut_off_by_the_end_of_its_loop_tells_so(site: Site) -> None:
    """A background task whose enqueue was under way when the loop was shut down is cancelled, not stuck."""
    ended: list[type[BaseException]] = []
    tasks: list[asyncio.Task[None]] = []

    async def background() -> None:
        try:
            await site.job.enqueue()
        except BaseException as error:
            ended.append(type(error))
            raise

    async def main() -> None:
        site.answer = lambda messages: asyncio.Event().wait()
        tasks.append(asyncio.create_task(background()))
        while not site.brokers or not site.broker.batches:
            await asyncio.sleep(0)

    asyncio.run(main())
    assert ended in ([asyncio.CancelledError], [EnqueueUnknown])
    assert not site.broker.is_open


def test_a_loop_that_died_without_a_word_is_forgotten(site: Site) -> None:
    """Even one that was closed hard: the next loop works, and the dead one is no longer held."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(site.job.enqueue())
    loop.close()
    opened = site.app.environment.producers._opened
    assert list(opened) == [loop]

    async def main() -> None:
        await site.job.enqueue()
        assert list(opened) == [asyncio.get_running_loop()]
        await site.app.close()

    asyncio.run(main())
    assert not opened
    assert len(site.brokers) == 2
    gc.collect()


@pytest.mark.asyncio
async def test_what_a_child_inherited_is_neither_used_nor_closed(site: Site) -> None:
    """After a fork the next enqueue opens another connection; the parent's stays as it is, also when the child closes its own."""
    await site.job.enqueue()
    site.app.environment.producers.forget()
    await site.job.enqueue()
    await site.app.close()
    assert [broker.is_open for broker in site.brokers] == [True, False]
    assert len(site.brokers[0].batches) == 1
    await site.brokers[0].close()


# --- sync twins -----------------------------------------------------------------------------------


def test_sync_twins_from_any_thread(site: Site) -> None:
    """Many threads at once share one connection, and their messages share batches."""
    together = threading.Barrier(16)
    handles: list[str] = []

    def work(number: int) -> None:
        together.wait(10)
        handles.extend(site.job.options(id=f"{number}-{n}").enqueue_sync().id for n in range(10))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    many = site.app.enqueue_many_sync(site.messages(["a", "b"]))
    assert [handle.id for handle in many] == ["a", "b"]
    assert len(handles) == 160
    assert site.broker.opened == 1
    assert len(asyncio.run(site.stored())) == 162
    site.app.close_sync()
    assert not site.broker.is_open
    assert site.job.enqueue_sync().task == "job"
    assert len(site.brokers) == 2
    site.app.close_sync()


def test_errors_reach_the_sync_caller(site: Site) -> None:
    """The same errors, with nothing of the machinery chained to them."""
    site.answer = lambda messages: [Refusal(0, QueueFull("full"))]
    with pytest.raises(QueueFull) as caught:
        site.job.enqueue_sync()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    with pytest.raises(MessageTooLarge):
        site.job.enqueue_sync("x" * codec.MAX_BODY)
    with pytest.raises(EnqueueManyError):
        site.app.enqueue_many_sync(site.messages(["a"]))
    site.app.close_sync()


@pytest.mark.asyncio
async def test_sync_twins_refuse_to_stop_a_running_loop(site: Site) -> None:
    """The text says what to do instead, nothing is sent, and no coroutine is left unawaited."""
    for call, instead in (
        (site.job.enqueue_sync, "await enqueue"),
        (lambda: site.app.enqueue_sync(site.job.message()), "await enqueue"),
        (lambda: site.app.enqueue_many_sync([site.job.message()]), "await enqueue_many"),
    ):
        with pytest.raises(SyncInAsyncContext, match=rf"would stop it: {instead}\(\.\.\.\)"):
            call()
    gc.collect()
    assert site.brokers == []
    handle = await asyncio.to_thread(site.job.enqueue_sync)
    assert await site.stored() == [handle.id]
    with pytest.raises(SyncInAsyncContext, match=r"await close\(\)"):
        site.app.close_sync()
    await asyncio.to_thread(site.app.close_sync)


def test_closing_the_twins_that_nobody_used_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread is made only to be told that there is nothing to close."""
    loop = PrivateLoop()
    monkeypatch.setattr("crossdock.app.private_loop", loop)
    App("memory://").close_sync()
    assert not loop.started


# --- memory ---------------------------------------------------------------------------------------


def test_apps_that_are_gone_are_gone() -> None:
    """Nothing keeps an App alive for the sake of forks."""

    def use() -> None:
        site = Site()

        async def main() -> None:
            await site.job.enqueue()
            await site.app.close()

        asyncio.run(main())
        memory.forget(site.name)

    gc.collect()
    before = list(_registered)  # what other tests left may go meanwhile
    use()
    gc.collect()
    assert not [each for each in _registered if not any(each is old for old in before)]
