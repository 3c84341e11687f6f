"""A NATS server that is set up as a test needs it, and a way to it whose connections can be cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.local import LocalServer
from crossdock_conformance.servers.nats_server import Nats
from crossdock_conformance.servers.recipe import HOST, Binary, Launch, Reach
from crossdock_conformance.servers.wire import http_json


class _Configured(Nats):
    """NATS with further lines of configuration."""

    def __init__(self, lines: str) -> None:
        self._lines = lines

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        config = data.parent / "server.conf"
        text = self._lines.replace("PORT+", str(ports["client"])).replace("STORE", binary.inside(data))
        config.write_text(text)
        plain = super().launch(binary, ports, data).argv
        if "jetstream" in self._lines:
            plain = plain[: plain.index("-js")]
        return Launch([*plain, "-c", binary.inside(config)])

    def greet(self, reach: Reach, timeout: float) -> str:
        if not any(word in self._lines for word in ("tls {", "no_auth_user", "accounts {", "operator:")):
            return super().greet(reach, timeout)
        http_json(str(reach.admin), "/healthz", timeout)  # it would not let in who does not know its authority, or has no name
        return str(http_json(str(reach.admin), "/varz", timeout)["version"])


class Node(LocalServer):
    """A server of its own, running.

    Args:
        source: Where the program is.
        lines: Its configuration beside ports and storage; one that has `jetstream` says itself where that is stored, as STORE.

    Raises:
        ServerFailed: It does not start; shows the end of its log.
    """

    def __init__(self, source: BinarySource, lines: str = "") -> None:
        super().__init__(_Configured(lines) if lines else Nats(), source.binary, source.version)
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def streams(self) -> Path:
        """Where it keeps its streams, each in a folder: messages in `msgs`, and consumers in `obs`."""
        return self._data / "jetstream" / "$G" / "streams"


class _Member(Nats):
    """NATS as one of several that are one cluster."""

    ports = ("client", "admin", "route")  # type: ignore[assignment]

    def __init__(self, name: str) -> None:
        self.name = name
        self.routes: list[int] = []

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        config = data.parent / "server.conf"
        routes = ", ".join(f'"nats://{HOST}:{port}"' for port in self.routes)
        config.write_text(
            f'server_name: "{self.name}"\njetstream {{ store_dir: "{binary.inside(data)}" }}\n'
            # Clients go where the test sends them, and nowhere else.
            f'cluster {{ name: test, listen: "{HOST}:{ports["route"]}", routes: [{routes}], no_advertise: true }}\n'
        )
        argv = super().launch(binary, ports, data).argv
        return Launch([*argv[: argv.index("-js")], "-c", binary.inside(config)])


class _Joined(LocalServer):
    """One node of a cluster."""

    def __init__(self, source: BinarySource, member: _Member) -> None:
        self.member = member
        super().__init__(member, source.binary, source.version)

    @property
    def route(self) -> int:
        """The port for the others."""
        return self._ports.numbers["route"]


class Cluster:
    """Three servers that are one, running, with JetStream on each. What is done to all of them is done at the same time."""

    def __init__(self, source: BinarySource) -> None:
        self.nodes = [_Joined(source, _Member(f"n{number}")) for number in range(3)]
        for node in self.nodes:
            node.member.routes = [each.route for each in self.nodes]
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        self.url = "nats://" + ",".join(urlsplit(node.url).netloc for node in self.nodes)

    def _each(self, verb: Callable[[_Joined], None]) -> None:
        with ThreadPoolExecutor(len(self.nodes)) as pool:
            list(pool.map(verb, self.nodes))

    def start(self) -> None:
        """Start those that do not run; return when all agree that they are one."""
        self._each(_Joined.start)

    def stop(self) -> None:
        """Stop all gently."""
        self._each(_Joined.stop)

    def kill(self) -> None:
        """End all as SIGKILL does."""
        self._each(_Joined.kill)

    def pause(self) -> None:
        """Freeze all."""
        self._each(_Joined.pause)

    def resume(self) -> None:
        """Let all go on."""
        self._each(_Joined.resume)

    @property
    def running(self) -> bool:
        """Whether all run."""
        return all(node.running for node in self.nodes)

    def residue(self) -> set[str]:
        """What is stored in any of them or connected to it."""
        return set[str]().union(*(node.residue() for node in self.nodes))

    def named(self, name: str) -> _Joined:
        """A node by the name that it has for the others."""
        return next(node for node in self.nodes if node.member.name == name)

    def close(self) -> None:
        """End it."""
        for node in self.nodes:
            node.close()


class Proxy:
    """Forwards every connection to a server, in threads of its own, so that it can be cut from anywhere."""

    def __init__(self, url: str) -> None:
        self._port = urlsplit(url).port
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server((HOST, 0))
        self._threads: list[threading.Thread] = []
        self._start(self._accept)
        self.stalled = False
        """Whether nothing passes any more, though connections stay: half-open, as when a firewall forgets them."""
        self.url = f"nats://{HOST}:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """End all connections without a word."""
        with self._lock:
            pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                try:
                    there = socket.create_connection((HOST, self._port or 0))
                except OSError:
                    here.close()
                    continue
                for end in (here, there):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._pairs.add((here, there))
                self._start(self._both, here, there)

    def _both(self, here: socket.socket, there: socket.socket) -> None:
        back = threading.Thread(target=self._pump, args=(there, here), daemon=True)
        back.start()
        self._pump(here, there)
        back.join()
        with self._lock:
            self._pairs.discard((here, there))
        here.close()
        there.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not self.stalled:
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
