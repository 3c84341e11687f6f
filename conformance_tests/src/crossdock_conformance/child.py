"""A process of its own with a Broker in it, which can be killed, frozen and forked: both ends of the pipe to it.

The file is also the program that runs there, as a script that imports nothing of the suite, so that a child starts as fast as crossdock::

    CROSSDOCK_CHILD_URL=... python -P child.py NAMESPACE

It opens a Broker on the system's clock and does as it is told. (The URL may hold a secret, and arguments are seen by everybody.)

    stdin    one line of JSON per order; the next is read when the one before is answered. At the end the Broker is closed.
    stdout   one line of JSON per answer, the first one when the Broker is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Literal

import msgspec

from crossdock.errors import CrossdockError
from crossdock.plugins import create_broker
from crossdock.spi import (
    LEVELS,
    Ack,
    Broker,
    Dead,
    DeadLetter,
    Delivery,
    Lane,
    Message,
    Nack,
    QueueSpec,
    Reason,
    Refusal,
    Replay,
    Settlement,
    State,
)

_URL: Final = "CROSSDOCK_CHILD_URL"

# --- orders and answers ----------------------------------------------------------------------------


class Declare(msgspec.Struct, tag=True):
    """Declare queues."""

    specs: list[QueueSpec]


class Enqueue(msgspec.Struct, tag=True):
    """Store messages."""

    messages: list[Message]


class Receive(msgspec.Struct, tag=True):
    """Take messages of every level, and remember the deliveries for `Settle` and `Extend`."""

    queue: str = "q"
    limit: int = 100
    wait: float = 0.0
    aside: bool = False
    """Answer at once; `Collect` tells what came."""


class Collect(msgspec.Struct, tag=True):
    """Wait for the end of the receive that goes on aside."""


class Ending(msgspec.Struct):
    """How to settle one of the deliveries that were received."""

    id: str
    how: Literal["ack", "give back", "retry", "dead-letter"]


class Settle(msgspec.Struct, tag=True):
    """End deliveries."""

    endings: list[Ending]


class Extend(msgspec.Struct, tag=True):
    """Renew leases."""

    ids: list[str]


class Revive(msgspec.Struct, tag=True):
    """Replay dead letters."""

    replays: list[Replay]
    queue: str = "q"


class Purge(msgspec.Struct, tag=True):
    """Delete the READY messages of a queue."""

    queue: str = "q"


class Close(msgspec.Struct, tag=True):
    """Close the Broker."""


class Open(msgspec.Struct, tag=True):
    """Open it again."""


class Fork(msgspec.Struct, tag=True):
    """Fork; the forked process opens a Broker of its own and follows the orders of `Forked`."""


class Forked(msgspec.Struct, tag=True):
    """Have the forked process follow an order, and pass its answer on."""

    order: Order


class Join(msgspec.Struct, tag=True):
    """Let the forked process close its Broker and end."""


Order = Declare | Enqueue | Receive | Collect | Settle | Extend | Revive | Purge | Close | Open | Fork | Forked | Join


class Held(msgspec.Struct, frozen=True):
    """What a process tells of a delivery."""

    id: str
    generation: int
    body: bytes
    count: int
    """Of deliveries."""


class Answer(msgspec.Struct):
    """What came of an order."""

    error: str = ""
    """What was raised, if anything."""
    refused: dict[int, str] = {}
    """Names of the types of errors by item."""
    deliveries: list[Held] = []
    count: int = 0
    """What `Purge` returned; for `Join`, the exit status."""


def retried(message: Message) -> Message:
    """What a `Settle` puts in the place of a message that is to be retried."""
    return Message(message.id, message.queue, message.priority, message.body, generation=message.generation + 1)


# --- the end that gives orders ---------------------------------------------------------------------


class Ended(Exception):
    """The process has ended and will not answer."""


class Child:
    """A process that was started; see `Children.start`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def ask(self, order: Order) -> Answer:
        """Have something done and return what came of it; one at a time.

        Raises:
            Ended: The process ended before it answered.
            AssertionError: The verb raised there.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Ended("the process has ended") from error
        return await self.answer()

    async def answer(self) -> Answer:
        """Return the next answer. Raises as `ask`."""
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line.endswith(b"\n"):
            raise Ended("the process ended before it answered")
        answer = msgspec.json.decode(line, type=Answer)
        assert not answer.error, f"in another process: {answer.error}"
        return answer

    def kill(self) -> None:
        """End it with SIGKILL, and what it forked. Returns when it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def freeze(self) -> None:
        """Stop it as SIGSTOP does."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    async def end(self) -> None:
        """Let it close its Broker and end. Fails if it ends badly."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert await asyncio.to_thread(self._process.wait) == 0

    def bury(self) -> None:
        """Leave nothing of it."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # an order that nobody read may still be in it
                pipe.close()


class Children:
    """The processes of one scenario: an asynchronous context manager, at whose end none is left.

    Args:
        url: The broker that they use.
        namespace: The namespace that they use.
    """

    def __init__(self, url: str, namespace: str) -> None:
        self._url = url
        self._namespace = namespace
        self._children: list[Child] = []

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for child in self._children:
            child.bury()

    async def start(self, *specs: QueueSpec) -> Child:
        """Start a process, and return when its Broker is open and has declared these queues. Fails if it cannot be opened."""
        child = Child(await asyncio.to_thread(self._spawn))
        self._children.append(child)
        try:
            await child.answer()
        except Ended as error:
            raise AssertionError(
                "a process of its own cannot open a Broker; what it wrote to its standard error says why"
            ) from error
        await child.ask(Declare(list(specs)))
        return child

    def _spawn(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # From 3.12 on Python warns of a fork beside threads; that a backend survives it is what a scenario proves.
            [sys.executable, "-P", "-W", "ignore::DeprecationWarning", __file__, self._namespace],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It shall find the backend where we do.
            env={**os.environ, _URL: self._url, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # so that it ends together with what it forks
        )


# --- the end that follows orders -------------------------------------------------------------------


class Follower:
    """A Broker, what it has received, and perhaps a forked process."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._held: dict[str, Delivery] = {}
        self._aside: asyncio.Task[Answer] | None = None
        self._forked = ForkedProcess()

    async def follow(self, order: Order) -> Answer:
        """Do as told; an error of ours becomes an answer."""
        try:
            return await self._do(order)
        except CrossdockError as error:
            return Answer(error=f"{type(error).__name__}: {error}")

    async def _do(self, order: Order) -> Answer:
        broker = self._broker
        match order:
            case Declare(specs):
                await broker.declare(specs)
            case Enqueue(messages):
                return _refused(await broker.enqueue(messages))
            case Receive(aside=True):
                self._aside = asyncio.ensure_future(self.follow(msgspec.structs.replace(order, aside=False)))
            case Receive(queue, limit, wait):
                return await self._receive(queue, limit, wait)
            case Collect():
                assert self._aside is not None
                return await self._aside
            case Settle(endings):
                return _refused(await broker.settle([_settlement(self._held[ending.id], ending.how) for ending in endings]))
            case Extend(ids):
                return _refused(await broker.extend([self._held[id] for id in ids]))
            case Revive(replays, queue):
                return _refused(await broker.replay(queue, replays))
            case Purge(queue):
                return Answer(count=await broker.purge(queue, State.READY))
            case Close():
                await broker.close()
            case Open():
                await broker.open()
            case Fork():
                return await self._forked.start()
            case Forked(passed_on):
                return await asyncio.to_thread(self._forked.ask, passed_on)
            case Join():
                return await asyncio.to_thread(self._forked.join)
        return Answer()

    async def _receive(self, queue: str, limit: int, wait: float) -> Answer:
        deliveries = await self._broker.receive([Lane(queue, level, 0) for level in LEVELS], limit, wait)
        self._held |= {delivery.message.id: delivery for delivery in deliveries}
        return Answer(deliveries=[held(delivery) for delivery in deliveries])

    async def close(self) -> None:
        """Close the Broker."""
        await self._broker.close()
        if self._aside is not None:
            await self._aside


