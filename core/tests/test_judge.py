"""The Judge: how every delivery begins and ends, row by row of the promises."""

from __future__ import annotations

import asyncio
import json
import math
import random
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from crossdock import App, Queue, Reject, RetryLater, RetryPolicy, Snooze, codec
from crossdock.clock import VirtualClock
from crossdock.codec import Envelope, Failure
from crossdock.errors import TaskCancelled, TaskTimeout
from crossdock.events import Event
from crossdock.execution import Execution, Judge
from crossdock.letters import read_story
from crossdock.retry import LONGEST, Backoff
from crossdock.spi import MAX_STORY_BYTES, Ack, Dead, Delivery, Message, Nack, Priority, Reason, Settlement

DAY = 24 * 3600.0


class Court:
    """A Judge over an App with one task, `job`, and the deliveries it is shown."""

    def __init__(
        self, *, retry: RetryPolicy | None = None, queue: Queue | None = None, app_retry: RetryPolicy | None = None
    ) -> None:
        self.clock = VirtualClock()
        self.app = App("memory://", queues=[queue or Queue("default")], clock=self.clock, retry=app_retry)
        self.told: list[Event] = []
        for name in ("task_started", "task_succeeded", "task_retried", "task_snoozed", "task_dead_lettered", "task_expired"):
            self.app.on(name)(self.told.append)  # type: ignore[arg-type]
        self.app.on("task_returned")(self.told.append)

        @self.app.task(name="job", retry=retry)
        async def job(n: int = 0) -> None: ...

        self.job = job
        self.judge = Judge(
            self.app.tasks,
            self.app.queue,
            default_retry=self.app.retry,
            worker="w-1",
            clock=self.clock,
            rng=random.Random(1),
            events=self.app.events,
        )

    def deliver(self, body: bytes | None = None, *, count: int = 1, **options: Any) -> Delivery:
        """A delivery of this body, or of a call of `job` with options."""
        message = self.job.options(**options).message(1).to_message(self.clock.time_ms())
        if body is not None:
            message = msgspec.structs.replace(message, body=body)
        message = msgspec.structs.replace(message, id="m-1", generation=6)
        return Delivery(message, count, math.inf, object())

    def begin(self, delivery: Delivery) -> Execution:
        """Begin one that is to run."""
        begun = self.judge.begin(delivery)
        assert isinstance(begun, Execution)
        return begun

    def fail(self, error: BaseException, delivery: Delivery | None = None) -> Settlement:
        """What becomes of a delivery whose handler raised this."""
        try:
            raise error
        except BaseException as caught:
            return self.judge.failed(self.begin(delivery or self.deliver()), caught)

    def again(self, settlement: Settlement) -> tuple[float, Delivery]:
        """The delay of a retry, and its next delivery, with the clock at that time."""
        assert isinstance(settlement, Nack)
        assert settlement.replacement is not None
        self.clock.advance(settlement.delay)
        return settlement.delay, Delivery(settlement.replacement, 1, math.inf, object())

    def names(self) -> list[str]:
        """What observers were told."""
        return [event.name for event in self.told]


def letter_of(settlement: Settlement | Execution) -> Any:
    """The dead letter, with its story beside it."""
    assert isinstance(settlement, Dead)
    assert settlement.letter.message is settlement.delivery.message
    return settlement.letter


def envelope_of(settlement: Settlement) -> Envelope:
    """The envelope of a replacement."""
    assert isinstance(settlement, Nack)
    assert settlement.replacement is not None
    return codec.decode(settlement.replacement.body)


# --- a normal life --------------------------------------------------------------------------------


def test_a_delivery_is_run_and_acknowledged() -> None:
    """Its arguments are decoded, observers are told, and the end is an Ack of just this delivery."""
    court = Court()
    delivery = court.deliver(timeout=5)
    execution = court.begin(delivery)
    assert execution.arguments == {"n": 1}
    assert (execution.task, execution.id, execution.attempt, execution.delivery_count) == ("job", "m-1", 1, 1)
    assert (execution.started, execution.deadline) == (0.0, 5.0)
    court.clock.advance(3)
    assert court.judge.succeeded(execution) == Ack(delivery)
    assert court.names() == ["task_started", "task_succeeded"]
    assert court.told[-1].seconds == 3


