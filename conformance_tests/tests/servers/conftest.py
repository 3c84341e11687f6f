"""Which servers the tests run on, and how they write something that must survive, without a driver.

They run on every version that is found on this machine; a kind that is not found is skipped by name.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

import pytest

from crossdock_conformance.servers import Server, ServerNotFound, Source, find_servers, start_server
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.fixtures import skip_or_fail
from crossdock_conformance.servers.redis_server import Connection
from crossdock_conformance.servers.wire import connect

KINDS = ("redis", "valkey", "nats", "rabbitmq")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `server` one value for each version found, and one for a kind of which none is."""
    if "source" in metafunc.fixturenames:
        found: list[Any] = []
        for kind in KINDS:
            programs = [source for source in find_servers(kind) if isinstance(source, BinarySource)]
            found += [pytest.param(source, id=f"{kind}-{source.version}") for source in programs] or [pytest.param(kind, id=kind)]
        metafunc.parametrize("source", found, indirect=True, scope="module")


@pytest.fixture(scope="module")
def source(request: pytest.FixtureRequest) -> Source:
    """Where a server comes from, version by version."""
    if isinstance(request.param, str):
        with start_or_skip(request.param, request.config) as server:  # perhaps from a container, or after an installation
            if not server.controllable:
                pytest.skip(f"the only {request.param} server is given by its URL")
        return find_servers(request.param)[0]
    found: Source = request.param
    return found


@pytest.fixture(scope="module")
def server(source: Source) -> Iterator[Server]:
    """A running server that the tests of a module share. Each leaves it running."""
    with source.start() as started:
        yield started


@pytest.fixture
def own_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """A server that one test may do with as it likes, of the kinds that start fastest."""
    with start_or_skip("redis" if find_servers("redis") else "valkey", pytestconfig) as started:
        yield started


def start_or_skip(kind: str, config: pytest.Config) -> Server:
    try:
        return start_server(kind)
    except ServerNotFound as error:
        skip_or_fail(error, config)


class Note(Protocol):
    """Something durable in a server."""

    def write(self, url: str) -> None: ...
    def stands(self, url: str) -> bool: ...


@pytest.fixture
def note(server: Server) -> Note:
    """A note that stands in `server`."""
    notes: dict[str, Note] = {"redis": Key(), "valkey": Key(), "nats": StreamMessage(), "rabbitmq": QueuedMessage()}
    written = notes[server.kind]
    if not written.stands(server.url):
        written.write(server.url)
    return written


class Key:
    """A key of Redis."""

    def write(self, url: str) -> None:
        with Connection(url, 5) as connection:
            connection.call("SET", "note", "survives")

    def stands(self, url: str) -> bool:
        with Connection(url, 5) as connection:
            return bool(connection.call("GET", "note") == b"survives")


class StreamMessage:
    """A message in a JetStream stream, acknowledged."""

    def write(self, url: str) -> None:
        with NatsConnection(url) as connection:
            connection.request("$JS.API.STREAM.CREATE.NOTES", {"name": "NOTES", "subjects": ["notes"], "storage": "file"})
            connection.request("$JS.API.CONSUMER.DURABLE.CREATE.NOTES.reader", {"stream_name": "NOTES", "config": READER})
            connection.request("notes", {"text": "survives"})

    def stands(self, url: str) -> bool:
        with NatsConnection(url) as connection:
            answer = connection.ask("$JS.API.STREAM.INFO.NOTES", {})
            return bool(answer.get("state", {}).get("messages") == 1)


READER = {"durable_name": "reader", "ack_policy": "explicit"}


class NatsConnection:
    """Requests and answers, in JSON."""

    def __init__(self, url: str) -> None:
        self._socket = connect(url, 4222, 10)
        self._file = self._socket.makefile("rb")
        self._file.readline()  # INFO
        self._socket.sendall(b'CONNECT {"verbose":false,"pedantic":false,"name":"note"}\r\nSUB answers 1\r\n')

    def ask(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        payload = json.dumps(body).encode()
        self._socket.sendall(b"PUB %s answers %d\r\n%s\r\n" % (subject.encode(), len(payload), payload))
        while not (line := self._file.readline()).startswith(b"MSG "):
            assert line, "the connection ended"
        answer: dict[str, Any] = json.loads(self._file.read(int(line.split()[-1]) + 2))
        return answer

    def request(self, subject: str, body: dict[str, Any]) -> None:
        answer = self.ask(subject, body)
        assert "error" not in answer, answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()
        self._socket.close()


class QueuedMessage:
    """A persistent message in a durable queue of RabbitMQ, confirmed."""

    def write(self, url: str) -> None:
        with AmqpConnection(url) as connection:
            connection.call(85, 10, b"\0")  # confirm.select
            connection.call(50, 10, struct.pack(">H", 0) + short("notes") + b"\x02" + table(b""))  # queue.declare, durable
            exchange = struct.pack(">H", 0) + short("noted") + short("direct") + b"\x02" + table(b"")
            connection.call(40, 10, exchange)  # exchange.declare, durable
            body = b"survives"
            header = struct.pack(">HHQHB", 60, 0, len(body), 1 << 12, 2)  # of class basic, with a delivery mode: persistent
            publish = struct.pack(">HHH", 60, 40, 0) + short("") + short("notes") + b"\0"
            connection.send((1, publish), (2, header), (3, body))
            assert connection.method()[:2] == (60, 80), "the message was not confirmed"

    def stands(self, url: str) -> bool:
        with AmqpConnection(url) as connection:
            # A passive declare is refused where there is no such queue; else it tells the name and the number of messages.
            declare = struct.pack(">H", 0) + short("notes") + b"\x01" + table(b"")
            kind, number, arguments = connection.call(50, 10, declare, may_fail=True)
            return (kind, number) == (50, 11) and struct.unpack(">I", arguments[6:10]) == (1,)


def short(value: str) -> bytes:
    return bytes([len(value)]) + value.encode()


def table(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


class AmqpConnection:
    """One channel of AMQP 0-9-1: methods by their class and number, one at a time."""

    def __init__(self, url: str) -> None:
        self._socket: socket.socket = connect(url, 5672, 10)
        self._file = self._socket.makefile("rb")
        self._channel = 0
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self.method()  # connection.start
        self.call(10, 11, table(b"") + short("PLAIN") + table(b"\0guest\0guest") + short("en_US"))
        self.send((1, struct.pack(">HHHIH", 10, 31, 1, 131072, 0)))  # connection.tune-ok
        self.call(10, 40, short("/") + short("") + b"\0")  # connection.open
        self._channel = 1
        self.call(20, 10, short(""))  # channel.open

    def call(self, kind: int, number: int, arguments: bytes, *, may_fail: bool = False) -> tuple[int, int, bytes]:
        """Send a method and return the one that answers."""
        self.send((1, struct.pack(">HH", kind, number) + arguments))
        answer = self.method()
        assert may_fail or answer[0] == kind, f"{kind}.{number} was answered {answer}"
        return answer

    def send(self, *frames: tuple[int, bytes]) -> None:
        sent = (struct.pack(">BHI", kind, self._channel, len(payload)) + payload + b"\xce" for kind, payload in frames)
        self._socket.sendall(b"".join(sent))

    def method(self) -> tuple[int, int, bytes]:
        """The next method that arrives."""
        while True:
            kind, _, length = struct.unpack(">BHI", self._file.read(7))
            payload = self._file.read(length + 1)[:-1]
            if kind == 1:
                return *struct.unpack(">HH", payload[:4]), payload[4:]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._file.close()
        self._socket.close()
