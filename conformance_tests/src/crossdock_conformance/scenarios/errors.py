"""Errors and outcomes: whatever goes wrong is said in a sentence of ours, without secrets, and what failed never happens later."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, cast
from urllib.parse import urlsplit

from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    CrossdockError,
    EnqueueError,
    EnqueueFailed,
    EnqueueUnknown,
    LeaseLost,
    MessageTooLarge,
    NotFound,
)
from crossdock.spi import Ack, Broker, BrokerEvent, Cursor, Delivery, Nack, Priority, QueueSpec, Refusal, Replay, State
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun
from crossdock_conformance.scenario import listing, scenario

_NO_LEVEL: Final = cast(Priority, 5)

# --- failed is failed ------------------------------------------------------------------------------


@scenario()
async def what_failed_never_happens(broker: Broker, lab: Lab) -> None:
    """A message that was refused with `EnqueueFailed` is stored nowhere, and is not delivered later when there would be room."""
    await lab.declare(broker, QueueSpec("full", lease=lab.lease, max_ready=2))
    batch = [
        lab.message("big", body=bytes(broker.capabilities.max_body + 1)),
        lab.message("fits"),
        lab.message("no-level", priority=_NO_LEVEL),
        *(lab.message(f"full{number}", "full") for number in range(30)),
    ]
    refused = lab.errors(await broker.enqueue(batch))
    assert issubclass(refused[0], MessageTooLarge)
    assert issubclass(refused[2], EnqueueFailed)
    assert all(issubclass(error, EnqueueFailed) for error in refused.values())
    stored = [message for index, message in enumerate(batch) if index not in refused]
    for queue in ("q", "full"):
        expected = sorted(message.id for message in stored if message.queue == queue)
        taken = await lab.take_exactly(broker, len(expected), queue)
        assert sorted(delivery.message.id for delivery in taken) == expected
        await lab.settle(broker, *map(Ack, taken))
    await lab.pass_time(lab.moment)
    for queue in ("q", "full"):
        assert not await lab.take(broker, queue=queue), "what was refused came later"
        await lab.holds(broker, {}, queue)


# --- nonsense --------------------------------------------------------------------------------------

_WITHIN_THE_RULES: Final[dict[str, dict[str, Any]]] = {
    "id of one character": {"id": "-"},
    "id of 64 characters": {"id": "_" + "Az-9" * 15 + "end"},
    "queue of one character": {"queue": "0"},
    "queue of 63 characters": {"queue": "Q" + "_-" * 31},
    "eta in 1970": {"eta_ms": 1},
    "eta before 1970": {"eta_ms": -1_000_000},
    "negative delay": {"delay_ms": -1},
    "generation of a million": {"generation": 1_000_000},
}
_BEYOND_ALL_USE: Final[dict[str, dict[str, Any]]] = {
    "eta in the year 30000": {"eta_ms": 10**15},
    "eta of 63 bits": {"eta_ms": 2**63 - 1},
    "eta of 70 bits": {"eta_ms": 2**70},
    "eta of minus 70 bits": {"eta_ms": -(2**70)},
    "delay of 30000 years": {"delay_ms": 10**15},
    "delay of 63 bits": {"delay_ms": 2**63 - 1},
    "delay of 70 bits": {"delay_ms": 2**70},
    "delay of minus 70 bits": {"delay_ms": -(2**70)},
    "eta and delay": {"eta_ms": 10**15, "delay_ms": 10**15},
    "generation of 63 bits": {"generation": 2**63 - 1},
    "generation of 70 bits": {"generation": 2**70},
    "negative generation": {"generation": -1},
    "priority between levels": {"priority": _NO_LEVEL},
    "negative priority": {"priority": -1},
    "priority of 70 bits": {"priority": 2**70},
}


@scenario(fields=_WITHIN_THE_RULES)
async def extreme_messages_are_stored(broker: Broker, lab: Lab, fields: Mapping[str, Any]) -> None:
    """Ids and queue names at the limits of their grammar are stored like others, and times of the past mean now."""
    message = lab.message(**fields)
    await lab.enqueue(broker, message)
    found = (await lab.take_one(broker, message.queue)).message
    assert (found.id, found.queue, found.body, found.generation) == (message.id, message.queue, message.body, message.generation)


@scenario(fields=_BEYOND_ALL_USE)
async def absurd_messages_are_stored_or_refused(broker: Broker, lab: Lab, fields: Mapping[str, Any]) -> None:
    """A message with numbers beyond all use is stored, or refused as certainly not stored; its neighbours are stored in any case."""
    await lab.enqueue(broker, lab.message("first"))
    refused = lab.errors(await broker.enqueue([lab.message("before"), lab.message("odd", **fields), lab.message("after")]))
    assert set(refused) <= {1}, "a neighbour was refused"
    assert not any(issubclass(error, EnqueueUnknown) for error in refused.values())
    taken = {delivery.message.id for delivery in await lab.take(broker)}
    assert taken - {"odd"} == {"first", "before", "after"}
    assert not refused or "odd" not in taken, "it was refused, and stored"
    later = [] if refused or "odd" in taken else ["odd"]
    await lab.holds(broker, {State.LEASED: sorted(taken), State.SCHEDULED: later}, in_order=False)


_Call = Callable[[Broker, Lab, Delivery], Awaitable[object]]
_ODD_IDS: Final = [
    "",
    " ",
    "a/b",
    "ä",
    "\0",
    "\n",
    "*",
    ">",
    "%s",
    "'; DROP TABLE message; --",
    "x" * 10_000,
    "\ud800",
    "{}",
    "[1]",
]
_ODD_CALLS: Final[dict[str, _Call]] = {
    "receive no more than 0": lambda broker, lab, delivery: broker.receive(lab.lanes("none"), 0, 0),
    "receive no more than -1": lambda broker, lab, delivery: broker.receive(lab.lanes("none"), -1, 0),
    "receive up to a billion": lambda broker, lab, delivery: broker.receive(lab.lanes("none"), 10**9, 0),
    "receive up to 70 bits": lambda broker, lab, delivery: broker.receive(lab.lanes("none"), 2**70, 0),
    "wait for less than nothing": lambda broker, lab, delivery: broker.receive(lab.lanes("none"), 1, -1.0),
    "quota of 70 bits": lambda broker, lab, delivery: broker.receive(lab.lanes("none", quota=2**70), 1, 0),
    "negative quota": lambda broker, lab, delivery: broker.receive(lab.lanes("none", quota=-1), 1, 0),
    "no lanes": lambda broker, lab, delivery: broker.receive([], 1, 0),
    "lanes of 500 queues": lambda broker, lab, delivery: broker.receive(lab.lanes(*_names(500)), 1, 0),
    "extend twice": lambda broker, lab, delivery: broker.extend([delivery, delivery]),
    "extend made-up deliveries": lambda broker, lab, delivery: broker.extend(_made_up(delivery)),
    "settle made-up deliveries": lambda broker, lab, delivery: broker.settle([Ack(one) for one in _made_up(delivery)]),
    "stats of nothing": lambda broker, lab, delivery: broker.stats([]),
    "stats of one queue twice": lambda broker, lab, delivery: broker.stats(["q", "q"]),
    "stats of 1000 queues": lambda broker, lab, delivery: broker.stats(_names(1000)),
    "stats of odd names": lambda broker, lab, delivery: broker.stats(_ODD_IDS),
    "a page of 0": lambda broker, lab, delivery: broker.peek("q", State.DEAD, limit=0),
    "a page of -1": lambda broker, lab, delivery: broker.peek("q", State.DEAD, limit=-1),
    "a page of 70 bits": lambda broker, lab, delivery: broker.peek("q", State.DEAD, limit=2**70),
    "peek by odd ids": lambda broker, lab, delivery: broker.peek("q", State.DEAD, ids=_ODD_IDS),
    "peek by 5000 ids": lambda broker, lab, delivery: broker.peek("q", State.DEAD, ids=_names(5000)),
    "remove odd ids": lambda broker, lab, delivery: broker.remove("q", State.DEAD, _ODD_IDS),
    "remove one id twice": lambda broker, lab, delivery: broker.remove("q", State.DEAD, ["x", "x"]),
    "replay odd ids": lambda broker, lab, delivery: broker.replay("q", [Replay(id, lab.message("odd")) for id in _ODD_IDS]),
    "purge an unknown queue": lambda broker, lab, delivery: broker.purge("none", State.READY),
    "purge a queue of an odd name": lambda broker, lab, delivery: broker.purge("a*b>c d/ä", State.DEAD),
    "declare a lease of 30000 years": lambda broker, lab, delivery: lab.declare(broker, QueueSpec("none", lease=1e12)),
    "declare an endless lease": lambda broker, lab, delivery: lab.declare(broker, QueueSpec("none", lease=math.inf)),
    "declare room for nothing": lambda broker, lab, delivery: lab.declare(broker, QueueSpec("none", max_ready=0)),
    "declare room for 70 bits": lambda broker, lab, delivery: lab.declare(broker, QueueSpec("none", max_ready=2**70)),
    "declare no retention": lambda broker, lab, delivery: lab.declare(
        broker, QueueSpec("none", dead_max_age=0.0, dead_max_count=0)
    ),
    "declare endless retention": lambda broker, lab, delivery: lab.declare(broker, QueueSpec("none", dead_max_age=math.inf)),
    "declare 300 queues": lambda broker, lab, delivery: lab.declare(broker, *[QueueSpec("none")] * 300),
}


def _names(count: int) -> list[str]:
    return [f"none{number}" for number in range(count)]


def _made_up(delivery: Delivery) -> list[Delivery]:
    receipts: list[object] = [None, 0, -1, 2**70, "", "1", b"1", (), (1, 2), object(), Delivery, delivery.lease_until]
    return [Delivery(delivery.message, 1, delivery.lease_until, receipt) for receipt in receipts]


@scenario(call=_ODD_CALLS)
async def odd_calls_end_well(broker: Broker, lab: Lab, call: _Call) -> None:
    """Whatever a verb is given, it answers or raises one of our errors, nothing is lost, and the Broker goes on working."""
    queue = "long"  # whose leases no slow call outlasts
    await lab.enqueue(broker, lab.message("held", queue))
    delivery = await lab.take_one(broker, queue)
    await lab.enqueue(broker, lab.message("ready", queue))
    await _ends_well(lab, call(broker, lab, delivery))
    await lab.settle(broker, Ack(delivery))
    rest = await lab.take_one(broker, queue)
    assert rest.message.id == "ready"
    await lab.settle(broker, Ack(rest))
    await lab.holds(broker, {}, queue)


@scenario(delay={"-1 s": -1.0, "30000 years": 1e12, "a quintillion s": 1e18, "for ever": math.inf})
async def absurd_delays_lose_nothing(broker: Broker, lab: Lab, delay: float) -> None:
    """Given back or retried with a delay beyond all use, a message is delayed, or stays with its holder; it is not lost."""
    await lab.enqueue(broker, lab.message("back"), lab.message("retried"))
    deliveries = {delivery.message.id: delivery for delivery in await lab.take_exactly(broker, 2)}
    for settlement in (Nack(deliveries["back"], delay), lab.retry(deliveries["retried"], delay)):
        await _ends_well(lab, broker.settle([settlement]))

    async def both_are_there() -> None:
        stats = await lab.stats(broker)
        counts = [stats.ready, stats.scheduled, stats.leased]
        assert None in counts or sum(filter(None, counts)) == 2, f"of 2 messages are left: {stats}"

    await lab.eventually(both_are_there)


@scenario(wait={"30 years": 1e9, "for ever": math.inf})
async def endless_waits_end_with_a_message(broker: Broker, lab: Lab, wait: float) -> None:
    """A receive that would wait for ever returns at the first message like any other."""
    async with lab.waiting(broker, wait=wait) as receive:
        await lab.enqueue(broker, lab.message("m"))
    assert [delivery.message.id for delivery in receive.result()] == ["m"]


@scenario(seconds=120)
async def huge_batches(broker: Broker, lab: Lab) -> None:
    """A batch of 5,000 items is done in one call, item by item."""
    messages = lab.messages(5000, queue="long")
    await lab.enqueue(broker, *messages)
    deliveries = await lab.take_exactly(broker, 5000, "long")
    assert {delivery.message.id for delivery in deliveries} == {message.id for message in messages}
    lab.nothing_refused(await broker.extend(deliveries))
    acked, buried, back = deliveries[:2000], deliveries[2000:4000], deliveries[4000:]
    await lab.settle(broker, *map(Ack, acked), *map(lab.dead, buried), *map(Nack, back))
    refused = lab.errors(await broker.settle(list(map(Nack, acked))))
    assert refused == dict.fromkeys(range(2000), LeaseLost)
    await lab.replay(broker, *(lab.revived(delivery.message) for delivery in buried), queue="long")
    assert len(await lab.take_exactly(broker, 3000, "long")) == 3000


async def _ends_well(lab: Lab, verb: Awaitable[object]) -> None:
    """Fail unless it returns, or raises one of our errors, in time and with a sentence."""
    outcome = await _outcome(lab, verb)
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, CrossdockError), f"a foreign exception escaped: {outcome!r}"
        _check_sentence(outcome)
    elif isinstance(outcome, Sequence):
        refusals = [one for one in cast("Sequence[object]", outcome) if isinstance(one, Refusal)]
        lab.errors(refusals)
        for refusal in refusals:
            _check_sentence(refusal.error)


async def _outcome(lab: Lab, verb: Awaitable[object]) -> object:
    """What it returned or raised; fails if it hangs."""
    task = asyncio.ensure_future(verb)
    _, hanging = await asyncio.wait([task], timeout=lab.patience)
    task.cancel()
    assert not hanging, "it hangs"
    return task.exception() or task.result()


# --- texts -----------------------------------------------------------------------------------------


@scenario()
async def texts_are_sentences(broker: Broker, lab: Lab) -> None:
    """Every error says in one sentence what happened; one about a message to be stored carries that message."""
    batch = [lab.message("big", body=bytes(broker.capabilities.max_body + 1)), lab.message("no-level", priority=_NO_LEVEL)]
    for refusal in (refusals := await broker.enqueue(batch)):
        _check_sentence(refusal.error)
        assert isinstance(refusal.error, EnqueueError)
        assert refusal.error.message == batch[refusal.index], "the error does not carry its message"
    assert len(refusals) == 2
    await lab.enqueue(broker, lab.message("m"))
    delivery = await lab.take_one(broker)
    await lab.settle(broker, Ack(delivery))
    for error, refused in (
        (LeaseLost, await broker.settle([Nack(delivery)])),
        (LeaseLost, await broker.extend([delivery])),
        (NotFound, await broker.remove("q", State.DEAD, ["nothing"])),
        (NotFound, await broker.replay("q", [Replay("nothing", lab.message())])),
    ):
        (refusal,) = refused
        assert type(refusal.error) is error
        _check_sentence(refusal.error)
    await broker.close()
    closed = await _outcome(lab, broker.stats())
    assert isinstance(closed, BrokerClosed)
    _check_sentence(closed)


@scenario(
    needs=[listing(State.DEAD)],
    text={"empty": "", "a letter": "x", "an escape": "%00", "brackets": "[]", "beyond ASCII": "ä", "1000 digits": "9" * 1000},
)
async def what_is_no_cursor_is_refused(broker: Broker, lab: Lab, text: str) -> None:
    """A cursor that no listing gave out raises `ConfigurationError`."""
    await lab.bury(broker, lab.message("dead"))
    outcome = await _outcome(lab, broker.peek("q", State.DEAD, after=Cursor(text)))
    assert isinstance(outcome, ConfigurationError), f"a made-up cursor led to {outcome!r}"
    _check_sentence(outcome)


def _check_sentence(error: BaseException) -> None:
    text = str(error)
    assert len(text.split()) >= 4, f"{type(error).__name__} says only {text!r}"
    assert "\n" not in text, f"{type(error).__name__} has more than a line to say: {text!r}"
    assert "Traceback" not in text
    assert " object at 0x" not in text, f"{type(error).__name__} shows an object: {text!r}"


# --- secrets and causes ----------------------------------------------------------------------------

_SECRET: Final = "Sesame9f2c41"
_ENCODED: Final = f"p%40{_SECRET}%2F"


def _at(url: str, credentials: str, address: str = "") -> str:
    parts = urlsplit(url)
    host = address or parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{credentials}@{host}{parts.path}" + (f"?{parts.query}" if parts.query else "")


def _unreachable(url: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return _at(url, f"guest:{_ENCODED}", f"127.0.0.1:{free.getsockname()[1]}")


_PLACES: Final[dict[str, Callable[[str], str]]] = {
    "password": lambda url: _at(url, f"guest:{_ENCODED}"),
    "token": lambda url: _at(url, _ENCODED),
    "unknown option": lambda url: f"{url}{'&' if '?' in url else '?'}zz-top={_ENCODED}",
    "password for a server that is not there": _unreachable,
}


@scenario(place=_PLACES)
async def secrets_stay_secret(lab: Lab, place: Callable[[str], str]) -> None:
    """A password, a token or the value of an unknown option in the URL shows in no error, event, representation or log."""
    target = replace(lab.target, url=place(lab.target.url))
    events: list[BrokerEvent] = []
    with _logged() as texts:
        try:
            broker = target.make_broker(lab.namespace, lab.clock, events.append)
        except ConfigurationError as error:
            texts += _told_by(error)
        else:
            outcome = await _outcome(lab, broker.open())
            texts += [str(broker), repr(broker)]
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, CrossdockError), f"a foreign exception escaped: {type(outcome).__name__}"
                texts += _told_by(outcome)
            else:
                texts += [repr(broker.capabilities), repr(await broker.stats(["q"]))]
            await broker.close()
        texts += map(repr, events)
    for text in texts:
        assert _SECRET not in text, f"the secret shows: {text}"


@scenario()
async def causes_are_kept(lab: Lab) -> None:
    """An error that comes from the network or the driver carries theirs as its cause."""
    target = replace(lab.target, url=_unreachable(lab.target.url))
    try:
        broker = target.make_broker(lab.namespace, lab.clock)
    except ConfigurationError as error:
        raise NotRun("the URL names no server that could be absent") from error
    outcome = await _outcome(lab, broker.open())
    await broker.close()
    assert isinstance(outcome, BrokerUnavailable), f"with nobody there, open() came up with {outcome!r}"
    assert outcome.__cause__ is not None, "nobody knows why"


@contextmanager
def _logged() -> Generator[list[str]]:
    """Collect what is logged, as people would see it."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger().removeHandler(handler)


def _told_by(error: BaseException | None) -> list[str]:
    """All that a traceback would show of an error and what led to it."""
    texts: list[str] = []
    while error is not None:
        texts += [str(error), repr(error)]
        error = error.__cause__ or error.__context__
    return texts