def test_a_failure_is_retried_with_its_history() -> None:
    """The replacement has the next attempt, the failure with its time, a higher generation and all else as it was."""
    court = Court(retry=RetryPolicy.fixed(3, 60))
    first = court.deliver(headers={"a": "b"}, priority=9)
    settlement = court.fail(ValueError("no"), first)
    assert isinstance(settlement, Nack)
    assert settlement.delay == 60
    replacement = settlement.replacement
    assert replacement is not None
    assert (replacement.id, replacement.queue, replacement.priority) == ("m-1", "default", Priority.CRITICAL)
    assert (replacement.generation, replacement.eta_ms, replacement.delay_ms) == (7, 0, 0)
    envelope = envelope_of(settlement)
    assert envelope.attempt == 2
    assert envelope.failures == [Failure(1, court.clock.time_ms(), "ValueError", "no", "w-1")]
    assert envelope.headers == {"a": "b"}
    assert codec.arguments(replacement.body) == {"n": 1}


def test_the_last_failure_is_dead_lettered_with_every_attempt() -> None:
    """`max_attempts` counts the first one."""
    court = Court(retry=RetryPolicy.fixed(3, 60))
    _, second = court.again(court.fail(ValueError("first")))
    _, third = court.again(court.fail(TypeError("second"), second))
    letter = letter_of(court.fail(OSError("third"), third))
    story = read_story(letter)
    assert (letter.reason, letter.task, letter.error_type) == (Reason.ATTEMPTS_EXHAUSTED, "job", "OSError")
    assert [(failure.attempt, failure.error_type, failure.text) for failure in story.attempts] == [
        (1, "ValueError", "first"),
        (2, "TypeError", "second"),
        (3, "OSError", "third"),
    ]
    assert [failure.at_ms - court.clock.time_ms() for failure in story.attempts] == [-120_000, -60_000, 0]
    assert (story.attempt, story.worker, story.origin, story.text) == (3, "w-1", "default", "third")
    assert court.names() == ["task_started", "task_retried"] * 2 + ["task_started", "task_dead_lettered"]


def test_a_give_back_changes_nothing() -> None:
    """Not run or interrupted by our own shutdown: the same bytes, no attempt, no delay."""
    court = Court()
    delivery = court.deliver()
    assert court.judge.returned(delivery) == Nack(delivery)
    assert court.names() == ["task_returned"]


# --- what does not run ----------------------------------------------------------------------------

BROKEN = [
    b"",
    b"\xc1",
    b"not an envelope",
    b"{",
    random.Random(2).randbytes(300),
    b"\x91" * 1000,
    b'{"v": 1, "task": "job", "attempt": 0}',
]


@pytest.mark.parametrize("body", BROKEN)
def test_what_does_not_decode_is_dead_lettered_raw(body: bytes) -> None:
    """With its bytes as they are, and no task or attempt made up."""
    court = Court()
    letter = letter_of(court.judge.begin(court.deliver(body)))
    assert (letter.reason, letter.task, letter.message.body) == (Reason.UNDECODABLE, "", body)
    assert letter.error_type == "crossdock.errors.Undecodable"
    assert read_story(letter).attempts == []
    assert court.names() == ["task_dead_lettered"]


def test_a_newer_version_is_dead_lettered_raw() -> None:
    """Under a reason of its own, so that it can be replayed after the upgrade."""
    body = msgspec.msgpack.encode({"v": 2, "task": {"name": "job"}})
    letter = letter_of(Court().judge.begin(Court().deliver(body)))
    assert (letter.reason, letter.message.body) == (Reason.UNSUPPORTED_VERSION, body)
    assert "upgrade the worker" in read_story(letter).text


@pytest.mark.parametrize("body", [*BROKEN, msgspec.msgpack.encode({"v": 2})])
def test_bytes_nobody_can_read_are_judged_before_their_count(body: bytes) -> None:
    """They are what they are, however often they were delivered."""
    letter = letter_of(Court().judge.begin(Court().deliver(body, count=100)))
    assert letter.reason in (Reason.UNDECODABLE, Reason.UNSUPPORTED_VERSION)


