"""Each topology comes up and does what it says, on every version that is found. That nothing of it is left, its fixture sees to."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import redis
from redis.cluster import RedisCluster
from redis.exceptions import NoPermissionError
from redis.sentinel import Sentinel
from topologies import (
    OTHER_HOST,
    Certificates,
    Cluster,
    Node,
    Replicated,
    SentinelSet,
    User,
    configured,
    wait_until,
    with_password,
    with_users,
)
from traffic import new_namespace

from crossdock_conformance.servers import ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.target import ServerControl

pytestmark = pytest.mark.timeout(180)


def client(url: str, **options: Any) -> Any:
    """A client that tries once."""
    connect: Any = redis.Redis.from_url  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return connect(url, retry=None, socket_timeout=10, decode_responses=True, **options)


# --- one server ---------------------------------------------------------------------------------------


def test_a_configured_server(source: BinarySource, use: Any) -> None:
    """The lines of configuration count, also before our own, and still do after a restart."""
    server = use(configured(source, "maxmemory 3mb", "maxmemory-policy allkeys-lru", "appendonly no", "appendfsync always"))
    server.restart()
    with client(server.url) as connection:
        told = {**connection.config_get("maxmemory*"), **connection.config_get("append*")}
        assert (told["maxmemory"], told["maxmemory-policy"]) == ("3145728", "allkeys-lru")
        assert (told["appendonly"], told["appendfsync"]) == ("no", "always")
        assert connection.config_get("save") == {"save": ""}


def test_a_server_that_wants_replicas(source: BinarySource, use: Any) -> None:
    """A server told to write only to replicas refuses where it has none."""
    server = use(configured(source, "min-replicas-to-write 1"))
    with client(server.url) as connection, pytest.raises(redis.ResponseError, match="NOREPLICAS"):
        connection.set("key", "value")


def test_a_line_that_is_wrong(source: BinarySource) -> None:
    """A server that does not take its configuration shows its log."""
    with pytest.raises(ServerFailed, match=r"The end of its log(.|\n)*maxmemory-policy nonsense"):
        configured(source, "maxmemory-policy nonsense")


# --- replication --------------------------------------------------------------------------------------


def test_replicas_follow(replicated: Replicated) -> None:
    """What is written to the master is on both replicas, which take no writes themselves."""
    assert len(replicated.replicas) == 2
    with client(replicated.url) as connection:
        connection.set("followed", "yes")
    replicated.wait_until_replicated()
    for replica in replicated.replicas:
        with client(replica.url) as connection:
            assert connection.get("followed") == "yes"
            with pytest.raises(redis.ReadOnlyError):
                connection.set("followed", "no")


def test_each_server_by_itself(replicated: Replicated) -> None:
    """A frozen replica and a killed one cost the master nothing; started again they catch up."""
    first, second = replicated.replicas
    first.pause()
    second.kill()
    replicated.master.call("SET", "apart", "yes")
    first.resume()
    second.start()
    wait_until(lambda: replicated.serves, "both are in step again")
    replicated.wait_until_replicated()  # the frozen one may not have noticed yet that it was behind
    assert [replica.call("GET", "apart") for replica in (first, second)] == [b"yes", b"yes"]


def test_a_promotion_by_hand(replicated: Replicated) -> None:
    """The promoted replica takes writes, the other one follows it; what the old master took meanwhile is lost when it follows."""
    old, (new, other) = replicated.master, replicated.replicas
    replicated.promote(new)
    assert replicated.url == new.url
    old.call("SET", "lost", "yes")
    new.call("SET", "kept", "yes")
    replicated.kill()
    replicated.start()
    assert (old.master_port, other.master_port, new.master_port) == (new.port, new.port, None)
    assert [node.call("MGET", "lost", "kept") for node in (new, old, other)] == [[None, b"yes"]] * 3


# --- sentinels ----------------------------------------------------------------------------------------


def test_sentinels_fail_over(sentinels: SentinelSet) -> None:
    """When the master is killed, two of three sentinels make another one master, which has what was replicated, and lead clients there."""
    find: Any = Sentinel
    finder = find([("127.0.0.1", sentinel.port) for sentinel in sentinels.sentinels], socket_timeout=5)
    assert sentinels.url == f"redis+sentinel://{','.join(sentinel.address for sentinel in sentinels.sentinels)}/shop"
    assert finder.discover_master("shop") == sentinels.master_address
    sentinels.master.call("SET", "kept", "yes")
    assert sentinels.master.call("WAIT", 2, 5000) == 2
    sentinels.sentinels[0].kill()
    assert sentinels.serves
    old = sentinels.kill_master()
    new = sentinels.wait_for_another_master(old)
    assert new is not old
    assert finder.discover_master("shop") == sentinels.master_address == ("127.0.0.1", new.port)
    with finder.master_for("shop", retry=None) as connection:
        assert connection.get("kept") == b"yes"
        assert connection.set("written", "yes")
    for client_of_sentinel in finder.sentinels:
        client_of_sentinel.close()


def test_a_failover_without_a_death(sentinels: SentinelSet) -> None:
    """The sentinels make another server the master when they are told to, and the old one lives."""
    old = sentinels.master
    new = sentinels.failover()
    assert new is not old
    assert old.ping()
    assert new.call("SET", "written", "yes") == b"OK"


# --- cluster ------------------------------------------------------------------------------------------


def test_a_cluster_is_a_cluster(cluster: Cluster) -> None:
    """A client that knows one node finds all, and each has its part of the keys."""
    assert cluster.url == f"redis+cluster://{','.join(node.address for node in cluster.nodes)}"
    with RedisCluster("127.0.0.1", cluster.nodes[0].port) as connection:
        for number in range(50):
            connection.set(f"spread{number}", number)
        assert [connection.get(f"spread{number}") for number in range(50)] == [b"%d" % number for number in range(50)]
        found: list[Any] = connection.get_nodes()
        assert {node.port for node in found} == {node.port for node in cluster.nodes}
    assert cluster.masters == cluster.nodes
    for node in cluster.nodes:
        assert any(name.startswith(f"{node.port} key 0 spread") for name in cluster.residue())
    parts = {cluster.owner(slot): slot for slot in (0, 8000, 16_383)}
    assert list(parts) == cluster.nodes


def test_a_slot_moves(cluster: Cluster) -> None:
    """In the middle the old node has the slot and asks to look for moved keys at the new one; afterwards the new one has all."""
    tag = new_namespace()  # of a slot that nothing else is in
    keys = [f"{{{tag}}}{number}" for number in range(25)]
    slot = cluster.slot(keys[0])
    old = cluster.owner(slot)
    new = next(node for node in cluster.masters if node is not old)
    third = next(node for node in cluster.masters if node not in (old, new))
    for key in keys:
        old.call("SET", key, "yes")
    migration = cluster.migration(slot, to=new)
    migration.begin()
    assert migration.move(10) == 10
    assert cluster.owner(slot) is old
    assert sum(has(old, key) for key in keys) == 15
    with RedisCluster("127.0.0.1", third.port) as connection:
        assert all(connection.get(key) == b"yes" for key in keys)
    while migration.move():
        pass
    migration.finish()
    assert cluster.owner(slot) is new
    assert all(new.call("GET", key) == b"yes" for key in keys)
    for node in (old, third):
        with pytest.raises(ServerFailed, match=f"MOVED {slot} {new.address}"):
            node.call("GET", keys[0])
    cluster.migrate(slot, to=old)
    assert cluster.owner(slot) is old
    assert all(old.call("GET", key) == b"yes" for key in keys)
    assert cluster.is_as_made


def has(node: Node, key: str) -> bool:
    """Whether a node answers for a key of a slot that is leaving it; else it must point to where the key went."""
    try:
        return bool(node.call("GET", key) == b"yes")
    except ServerFailed as error:
        if "'ASK " in str(error):
            return False
        raise


def test_a_migration_that_is_given_up(cluster: Cluster) -> None:
    """The slot stays where it was, and the cluster serves."""
    key = "{staying}"
    slot = cluster.slot(key)
    old = cluster.owner(slot)
    old.call("SET", key, "yes")
    migration = cluster.migration(slot, to=next(node for node in cluster.masters if node is not old))
    migration.begin()
    migration.give_up()
    assert old.call("GET", key) == b"yes"
    assert cluster.owner(slot) is old
    assert cluster.is_as_made


def test_a_cluster_is_one_server(cluster: Cluster) -> None:
    """Killed, stopped or frozen as a whole and set going again, it has its data at the same URL."""
    assert isinstance(cluster, ServerControl)
    url = cluster.url
    owner = cluster.owner(cluster.slot("lasting"))
    owner.call("SET", "lasting", "yes")
    cluster.pause()
    assert not any(node.ping(0.1) for node in cluster.nodes)
    cluster.resume()
    cluster.kill()
    assert not cluster.running
    cluster.start()
    cluster.pause()
    cluster.stop()
    assert not cluster.running
    cluster.start()
    assert cluster.url == url
    with RedisCluster("127.0.0.1", cluster.nodes[1].port) as connection:
        assert connection.get("lasting") == b"yes"


def test_a_cluster_survives_a_master(cluster_with_replicas: Cluster) -> None:
    """The replica of a killed master takes its place; without a death it does so when it is told to."""
    servers = cluster_with_replicas
    slot = servers.slot("kept")
    old = servers.owner(slot)
    (replica,) = servers.replicas(old)
    old.call("SET", "kept", "yes")
    assert old.call("WAIT", 1, 5000) == 1
    old.kill()
    wait_until(lambda: servers.serves and servers.owner(slot) is replica, "the replica has the slot", 30)
    assert replica.call("GET", "kept") == b"yes"
    old.start()
    wait_until(lambda: servers.serves and old.master_port == replica.port, "the old master follows", 30)
    servers.failover(old)
    assert servers.owner(slot) is old
    assert replica in servers.replicas(old)


# --- TLS ----------------------------------------------------------------------------------------------


def test_tls_with_the_right_authority(tls_server: Any, certificates: Certificates) -> None:
    """A client that trusts the authority works, by address and by name; one without TLS does not."""
    server = tls_server()
    assert server.url.startswith("rediss://127.0.0.1:")
    for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
        with client(url, ssl_ca_certs=str(certificates.ca_file), ssl_check_hostname=True) as connection:
            assert connection.ping()
    with client(server.url.replace("rediss:", "redis:")) as connection, pytest.raises(redis.ConnectionError):
        connection.ping()


def test_tls_with_another_authority(tls_server: Any, certificates: Certificates) -> None:
    """A client that trusts another authority refuses the server."""
    with (
        client(tls_server().url, ssl_ca_certs=str(certificates.wrong_ca_file)) as connection,
        pytest.raises(redis.ConnectionError, match="certificate verify failed"),
    ):
        connection.ping()


def test_tls_for_another_host(tls_server: Any, certificates: Certificates) -> None:
    """A client refuses a server whose certificate is for another host, unless it does not look."""
    server = tls_server(host=OTHER_HOST)
    trust = {"ssl_ca_certs": str(certificates.ca_file)}
    with client(server.url, **trust, ssl_check_hostname=False) as connection:
        assert connection.ping()
    with (
        client(server.url, **trust, ssl_check_hostname=True) as connection,
        pytest.raises(redis.ConnectionError, match=r"not valid for '127\.0\.0\.1'"),
    ):
        connection.ping()


@pytest.mark.parametrize(("wants", "takes"), [("no", "any"), ("optional", "none or right"), ("yes", "right")])
def test_tls_client_certificates(tls_server: Any, certificates: Certificates, wants: str, takes: str) -> None:
    """A server that wants its clients' certificates refuses those that have none, or a wrong one."""
    server = tls_server(client_certificates=wants)
    files = {"none": None, "right": str(certificates.client_file), "wrong": str(certificates.wrong_client_file)}
    for name, file in files.items():
        with client(server.url, ssl_ca_certs=str(certificates.ca_file), ssl_certfile=file, ssl_keyfile=file) as connection:
            if takes == "any" or name in takes:
                assert connection.ping()
            else:
                with pytest.raises(redis.ConnectionError):
                    connection.ping()


