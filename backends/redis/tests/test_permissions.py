"""Users that may do no more than the README says, and what is told to those who may not."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
from topologies import GuardedServer, User, configured, with_password, with_users
from traffic import lanes_of, message, new_namespace, opened

from crossdock.errors import BrokerUnavailable, EnqueueFailed
from crossdock.spi import Ack, Dead, DeadLetter, Nack, QueueSpec, Reason, Replay, State

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]

Role = Literal["producer", "worker", "operator"]
README = Path(__file__).resolve().parents[1] / "README.md"
SECRET = "s/e:c@ret word"


def documented(role: Role, namespace: str) -> list[str]:
    """The rules of a role, as the README has them."""
    [line] = re.findall(rf"^user NAMESPACE-{role} on >SECRET (.*)$", README.read_text("utf-8"), re.MULTILINE)
    return str(line).replace("NAMESPACE", namespace).split(" ")


@pytest.fixture
def namespace() -> str:
    return new_namespace()


@pytest.fixture
def server(source: Any, namespace: str, use: Any) -> GuardedServer:
    """A server with the three users of a namespace."""
    users = [User(role, SECRET, documented(role, namespace)) for role in ("producer", "worker", "operator")]
    guarded: GuardedServer = use(with_users(source, users))
    return guarded


@pytest.mark.parametrize("protocol", [2, 3])
async def test_each_role_can_do_its_work(server: GuardedServer, namespace: str, protocol: int) -> None:
    """A producer enqueues what a worker works off and an operator looks at and repairs, each with its own rights only."""
    if protocol == 3 and server.version.startswith("6."):
        for user in server.users:
            server.call("ACL", "SETUSER", user, "+hello")
    async with (
        opened(server.url_as("producer"), namespace, protocol=protocol) as producer,
        opened(server.url_as("worker"), namespace, protocol=protocol) as worker,
        opened(server.url_as("operator"), namespace, protocol=protocol) as operator,
    ):
        assert "append-only" in worker.capabilities.durability_note.lower()
        await worker.declare([QueueSpec("q", max_ready=50, dead_max_count=10, dead_max_age=1000)])
        assert await producer.enqueue([message(f"m{number}") for number in range(6)]) == []
        assert await producer.enqueue([message("later", delay_ms=100_000)]) == []
        assert await producer.enqueue([message("other", "other")]) == []
        [one, two, three, four, *rest] = await worker.receive(lanes_of("q", quota=6), 6, 5)
        assert await worker.extend([one]) == []
        letter = DeadLetter(three.message, Reason.REJECTED, time.time_ns() // 1_000_000, "task")
        retry = Nack(two, 0.0, message("m1", generation=1))
        assert await worker.settle([Ack(one), retry, Dead(three, letter), Nack(four, 50.0), *map(Nack, rest)]) == []
        assert not await worker.receive(lanes_of("empty", quota=1), 1, 0.3)
        [_, stats] = await operator.stats()
        assert (stats.ready, stats.scheduled, stats.leased, stats.dead) == (3, 2, 0, 1)
        for state in State:
            await operator.peek("q", state)
            await operator.peek("q", state, ids=["m1"])
        assert await operator.replay("q", [Replay("m2", message("m2", generation=1))]) == []
        assert await operator.remove("q", State.READY, ["m2"]) == []
        assert await operator.remove("q", State.SCHEDULED, ["later"]) == []
        assert await operator.enqueue([message("m2", generation=2)]) == []
        assert await operator.purge("q", State.READY) == 4
        await operator.erase(["q", "other"])


async def test_a_role_cannot_do_more(server: GuardedServer, namespace: str) -> None:
    """A producer cannot take work away, a worker cannot look around, and none of them gets into another namespace; the error says so."""
    async with opened(server.url_as("producer"), namespace) as producer, opened(server.url_as("worker"), namespace) as worker:
        assert await producer.enqueue([message("a")]) == []
        with pytest.raises(BrokerUnavailable, match=r"lacks a permission.*README"):
            await producer.receive(lanes_of("q", quota=1), 1, 1)
        with pytest.raises(BrokerUnavailable, match="lacks a permission"):
            await worker.peek("q", State.READY)
    async with opened(server.url_as("operator"), new_namespace()) as stranger:
        [refusal] = await stranger.enqueue([message("a")])
        assert isinstance(refusal.error, EnqueueFailed)
        assert "lacks a permission" in str(refusal.error)
        with pytest.raises(BrokerUnavailable, match="lacks a permission"):
            await stranger.stats()


async def test_a_server_that_tells_nothing_of_itself(source: Any, namespace: str, use: Any) -> None:
    """Without +info and +config|get all works, and no durability is promised; without +time open says what is missing."""
    few = [rule for rule in documented("worker", namespace) if rule not in ("+info", "+config|get", "+client|setname")]
    none = [rule for rule in few if rule != "+time"]
    server = use(with_users(source, [User("worker", SECRET, few), User("blind", SECRET, none)]))
    async with opened(server.url_as("worker"), namespace) as broker:
        assert broker.capabilities.survives == frozenset()
        assert "Permit the user INFO" in broker.capabilities.durability_note
        assert await broker.enqueue([message("a")]) == []
        [delivery] = await broker.receive(lanes_of("q", quota=1), 1, 5)
        assert await broker.settle([Ack(delivery)]) == []
    with pytest.raises(BrokerUnavailable, match=r"time.*lacks a permission"):
        async with opened(server.url_as("blind"), namespace):
            pass


async def test_rights_that_are_taken_away_and_given_back(server: GuardedServer, namespace: str) -> None:
    """While a worker runs: its calls fail and say why, and go on when the right is back."""
    async with opened(server.url_as("worker"), namespace) as worker:
        assert await worker.enqueue([message("a"), message("b")]) == []
        [delivery] = await worker.receive(lanes_of("q", quota=1), 1, 5)
        server.call("ACL", "SETUSER", "worker", "-evalsha", "-eval")
        with pytest.raises(BrokerUnavailable, match="lacks a permission"):
            await worker.settle([Ack(delivery)])
        with pytest.raises(BrokerUnavailable, match="lacks a permission"):
            await worker.receive(lanes_of("q", quota=1), 1, 1)
        server.call("ACL", "SETUSER", "worker", "+evalsha", "+eval")
        assert await worker.settle([Ack(delivery)]) == []
        [delivery] = await worker.receive(lanes_of("q", quota=1), 1, 5)
        assert delivery.message.id == "b"


async def test_wrong_passwords(source: Any, use: Any) -> None:
    """A wrong password, an unknown user and no password at all: one sentence with advice, and no secret in it."""
    server = use(with_password(source, SECRET))
    for url, advice in (
        (server.url, "wants a password"),
        (server.url_as("default", "wr0ng"), "user or password in the URL are wrong"),
        (server.url.replace("://", "://:wr0ng@"), "user or password in the URL are wrong"),
        (server.url.replace("://", "://nobody:wr0ng@"), "user or password in the URL are wrong"),
    ):
        for protocol in (2, 3):
            with pytest.raises(BrokerUnavailable, match=advice) as caught:
                async with opened(url, protocol=protocol):
                    pass
            assert "wr0ng" not in str(caught.value) and SECRET not in str(caught.value)
    for url in (server.url_as("default"), server.url.replace("://", "://:s%2Fe%3Ac%40ret%20word@")):
        for protocol in (2, 3):
            async with opened(url, protocol=protocol) as broker:
                assert await broker.enqueue([message("a")]) == []


async def test_a_password_for_a_server_that_has_none(a_source: Any, use: Any) -> None:
    """The server says that it knows no password; the sentence says that the URL is wrong."""
    server = use(configured(a_source))
    with pytest.raises(BrokerUnavailable, match="user or password in the URL are wrong"):
        async with opened(server.url.replace("://", "://:wr0ng@")):
            pass


@pytest.fixture(autouse=True)
def _no_more_than_said(request: pytest.FixtureRequest) -> Iterator[None]:
    """The documented rules name no whole category: what is not named is not allowed."""
    yield
    for role in get_args(Role):
        assert not [rule for rule in documented(role, "n") if "@" in rule]