def test_an_expired_task_is_dead_lettered_by_default() -> None:
    """From the very instant on; it counts no failed attempt and is told to observers as expired too."""
    court = Court()
    delivery = court.deliver(expires=10)
    court.clock.advance(9.999)
    assert isinstance(court.judge.begin(delivery), Execution)
    court.clock.advance(0.001)
    assert letter_of(court.judge.begin(delivery)).reason is Reason.EXPIRED
    court.clock.advance(1.5)
    letter = letter_of(court.judge.begin(delivery))
    assert read_story(letter).text == "received 1.500 s after it had expired"
    assert read_story(letter).attempts == []
    assert court.names()[1:3] == ["task_expired", "task_dead_lettered"]


def test_an_expired_task_is_dropped_where_the_queue_says_so() -> None:
    """Counted all the same: observers are told."""
    court = Court(queue=Queue("default", on_expired="drop"))
    delivery = court.deliver(expires=10)
    court.clock.advance(10)
    assert court.judge.begin(delivery) == Ack(delivery)
    assert court.names() == ["task_expired"]
    assert court.told[0].detail == "drop"


def test_expiry_holds_for_retries_and_unknown_tasks_too() -> None:
    """It is judged at each receipt, before anything else is looked at."""
    court = Court(retry=RetryPolicy.fixed(5, 60))
    _, second = court.again(court.fail(ValueError(), court.deliver(expires=30)))
    assert letter_of(court.judge.begin(second)).reason is Reason.EXPIRED
    body = json.dumps({"v": 1, "task": "nobody", "expires_ms": court.clock.time_ms()}).encode()
    assert letter_of(court.judge.begin(court.deliver(body))).reason is Reason.EXPIRED


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_too_many_deliveries_are_poison(limit: int) -> None:
    """The last allowed one still runs; one more is dead-lettered without being run, and no failed attempt is made up."""
    court = Court(queue=Queue("default", max_deliveries=limit))
    assert isinstance(court.judge.begin(court.deliver(count=limit)), Execution)
    letter = letter_of(court.judge.begin(court.deliver(count=limit + 1)))
    story = read_story(letter)
    assert (letter.reason, letter.error_type, story.delivery_count, story.attempts) == (Reason.POISON, "", limit + 1, [])
    assert story.text == f"delivered {limit + 1} times without an ending; the limit is {limit}"
    assert court.names() == ["task_started", "task_dead_lettered"]


def test_poison_is_judged_before_the_task_is_known() -> None:
    """A message that kills workers of every kind does not circle for a day first."""
    court = Court()
    body = codec.encode(Envelope(1, "nobody"))
    assert letter_of(court.judge.begin(court.deliver(body, count=4))).reason is Reason.POISON


@pytest.mark.parametrize(
    "args", [{"n": "one"}, {"n": 1, "m": 2}, [1], None, {"n": None}], ids=["type", "unknown", "list", "null", "none"]
)
@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, msgspec.json.encode], ids=["msgpack", "json"])
def test_arguments_that_do_not_fit_are_dead_lettered(args: object, encode: Callable[[object], bytes]) -> None:
    """They are not retried, since they will never fit, and the task and its history are told."""
    court = Court()
    body = encode({"v": 1, "task": "job", "args": args, "attempt": 2, "failures": [{"attempt": 1, "at_ms": 1, "error_type": "E"}]})
    letter = letter_of(court.judge.begin(court.deliver(body)))
    story = read_story(letter)
    assert (letter.reason, letter.task, letter.message.body) == (Reason.INVALID_PAYLOAD, "job", body)
    assert letter.error_type == "crossdock.errors.InvalidArguments"
    assert (story.attempt, len(story.attempts)) == (2, 1)
    assert "task 'job': " in story.text


def test_a_task_whose_annotations_cannot_travel_is_an_invalid_payload() -> None:
    """The worker lives; the message is kept for when the program is repaired."""
    court = Court()

    @court.app.task(name="bad")
    def bad(x: complex) -> None: ...

    letter = letter_of(court.judge.begin(court.deliver(codec.encode(Envelope(1, "bad")))))
    assert (letter.reason, letter.error_type) == (Reason.INVALID_PAYLOAD, "crossdock.errors.InvalidTask")


