"""A server in a container: for real, with images made here of the programs that are found, where a Docker engine answers."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crossdock_conformance.servers import ServerFailed, ServerNotFound, docker_server, find_servers, finding, start_server
from crossdock_conformance.servers.docker_server import DockerServer
from crossdock_conformance.servers.finding import BinarySource

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("address", ["unix:///nothing/here.sock", "tcp://127.0.0.1:1", "http://127.0.0.1:1"])
def test_no_engine(address: str) -> None:
    """Where no engine answers, that is the reason; nothing is left open by having asked."""
    pytest.importorskip("testcontainers")
    program = f"""
import gc, os
os.environ["DOCKER_HOST"] = {address!r}
from crossdock_conformance.servers import docker_server, find_servers
assert docker_server.why_no_engine() == "no Docker engine answers"
assert not any("image" in source.origin for source in find_servers("redis"))
gc.collect()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_testcontainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without testcontainers there are no images, and the reason says so."""
    monkeypatch.setitem(sys.modules, "testcontainers.core.docker_client", None)
    assert docker_server.why_no_engine.__wrapped__() == "testcontainers is not installed"


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """The Docker engine's client."""
    if why := docker_server.why_no_engine():
        pytest.skip(why)
    client = docker_server._new_client().client
    yield client
    client.close()


@pytest.fixture(scope="module", params=["redis", "valkey", "nats"])
def image(request: pytest.FixtureRequest, engine: Any) -> Iterator[tuple[str, str]]:
    """A kind, and an image with a program of this kind and what it is linked with; it takes the official image's arguments."""
    kind = request.param
    programs = [source for source in find_servers(kind) if isinstance(source, BinarySource) and source.binary.root is None]
    if not programs:
        pytest.skip(f"there is no {kind} program here to make an image of")
    program = Path(programs[-1].binary.path).resolve()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("data", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o777
            tar.addfile(folder)
        tar.add(program, f"usr/bin/{finding.RECIPES[kind].program}")
        for library in libraries(program):
            tar.add(library.resolve(), str(library).lstrip("/"))
    changes = ["ENV PATH=/usr/bin", *(['ENTRYPOINT ["/usr/bin/nats-server"]'] if kind == "nats" else [])]
    name = f"crossdock-test/{kind}:{uuid.uuid4().hex[:8]}"
    engine.api.import_image_from_data(archive.getvalue(), repository=name.split(":")[0], tag=name.split(":")[1], changes=changes)
    yield kind, name
    engine.images.remove(name, force=True)


def libraries(program: Path) -> list[Path]:
    """What a program is linked with; nothing for a static one."""
    told = subprocess.run(["ldd", str(program)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return [Path(word) for word in told.split() if word.startswith("/")]


@pytest.fixture
def only_images(image: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A kind, on a machine where it can be had only as an image."""
    kind, name = image
    monkeypatch.setenv(f"CROSSDOCK_TEST_{kind.upper()}_IMAGE", name)
    monkeypatch.setattr(finding, "_programs", lambda recipe, wanted: iter(()))
    return kind


def test_a_container_lives_as_a_server_does(only_images: str, engine: Any) -> None:
    """Start, data over kill and restart at the same URL, pause, resume, stop, wipe and close, as with a program."""
    server = start_server(only_images)
    try:
        assert isinstance(server, DockerServer)
        assert server.controllable
        assert server.version[0].isdigit()
        url = server.url
        assert server.new_residue(set()) == set()
        store(server.kind, url)
        stored = server.new_residue(set(), within=0)
        assert stored

        server.kill()
        assert not runs(server)
        assert not server.ping()
        server.kill()
        server.start()
        assert (server.url, server.new_residue(stored)) == (url, set())
        assert stored <= server.residue()

        server.pause()
        assert runs(server)
        assert not server.ping(0.1)
        server.resume()
        assert server.ping()

        server.pause()
        server.restart()
        assert stored <= server.residue()
        assert server.log_tail(1)

        server.wipe()
        assert server.url == url
        assert server.new_residue(set()) == set()

        server.pause()  # also such a one can be removed
    finally:
        server.close()
    server.close()
    assert not runs(server)
    assert server._name not in names(engine)


def runs(server: DockerServer) -> bool:
    """Asked anew each time, also in the eyes of a type checker."""
    return server.running


def store(kind: str, url: str) -> None:
    """Store one durable thing."""
    from crossdock_conformance.servers.redis_server import Connection
    from crossdock_conformance.servers.wire import connect

    if kind != "nats":
        with Connection(url, 5) as connection:
            connection.call("SET", "note", "survives")
        return
    with connect(url, 4222, 5) as client, client.makefile("rb") as answers:
        body = b'{"name":"NOTES","subjects":["notes"],"storage":"file"}'
        client.sendall(b"CONNECT {}\r\nSUB answer 1\r\nPUB $JS.API.STREAM.CREATE.NOTES answer %d\r\n%s\r\n" % (len(body), body))
        while not answers.readline().startswith(b"MSG"):
            pass


def names(engine: Any) -> set[str]:
    """The containers that are ours, in whatever state."""
    return {container.name for container in engine.containers.list(all=True) if container.name.startswith("crossdock-")}


def test_a_container_does_not_outlive_the_test_process(only_images: str, image: tuple[str, str], engine: Any) -> None:
    """The container is removed when the test process is killed."""
    program = f"""
import os
from crossdock_conformance.servers import finding, start_server
finding._programs = lambda recipe, wanted: iter(())
print(start_server({only_images!r})._name, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -9
    name = done.stdout.strip()
    assert name.startswith(f"crossdock-{only_images}-")
    deadline = time.monotonic() + 20
    while name in names(engine):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_container_that_ends_at_once(only_images: str, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exit status and log are in the error, and nothing is left."""
    made = uuid.uuid4()
    monkeypatch.setattr(uuid, "uuid4", lambda: made)
    recipe = finding.RECIPES[only_images]
    image = recipe.image()
    assert image.command is not None
    broken = type(image)(image.name, image.client_port, image.admin_port, [*image.command, "--no-such-option", "x"])
    monkeypatch.setattr(recipe, "image", lambda: broken)
    with pytest.raises(
        ServerFailed, match=r"ended at its start with status \d+\nThe end of its log:\n(.|\n)*(no-such-option|Options:)"
    ):
        start_server(only_images)
    assert not any(made.hex[:12] in name for name in names(engine))


def test_an_image_that_cannot_be_had(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is neither here nor at its registry is a server that is not found; the reason is told."""
    monkeypatch.setattr(finding, "_programs", lambda recipe, wanted: iter(()))
    monkeypatch.setenv("CROSSDOCK_TEST_NATS_IMAGE", "127.0.0.1:1/nothing/nats")
    with pytest.raises(
        ServerNotFound, match=r"the image 127\.0\.0\.1:1/nothing/nats:latest is not here and cannot be fetched: .*refused"
    ):
        start_server("nats")


def test_the_reaper_is_left_as_it_was(only_images: str) -> None:
    """That we do without testcontainers' reaper does not turn it off for others."""
    from testcontainers.core.config import testcontainers_config

    before = testcontainers_config.ryuk_disabled
    start_server(only_images).close()
    assert testcontainers_config.ryuk_disabled == before