class ForkedProcess:
    """A fork of this process, which follows orders as this one does."""

    async def start(self) -> Answer:
        """Fork, in the middle of whatever the event loop and other threads do; return when it has opened its Broker."""
        its_orders, orders = os.pipe()
        answers, its_answers = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            status = 1
            try:
                os.close(orders)
                os.close(answers)
                asyncio.run(_serve(its_orders, its_answers))
                status = 0
            finally:
                os._exit(status)  # the frames below belong to the other process
        os.close(its_orders)
        os.close(its_answers)
        self._orders, self._answers = os.fdopen(orders, "wb", 0), os.fdopen(answers, "rb")
        return await asyncio.to_thread(self._answer)

    def ask(self, order: Order) -> Answer:
        """Have something done."""
        self._orders.write(msgspec.json.encode(order) + b"\n")
        return self._answer()

    def _answer(self) -> Answer:
        line = self._answers.readline()
        return msgspec.json.decode(line, type=Answer) if line else Answer(error="the forked process has ended")

    def join(self) -> Answer:
        """Let it end."""
        self._orders.close()
        self._answers.close()
        return Answer(count=os.waitpid(self._pid, 0)[1])


def held(delivery: Delivery) -> Held:
    """What can be told of a delivery."""
    message = delivery.message
    return Held(message.id, message.generation, message.body, delivery.delivery_count)


def _refused(refusals: Sequence[Refusal]) -> Answer:
    return Answer(refused={refusal.index: type(refusal.error).__name__ for refusal in refusals})


def _settlement(delivery: Delivery, how: Literal["ack", "give back", "retry", "dead-letter"]) -> Settlement:
    match how:
        case "ack":
            return Ack(delivery)
        case "give back":
            return Nack(delivery)
        case "retry":
            return Nack(delivery, replacement=retried(delivery.message))
        case "dead-letter":
            return Dead(delivery, DeadLetter(delivery.message, Reason.REJECTED, died_ms=1_800_000_000_000))


async def _serve(orders: int, answers: int) -> None:
    """Follow the orders that come out of one descriptor, and write answers to the other."""
    lines = asyncio.StreamReader(limit=64 * 1024 * 1024)
    connect = asyncio.get_running_loop().connect_read_pipe
    transport, _ = await connect(lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(orders, "rb", 0))
    broker = create_broker(os.environ[_URL], namespace=sys.argv[1])
    await broker.open()
    follower = Follower(broker)
    _tell(answers, Answer())
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(Order)
    while line := await lines.readline():
        _tell(answers, await follower.follow(decoder.decode(line)))
    await follower.close()
    transport.close()


def _tell(answers: int, answer: Answer) -> None:
    line = msgspec.json.encode(answer) + b"\n"
    while line:
        line = line[os.write(answers, line) :]


if __name__ == "__main__":
    asyncio.run(_serve(0, 1))