# --- unknown tasks --------------------------------------------------------------------------------


@pytest.mark.parametrize("encode", [msgspec.msgpack.encode, msgspec.json.encode], ids=["msgpack", "json"])
def test_an_unknown_task_waits_for_a_worker_that_knows_it(encode: Callable[[object], bytes]) -> None:
    """It is stored again, due in 10 s, with the time it was first seen, for 24 h; then it is dead-lettered. No attempt is spent."""
    court = Court()
    first_seen = court.clock.time_ms()
    delivery = court.deliver(encode({"v": 1, "task": "nobody", "args": {"n": 1}, "attempt": 2, "other": [1]}))
    rounds = 0
    while True:
        begun = court.judge.begin(delivery)
        if isinstance(begun, Dead):
            break
        assert isinstance(begun, Nack)
        envelope = envelope_of(begun)
        assert (envelope.unknown_since_ms, envelope.attempt, envelope.failures) == (first_seen, 2, [])
        delay, delivery = court.again(begun)
        rounds += 1
        assert delay == 10.0
        assert delivery.message.generation == 6 + rounds
    assert court.clock.monotonic() == DAY
    assert rounds == DAY / 10
    letter = letter_of(begun)
    assert (letter.reason, letter.task, letter.error_type) == (Reason.UNKNOWN_TASK, "nobody", "crossdock.errors.UnknownTask")
    assert read_story(letter).text == "no worker of this queue has had a task 'nobody' for 24 hours"
    assert b"other" in letter.message.body


def test_a_task_that_becomes_known_runs_and_forgets_the_wait() -> None:
    """The arriving deploy runs it at its attempt; a later failure starts with a clean slate."""
    court = Court(retry=RetryPolicy.fixed(3, 1.0))
    _, delivery = court.again(court.judge.begin(court.deliver(codec.encode(Envelope(1, "new")))))  # type: ignore[arg-type]

    @court.app.task(name="new")
    async def new() -> None: ...

    execution = court.begin(delivery)
    assert execution.attempt == 1
    assert envelope_of(court.judge.failed(execution, ValueError())).unknown_since_ms == 0


def test_a_first_sight_in_the_future_is_now() -> None:
    """Another worker's wrong clock, or somebody's prank, does not make it circle for ever."""
    court = Court()
    body = codec.encode(Envelope(1, "nobody", unknown_since_ms=court.clock.time_ms() + 10**11))
    begun = court.judge.begin(court.deliver(body))
    assert isinstance(begun, Nack)
    assert envelope_of(begun).unknown_since_ms == court.clock.time_ms()


# --- policies -------------------------------------------------------------------------------------

CALL = RetryPolicy.fixed(9, 1.0)
TASK = RetryPolicy.fixed(9, 2.0)
QUEUE = RetryPolicy.fixed(9, 3.0)
APP = RetryPolicy.fixed(9, 5.0)


@pytest.mark.parametrize(
    ("call", "task", "queue", "app", "delay"),
    [
        (CALL, TASK, QUEUE, APP, 1.0),
        (None, TASK, QUEUE, APP, 2.0),
        (None, None, QUEUE, APP, 3.0),
        (None, None, None, APP, 5.0),
        (CALL, None, None, None, 1.0),
        (None, TASK, None, None, 2.0),
    ],
)
def test_the_nearest_policy_counts(
    call: RetryPolicy | None, task: RetryPolicy | None, queue: RetryPolicy | None, app: RetryPolicy | None, delay: float
) -> None:
    """Call, then task, then queue, then App."""
    court = Court(retry=task, queue=Queue("default", retry=queue), app_retry=app)
    delivery = court.deliver(**({"retry": call} if call else {}))
    settlement = court.fail(ValueError(), delivery)
    assert isinstance(settlement, Nack)
    assert settlement.delay == delay


