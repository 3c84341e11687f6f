"""Testing a program's tasks without a broker and without waiting: a memory broker and a clock that the test turns.

In a test::

    async with app.testing() as t:
        await send_email.enqueue("a@example.com", "Hi")
        await t.run_until_idle()
        await t.advance(hours=1)          # retries and delays that fall due on the way run in order
        assert not t.dead_letters()
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from crossdock.backends import memory
from crossdock.clock import VirtualClock
from crossdock.events import Events
from crossdock.execution import Judge
from crossdock.executor import Executor
from crossdock.ids import IdSource
from crossdock.lanes import Lanes
from crossdock.plugins import create_broker
from crossdock.spi import Broker, DeadLetter, Delivery, Settlement, State

if TYPE_CHECKING:
    from crossdock.app import App

SLOTS: Final = 100
_numbers = itertools.count(1)


class Testing:
    """An App on a memory broker of its own, in virtual time. Made by `App.testing()`; use it with `async with`.

    Everything runs in the test's event loop. The same program decides about retries, expiry and dead letters as in a worker.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    def __init__(self, app: App) -> None:
        self.app = app
        self.clock = VirtualClock()
        """The clock the App and its broker live by."""
        self._url = f"memory://testing-{next(_numbers)}"
        self._letters: list[DeadLetter] = []
        self._endings: list[Settlement] = []

    async def __aenter__(self) -> Self:
        rng = random.Random(0)
        self._outside = self.app.enter_environment(self.clock, rng, IdSource(self.clock, rng), self._make_broker)
        self._broker = self._make_broker()
        await self._broker.open()
        await self._broker.declare([self.app.queue(name).spec() for name in self.app.queue_names()])
        judge = Judge(
            self.app.tasks,
            self.app.queue,
            default_retry=self.app.retry,
            worker="testing",
            clock=self.clock,
            rng=rng,
            events=self.app.events,
        )
        self._executor = Executor(
            judge,
            self._settle,
            middleware=self.app.middleware,
            concurrency=SLOTS,
            clock=self.clock,
            events=Events(),
            worker="testing",
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._executor.close()
        await self._broker.close()
        await self.app.close()
        self.app.leave_environment(self._outside)
        memory.forget(self._url.removeprefix("memory://"))

    async def run_until_idle(self) -> int:
        """Execute all that is ready, and what it enqueues, until nothing is ready. Time stands still.

        Returns:
            How many deliveries were executed.
        """
        executed = 0
        while True:
            names = [stats.queue for stats in await self._broker.stats() if stats.ready]
            if not names:
                break
            lanes = Lanes([(self.app.queue(name), self.app.queue(name).weight) for name in names])
            deliveries = await self._broker.receive(lanes.plan(SLOTS).lanes, SLOTS, 0.0)
            executed += len(deliveries)
            self._executor.start(deliveries)
            await self._executor.idle()
            await self._settle_all()
        self._letters = await self._read_letters()
        return executed

    async def advance(self, *, seconds: float = 0.0, minutes: float = 0.0, hours: float = 0.0, days: float = 0.0) -> int:
        """Let time pass, and execute at its due time what falls due on the way.

        Returns:
            How many deliveries were executed.
        """
        end_ms = self.clock.time_ms() + round((seconds + 60 * minutes + 3600 * hours + 86400 * days) * 1000)
        executed = await self.run_until_idle()
        while (due_ms := await self._next_due_ms()) is not None and due_ms <= end_ms:
            self.clock.advance(max(0, due_ms - self.clock.time_ms()) / 1000)
            executed += await self.run_until_idle()
        self.clock.advance(max(0, end_ms - self.clock.time_ms()) / 1000)
        return executed + await self.run_until_idle()

    def dead_letters(self) -> Sequence[DeadLetter]:
        """The dead letters there were after the last `run_until_idle` or `advance`, in order of dying within each queue."""
        return self._letters

    def _make_broker(self) -> Broker:
        return create_broker(self._url, namespace=self.app.settings.namespace, clock=self.clock)

    def _settle(self, _: Delivery, settlement: Settlement | None) -> None:
        if settlement is not None:
            self._endings.append(settlement)

    async def _settle_all(self) -> None:
        endings, self._endings = self._endings, []
        for refusal in await self._broker.settle(endings):
            raise refusal.error

    async def _next_due_ms(self) -> int | None:
        due: list[int] = []
        for stats in await self._broker.stats():
            if stats.scheduled:
                page = await self._broker.peek(stats.queue, State.SCHEDULED, limit=1)
                due += [entry.message.eta_ms for entry in page.entries]
        return min(due, default=None)

    async def _read_letters(self) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        for stats in await self._broker.stats():
            after = None
            while stats.dead:
                page = await self._broker.peek(stats.queue, State.DEAD, after=after, limit=1000)
                letters += [entry.letter for entry in page.entries if entry.letter is not None]
                after = page.next
                if after is None:
                    break
        return letters
