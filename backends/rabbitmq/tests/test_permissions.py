"""Users who may do no more than the README says, and what is told to those who may not."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from rabbitmq_nodes import control

from crossdock.clock import SystemClock
from crossdock.errors import BrokerUnavailable, ConfigurationError, EnqueueFailed
from crossdock.plugins import create_broker
from crossdock.spi import (
    LEVELS,
    Ack,
    Broker,
    Dead,
    DeadLetter,
    Delivery,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    Reason,
    Replay,
    Settlement,
    State,
    SupportsErase,
)
from crossdock_conformance.servers import Server

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(120)]

README = Path(__file__).resolve().parents[1] / "README.md"
ROLES = ("deploy", "producer", "worker", "operator")
SECRET = "s/e:c@ret word"
ENCODED = "s%2Fe%3Ac%40ret%20word"
LANES = [Lane("q", level, 0) for level in LEVELS]
WAIT = 30.0


def documented(role: str, namespace: str) -> list[str]:
    """The patterns of a role, as the README has them."""
    [row] = re.findall(rf"^\| {role}: .*$", README.read_text("utf-8"), re.MULTILINE)
    cells = re.findall(r" \| `(.*?)`(?= \|)", str(row))
    assert len(cells) == 3
    return [cell.replace("\\|", "|").replace("NAMESPACE", namespace) for cell in cells]


class Users:
    """A user for each role of one namespace."""

    def __init__(self, server: Server, namespace: str) -> None:
        self.namespace = namespace
        self._place = server.url.removeprefix("amqp://").rpartition("@")[2]

    def url(self, role: str) -> str:
        """The broker URL of a role."""
        return f"amqp://{self.namespace}-{role}:{ENCODED}@{self._place}"


@pytest.fixture
def users(server: Server) -> Iterator[Users]:
    """All roles, made by one call of the operator's program, because each takes a second or two."""
    namespace = f"t{secrets.token_hex(8)}"
    made = ""
    for role in ROLES:
        patterns = ",".join(f"<<{erlang(pattern)}>>" for pattern in documented(role, namespace))
        made += f'rabbit_auth_backend_internal:add_user(<<"{namespace}-{role}">>,<<"{SECRET}">>,<<"test">>),'
        made += f'rabbit_auth_backend_internal:set_permissions(<<"{namespace}-{role}">>,<<"/">>,{patterns},<<"test">>),'
    control(server, "eval", made + "ok.")
    yield Users(server, namespace)
    gone = ",".join(f'rabbit_auth_backend_internal:delete_user(<<"{namespace}-{role}">>,<<"test">>)' for role in ROLES)
    control(server, "eval", f"{gone}.")


def erlang(text: str) -> str:
    """A text as Erlang writes it."""
    return '"' + text.replace("\\", "\\\\") + '"'


@asynccontextmanager
async def opened(url: str, namespace: str) -> AsyncGenerator[Broker]:
    """An open Broker."""
    broker = create_broker(url, namespace=namespace, clock=SystemClock(), report=lambda event: None)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


@asynccontextmanager
async def declared(users: Users) -> AsyncGenerator[None]:
    """Queue `q` of the namespace, declared by who may, erased in the end."""
    async with opened(users.url("deploy"), users.namespace) as broker:
        await broker.declare([QueueSpec("q")])
        yield
        assert isinstance(broker, SupportsErase)
        await broker.erase(["q"])


def message(id: str, **fields: int) -> Message:
    return Message(id, "q", Priority.NORMAL, b"body", **fields)


async def test_each_role_can_do_its_work(users: Users) -> None:
    """A producer enqueues what a worker works off and an operator looks at and repairs, each with its own rights only."""
    async with (
        declared(users),
        opened(users.url("producer"), users.namespace) as producer,
        opened(users.url("worker"), users.namespace) as worker,
        opened(users.url("operator"), users.namespace) as operator,
    ):
        await producer.declare([QueueSpec("q")])
        await worker.declare([QueueSpec("q")])
        assert not await producer.enqueue([message(f"m{number}") for number in range(5)])
        assert not await producer.enqueue([message("later", delay_ms=300)])
        taken: dict[str, Delivery] = {}
        while len(taken) < 6:
            deliveries = await worker.receive(LANES, 10, WAIT)
            assert deliveries
            taken |= {delivery.message.id: delivery for delivery in deliveries}
        assert not await worker.extend(list(taken.values()))
        letters = [DeadLetter(taken[id].message, Reason.REJECTED, time.time_ns() // 1_000_000, "task") for id in ("m1", "m2")]
        ends: list[Settlement] = [Ack(taken["m0"]), Nack(taken["m3"], 3600.0), Nack(taken["m4"])]
        ends += [Dead(taken[letter.message.id], letter) for letter in letters]
        assert not await worker.settle([*ends, Nack(taken["later"], 0.0, message("later", generation=1))])
        assert [stats.dead for stats in await operator.stats(["q"])] == [2]
        page = await operator.peek("q", State.DEAD)
        assert [entry.message.id for entry in page.entries] == ["m1", "m2"]
        assert not await operator.replay("q", [Replay("m1", message("m1", generation=1))])
        assert not await operator.remove("q", State.DEAD, ["m2"])
        await operator.purge("q", State.READY)
        assert await operator.purge("q", State.DEAD) == 0


async def test_who_may_not_is_told_so_at_once(users: Users) -> None:
    """A producer cannot take work away or look around, a worker cannot see dead letters; the errors say what to do, and nothing hangs."""
    async with (
        declared(users),
        opened(users.url("producer"), users.namespace) as producer,
        opened(users.url("worker"), users.namespace) as worker,
    ):
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable, match="may not consume: ACCESS_REFUSED"):
            await producer.receive(LANES, 1, WAIT * 10)
        assert not await producer.enqueue([message("m")]), "its other connection lives"
        (delivery,) = await worker.receive(LANES, 1, WAIT)
        letter = DeadLetter(delivery.message, Reason.REJECTED, time.time_ns() // 1_000_000, "task")
        assert not await worker.settle([Dead(delivery, letter)])
        with pytest.raises(BrokerUnavailable, match="permissions"):
            await worker.peek("q", State.DEAD)
        with pytest.raises(ConfigurationError, match="may not make it"):
            await worker.declare([QueueSpec("other")])
        assert time.monotonic() - began < WAIT * 10


async def test_who_may_not_publish_is_told_that_nothing_was_stored(users: Users, server: Server) -> None:
    """Where a user may not write, an enqueue has certainly failed, and says to what; what may be written is written."""
    name = f"{users.namespace}-producer"
    patterns = ",".join(f"<<{erlang(pattern)}>>" for pattern in ("^$", rf"^(cd\.{users.namespace}\..*|amq\.default)$", "^$"))
    async with declared(users), opened(users.url("producer"), users.namespace) as producer:
        control(server, "eval", f'rabbit_auth_backend_internal:set_permissions(<<"{name}">>,<<"/">>,{patterns},<<"test">>).')
        (refusal,) = await producer.enqueue([message("later", delay_ms=60_000)])
        assert isinstance(refusal.error, EnqueueFailed)
        assert "may not write to the exchange 'cd.delay'" in str(refusal.error)
        deadline = time.monotonic() + WAIT
        while await producer.enqueue([message("now")]):
            assert time.monotonic() < deadline