def test_the_default_policy() -> None:
    """Where nobody states one: exponential with full jitter, five attempts in all."""
    court = Court()
    delivery, delays = court.deliver(), []
    while isinstance(settlement := court.fail(ValueError(), delivery), Nack):
        delay, delivery = court.again(settlement)
        delays.append(delay)
    assert len(delays) == 4
    assert all(0 <= delay <= ceiling for delay, ceiling in zip(delays, (2, 4, 8, 16), strict=True))


def test_a_queues_number_of_attempts() -> None:
    """It holds for tasks that state no policy, and gives way to any that does."""
    court = Court(queue=Queue("default", max_attempts=2), app_retry=APP)
    _, second = court.again(court.fail(ValueError()))
    assert isinstance(court.fail(ValueError(), second), Dead)
    stated = Court(queue=Queue("default", max_attempts=2), retry=TASK)
    _, second = stated.again(stated.fail(ValueError()))
    assert isinstance(stated.fail(ValueError(), second), Nack)
    both = Court(queue=Queue("default", max_attempts=2, retry=QUEUE))
    _, second = both.again(both.fail(ValueError()))
    assert isinstance(both.fail(ValueError(), second), Nack)


def test_a_calls_policy_keeps_the_tasks_rules_about_exceptions() -> None:
    """A call changes numbers only."""
    court = Court(retry=RetryPolicy.exponential(no_retry_on=(KeyError,)))
    assert isinstance(court.fail(KeyError(), court.deliver(retry=CALL)), Dead)
    assert isinstance(court.fail(ValueError(), court.deliver(retry=CALL)), Nack)


@pytest.mark.parametrize("kind", ["timeout of the call", "of the task", "of the queue", "none"])
def test_the_nearest_timeout_counts(kind: str) -> None:
    """Call, then task, then queue, else none."""
    court = Court(queue=Queue("default", timeout=None if kind == "none" else 30))
    court.job.timeout = 20 if kind in ("timeout of the call", "of the task") else None
    delivery = court.deliver(**({"timeout": 10} if kind == "timeout of the call" else {}))
    expected = {"timeout of the call": 10.0, "of the task": 20.0, "of the queue": 30.0, "none": None}[kind]
    assert court.begin(delivery).deadline == expected


def test_give_up_after_counts_from_the_first_enqueue_over_all_attempts() -> None:
    """With the time the message says it was enqueued; a producer that does not say has no age."""
    court = Court(retry=RetryPolicy.fixed(100, 60, give_up_after=150))
    _, second = court.again(court.fail(ValueError()))
    _, third = court.again(court.fail(ValueError(), second))
    assert letter_of(court.fail(ValueError(), third)).reason is Reason.ATTEMPTS_EXHAUSTED
    silent = codec.encode(Envelope(1, "job"))
    assert isinstance(court.fail(ValueError(), court.deliver(silent)), Nack)


