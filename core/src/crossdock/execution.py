"""One delivery being worked on, and the decisions about how it begins and ends. No I/O, no loop: each decision returns a settlement."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from crossdock import codec, letters
from crossdock.codec import Envelope
from crossdock.errors import InvalidArguments, InvalidTask, TaskCancelled, TaskTimeout, Undecodable, UnknownTask, UnsupportedVersion
from crossdock.events import Event, EventName, Events
from crossdock.outcome import Reject, RetryLater, Snooze
from crossdock.queues import Queue
from crossdock.retry import LONGEST, Backoff, RetryPolicy
from crossdock.spi import Ack, Clock, Dead, Delivery, Message, Nack, Priority, Reason, Settlement

if TYPE_CHECKING:
    from crossdock.task import Task

UNKNOWN_TASK_DELAY: Final = 10.0
"""Seconds after which an unknown task is offered again: a rolling deploy may bring a worker that knows it."""
UNKNOWN_TASK_LIMIT_MS: Final = 24 * 3600 * 1000
"""How long unknown tasks are offered before they are dead-lettered."""

_log = logging.getLogger("crossdock.worker")


class Execution(msgspec.Struct, eq=False):
    """A delivery that is being executed; also the `Context` that its handler sees."""

    delivery: Delivery
    envelope: Envelope
    target: Task[Any, Any]
    """The registered task that is executed."""
    arguments: dict[str, Any]
    started: float
    """By the clock's monotonic seconds."""
    deadline: float | None
    """When its timeout ends, or None."""
    asyncio_task: asyncio.Task[None] | None = None
    cancelled_for: str = ""
    """Why we cancelled it: `timeout`, `lease`, `shutdown`, or "" if we did not."""
    ended: bool = False
    """Set by its one ending; what the handler does later changes nothing."""

    # --- Context ---

    @property
    def id(self) -> str:
        return self.delivery.message.id

    @property
    def task(self) -> str:
        return self.target.name

    @property
    def queue(self) -> str:
        return self.delivery.message.queue

    @property
    def priority(self) -> Priority:
        return self.delivery.message.priority

    @property
    def attempt(self) -> int:
        return self.envelope.attempt

    @property
    def delivery_count(self) -> int:
        return self.delivery.delivery_count

    @property
    def headers(self) -> Mapping[str, str]:
        return self.envelope.headers

    @property
    def enqueued_ms(self) -> int:
        return self.envelope.enqueued_ms

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        logger = logging.getLogger(f"crossdock.task.{self.task}")
        return logging.LoggerAdapter(logger, {"task_id": self.id, "task": self.task, "attempt": self.attempt})


