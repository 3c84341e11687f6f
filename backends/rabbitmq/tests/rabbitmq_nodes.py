"""A RabbitMQ that is set up as a test needs it, three that are one broker, and how an operator acts on them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import trustme

from crossdock_conformance.servers import Server, ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.local import LocalServer
from crossdock_conformance.servers.ports import Ports
from crossdock_conformance.servers.rabbitmq_server import RabbitMQ
from crossdock_conformance.servers.recipe import HOST, Binary, Launch

_CONTROL_WITHIN = 60.0
_COOKIE = "crossdock-tests"
"""The secret that the nodes of a cluster share."""


@dataclass(frozen=True)
class Setup:
    """What a node has beside what every one of ours has."""

    lines: Sequence[str] = ()
    """Of rabbitmq.conf. FOLDER stands for the folder of the files."""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    """By name."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    plugins: Sequence[str] = ()


class _Recipe(RabbitMQ):
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.plugins = setup.plugins

    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        launch = super().launch(binary, ports, data)
        for name, content in self._setup.files.items():
            (data / name).write_text(content)
        with (data / "rabbitmq.conf").open("a") as configuration:
            configuration.writelines(f"{line.replace('FOLDER', binary.inside(data))}\n" for line in self._setup.lines)
        cookie = data / "home" / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(_COOKIE)
            cookie.chmod(0o400)
        return Launch(launch.argv, {**launch.env, **self._setup.environment})


class Node(LocalServer):
    """A server of its own, not started yet."""

    def __init__(self, source: BinarySource, setup: Setup | None = None, folder: Path | None = None) -> None:
        super().__init__(_Recipe(setup or Setup()), source.binary, source.version, folder)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return f"{HOST}:{self._ports.numbers['client']}"

    @property
    def name(self) -> str:
        """What other nodes call it."""
        return f"crossdock{self._ports.numbers['client']}@localhost"


class Certificates:
    """Two authorities, and what each of them signed, as PEM files in a folder."""

    def __init__(self, folder: Path) -> None:
        authority, wrong = trustme.CA(), trustme.CA()
        self.ca_file = folder / "ca.pem"
        """The authority that signed what the server shows, and that the server asks clients for."""
        self.wrong_ca_file = folder / "wrong-ca.pem"
        """An authority that did not."""
        self.client_file = folder / "client.pem"
        """A client's certificate that the server takes, and its key, in one file."""
        self.wrong_client_file = folder / "wrong-client.pem"
        """The same by the wrong authority."""
        authority.cert_pem.write_to_path(str(self.ca_file))
        wrong.cert_pem.write_to_path(str(self.wrong_ca_file))
        for signer, file in ((authority, self.client_file), (wrong, self.wrong_client_file)):
            signer.issue_cert("client@crossdock.example").private_key_and_cert_chain_pem.write_to_path(str(file))
        issued = authority.issue_cert(HOST)
        self.of_server: Mapping[str, str] = {
            "ca.pem": self.ca_file.read_text(),
            "server.pem": issued.cert_chain_pems[0].bytes().decode(),
            "server.key": issued.private_key_pem.bytes().decode(),
        }
        """What a server has: its certificate is for its address only."""


class TlsNode(Node):
    """A server that speaks TLS on a port beside the plain one, and looks at the certificate of whoever shows one; not started yet."""

    def __init__(self, source: BinarySource, certificates: Certificates) -> None:
        self.certificates = certificates
        self._tls_ports = Ports(["tls"])
        lines = [
            f"listeners.ssl.1 = {HOST}:{self._tls_ports.numbers['tls']}",
            "ssl_options.cacertfile = FOLDER/ca.pem",
            "ssl_options.certfile = FOLDER/server.pem",
            "ssl_options.keyfile = FOLDER/server.key",
            "ssl_options.verify = verify_peer",
            "ssl_options.fail_if_no_peer_cert = false",
        ]
        super().__init__(source, Setup(lines, certificates.of_server))

    @property
    def tls_url(self) -> str:
        """The broker URL of the other port, without options."""
        return f"amqps://guest:guest@{HOST}:{self._tls_ports.numbers['tls']}/"

    def close(self) -> None:
        super().close()
        self._tls_ports.close()


