"""BrokerThread: the half of a worker that lives with the broker, in a thread and an event loop of its own, of the worker's kind.

Handlers run in the worker's loop and may block it for as long as they like: leases and heartbeats are kept here. A batch crosses the
border by one call each way.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final

from crossdock.errors import CrossdockError
from crossdock.lanes import Lanes
from crossdock.lease import LeaseKeeper
from crossdock.receiver import WAIT, Receiver
from crossdock.settlement import Settler
from crossdock.spi import Broker, Clock, Delivery, QueueSpec, Settlement

LAST_SETTLEMENTS: Final = 5.0
"""Seconds for the last settlements to reach the broker when the worker ends."""
BURST_WAIT: Final = 0.1
"""Seconds one receive waits in burst mode."""

_log = logging.getLogger("crossdock.worker")


class BrokerThread:
    """Opens the broker, receives, keeps leases and settles.

    Args:
        make_broker: Builds an unopened Broker; called in the new thread.
        lanes: Shares the slots out.
        specs: The queues received from.
        slots: Most messages in hand at once.
        limits: Most messages in hand per queue, for queues that state one.
        burst: Report `drained` when nothing is ready and nothing in hand.
        clock: For pauses and leases.
        received: Told of deliveries, in the worker's loop.
        lost: Told receipts of lost leases, in the worker's loop.
        drained: Burst mode: there is nothing left, in the worker's loop.
        failed: Told of an error that ends this thread, in the worker's loop.
    """

    def __init__(
        self,
        make_broker: Callable[[], Broker],
        *,
        lanes: Lanes,
        specs: Sequence[QueueSpec],
        slots: int,
        limits: Mapping[str, int],
        burst: bool,
        clock: Clock,
        received: Callable[[Sequence[Delivery]], None],
        lost: Callable[[Sequence[object]], None],
        drained: Callable[[], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._make_broker = make_broker
        self._lanes = lanes
        self._specs = specs
        self._slots = slots
        self._limits = limits
        self._burst = burst
        self._clock = clock
        self._received = received
        self._lost = lost
        self._drained = drained
        self._failed = failed
        self._home = asyncio.get_running_loop()
        self._endings: deque[tuple[Delivery, Settlement | None]] = deque()
        self._crossing = False
        self._ready: Future[None] = Future()
        self._ended: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="crossdock-broker", daemon=True)
        self.leases_refused = 0
        """Settlements that came after their lease was lost."""

    # --- called in the worker's loop ---

    async def start(self) -> None:
        """Return when the broker is open and messages are being received. Raises what `Broker.open` raises."""
        self._thread.start()
        await asyncio.wrap_future(self._ready)

    def settle(self, delivery: Delivery, settlement: Settlement | None) -> None:
        """Hand an ending over and free its slot; None = the lease is lost, only free the slot."""
        self._endings.append((delivery, settlement))
        if not self._crossing:
            self._crossing = True
            self._call_there(self._take_endings)

    async def stop_receiving(self) -> None:
        """Return when no further delivery will be reported."""
        stopped: Future[None] = Future()
        if self._call_there(self._stop_receiving, stopped):
            await asyncio.wrap_future(stopped)

    async def close(self) -> None:
        """Settle what is left, disconnect and end the thread."""
        if self._ready.done() and self._ready.exception() is None:
            self._call_there(self._closing.set)
        await asyncio.wrap_future(self._ended)

    def _call_there(self, callback: Callable[..., None], *args: Any) -> bool:
        """Call something in the broker's loop; False if that loop has ended, because the broker thread failed."""
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return False
        return True

    # --- in the broker's thread ---

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=type(self._home)) as runner:
                self._loop = runner.get_loop()
                runner.run(self._main())
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(error)
            else:
                self._call_home(self._failed, error)
        finally:
            self._ended.set_result(None)

    async def _main(self) -> None:
        self._closing = asyncio.Event()
        broker = self._make_broker()
        await broker.open()
        try:
            await broker.declare(self._specs)
            leases = {spec.name: spec.lease for spec in self._specs}
            self._keeper = LeaseKeeper(
                broker,
                lease_of=lambda queue: leases[queue],
                shortest=min(leases.values()),
                lost=lambda receipts: self._call_home(self._lost, receipts),
                clock=self._clock,
            )
            self._settler = Settler(broker, settled=self._keeper.release, refused=self._count_refused, clock=self._clock)
            self._receiver = Receiver(
                broker, self._lanes, slots=self._slots, limits=self._limits, deliver=self._deliver, clock=self._clock
            )
            await self._serve(broker)
        finally:
            await broker.close()

    async def _serve(self, broker: Broker) -> None:
        self._receiving = asyncio.create_task(self._receiver.run(BURST_WAIT if self._burst else WAIT), name="crossdock-receive")
        jobs = [self._receiving, asyncio.create_task(self._keeper.run(), name="crossdock-leases")]
        if self._burst:
            jobs.append(asyncio.create_task(self._watch_burst(broker), name="crossdock-burst"))
        closing = asyncio.create_task(self._closing.wait(), name="crossdock-closing")
        self._ready.set_result(None)
        try:
            waiting = {closing, *jobs}
            while not closing.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for job in done - {closing}:
                    if not job.cancelled():
                        job.result()  # raises what ended it: a worker that receives nothing must not look alive
            await self._settle_last()
        finally:
            for job in (closing, *jobs):
                job.cancel()
            await asyncio.wait([closing, *jobs])

    async def _settle_last(self) -> None:
        self._take_endings()
        try:
            await asyncio.wait_for(self._settler.drained(), LAST_SETTLEMENTS)
        except TimeoutError:
            self._settler.give_up()
            await self._settler.drained()

    async def _watch_burst(self, broker: Broker) -> None:
        names = [spec.name for spec in self._specs]
        while True:
            await self._receiver.empty_handed.wait()
            if self._keeper.holds_nothing and all(stats.ready == 0 for stats in await broker.stats(names)):
                self._call_home(self._drained)
                return
            await self._clock.sleep(BURST_WAIT)

    def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        self._keeper.hold(deliveries)
        self._call_home(self._received, deliveries)

    def _take_endings(self) -> None:
        self._crossing = False
        endings = [self._endings.popleft() for _ in range(len(self._endings))]
        self._receiver.release([delivery for delivery, _ in endings])
        self._keeper.release([delivery for delivery, settlement in endings if settlement is None])
        self._settler.settle([settlement for _, settlement in endings if settlement is not None])

    def _stop_receiving(self, stopped: Future[None]) -> None:
        self._receiving.cancel()
        self._receiving.add_done_callback(lambda _: stopped.set_result(None))

    def _count_refused(self, delivery: Delivery) -> None:
        self.leases_refused += 1

    def _call_home(self, callback: Callable[..., None], *args: Any) -> None:
        try:
            self._home.call_soon_threadsafe(callback, *args)
        except RuntimeError as error:
            raise CrossdockError("the worker's event loop ended before its broker thread") from error