# --- users --------------------------------------------------------------------------------------------


def test_users(source: BinarySource, use: Any) -> None:
    """Each user may do what its rules say, with its own password only, whatever characters that has; the default user is off."""
    password = 'p@s/w:"o\\rd'
    server = use(with_users(source, [User("shop", password, ["~t*", "&t*", "+@all", "-flushall"]), User("idle", "x", [])]))
    server.restart()
    with client(server.url_as("shop")) as connection:
        assert connection.set("t1", "yes")
        with pytest.raises(NoPermissionError):
            connection.set("other", "no")
        with pytest.raises(NoPermissionError):
            connection.flushall()
    with client(server.url_as("idle")) as connection, pytest.raises(NoPermissionError):
        connection.get("t1")
    with client(server.url_as("shop", "wrong")) as connection, pytest.raises(redis.AuthenticationError):
        connection.ping()
    with client(server.url) as connection, pytest.raises(redis.AuthenticationError):
        connection.ping()


def test_a_password(source: BinarySource, use: Any) -> None:
    """The default user has to log in, and then may do everything."""
    server = use(with_password(source, "s/e@cret word"))
    with client(server.url_as("default")) as connection:
        assert connection.flushall()
    with client(server.url_as("default", "wrong")) as connection, pytest.raises(redis.AuthenticationError):
        connection.ping()
    with client(server.url) as connection, pytest.raises(redis.AuthenticationError):
        connection.ping()


# --- their end ----------------------------------------------------------------------------------------


def test_what_is_left_is_seen(replicated: Replicated, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The check that nothing is left sees a process that is."""
    conftest: Any = request.config.pluginmanager.getplugin(str(request.path.with_name("conftest.py")))
    with monkeypatch.context() as context:
        context.setattr(replicated, "close", lambda: None)
        with pytest.raises(AssertionError, match="left"):
            conftest.end(replicated)


def test_a_node_that_dies_is_replaced(replicated: Replicated, request: pytest.FixtureRequest) -> None:
    """A topology that a test left otherwise than it was is not handed to the next test."""
    shared = request.getfixturevalue("_replicated")
    assert shared.get() is replicated
    os.kill(replicated.replicas[1].processes[1], signal.SIGKILL)
    wait_until(lambda: not replicated.replicas[1].running, "it died")
    assert shared.get() is not replicated
    assert shared.get().is_as_made
