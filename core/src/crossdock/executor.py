"""Executor: runs deliveries in this event loop, and gives each exactly one ending."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

from crossdock.context import running
from crossdock.events import Event, Events
from crossdock.execution import Execution, Judge
from crossdock.middleware import Middleware, compose_run
from crossdock.spi import Clock, Delivery, Settlement
from crossdock.threads import ThreadPool

ABANDON_AFTER: Final = 5.0
"""Seconds a cancelled handler has to end before it is abandoned."""

_log = logging.getLogger("crossdock.worker")


class Executor:
    """Runs handlers: `async` ones as asyncio tasks, sync ones in threads.

    Args:
        judge: Decides beginnings and endings.
        settle: Takes each ending, once per delivery; None as settlement means that the lease is lost and nothing is to be settled.
        middleware: Wraps executions; the first is outermost.
        concurrency: Most sync handlers at once; the caller bounds deliveries.
        clock: For timeouts.
        events: Told of abandoned handlers.
        worker: This worker's name.
    """

    def __init__(
        self,
        judge: Judge,
        settle: Callable[[Delivery, Settlement | None], None],
        *,
        middleware: Iterable[Middleware],
        concurrency: int,
        clock: Clock,
        events: Events,
        worker: str,
    ) -> None:
        self._judge = judge
        self._settle = settle
        self._clock = clock
        self._events = events
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._chain = compose_run(list(middleware), self._call)
        self._threads = ThreadPool(concurrency, "crossdock-handler")
        self._running: dict[object, Execution] = {}
        self._abandoned: set[Execution] = set()
        self._returned: deque[tuple[Execution, BaseException | None]] = deque()
        self._returning = False
        self._alarm: asyncio.Task[None] | None = None
        self._alarm_at = float("inf")
        self._idle = asyncio.Event()
        self._idle.set()
        self.abandoned = 0
        """Handlers that were cancelled and did not end within `ABANDON_AFTER`, since the start."""

    @property
    def busy(self) -> int:
        """Deliveries that have begun and not ended."""
        return len(self._running)

    @property
    def still_running(self) -> int:
        """Handlers that run on without a delivery: abandoned ones, and those whose lease was lost."""
        return len(self._abandoned)

    def start(self, deliveries: Iterable[Delivery]) -> None:
        """Begin executing; returns at once."""
        begin, create_task = self._judge.begin, self._loop.create_task
        for delivery in deliveries:
            try:
                begun = begin(delivery)
            except Exception:
                # A fault of ours. Its lease runs out, and the delivery count sees to it that this ends.
                _log.exception("message %s of queue %r could not be begun", delivery.message.id, delivery.message.queue)
                self._settle(delivery, None)
                continue
            if not isinstance(begun, Execution):
                self._settle(delivery, begun)
                continue
            self._running[delivery.receipt] = begun
            if begun.deadline is not None and begun.deadline < self._alarm_at:
                self._set_alarm(begun.deadline)
            if begun.target.is_async or self._chain is not None:
                begun.asyncio_task = create_task(self._run(begun))
            else:
                self._submit(begun, self._collect)
        if self._running:
            self._idle.clear()

    def lose(self, receipts: Iterable[object]) -> None:
        """Leases are lost: cancel the handlers; whatever they do now, nothing is settled for them."""
        for receipt in receipts:
            execution = self._running.get(receipt)
            if execution is not None:
                _log.warning("lost the lease of task %r %s: its handler is cancelled", execution.task, execution.id)
                self._cancel(execution, "lease")
                self._keep_abandoned(execution)
                self._end(execution, None)

    async def idle(self) -> None:
        """Return when no execution is under way."""
        await self._idle.wait()

    async def shut_down(self, grace: float) -> None:
        """Let executions end for `grace` seconds, then cancel them and give their messages back, unspent."""
        if await self._idle_within(grace):
            return
        for execution in list(self._running.values()):
            self._cancel(execution, "shutdown")
        await self._idle_within(min(ABANDON_AFTER, 1.0))
        for execution in list(self._running.values()):
            self._abandon(execution, "did not end when the worker shut down")
            self._end(execution, self._judge.returned(execution.delivery))

    def close(self) -> None:
        """Let go of threads and timers. Executions should have ended."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._threads.close()

    # --- running ---

    async def _run(self, execution: Execution) -> None:
        """The body of one asyncio task. It catches everything: asyncio would let SystemExit and KeyboardInterrupt end the worker."""
        running.set(execution)
        try:
            if self._chain is None:
                await execution.target.function(**execution.arguments)
            else:
                await self._chain(execution)
        except BaseException as error:
            self._ended(execution, error)
        else:
            self._ended(execution, None)

    async def _call(self, context: Any) -> Any:
        """The innermost of the middleware chain: the handler itself."""
        execution: Execution = context
        if execution.target.is_async:
            return await execution.target.function(**execution.arguments)
        future: asyncio.Future[tuple[Any, BaseException | None]] = self._loop.create_future()

        def resolve(outcome: tuple[Any, BaseException | None]) -> None:
            self._forget_abandoned(execution)
            if not future.done():
                future.set_result(outcome)

        self._submit(execution, lambda _, result, error: self._to_loop(resolve, (result, error)))
        try:
            result, error = await future
        except asyncio.CancelledError:
            self._abandon(execution, "was cancelled, and a thread cannot be stopped")
            raise
        if error is not None:
            raise error
        return result

    def _submit(self, execution: Execution, give: Callable[[Execution, Any, BaseException | None], None]) -> None:
        def job() -> None:
            running.set(execution)
            try:
                result = execution.target.function(**execution.arguments)
                if inspect.iscoroutine(result):  # an async function behind a decorator that hides it
                    result.close()
                    raise TypeError(f"task {execution.task!r} returned a coroutine that nobody awaits: decorate an async def")
            except BaseException as error:
                give(execution, None, error)
            else:
                give(execution, result, None)

        self._threads.submit(job)

    def _collect(self, execution: Execution, _: Any, error: BaseException | None) -> None:
        """In a handler's thread: hand its ending over to the loop."""
        self._returned.append((execution, error))
        if not self._returning:
            self._returning = True
            self._to_loop(self._end_returned)

    def _to_loop(self, callback: Callable[..., None], *args: Any) -> None:
        # The loop is closed if an abandoned handler ends after the worker; then nobody is left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *args)

    def _end_returned(self) -> None:
        self._returning = False  # before looking: what is appended from now on calls again
        while self._returned:
            self._ended(*self._returned.popleft())

    # --- ending ---

    def _ended(self, execution: Execution, error: BaseException | None) -> None:
        """The handler returned or raised."""
        execution.asyncio_task = None  # whose context holds the execution: a cycle that only the garbage collector would find
        if execution.ended:
            self._forget_abandoned(execution)
            return
        if error is None:
            settlement = self._judge.succeeded(execution)
        elif execution.cancelled_for == "shutdown" and isinstance(error, asyncio.CancelledError):
            settlement = self._judge.returned(execution.delivery)
        else:
            settlement = self._judge.failed(execution, error)
        self._end(execution, settlement)

    def _end(self, execution: Execution, settlement: Settlement | None) -> None:
        execution.ended = True
        del self._running[execution.delivery.receipt]
        self._settle(execution.delivery, settlement)
        if not self._running:
            self._idle.set()

    def _cancel(self, execution: Execution, why: str) -> None:
        execution.cancelled_for = why
        if execution.asyncio_task is not None:
            execution.asyncio_task.cancel()

    def _abandon(self, execution: Execution, why: str) -> None:
        self.abandoned += 1
        self._keep_abandoned(execution)
        _log.error("task %r %s %s; its handler is abandoned and may run on", execution.task, execution.id, why)
        if "task_abandoned" in self._events.wanted:
            self._events.publish(
                Event(
                    name="task_abandoned",
                    at_ms=self._clock.time_ms(),
                    task=execution.task,
                    id=execution.id,
                    queue=execution.queue,
                    worker=self._worker,
                    attempt=execution.attempt,
                    detail=why,
                )
            )

    def _keep_abandoned(self, execution: Execution) -> None:
        self._abandoned.add(execution)
        if not execution.target.is_async:
            self._threads.resize(+1)

    def _forget_abandoned(self, execution: Execution) -> None:
        if execution in self._abandoned:
            self._abandoned.remove(execution)
            if not execution.target.is_async:
                self._threads.resize(-1)

    # --- timeouts: one alarm for all, set to the earliest deadline; when it rings, the few that run are looked through ---

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = at
        self._alarm = self._loop.create_task(self._ring(at - self._clock.monotonic()), name="crossdock-timeouts")

    async def _ring(self, seconds: float) -> None:
        await self._clock.sleep(seconds)
        self._alarm, self._alarm_at = None, float("inf")
        now = self._clock.monotonic()
        for execution in list(self._running.values()):
            if execution.deadline is None:
                continue
            if execution.deadline + ABANDON_AFTER <= now:
                self._abandon(execution, f"did not end within {ABANDON_AFTER:g} s of its timeout")
                execution.cancelled_for = "timeout"
                self._end(execution, self._judge.failed(execution, asyncio.CancelledError()))
            elif execution.deadline <= now and not execution.cancelled_for:
                self._cancel(execution, "timeout")
        pending = [
            execution.deadline + (ABANDON_AFTER if execution.cancelled_for else 0.0)
            for execution in self._running.values()
            if execution.deadline is not None
        ]
        if pending:
            self._set_alarm(min(pending))

    async def _idle_within(self, seconds: float) -> bool:
        waiting = [asyncio.ensure_future(self.idle()), asyncio.ensure_future(self._clock.sleep(seconds))]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiter in waiting:
                waiter.cancel()
        return not self._running