class Judge:
    """Decides how deliveries begin and end, by the App's tasks, queues and policies.

    Args:
        tasks: By name.
        queue_of: Settings of a queue.
        default_retry: Policy where neither call, task nor queue states one.
        worker: This worker's name, for histories and letters.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task[Any, Any]],
        queue_of: Callable[[str], Queue],
        *,
        default_retry: RetryPolicy,
        worker: str,
        clock: Clock,
        rng: random.Random,
        events: Events,
    ) -> None:
        self._tasks = tasks
        self._queue_of = queue_of
        self._default_retry = default_retry
        self._worker = worker
        self._clock = clock
        self._rng = rng
        self._events = events
        self._unknown_names: set[str] = set()  # those that the log has named

    def begin(self, delivery: Delivery) -> Execution | Settlement:
        """Decide whether a delivery runs; if not, return how it ends unrun."""
        message = delivery.message
        queue = self._queue_of(message.queue)
        try:
            envelope = codec.decode(message.body)
        except UnsupportedVersion as error:
            return self._dead(delivery, None, Reason.UNSUPPORTED_VERSION, error)
        except Undecodable as error:
            return self._dead(delivery, None, Reason.UNDECODABLE, error)
        if envelope.expires_ms and envelope.expires_ms <= self._clock.time_ms():
            return self._expired(delivery, envelope, queue)
        if delivery.delivery_count > queue.max_deliveries:
            text = f"delivered {delivery.delivery_count} times without an ending; the limit is {queue.max_deliveries}"
            return self._dead(delivery, envelope, Reason.POISON, text=text)
        task = self._tasks.get(envelope.task)
        if task is None:
            return self._unknown(delivery, envelope)
        try:
            arguments = task.payload.decode(envelope.args, json=codec.is_json(message.body))
        except (InvalidArguments, InvalidTask) as error:
            return self._dead(delivery, envelope, Reason.INVALID_PAYLOAD, error)
        timeout = envelope.timeout or task.timeout or queue.timeout
        now = self._clock.monotonic()
        execution = Execution(delivery, envelope, task, arguments, now, now + timeout if timeout else None)
        if "task_started" in self._events.wanted:
            self._publish("task_started", delivery, envelope)
        return execution

    def succeeded(self, execution: Execution) -> Settlement:
        """The handler returned."""
        if "task_succeeded" in self._events.wanted:
            seconds = self._clock.monotonic() - execution.started
            self._publish("task_succeeded", execution.delivery, execution.envelope, seconds=seconds)
        return Ack(execution.delivery)

    def failed(self, execution: Execution, error: BaseException) -> Settlement:
        """The handler raised: again later, or to the dead letters."""
        delivery, envelope = execution.delivery, execution.envelope
        if isinstance(error, asyncio.CancelledError):
            error = self._named(execution, error)
        if isinstance(error, Snooze):
            self._publish("task_snoozed", delivery, envelope, seconds=error.delay)
            return Nack(delivery, min(error.delay, LONGEST))
        if isinstance(error, Reject):
            return self._dead(delivery, envelope, Reason.REJECTED, error, failed=True)
        policy = self._policy(execution)
        if isinstance(error, RetryLater):
            delay = min(error.delay, LONGEST) if envelope.attempt < policy.backoff.max_attempts else None
        else:
            delay = self._delay(policy, envelope, error)
        if delay is None:
            return self._dead(delivery, envelope, Reason.ATTEMPTS_EXHAUSTED, error, failed=True)
        return self._retry(delivery, envelope, error, delay)

    def returned(self, delivery: Delivery) -> Settlement:
        """Not run, or interrupted by our own shutdown: give it back as it was."""
        self._publish("task_returned", delivery, None)
        return Nack(delivery)

    # --- the single decisions ---

    def _named(self, execution: Execution, error: BaseException) -> BaseException:
        """A cancellation, as what it was."""
        named: BaseException
        if execution.cancelled_for == "timeout":
            limit = (execution.deadline or execution.started) - execution.started
            named = TaskTimeout(f"the task ran longer than its timeout of {limit:g} s")
        else:
            named = TaskCancelled("the handler raised CancelledError, though the worker had not cancelled it")
        named.__cause__ = error
        return named.with_traceback(error.__traceback__)

    def _policy(self, execution: Execution) -> RetryPolicy:
        """Call, then task, then queue, then default."""
        task, queue = execution.target, self._queue_of(execution.queue)
        own = task.retry or queue.retry
        if own is None and queue.max_attempts is not None:
            own = RetryPolicy(Backoff(max_attempts=queue.max_attempts))
        policy = own or self._default_retry
        return policy.with_backoff(execution.envelope.retry) if execution.envelope.retry else policy

    def _delay(self, policy: RetryPolicy, envelope: Envelope, error: BaseException) -> float | None:
        age = (self._clock.time_ms() - envelope.enqueued_ms) / 1000 if envelope.enqueued_ms else 0.0
        try:
            return policy.next_delay(envelope.attempt, error, age, self._rng)
        except BaseException:
            _log.exception("the retry function of task %r failed; using the default", envelope.task)
            return self._default_retry.next_delay(envelope.attempt, error, age, self._rng)

    def _retry(self, delivery: Delivery, envelope: Envelope, error: BaseException, delay: float) -> Settlement:
        latest = letters.failure(envelope, error, self._clock.time_ms(), self._worker)
        history = letters.add_failure(envelope.failures, latest)
        body = codec.revise(delivery.message.body, attempt=envelope.attempt + 1, failures=history, unknown_since_ms=0)
        _log.info(
            "task %r %s failed in attempt %d, again in %.3g s: %s: %s",
            envelope.task,
            delivery.message.id,
            envelope.attempt,
            delay,
            latest.error_type,
            latest.text,
        )
        self._publish("task_retried", delivery, envelope, detail=latest.error_type, seconds=delay)
        return Nack(delivery, delay, _next_generation(delivery.message, body))

    def _unknown(self, delivery: Delivery, envelope: Envelope) -> Settlement:
        now = self._clock.time_ms()
        since = min(envelope.unknown_since_ms or now, now)
        if now - since >= UNKNOWN_TASK_LIMIT_MS:
            text = f"no worker of this queue has had a task {envelope.task!r} for {UNKNOWN_TASK_LIMIT_MS // 3_600_000} hours"
            return self._dead(delivery, envelope, Reason.UNKNOWN_TASK, UnknownTask(text))
        if envelope.task not in self._unknown_names:
            self._unknown_names.add(envelope.task)
            _log.warning(
                "this worker has no task %r; such messages are offered again every %g s", envelope.task, UNKNOWN_TASK_DELAY
            )
        body = codec.revise(delivery.message.body, unknown_since_ms=since)
        self._publish("task_retried", delivery, envelope, detail="unknown_task", seconds=UNKNOWN_TASK_DELAY)
        return Nack(delivery, UNKNOWN_TASK_DELAY, _next_generation(delivery.message, body))

    def _expired(self, delivery: Delivery, envelope: Envelope, queue: Queue) -> Settlement:
        self._publish("task_expired", delivery, envelope, detail=queue.on_expired)
        if queue.on_expired == "drop":
            return Ack(delivery)
        late = (self._clock.time_ms() - envelope.expires_ms) / 1000
        return self._dead(delivery, envelope, Reason.EXPIRED, text=f"received {late:.3f} s after it had expired")

    def _dead(
        self,
        delivery: Delivery,
        envelope: Envelope | None,
        reason: Reason,
        error: BaseException | None = None,
        *,
        text: str = "",
        failed: bool = False,
    ) -> Settlement:
        letter = letters.write(
            delivery.message,
            envelope,
            reason,
            error=error,
            text=text,
            failed=failed,
            now_ms=self._clock.time_ms(),
            worker=self._worker,
            delivery_count=delivery.delivery_count,
        )
        why = text or ("" if error is None else letters.error_text(error, letters.MAX_FAILURE_TEXT))
        _log.warning("task %r %s is dead-lettered, %s: %s", letter.task, delivery.message.id, reason.value, why)
        self._publish("task_dead_lettered", delivery, envelope, detail=reason.value)
        return Dead(delivery, letter)

    def _publish(
        self, name: EventName, delivery: Delivery, envelope: Envelope | None, *, detail: str = "", seconds: float = 0.0
    ) -> None:
        if name not in self._events.wanted:
            return
        message = delivery.message
        self._events.publish(
            Event(
                name=name,
                at_ms=self._clock.time_ms(),
                task=envelope.task if envelope else "",
                id=message.id,
                queue=message.queue,
                worker=self._worker,
                attempt=envelope.attempt if envelope else 0,
                detail=detail,
                seconds=seconds,
            )
        )


def _next_generation(message: Message, body: bytes) -> Message:
    return Message(message.id, message.queue, message.priority, body, generation=message.generation + 1)