@pytest.mark.parametrize(
    "function",
    [
        lambda attempt, error: 1 / 0,
        lambda attempt, error: "soon",
        lambda attempt, error: math.nan,
        lambda attempt, error: math.inf,
        lambda attempt: 5.0,
        lambda attempt, error: exec("raise SystemExit"),
        lambda attempt, error: exec("import asyncio; raise asyncio.CancelledError"),
    ],
    ids=["raises", "text", "nan", "infinite", "signature", "exits", "cancelled"],
)
def test_a_retry_function_that_fails_gives_way_to_the_default(function: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged with the task's name, the task is retried all the same, and the worker lives."""
    court = Court(retry=RetryPolicy.call(function), app_retry=RetryPolicy.fixed(2, 7.0))
    settlement = court.fail(ValueError())
    assert isinstance(settlement, Nack)
    assert settlement.delay == 7.0
    assert "the retry function of task 'job' failed; using the default" in caplog.text
    _, second = court.again(settlement)
    assert isinstance(court.fail(ValueError(), second), Dead)


# --- orders ---------------------------------------------------------------------------------------


def test_reject_dead_letters_at_once() -> None:
    """Whatever the policy would grant; its text stands in the letter, the attempt in the history."""
    letter = letter_of(Court(retry=CALL).fail(Reject("card stolen")))
    story = read_story(letter)
    assert (letter.reason, story.text, [failure.attempt for failure in story.attempts]) == (Reason.REJECTED, "card stolen", [1])
    assert read_story(letter_of(Court().fail(Reject()))).text == "rejected by the task"


def test_retry_later_counts_an_attempt_with_its_own_delay() -> None:
    """Also for errors that the policy would not retry, and beyond `give_up_after`; but the last attempt is the last."""
    court = Court(retry=RetryPolicy.fixed(2, 60, retry_on=(OSError,), give_up_after=1))
    settlement = court.fail(RetryLater(10, "busy"))
    delay, second = court.again(settlement)
    assert delay == 10
    assert envelope_of(settlement).failures[0].text == "busy"
    letter = letter_of(court.fail(RetryLater(10), second))
    assert letter.reason is Reason.ATTEMPTS_EXHAUSTED
    assert [failure.text for failure in read_story(letter).attempts] == ["busy", "retry in 10 s"]


def test_snooze_spends_nothing() -> None:
    """The same message later, with its generation and its count, as often as it likes, also at the last attempt."""
    court = Court(retry=RetryPolicy.fixed(1))
    delivery = court.deliver(count=2)
    assert court.fail(Snooze(60), delivery) == Nack(delivery, 60.0)
    assert court.names() == ["task_started", "task_snoozed"]
    assert court.told[-1].seconds == 60


@pytest.mark.parametrize(
    ("delay", "taken"), [(-5, 0.0), (0, 0.0), (math.nan, 0.0), (math.inf, LONGEST), (1e300, LONGEST), (2, 2.0), (True, 1.0)]
)
def test_delays_that_a_handler_orders_are_made_sane(delay: float, taken: float) -> None:
    """No handler can order a delay that a broker cannot count."""
    for order in (Snooze(delay), RetryLater(delay)):
        settlement = Court().fail(order)
        assert isinstance(settlement, Nack)
        assert settlement.delay == taken


# --- cancellation ---------------------------------------------------------------------------------


def test_our_own_timeout_is_told_as_such() -> None:
    """A cancellation by timeout is retried as TaskTimeout, with the place where the handler was."""
    court = Court(retry=RetryPolicy.fixed(1))
    execution = court.begin(court.deliver(timeout=2.5))
    execution.cancelled_for = "timeout"
    letter = letter_of(court.judge.failed(execution, _raised(asyncio.CancelledError())))
    story = read_story(letter)
    assert (letter.error_type, story.text) == ("crossdock.errors.TaskTimeout", "the task ran longer than its timeout of 2.5 s")
    assert "in _raised" in story.traceback


def test_a_policy_may_tell_timeouts_apart() -> None:
    """They can be named in `retry_on` and `no_retry_on`."""
    court = Court(retry=RetryPolicy.fixed(5, no_retry_on=(TaskTimeout,)))
    execution = court.begin(court.deliver(timeout=2.5))
    execution.cancelled_for = "timeout"
    assert isinstance(court.judge.failed(execution, asyncio.CancelledError()), Dead)
    again = Court(retry=RetryPolicy.fixed(5, no_retry_on=(TaskCancelled,)))
    assert letter_of(again.fail(asyncio.CancelledError())).error_type == "crossdock.errors.TaskCancelled"


def test_a_handlers_own_error_after_the_timeout_is_its_own() -> None:
    """Cleaning up may fail in another way; that is what is told."""
    court = Court(retry=RetryPolicy.fixed(1))
    execution = court.begin(court.deliver(timeout=2.5))
    execution.cancelled_for = "timeout"
    assert letter_of(court.judge.failed(execution, _raised(OSError("in finally")))).error_type == "OSError"


def _raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


# --- exceptions of every nasty kind ---------------------------------------------------------------


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Falsy(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __len__(self) -> int:
        return 0


class NeverEqual(Exception):
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __hash__ = None  # type: ignore[assignment]


class Silent(Snooze):
    def __init__(self) -> None: ...


class SilentRetry(RetryLater):
    def __init__(self) -> None: ...


NASTY: list[BaseException] = [
    asyncio.CancelledError(),
    SystemExit(3),
    SystemExit(),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(1),
    StopAsyncIteration(),
    BaseException("bare"),
    Mute(),
    Falsy(),
    NeverEqual(),
    MemoryError(),
    RecursionError(),
    ExceptionGroup("many", [ValueError("a"), ExceptionGroup("more", [Mute()])]),
    BaseExceptionGroup("base", [KeyboardInterrupt(), asyncio.CancelledError()]),
    ValueError("\ud800"),
    ValueError("x" * 3_000_000),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "bad"),
    type("E" * 5000, (Exception,), {"__module__": None})("odd class"),
]


@pytest.mark.parametrize("error", NASTY, ids=lambda error: type(error).__name__[:20])
@pytest.mark.parametrize("body_kind", ["msgpack", "json"])
def test_exceptions_of_every_nasty_kind_are_decided_by_the_policy(error: BaseException, body_kind: str) -> None:
    """Each is retried with a readable history, then dead-lettered with a story that fits; nothing escapes."""
    court = Court(retry=RetryPolicy.fixed(2, 1.0))
    body = b'{"v": 1, "task": "job"}' if body_kind == "json" else None
    settlement = court.fail(error, court.deliver(body))
    _, second = court.again(settlement)
    (failure,) = envelope_of(settlement).failures
    assert failure.error_type
    assert len(failure.text) < 300
    letter = letter_of(court.fail(error, second))
    assert letter.reason is Reason.ATTEMPTS_EXHAUSTED
    assert len(letter.story) <= MAX_STORY_BYTES
    assert [each.attempt for each in read_story(letter).attempts] == [1, 2]


@pytest.mark.parametrize("order", [Silent(), SilentRetry()])
def test_an_order_whose_constructor_was_skipped_is_obeyed(order: BaseException) -> None:
    """A subclass that forgets to call the base class orders no delay."""
    settlement = Court().fail(order)
    assert isinstance(settlement, Nack)
    assert settlement.delay == 0.0


def test_a_handler_that_raises_the_same_object_again_and_again() -> None:
    """Its traceback grows with each raise, the story does not."""
    court, error = Court(retry=RetryPolicy.fixed(1000, 0.0)), ValueError("one object")
    delivery = court.deliver()
    for _ in range(100):
        _, delivery = court.again(court.fail(error, delivery))
    assert len(delivery.message.body) < 5000
    assert len(traceback.extract_tb(error.__traceback__)) >= 100
    execution = court.begin(delivery)
    assert execution.attempt == 101
    assert len(execution.envelope.failures) == 20
    assert len(letter_of(court.fail(Reject(), delivery)).story) <= MAX_STORY_BYTES


@pytest.mark.parametrize("backoff", [Backoff("fixed", 1), Backoff("linear", 2, 0.0)])
def test_a_policy_in_a_foreign_envelope_is_obeyed(backoff: Backoff) -> None:
    """A producer in another language states its own numbers."""
    court = Court(retry=TASK)
    body = json.dumps({"v": 1, "task": "job", "retry": msgspec.to_builtins(backoff)}).encode()
    settlement = court.fail(ValueError(), court.deliver(body))
    assert isinstance(settlement, Dead) == (backoff.max_attempts == 1)


def test_a_message_that_was_replayed_is_told_as_such() -> None:
    """The story says how often."""
    body = codec.encode(Envelope(1, "job", replays=2))
    assert read_story(letter_of(Court().fail(Reject(), Court().deliver(body)))).replays == 2


def test_the_judge_needs_no_observer() -> None:
    """Without any, nothing is built and everything is decided the same."""
    court = Court()
    court.app.events.wanted.clear()
    assert court.judge.succeeded(court.begin(court.deliver())) is not None
    assert isinstance(court.fail(ValueError()), Nack)
    assert isinstance(court.judge.begin(court.deliver(b"")), Dead)
    assert court.told == []


def test_a_message_is_never_changed() -> None:
    """What was received stays as it is; replacements are new."""
    court = Court()
    delivery = court.deliver()
    before: Message = msgspec.structs.replace(delivery.message)
    court.fail(ValueError(), delivery)
    assert delivery.message == before
