"""A Redis or Valkey that is set up in another way is started, asked and ended as the usual one is."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from crossdock_conformance.servers import ServerFailed, find_servers, start_server
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.local import LocalServer
from crossdock_conformance.servers.recipe import Reach
from crossdock_conformance.servers.redis_server import Connection, Redis, Setup, Valkey

Start = Callable[[Setup], LocalServer]


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(Setup(...))`: a running server that ends with the test."""
    programs = [source for kind in ("redis", "valkey") for source in find_servers(kind) if isinstance(source, BinarySource)]
    if not programs:
        pytest.skip("there is no redis or valkey server for tests")
    started: list[LocalServer] = []

    def add(setup: Setup) -> LocalServer:
        recipe = (Redis if programs[0].kind == "redis" else Valkey)(setup)
        started.append(LocalServer(recipe, programs[0].binary, programs[0].version))
        started[-1].start()
        return started[-1]

    yield add
    for server in started:
        server.close()


def told(server: LocalServer, setting: str, url: str | None = None) -> str:
    """What a setting is."""
    with Connection(url or server.url, 5) as connection:
        _, value = connection.call("CONFIG", "GET", setting)
        return str(value.decode())


def test_lines_count_before_our_own(start: Start) -> None:
    """Lines say what else is set, and may say otherwise than we do on what is kept; what they do not name stays."""
    server = start(Setup(lines=["maxmemory 3mb", "AppendOnly no"]))
    assert (told(server, "maxmemory"), told(server, "appendonly")) == ("3145728", "no")
    assert (told(server, "appendfsync"), told(server, "save")) == ("no", "")


def test_what_a_server_changes_in_its_files_stays(start: Start) -> None:
    """The configuration and the files are written once, for nobody else to read; wipe writes them again."""
    server = start(Setup(lines=["aclfile users.acl", "maxmemory 3mb"], files={"users.acl": "user default on nopass ~* &* +@all\n"}))
    files = [server.folder / "data" / name for name in ("redis.conf", "users.acl")]
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    with Connection(server.url, 5) as connection:
        connection.call("CONFIG", "SET", "maxmemory", "4mb")
        connection.call("CONFIG", "REWRITE")
        connection.call("ACL", "SETUSER", "late", "on", ">x", "+@all")
        connection.call("ACL", "SAVE")
    server.restart(kill=True)
    assert told(server, "maxmemory") == str(4 << 20)
    assert "user late " in files[1].read_text()
    server.wipe()
    assert told(server, "maxmemory") == str(3 << 20)
    assert "user late " not in files[1].read_text()


def test_a_login(start: Start) -> None:
    """A server that asks for a password is asked with it, and its URL does not have it."""
    server = start(Setup(lines=["requirepass secret"], login=":secret"))
    parts = urlsplit(server.url)
    assert (parts.username, parts.password) == (None, None)
    assert server.ping()
    with Connection(f"redis://:secret@127.0.0.1:{parts.port}/0", 5) as connection:
        connection.call("SET", "key", "value")
    assert server.new_residue({"key 0 key"}) == set()
    with Connection(server.url, 5) as connection, pytest.raises(ServerFailed, match="NOAUTH"):
        connection.call("GET", "key")


def test_a_given_server_may_be_asked_with_another_login(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the user of the broker URL may not ask what is stored, the admin URL has one who may."""
    server = start(Setup(lines=["requirepass secret"], login=":secret"))
    kind, port = server.kind.upper(), urlsplit(server.url).port
    monkeypatch.setenv(f"CROSSDOCK_TEST_{kind}_URL", server.url)
    with pytest.raises(ServerFailed, match="NOAUTH"):
        start_server(server.kind)
    monkeypatch.setenv(f"CROSSDOCK_TEST_{kind}_ADMIN_URL", f"redis://:secret@127.0.0.1:{port}/0")
    given = start_server(server.kind)
    assert given.url == server.url
    assert given.residue() == set()


def test_connections_of_servers_are_no_residue(start: Start) -> None:
    """That a replica is connected to its master is of no interest: it would be there without any client."""
    master = start(Setup(lines=["repl-diskless-sync-delay 0"]))
    replica = start(Setup(lines=[f"replicaof 127.0.0.1 {urlsplit(master.url).port}"]))
    with Connection(master.url, 5) as connection:
        connection.call("SET", "key", "value")
        assert connection.call("WAIT", "1", "10000") == 1
        assert len(master.residue()) == len({"key", "this connection"})
    assert master.new_residue({"key 0 key"}) == replica.new_residue({"key 0 key"}) == set()


def test_a_node_of_a_cluster(start: Start) -> None:
    """It listens on its second port, 10,000 above the first, which is ours as long as it is not closed."""
    server = start(Setup(cluster=True))
    with Connection(server.url, 5) as connection:
        info = connection.call("CLUSTER", "INFO").decode()
        (line,) = connection.call("CLUSTER", "NODES").decode().splitlines()
    assert "cluster_state:fail" in info, "it has no slots yet"
    port = urlsplit(server.url).port or 0
    assert f":{port}@{port + 10_000}" in line


def test_a_sentinel(start: Start) -> None:
    """It watches over what its configuration names, and stores nothing."""
    master = start(Setup())
    port = urlsplit(master.url).port
    sentinel = start(Setup(lines=[f"sentinel monitor shop 127.0.0.1 {port} 1"], sentinel=True))
    with Connection(sentinel.url, 5) as connection:
        assert connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "shop") == [b"127.0.0.1", str(port).encode()]
    sentinel.restart(kill=True)
    assert sentinel.ping()


def test_the_url_says_tls() -> None:
    """A server that speaks TLS is reached under the scheme for that."""
    recipe = Redis(Setup(tls=ssl.create_default_context(), login="me:pw"))
    assert recipe.reach("127.0.0.1", 7, None) == Reach("rediss://127.0.0.1:7/0", "rediss://me:pw@127.0.0.1:7/0")
    assert Redis().reach("127.0.0.1", 7, None) == Reach("redis://127.0.0.1:7/0")


def test_the_usual_server_has_no_configuration(start: Start) -> None:
    """Without anything else to say, there is no file: what it does is on its command line."""
    server = start(Setup())
    assert not list(Path(server.folder, "data").glob("*.conf"))
