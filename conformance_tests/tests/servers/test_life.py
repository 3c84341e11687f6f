"""A server is started, ended, killed, frozen, emptied and looked into: on every version that is found."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from crossdock_conformance.servers import Server, ServerFailed, Source
from crossdock_conformance.servers.keeper import descendants
from crossdock_conformance.servers.local import LocalServer

pytestmark = pytest.mark.timeout(180)


def test_it_runs_and_tells_its_version(server: Server, request: pytest.FixtureRequest) -> None:
    """A started server answers, at its URL, and says itself which version it is."""
    assert server.running
    assert server.ping()
    assert server.version[0].isdigit()
    assert server.version in request.node.name
    assert urlsplit(server.url).hostname == "127.0.0.1"
    assert server.controllable


def test_data_survive_a_kill(server: Server, note: Any) -> None:
    """What a server acknowledged is there when it was killed and started again, at the same URL."""
    url = server.url
    server.kill()
    assert not server.running
    assert not server.ping()
    server.kill()  # again does nothing
    server.start()
    assert server.url == url
    assert note.stands(server.url)


def test_data_survive_an_orderly_restart(server: Server, note: Any) -> None:
    """What a server acknowledged is there after a stop in order and a start, also if it was paused."""
    server.pause()
    server.stop()
    if isinstance(server, LocalServer):
        assert server._exit_status() in (0, 1), "it was not left to end by itself"
    server.start()
    assert note.stands(server.url)


def test_data_survive_a_death(server: Server, note: Any) -> None:
    """A server that died by itself is seen as not running, and starts on its data."""
    if not isinstance(server, LocalServer):
        pytest.skip("it runs in a container")
    pid = server._processes.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.running)
    server.stop()  # does nothing
    server.start()
    server.start()  # again does nothing
    assert server._processes.pid != pid
    assert note.stands(server.url)


def test_residue_names_what_is_stored(server: Server, note: Any) -> None:
    """The residue is the name of each thing that is stored, and nothing else."""
    stored = {
        "redis": {"key 0 note"},
        "valkey": {"key 0 note"},
        "nats": {"stream NOTES", "consumer NOTES reader"},
        "rabbitmq": {"queue / notes", "exchange / noted"},
    }
    server.wipe()  # RabbitMQ 3.10 may forget what was declared last, if it was killed right after: here the exchange
    note.write(server.url)
    assert server.new_residue(stored[server.kind]) == set()
    assert server.residue() == stored[server.kind]


def test_residue_names_connections(server: Server) -> None:
    """A client that is connected is residue until it leaves."""
    before = server.residue()
    with connected(server) as client:
        address = ":".join(map(str, client.getsockname()))
        new = server.residue() - before
        assert len(new) == 1
        assert new.pop().startswith("connection ")
        assert any(address in name for name in server.residue())
        assert server.new_residue(before, within=0.05) == server.residue() - before
    assert server.new_residue(before) == set()


def connected(server: Server) -> socket.socket:
    """A client that the server knows, past the handshake."""
    parts = urlsplit(server.url)
    assert parts.port is not None
    client = socket.create_connection(("127.0.0.1", parts.port), 10)
    greetings = {
        "redis": b"PING\r\n",
        "valkey": b"PING\r\n",
        "nats": b"CONNECT {}\r\nPING\r\n",
        "rabbitmq": b"AMQP\x00\x00\x09\x01",
    }
    client.sendall(greetings[server.kind])
    client.recv(1)
    return client


def test_pause_and_resume(server: Server, note: Any) -> None:
    """A paused server keeps its connections and answers nothing; a resumed one answers on them."""
    parts = urlsplit(server.url)
    assert parts.port is not None
    server.pause()
    try:
        assert server.running
        assert not server.ping(0.1)
        with socket.create_connection(("127.0.0.1", parts.port), 5) as client:  # the kernel accepts it
            client.settimeout(0.1)
            client.sendall(b"PING\r\n")
            with pytest.raises(TimeoutError):
                client.recv(1)
    finally:
        server.resume()
    assert server.ping()
    assert note.stands(server.url)


def test_wipe(server: Server, note: Any) -> None:
    """Wipe leaves a running server with nothing in it and nobody connected, at the same URL."""
    url = server.url
    server.wipe()
    assert server.url == url
    assert not note.stands(url)
    assert server.new_residue(set()) == set()


def test_close_leaves_nothing(source: Source) -> None:
    """Close ends every process, removes the folder and frees the port; again does nothing, anything else says that it is closed."""
    server = source.start()
    if not isinstance(server, LocalServer):
        server.close()
        pytest.skip("it runs in a container")
    assert server.folder.is_dir()
    keeper = server._processes._keeper
    processes = descendants(keeper.pid)
    assert processes
    server.close()
    assert not server.folder.exists()
    assert keeper.returncode == 0
    assert not any(map(lives, processes))
    assert not server.running
    assert not server.ping()
    with socket.socket() as free:
        free.bind(("127.0.0.1", urlsplit(server.url).port or 0))
    server.close()
    for method in (server.start, server.stop, server.kill, server.pause, server.resume, server.restart, server.wipe):
        with pytest.raises(ServerFailed, match="was closed; start another"):
            method()


# --- on one server, whichever there is -----------------------------------------------------------------


def test_many_threads(own_server: Server) -> None:
    """Threads that restart, wipe, ask and ping one server at once neither hang nor break it."""
    failures: list[BaseException] = []

    def run(method: str) -> None:
        try:
            for _ in range(5):
                getattr(own_server, method)()
        except ServerFailed as error:
            if method != "residue":  # which may find the server down
                failures.append(error)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(method,)) for method in ("restart", "wipe", "residue", "ping", "start", "kill")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert failures == []
    own_server.start()
    assert own_server.ping()


def test_a_stopped_server_keeps_its_port(own_server: Server) -> None:
    """Nobody is given the port of a stopped server, neither who listens nor who calls; and calling it is refused."""
    port = urlsplit(own_server.url).port
    assert port is not None
    own_server.stop()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
    for _ in range(50):
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
    own_server.start()
    assert urlsplit(own_server.url).port == port


def test_pausing_what_does_not_run(own_server: Server) -> None:
    """A server that does not run cannot be paused or resumed, and says so."""
    own_server.kill()
    with pytest.raises(ServerFailed, match="cannot be paused: it does not run"):
        own_server.pause()
    with pytest.raises(ServerFailed, match="cannot be resumed: it does not run"):
        own_server.resume()


def test_residue_of_what_does_not_run(own_server: Server) -> None:
    """Asking a server that does not run is our error, with its log."""
    own_server.kill()
    with pytest.raises(ServerFailed, match=r"does not tell what it holds(.|\n)*The end of its log"):
        own_server.residue()


def test_a_server_that_does_not_end_in_order(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop is bounded: what ignores it is killed, and the error says so."""
    assert isinstance(own_server, LocalServer)
    monkeypatch.setattr(own_server._processes, "terminate", lambda: None)
    monkeypatch.setattr(own_server._recipe, "stop_within", 0.05)
    with pytest.raises(ServerFailed, match=r"did not end in order within 0\.05 s, and was killed"):
        own_server.stop()
    assert not own_server.running


def wait_until(fact: object, seconds: float = 10) -> None:
    assert callable(fact)
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
