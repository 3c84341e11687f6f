"""The server: a process that owns a SQLite file and serves it to whoever connects. It ends with its standard input.

    python server.py PORT FILE

Each client has a session, with a Broker and the deliveries it was handed; a session outlives the loss of its connection for a while.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from crossdock.errors import CrossdockError, LeaseLost
from crossdock.plugins import create_broker
from crossdock.spi import Ack, Broker, Cursor, Dead, Delivery, Lane, Nack, Page, Refusal, Settlement, State
from crossdock_remote import wire

LINGER = 5.0
"""Seconds for which a session waits for its client to come back."""


class Session:
    """One client. Verbs that are not here are its Broker's own.

    Args:
        broker: Its Broker.
        turn: Held while a Broker works, for SQLite's writers do not queue: of fifty in one process some would wait for seconds.
    """

    def __init__(self, broker: Broker, turn: asyncio.Lock) -> None:
        self.broker = broker
        self._turn = turn
        self.connection: asyncio.StreamWriter | None = None
        self.losses = 0
        """How often it lost its connection."""
        self._life = uuid.uuid4().hex
        self._deliveries: dict[int, Delivery] = {}
        self._numbers = itertools.count(1)

    async def call(self, verb: str, arguments: Sequence[Any]) -> object:
        """Carry out a verb; what it returns can travel."""
        if verb == "receive":
            return await self._receive(*arguments)
        async with self._turn:
            value = await getattr(self, verb, getattr(self.broker, verb))(*arguments)
        return _refused(value) if verb in wire.REFUSING else value

    async def _receive(self, lanes: list[Lane], limit: int, wait: float) -> wire.Received:
        began = time.monotonic()
        async with self._turn:
            deliveries = await self.broker.receive(lanes, limit, 0)
        if not deliveries and wait > 0:
            deliveries = await self.broker.receive(lanes, limit, wait)
        now = time.monotonic()
        return wire.Received([self._handed(delivery, now) for delivery in deliveries], now - began)

    def _handed(self, delivery: Delivery, now: float) -> wire.Handed:
        number = next(self._numbers)
        self._deliveries[number] = delivery
        receipt = wire.Receipt(self._life, number)
        return wire.Handed(delivery.message, delivery.delivery_count, delivery.lease_until - now, receipt)

    async def take_back(self, received: wire.Received) -> None:
        """Undo a receive whose answer reaches nobody."""
        await self.broker.settle([Nack(self._deliveries[handed.receipt.number]) for handed in received.deliveries])

    async def extend(self, receipts: list[wire.Receipt]) -> list[Refusal]:
        """As `Broker.extend`."""
        known, refusals = self._known(receipts)
        refused = await self.broker.extend([self._deliveries[receipts[at].number] for at in known])
        return [*refusals, *(Refusal(known[one.index], one.error) for one in refused)]

    async def settle(self, endings: list[wire.Ending]) -> list[Refusal]:
        """As `Broker.settle`."""
        known, refusals = self._known([ending.receipt for ending in endings])
        refused = await self.broker.settle([self._settlement(endings[at]) for at in known])
        return [*refusals, *(Refusal(known[one.index], one.error) for one in refused)]

    def _known(self, receipts: list[wire.Receipt]) -> tuple[list[int], list[Refusal]]:
        known = [at for at, one in enumerate(receipts) if one.life == self._life and one.number in self._deliveries]
        lost = LeaseLost("The server has started anew since, and this lease is over.")
        return known, [Refusal(at, lost) for at in sorted({*range(len(receipts))} - {*known})]

    def _settlement(self, ending: wire.Ending) -> Settlement:
        delivery = self._deliveries[ending.receipt.number]
        if ending.letter is not None:
            return Dead(delivery, ending.letter)
        return Ack(delivery) if ending.delay is None else Nack(delivery, ending.delay, ending.replacement)

    async def peek(self, queue: str, state: State, ids: list[str], after: Cursor | None, limit: int) -> Page:
        """As `Broker.peek`."""
        return await self.broker.peek(queue, state, ids=ids, after=after, limit=limit)


def _refused(refusals: Sequence[Refusal]) -> list[wire.Refused]:
    return [wire.Refused(one.index, type(one.error).__name__, str(one.error)) for one in refusals]


class Server:
    """All sessions and connections."""

    def __init__(self, file: Path) -> None:
        self._file = file
        identity = file.with_suffix(".id")
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        self._store = identity.read_text()
        self._sessions: dict[str, Session] = {}
        self._turn = asyncio.Lock()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        tasks: dict[int, asyncio.Task[None]] = {}
        session: Session | None = None
        name = ""
        try:
            while True:
                request = wire.decode(await wire.read(reader), type=wire.Request)
                if request.verb == "hello":
                    (name, namespace) = wire.decode(request.arguments, type=wire.ARGUMENTS["hello"])
                    session = await self._session(name, namespace)
                    session.connection = writer
                    answer = wire.Welcome(session.broker.capabilities, self._store)
                    _write(writer, request.number, answer)
                elif session is None:
                    return
                elif request.verb == "cancel":
                    (number,) = wire.decode(request.arguments, type=wire.ARGUMENTS["cancel"])
                    await asyncio.sleep(0)  # a task that has not begun cannot be told that it is cancelled
                    if number in tasks:
                        tasks[number].cancel()
                    _write(writer, request.number)
                elif request.verb == "bye":
                    await self._end(name)
                    _write(writer, request.number)
                else:
                    task = tasks[request.number] = asyncio.ensure_future(_answer(session, request, writer))
                    task.add_done_callback(partial(_forget, tasks, request.number))
        except (OSError, EOFError):
            pass
        finally:
            for task in list(tasks.values()):
                task.cancel()
            writer.transport.abort()
            if session is not None and session.connection is writer:
                session.connection = None
                session.losses += 1
                asyncio.get_running_loop().call_later(LINGER, self._leave, name, session, session.losses)

    async def _session(self, name: str, namespace: str) -> Session:
        if name not in self._sessions:
            broker = create_broker(f"sqlite:///{self._file}", namespace=namespace)
            await broker.open()
            broker.capabilities = msgspec.structs.replace(broker.capabilities, server="Remote", version="1", clock="broker")
            self._sessions[name] = Session(broker, self._turn)
        return self._sessions[name]

    def _leave(self, name: str, session: Session, losses: int) -> None:
        if session.connection is None and session.losses == losses:  # it did not come back since just this loss
            self._ending = asyncio.ensure_future(self._end(name))

    async def _end(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is not None:
            await session.broker.close()

    def cut(self) -> None:
        """Cut every connection."""
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.transport.abort()

    async def close(self) -> None:
        """End every session."""
        self.cut()
        for name in list(self._sessions):
            await self._end(name)


def _forget(tasks: dict[int, asyncio.Task[None]], number: int, _: asyncio.Task[None]) -> None:
    del tasks[number]


async def _answer(session: Session, request: wire.Request, writer: asyncio.StreamWriter) -> None:
    value: Any = None
    error: tuple[str, str] | None = None
    try:
        arguments = wire.decode(request.arguments, type=wire.ARGUMENTS[request.verb])
        value = await session.call(request.verb, arguments)
    except asyncio.CancelledError:
        value = wire.Received([], 0.0)
    except msgspec.DecodeError as failure:
        error = "ConfigurationError", f"The server cannot make sense of what it was asked: {failure}."
    except CrossdockError as failure:
        error = type(failure).__name__, str(failure)
    if isinstance(value, wire.Received) and value.deliveries and writer.transport.is_closing():
        await session.take_back(value)
    _write(writer, request.number, value, error)


def _write(writer: asyncio.StreamWriter, number: int, value: object = None, error: tuple[str, str] | None = None) -> None:
    if not writer.transport.is_closing():
        writer.write(wire.frame(wire.Reply(number, msgspec.Raw(wire.encode(value)), error)))


async def main(port: int, file: Path) -> None:
    """Serve until told to end."""
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    server = Server(file)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", port, limit=64 * 1024 * 1024)
    loop.add_signal_handler(signal.SIGTERM, end.set)
    loop.add_signal_handler(signal.SIGUSR1, server.cut)
    loop.add_reader(0, lambda: None if os.read(0, 1) else end.set())
    await end.wait()
    listener.close()
    await server.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
