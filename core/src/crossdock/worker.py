"""Worker: receives deliveries and executes them until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from crossdock.broker_thread import BrokerThread
from crossdock.errors import ConfigurationError
from crossdock.events import Event, EventName
from crossdock.execution import Judge
from crossdock.executor import Executor
from crossdock.lanes import Lanes
from crossdock.queues import Queue
from crossdock.spi import Delivery, Nack, Settlement

if TYPE_CHECKING:
    from crossdock.app import App

MAX_CONCURRENCY: Final = 100_000

_log = logging.getLogger("crossdock.worker")


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one worker process works.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    queues: Mapping[str, int] | None = None
    """Queues to serve, with their weights; None = all that the App's tasks and settings name, with the weights from there."""
    concurrency: int = 100
    """Most tasks at once, 1 to 100,000."""
    strict: bool = False
    """Serve queues strictly in order instead of by weight."""
    burst: bool = False
    """End when nothing is ready any more. Scheduled tasks and retries that are not due are left."""
    grace: float = 30.0
    """Seconds that running tasks get to end after `stop`, 0 to 86,400."""
    lease: float | None = None
    """Lease in seconds instead of the queues' own."""

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= MAX_CONCURRENCY:
            raise ConfigurationError(f"concurrency must be from 1 to {MAX_CONCURRENCY:,}, not {self.concurrency}")
        if not 0 <= self.grace <= 86_400:
            raise ConfigurationError(f"grace must be from 0 to 86,400 seconds, not {self.grace!r}")
        for name, weight in (self.queues or {}).items():
            if not 1 <= weight <= 1000:
                raise ConfigurationError(f"queue {name!r}: weight must be from 1 to 1,000, not {weight!r}")


class WorkerReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker did, returned by `Worker.run`."""

    executed: int
    """Deliveries that came to an ending here, in whatever way."""
    returned: int
    """Of these, given back unspent at shutdown."""
    leases_lost: int
    """Of these, ended by the loss of the lease, or settled too late."""
    abandoned: int
    """Handlers that did not end when cancelled."""
    still_running: int
    """Handlers that still run now: a process that wants to end has to do so without waiting for their threads."""


class Worker:
    """One worker. Build it, `await run()`, and call `stop()` from the same loop to end it.

    Args:
        app: Its tasks, queues, broker and middleware.
        options: How to work.

    Raises:
        ConfigurationError: The App has no tasks, no broker URL, or a queue's name is not valid.
    """

    def __init__(self, app: App, options: WorkerOptions | None = None) -> None:
        self.app = app
        self.options = options or WorkerOptions()
        self.name = f"{socket.gethostname()}-{os.getpid()}-{app.new_id()[-6:]}"
        self.queues = self.check(app, self.options)
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._failure: BaseException | None = None
        self._executed = 0
        self._returned = 0
        self._leases_lost = 0
        self._stopping = False

    @staticmethod
    def check(app: App, options: WorkerOptions) -> list[tuple[Queue, int]]:
        """Return the queues, with their weights, that a worker with these options would serve.

        Raises:
            ConfigurationError: As for `Worker`.
        """
        if not app.tasks:
            raise ConfigurationError(
                "this App has no tasks: decorate functions with @app.task, and import their modules where it is made"
            )
        app.require_url()
        return _chosen_queues(app, options)

    def stop(self) -> None:
        """Stop receiving at once; running tasks get the grace period. A second call ends the grace period."""
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def run(self) -> WorkerReport:
        """Work until `stop`, or in burst mode until there is nothing ready.

        Raises:
            BrokerUnavailable: The broker cannot be reached at the start. Later outages are waited out.
        """
        app, options = self.app, self.options
        environment = app.environment
        self._judge = Judge(
            app.tasks,
            app.queue,
            default_retry=app.retry,
            worker=self.name,
            clock=environment.clock,
            rng=environment.rng,
            events=app.events,
        )
        self._executor = Executor(
            self._judge,
            self._settle,
            middleware=app.middleware,
            concurrency=options.concurrency,
            clock=environment.clock,
            events=app.events,
            worker=self.name,
        )
        queues = [queue for queue, _ in self.queues]
        self._link = BrokerThread(
            app.make_broker,
            lanes=Lanes(self.queues, strict=options.strict),
            specs=[queue.spec() for queue in queues],
            slots=options.concurrency,
            limits={queue.name: queue.concurrency for queue in queues if queue.concurrency},
            burst=options.burst,
            clock=environment.clock,
            received=self._received,
            lost=self._lost,
            drained=self.stop,
            failed=self._failed,
        )
        try:
            await self._link.start()
            self._publish("worker_started")
            await self._stop.wait()
            await self._shut_down()
        finally:
            await self._link.close()
            self._executor.close()
        self._publish("worker_stopped")
        if self._failure is not None:
            raise self._failure
        return WorkerReport(
            executed=self._executed,
            returned=self._returned,
            leases_lost=self._leases_lost + self._link.leases_refused,
            abandoned=self._executor.abandoned,
            still_running=self._executor.still_running,
        )

    async def _shut_down(self) -> None:
        if self._failure is not None:
            await self._executor.shut_down(0.0)
            return
        await self._link.stop_receiving()
        # Deliveries already on their way to this loop arrive before the next line runs, and are given back.
        self._stopping = True
        await asyncio.sleep(0)
        gentle = asyncio.ensure_future(self._executor.shut_down(self.options.grace))
        hurried = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait([gentle, hurried], return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        if not gentle.done():
            gentle.cancel()
            await asyncio.wait([gentle])
            await self._executor.shut_down(0.0)
        elif not gentle.cancelled():
            gentle.result()

    # --- called in this loop, by the broker thread ---

    def _received(self, deliveries: Sequence[Delivery]) -> None:
        if self._stopping:
            for delivery in deliveries:
                self._settle(delivery, self._judge.returned(delivery))
        else:
            self._executor.start(deliveries)

    def _lost(self, receipts: Sequence[object]) -> None:
        self._executor.lose(receipts)

    def _failed(self, error: BaseException) -> None:
        _log.error("the broker thread ended: %s", error)
        self._failure = error
        self._stop.set()

    # --- called by the executor ---

    def _settle(self, delivery: Delivery, settlement: Settlement | None) -> None:
        self._executed += 1
        if settlement is None:
            self._leases_lost += 1
            self._publish("lease_lost", delivery)
        elif self._stopping and isinstance(settlement, Nack) and settlement.replacement is None:
            self._returned += 1
        self._link.settle(delivery, settlement)

    def _publish(self, name: EventName, delivery: Delivery | None = None) -> None:
        events = self.app.events
        if name not in events.wanted:
            return
        message = delivery.message if delivery else None
        events.publish(
            Event(
                name=name,
                at_ms=self.app.now_ms(),
                worker=self.name,
                id=message.id if message else "",
                queue=message.queue if message else "",
            )
        )


def _chosen_queues(app: App, options: WorkerOptions) -> list[tuple[Queue, int]]:
    """The queues to serve and their weights, in order."""
    names = list(options.queues) if options.queues else app.queue_names()
    chosen: list[tuple[Queue, int]] = []
    for name in names:
        queue = app.queue(name)
        if options.lease is not None:
            queue = msgspec.structs.replace(queue, lease=options.lease)
        chosen.append((queue, options.queues[name] if options.queues else queue.weight))
    return chosen
