"""The thread that uses the file, as the event loop sees it: commands go in, answers come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TypeVar

from crossdock.backends.sqlite.command import Answer, Command, Inbox, Loss, Note, Receive, give_back
from crossdock.backends.sqlite.desk import Desk
from crossdock.backends.sqlite.store import Store
from crossdock.backends.sqlite.watch import Watch
from crossdock.errors import BrokerClosed, BrokerUnavailable, CrossdockError
from crossdock.spi import BrokerEvent, Clock, Delivery, Lane

T = TypeVar("T")


class Engine:
    """A thread of its own for one store. Belongs to the running event loop.

    Args:
        open_store: Called in the thread, with a function that sleeps for some seconds or until the engine stops.
        clock: For deadlines and due times.
        report: Gets events, in the loop.
    """

    def __init__(
        self, open_store: Callable[[Callable[[float], object]], Store], clock: Clock, report: Callable[[BrokerEvent], None]
    ) -> None:
        self._open_store = open_store
        self._clock = clock
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._inbox: Inbox = SimpleQueue()
        self._stopping = threading.Event()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._main, name="crossdock-sqlite", daemon=True)

    async def start(self) -> None:
        """Start the thread and open the store. Raises what opening raises; then nothing is left."""
        self._thread.start()
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            await self.stop()
            raise

    async def call(self, run: Callable[[Store], T], excuse: Callable[[Loss], T] | None = None) -> T:
        """Have something done in the store, in a transaction.

        Args:
            run: Does it.
            excuse: Turns a failed transaction into an answer; None: its error is raised.

        Raises:
            BrokerUnavailable: It was not attempted, or undone.
        """
        future: asyncio.Future[T] = self._loop.create_future()
        self._put(Command(run, excuse, future))
        return await future

    async def receive(self, lanes: Sequence[Lane], limit: int, wait: float) -> Sequence[Delivery]:
        """Take messages, waiting for a first one. Raises `BrokerUnavailable`; `BrokerClosed` if stopped meanwhile."""
        future: asyncio.Future[Sequence[Delivery]] = self._loop.create_future()
        self._put(Receive(lanes, limit, self._clock.monotonic() + wait, future))
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None and future.result():
                self._inbox.put(give_back(future.result()))
            raise

    async def stop(self) -> None:
        """Do what was asked so far, end waiting receives with `BrokerClosed`, close the store and end the thread. Idempotent."""
        if not self._thread.is_alive():
            return
        # First let every answer arrive: what a cancelled receive took comes back as one more command.
        flushed: asyncio.Future[None] = self._loop.create_future()
        self._inbox.put(Command(_nothing, future=flushed))
        try:
            await asyncio.wait({flushed, self._ended}, return_when=asyncio.FIRST_COMPLETED)
            if flushed.done():
                flushed.exception()  # whatever it was, it is no matter now
        finally:
            self._stopping.set()
            self._inbox.put(Note.END)
        await asyncio.shield(self._ended)
        self._thread.join()

    def _put(self, command: Command[T]) -> None:
        if not self._thread.is_alive():  # after a fork the thread is in the parent
            raise BrokerClosed("The SQLite broker is not open in this process.")
        self._inbox.put(command)

    def _deliver(self, answers: Sequence[Answer]) -> None:
        for command, value, error in answers:
            future = command.future
            if future is None:
                continue
            if future.done():  # nobody waits any more: what a receive took goes back
                if isinstance(command, Receive) and value:
                    self._inbox.put(give_back(value))
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)

    # --- in the thread ---

    def _main(self) -> None:
        try:
            store = self._open_store(self._stopping.wait)
        except CrossdockError as error:
            self._in_loop(_fail, self._opened, error)
        except Exception as error:
            unavailable = BrokerUnavailable(f"The SQLite broker cannot be opened: {type(error).__name__}: {error}")
            unavailable.__cause__ = error
            self._in_loop(_fail, self._opened, unavailable)
        else:
            self._in_loop(_finish, self._opened)
            watch = Watch(store.database.log, self._loop, lambda: self._inbox.put(Note.WRITTEN))
            Desk(store, self._inbox, self._clock, self._answer, self._tell, watch).work()
            if not self._in_loop(watch.close):
                watch.close()
        self._in_loop(_finish, self._ended)

    def _answer(self, answers: Sequence[Answer]) -> bool:
        return self._in_loop(self._deliver, answers) if answers else not self._loop.is_closed()

    def _tell(self, event: BrokerEvent) -> None:
        self._in_loop(self._report, event)

    def _in_loop(self, callback: Callable[..., None], *arguments: object) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop was closed, and with it everybody who waited
            return False
        return True


def _nothing(store: Store) -> None:
    pass


def _finish(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: CrossdockError) -> None:
    if not future.done():
        future.set_exception(error)
