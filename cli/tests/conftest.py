"""A broker with messages and dead letters in it, and the command run in this process."""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest

from crossdock import codec, letters
from crossdock.backends import memory
from crossdock.codec import Envelope
from crossdock.plugins import create_broker
from crossdock.spi import Broker, Dead, Entry, Lane, Message, Priority, Reason, State
from crossdock_cli.main import main

Answer = TypeVar("Answer")

_numbers = itertools.count()


class Result(NamedTuple):
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, read as JSON."""
        return msgspec.json.decode(self.out)


Run = Callable[..., Result]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A memory broker of this test's own, named by $CROSSDOCK_URL; the working directory is empty."""
    name = f"cli-{next(_numbers)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSDOCK_URL", f"memory://{name}")
    yield f"memory://{name}"
    memory.forget(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `crossdock` with these arguments in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str, stdin: str | None = None) -> Result:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", _Terminal(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(arguments)
        captured = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, captured.out, captured.err)

    return call


class _Terminal:
    """A standard input at which somebody sits and types."""

    def __init__(self, text: str) -> None:
        self._text = text

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self._text


class Store:
    """The broker of a test, reached past the commands."""

    def __init__(self, url: str) -> None:
        self._url = url

    def do(self, work: Callable[[Broker], Awaitable[Answer]]) -> Answer:
        """Do something with the open broker."""

        async def session() -> Answer:
            broker = create_broker(self._url)
            await broker.open()
            try:
                return await work(broker)
            finally:
                await broker.close()

        return asyncio.run(session())

    def enqueue(
        self,
        id: str,
        queue: str = "default",
        *,
        task: str = "shop.work",
        arguments: Any = None,
        body: bytes | None = None,
        eta_ms: int = 0,
    ) -> None:
        """Store one message."""
        message = self._message(id, queue, task, arguments, body, eta_ms)

        async def work(broker: Broker) -> None:
            assert not await broker.enqueue([message])

        self.do(work)

    @staticmethod
    def _message(id: str, queue: str, task: str, arguments: Any, body: bytes | None, eta_ms: int) -> Message:
        envelope = Envelope(1, task, msgspec.Raw(msgspec.msgpack.encode(arguments or {})), 1_767_225_600_000, headers={"h": "1"})
        return Message(id, queue, Priority.NORMAL, codec.encode(envelope) if body is None else body, eta_ms)

    def kill(
        self,
        *ids: str,
        queue: str = "default",
        task: str = "shop.work",
        arguments: Any = None,
        body: bytes | None = None,
        error: BaseException | None = None,
        reason: Reason = Reason.ATTEMPTS_EXHAUSTED,
        died_ms: int = 1_767_225_660_000,
    ) -> None:
        """Store messages and dead-letter them, one a millisecond."""
        bodies = [self._message(id, queue, task, arguments, body, 0) for id in ids]
        failure = error or ValueError("no stock")

        async def work(broker: Broker) -> None:
            assert not await broker.enqueue(bodies)
            deliveries = await broker.receive([Lane(queue, Priority.NORMAL, len(ids))], len(ids), 0)
            assert {delivery.message.id for delivery in deliveries} == set(ids)
            dead: list[Dead] = []
            for number, delivery in enumerate(deliveries):
                envelope = codec.decode(delivery.message.body) if body is None else None
                try:
                    raise failure.with_traceback(None)
                except BaseException as raised:
                    letter = letters.write(
                        delivery.message,
                        envelope,
                        reason,
                        error=raised,
                        failed=True,
                        now_ms=died_ms + number,
                        worker="w1",
                        delivery_count=1,
                    )
                dead.append(Dead(delivery, letter))
            assert not await broker.settle(dead)

        self.do(work)

    def entries(self, queue: str, state: State) -> dict[str, Entry]:
        """What is stored in one state, by id."""

        async def work(broker: Broker) -> dict[str, Entry]:
            return {entry.message.id: entry for entry in (await broker.peek(queue, state, limit=1000)).entries}

        return self.do(work)

    def arguments(self, queue: str, id: str) -> dict[str, Any]:
        """The arguments of a READY message."""
        return codec.arguments(self.entries(queue, State.READY)[id].message.body)


@pytest.fixture
def store(url: str) -> Store:
    """The broker of this test."""
    return Store(url)
