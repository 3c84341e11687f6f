"""A server that runs in a container, where a Docker engine answers.

testcontainers is imported at the first use: it is an optional dependency, and slow to import.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import uuid
from collections.abc import Generator
from functools import cache
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from crossdock_conformance.servers.errors import ServerFailed, ServerNotFound
from crossdock_conformance.servers.owned import OwnedServer
from crossdock_conformance.servers.processes import Processes
from crossdock_conformance.servers.recipe import HOST, Image, Recipe

_REMOVE = """\
import contextlib, docker, sys
with contextlib.suppress(docker.errors.NotFound):
    docker.from_env().containers.get(sys.argv[1]).remove(force=True, v=True)
"""


@cache
def why_no_engine() -> str | None:
    """Why no container can be started here; None if one can. Asked once per process."""
    try:
        testcontainers = import_module("testcontainers.core.docker_client")
    except ImportError:
        return "testcontainers is not installed"
    try:
        # First by ourselves: the client leaves its socket open where it finds nobody.
        _call(testcontainers.get_docker_host() or "unix:///var/run/docker.sock")
        _new_client(timeout=5).client.close()
    except _errors():
        return "no Docker engine answers"
    return None


def _call(address: str) -> None:
    """Connect to where the engine should be, if that is a socket or a port, and hang up.

    Raises:
        OSError: Nobody is there, or not for us.
    """
    parts = urlsplit(address)
    if parts.scheme == "unix":
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(parts.path)
    elif parts.scheme in ("tcp", "http", "https"):
        socket.create_connection((parts.hostname or HOST, parts.port or 2375), 5).close()


def fetch(image: str, recipe: Recipe) -> None:
    """Have an image, from this machine or from its registry.

    Raises:
        ServerNotFound: It is in neither.
        ServerFailed: The engine does not answer.
    """
    image = import_module("testcontainers.core.config").testcontainers_config.hub_image_name_prefix + image
    try:
        with contextlib.closing(_new_client().client) as docker:
            try:
                docker.images.get(image)
            except import_module("docker.errors").ImageNotFound:
                try:
                    docker.images.pull(image)
                except _errors() as error:
                    why = f"the image {image} is not here and cannot be fetched: {getattr(error, 'explanation', error)}"
                    raise ServerNotFound(why, recipe.kind) from error
    except _errors() as error:
        raise ServerFailed(f"the Docker engine does not tell of {image}: {error}") from error


class DockerServer(OwnedServer):
    """Made by `start_server`: a container with a name and host ports of its own, removed with its data by `close()`.

    testcontainers' reaper, a container that may command the engine, is not used. What ends other servers when the test process
    dies removes this container too.
    """

    def __init__(self, recipe: Recipe, image: Image, version: str) -> None:
        self._image = image
        self._name = f"crossdock-{recipe.kind}-{uuid.uuid4().hex[:12]}"
        self._container: Any = None
        self._keeper = Processes(None, at_end=[sys.executable, "-P", "-c", _REMOVE, self._name])
        super().__init__(recipe, version)  # last: from here on it may be closed

    @property
    def running(self) -> bool:
        with self._lock, self._engine("tell whether it runs"):
            if self._closed or self._container is None:
                return False
            container = self._container.get_wrapped_container()
            container.reload()
            return container.status in ("running", "paused", "restarting")

    def log_tail(self, lines: int = 20) -> str:
        with self._lock, contextlib.suppress(*_errors()):
            if self._container is not None:
                log: bytes = self._container.get_wrapped_container().logs(tail=lines)
                return log.decode(errors="replace").rstrip()
        return ""

    def _begin(self) -> None:
        with self._engine("start"):
            if self._container is None:
                self._create()
            else:
                self._container.get_wrapped_container().start()

    def _create(self) -> None:
        """Make and start the container, bound to this machine's loopback address where the engine is on this machine."""
        container = import_module("testcontainers.core.container").DockerContainer(self._image.name, name=self._name)
        engine = container.get_docker_client()
        mode = engine.get_connection_mode()
        is_here = mode.value == "docker_host" and engine.host() in ("localhost", HOST)
        reached: dict[str, int] = {}
        for name, port in {"client": self._image.client_port, "admin": self._image.admin_port}.items():
            if port is not None:
                host_port = self._ports.numbers[name]
                container.ports[f"{port}/tcp"] = (HOST, host_port) if is_here else host_port
                reached[name] = host_port if mode.use_mapped_port else port
        if self._image.command is not None:
            container.with_command(self._image.command)
        container.with_envs(**self._image.env)
        with _without_reaper():
            try:
                container.start()
            except BaseException:
                container.stop()
                raise
        self._container = container
        host = HOST if is_here else container.get_container_host_ip()
        self._reached_at(self._recipe.reach(host, reached["client"], reached.get("admin")))

    def _end(self) -> None:
        with self._engine("end"):
            self._container.get_wrapped_container().stop(timeout=int(self._recipe.stop_within))

    def _kill(self) -> None:
        with self._engine("end"):
            container = self._container.get_wrapped_container()
            container.kill("SIGKILL")
            container.wait(timeout=self._recipe.stop_within)

    def _freeze(self) -> None:
        with self._engine("pause"):
            self._container.get_wrapped_container().pause()

    def _thaw(self) -> None:
        with self._engine("resume"):
            self._container.get_wrapped_container().unpause()

    def _empty(self) -> None:
        if self._container is not None:
            with self._engine("be removed"):
                self._container.stop()
            self._container = None

    def _dispose(self) -> None:
        try:
            self._empty()
        finally:
            self._keeper.end()

    def _exit_status(self) -> int | None:
        with self._engine("tell how it ended"):
            if self._container is None:
                return None
            status: int = self._container.get_wrapped_container().attrs["State"]["ExitCode"]
            return status

    @contextlib.contextmanager
    def _engine(self, doing: str) -> Generator[None]:
        """Turn what the engine answers into our errors."""
        try:
            yield
        except _errors() as error:
            raise self._failed(f"does not {doing}: {error}") from error


def _new_client(**options: Any) -> Any:
    """testcontainers' client, which finds the engine by its own settings too."""
    return import_module("testcontainers.core.docker_client").DockerClient(**options)


def _errors() -> tuple[type[Exception], ...]:
    """What asking the engine may raise."""
    return (import_module("docker.errors").DockerException, import_module("requests").RequestException, OSError)


@contextlib.contextmanager
def _without_reaper() -> Generator[None]:
    config = import_module("testcontainers.core.config").testcontainers_config
    before = config.ryuk_disabled
    config.ryuk_disabled = True
    try:
        yield
    finally:
        config.ryuk_disabled = before