class ManagedNode(Node):
    """A server with the management plugin; not started yet."""

    def __init__(self, source: BinarySource) -> None:
        self._http_port = Ports(["http"])
        port = self._http_port.numbers["http"]
        self.management = f"http://guest:guest@{HOST}:{port}"
        """The URL of the plugin."""
        lines = [f"management.tcp.ip = {HOST}", f"management.tcp.port = {port}", "collect_statistics_interval = 500"]
        super().__init__(source, Setup(lines, plugins=["rabbitmq_management"]))

    def close(self) -> None:
        super().close()
        self._http_port.close()


def control(server: Server, *words: str) -> str:
    """What `rabbitmqctl` says to this, without its headings. It takes a second or two.

    Raises:
        ServerFailed: It fails.
    """
    assert isinstance(server, LocalServer), f"{server} is not ours to control"
    binary, ports, data = server._binary, server._ports.numbers, server._data  # pyright: ignore[reportPrivateUsage]
    environment = server._recipe.launch(binary, ports, data).env  # pyright: ignore[reportPrivateUsage]
    program = str((Path(binary.path) if binary.root else Path(binary.path).resolve()).with_name("rabbitmqctl"))
    done = subprocess.run(
        [*Binary(program, binary.origin, binary.root).command(), "--quiet", *words],
        env={**os.environ, **environment},
        cwd=data,
        capture_output=True,
        text=True,
        timeout=_CONTROL_WITHIN,
    )
    if done.returncode:
        raise ServerFailed(f"rabbitmqctl {' '.join(words)}: {done.stderr or done.stdout}")
    return done.stdout


class Cluster:
    """Three nodes that are one broker, started when it is entered.

    They share a port mapper that is no child of any of them, because it has to outlive whichever is killed.
    """

    def __init__(self, source: BinarySource, folder: Path | None = None) -> None:
        self._source = source
        self._folder = folder
        self._ports = Ports(["port mapper"])
        self._mapper: subprocess.Popen[bytes] | None = None
        self.nodes: list[Node] = []

    def __enter__(self) -> Self:
        port = str(self._ports.numbers["port mapper"])
        epmd = shutil.which("epmd")
        if epmd is None:
            raise ServerFailed("there is no epmd on this machine")
        self._mapper = subprocess.Popen([epmd, "-port", port, "-address", HOST], stdout=subprocess.DEVNULL)
        try:
            self._start(port)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, port: str) -> None:
        # The first makes the cluster, and the others find it there.
        environment = {"ERL_EPMD_PORT": port}
        first = Node(self._source, Setup(environment=environment), self._folder)
        self.nodes.append(first)
        first.start()
        lines = [
            "cluster_formation.peer_discovery_backend = classic_config",
            f"cluster_formation.classic_config.nodes.1 = {first.name}",
        ]
        self.nodes += [Node(self._source, Setup(lines, environment=environment), self._folder) for _ in range(2)]
        for node in self.nodes[1:]:
            node.start()

    @property
    def url(self) -> str:
        """Names all three."""
        return f"amqp://guest:guest@{','.join(node.address for node in self.nodes)}/"

    def leader(self, queue: str) -> Node:
        """The node that leads a queue's replicas."""
        alive = next(node for node in self.nodes if node.running)
        told = control(alive, "list_queues", "--no-table-headers", "name", "leader")
        for line in told.splitlines():
            name, leader = line.split("\t")
            if name == queue:
                return next(node for node in self.nodes if node.name == leader)
        raise ServerFailed(f"nobody leads {queue}:\n{told}")

    def close(self) -> None:
        """End all."""
        with ThreadPoolExecutor() as pool:
            for node in self.nodes:
                pool.submit(node.close)
        if self._mapper is not None:
            self._mapper.terminate()
            self._mapper.wait()
        self._ports.close()
