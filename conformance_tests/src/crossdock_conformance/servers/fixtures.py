"""The servers as pytest fixtures, and the word at the end of the run on those that were not found. A pytest plugin of its own.

    def test_backend(server_of):
        redis = server_of("redis", "7.0")          # runs, shared by the tests of this process
        ...

Each process of pytest-xdist starts its own servers, on ports and data of their own. Whatever is not pytest's is imported where it is
used, because pytest loads this in every project that has the suite installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import pytest

if TYPE_CHECKING:
    from crossdock_conformance.servers.errors import ServerNotFound
    from crossdock_conformance.servers.requirements import NotRun
    from crossdock_conformance.servers.server import Server

NOT_RUN = pytest.StashKey["NotRun"]()
_WORKER_OUTPUT = "crossdock_servers_not_run"


class ServerOf(Protocol):
    """What the fixture `server_of` is."""

    def __call__(self, kind: str, version: str | None = None) -> Server:
        """The running server of this kind and version; skips the test if there is none, or fails it if CROSSDOCK_REQUIRE asks."""
        ...


class ServerPool:
    """The servers of one process, each started when first asked for and kept until the end."""

    def __init__(self, start: Callable[..., Server] | None = None) -> None:
        self._start = start
        self._servers: dict[tuple[str, str | None], Server | ServerNotFound] = {}

    def get(self, kind: str, version: str | None = None) -> Server:
        """The server of this kind and version, running: one that a test left paused, stopped or killed is set going again.

        Raises:
            ServerNotFound: There is none; looked for once.
            ServerFailed: It does not start.
        """
        from crossdock_conformance.servers.errors import ServerNotFound
        from crossdock_conformance.servers.finding import start_server

        asked = (kind, version)
        if asked not in self._servers:
            try:
                self._servers[asked] = (self._start or start_server)(kind, version=version)
            except ServerNotFound as error:
                self._servers[asked] = error
        server = self._servers[asked]
        if isinstance(server, ServerNotFound):
            raise server
        if server.controllable:
            if server.running:
                server.resume()
            else:
                server.start()
        return server

    def close(self) -> None:
        """Close them all."""
        from crossdock_conformance.servers.server import Server

        while self._servers:
            _, server = self._servers.popitem()
            if isinstance(server, Server):
                server.close()


@pytest.fixture(scope="session")
def server_pool() -> Iterator[ServerPool]:
    """The servers that the tests of this process share."""
    pool = ServerPool()
    yield pool
    pool.close()


@pytest.fixture
def server_of(server_pool: ServerPool, pytestconfig: pytest.Config) -> ServerOf:
    """`server_of("redis", "7.0")`: a running server. Its data may be what another test left; `Server.wipe` empties it."""

    def get(kind: str, version: str | None = None) -> Server:
        from crossdock_conformance.servers.errors import ServerNotFound

        try:
            return server_pool.get(kind, version)
        except ServerNotFound as error:
            skip_or_fail(error, pytestconfig)

    return get


def skip_or_fail(missing: ServerNotFound, config: pytest.Config) -> NoReturn:
    """End a test that cannot run without this server: fail it if CROSSDOCK_REQUIRE asks for the server, else skip it.

    The end of the run names the server, and what was looked for.
    """
    from crossdock_conformance.servers.requirements import is_required

    if is_required(missing):
        pytest.fail(f"CROSSDOCK_REQUIRE asks for it, and {missing}", pytrace=False)
    not_run(config).add(missing)
    pytest.skip(str(missing).partition(":")[0])


def not_run(config: pytest.Config) -> NotRun:
    """The servers that tests of this run were skipped for; complete in `pytest_terminal_summary`."""
    from crossdock_conformance.servers.requirements import NotRun

    return config.stash.setdefault(NOT_RUN, NotRun())


# --- from the processes of pytest-xdist to the one that reports ------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a process of pytest-xdist: hand over what was not found."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None and NOT_RUN in session.config.stash:
        output[_WORKER_OUTPUT] = not_run(session.config).entries()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In the process that reports: take it over."""
    output: dict[str, Any] = getattr(node, "workeroutput", None) or {}
    if entries := output.get(_WORKER_OUTPUT):
        not_run(node.config).add_entries((kind, version, why) for kind, version, why in entries)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """End the run by naming what did not run."""
    missed = not_run(config).entries() if NOT_RUN in config.stash else ()
    if missed:
        terminalreporter.section("servers that were not found; their tests did not run")
        for kind, version, why in missed:
            terminalreporter.line(f"{kind} {version or '(any version)'}: {why}")
