"""TLS, NKEYs, users, and the rights that each part of a system needs."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flow
import nkeys as untyped_nkeys  # type: ignore[import-untyped]
import nodes
import pytest
import trustme

from crossdock.errors import BrokerUnavailable
from crossdock.spi import Dead, DeadLetter, Message, Nack, Priority, QueueSpec, Reason, Replay, State
from crossdock_conformance.servers.finding import BinarySource
from crossdock_nats import topology

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

Use = Callable[[nodes.Node], nodes.Node]
nkeys: Any = untyped_nkeys
README = Path(__file__).resolve().parents[1] / "README.md"
_JETSTREAM = "jetstream { store_dir: STORE }\n"
_NOBODY = '{ user: nobody, password: "x", permissions: { publish: { deny: ">" }, subscribe: { deny: ">" } } }'


class Authority:
    """A certificate authority, and a server's certificate of it."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        authority = trustme.CA()
        self.ca = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        certificate = authority.issue_cert(host)
        self.key = folder / "key.pem"
        self.cert = folder / "cert.pem"
        certificate.private_key_pem.write_to_path(self.key)
        certificate.cert_chain_pems[0].write_to_path(self.cert)
        self.lines = f'tls {{ cert_file: "{self.cert}", key_file: "{self.key}", timeout: 5 }}\n{_JETSTREAM}'


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority of the test's own."""
    return Authority(tmp_path)


async def test_tls(source: BinarySource, use: Use, authority: Authority) -> None:
    """Over TLS everything works as without, by `tls://` and, where the server asks for it, by `nats://`."""
    server = use(nodes.Node(source, authority.lines))
    for scheme in ("tls", "nats"):
        url = f"{server.url.replace('nats', scheme)}?ssl_ca_certs={authority.ca}&timeout=5"
        async with flow.opened(url, namespace=scheme) as broker:
            assert not await broker.enqueue([Message("big", "q", Priority.NORMAL, bytes(900_000)), *flow.messages(500)])
            taken = await flow.take(broker, 501)
            assert max(len(each.message.body) for each in taken) == 900_000
            assert not await flow.ack_for_good(broker, taken)


@pytest.mark.parametrize("wrong", ["authority", "host", "plain server"])
async def test_tls_that_cannot_be_trusted(source: BinarySource, use: Use, authority: Authority, wrong: str, tmp_path: Path) -> None:
    """An unknown authority, a certificate for another host, or a server without TLS behind `tls://` are refused."""
    ca = authority.ca
    if wrong == "authority":
        other = tmp_path / "other"
        other.mkdir()
        ca = Authority(other).ca
    lines = Authority(tmp_path, "elsewhere.example").lines if wrong == "host" else authority.lines
    server = use(nodes.Node(source, _JETSTREAM if wrong == "plain server" else lines))
    ca = tmp_path / "ca.pem" if wrong == "host" else ca
    broker = flow.build(f"{server.url.replace('nats', 'tls')}?ssl_ca_certs={ca}&timeout=3")
    with pytest.raises(BrokerUnavailable, match="TLS" if wrong == "plain server" else "certificate|verify"):
        await broker.open()


async def test_nkeys(source: BinarySource, use: Use, tmp_path: Path) -> None:
    """An NKEY proves who we are; another one is refused."""
    pairs = [nkeys.from_seed(bytearray(nkeys.encode_seed(bytes([number]) * 32, nkeys.PREFIX_BYTE_USER))) for number in (1, 2)]
    public = pairs[0].public_key.decode()
    users = f"authorization {{ users: [ {{ nkey: {public} }}, {_NOBODY} ] }}\nno_auth_user: nobody\n"
    server = use(nodes.Node(source, users + _JETSTREAM))
    for number, pair in enumerate(pairs):
        file = tmp_path / f"{number}.nk"
        file.write_bytes(bytes(pair.seed))
        broker = flow.build(f"{server.url}?nkey={file}&timeout=3")
        if number == 0:
            await broker.open()
            assert not await broker.enqueue(flow.messages(1))
            await broker.close()
        else:
            with pytest.raises(BrokerUnavailable, match="refused who we are"):
                await broker.open()


async def test_accounts(source: BinarySource, use: Use) -> None:
    """What two accounts keep in queues of the same name has nothing to do with each other; a wrong password is refused."""
    accounts = ", ".join(f"{name}: {{ jetstream: enabled, users: [{{ user: {name}, password: secret }}] }}" for name in "ab")
    server = use(nodes.Node(source, f"accounts {{ {accounts} }}\n{_JETSTREAM}"))
    a, b = (f"nats://{name}:secret@{server.url.removeprefix('nats://')}?timeout=5" for name in "ab")
    async with flow.opened(a) as one, flow.opened(b) as other:
        assert not await one.enqueue(flow.messages(3))
        assert not await other.receive(flow.LANES, 3, 0.0)
        assert not await other.enqueue(flow.messages(1))
        assert [(await each.stats())[0].ready for each in (one, other)] == [3, 1]
        assert not await flow.ack_for_good(one, await flow.take(one, 3))
        assert [(await each.stats())[0].ready for each in (one, other)] == [0, 1]
    broker = flow.build(a.replace("secret", "wrong"))
    with pytest.raises(BrokerUnavailable, match="refused who we are") as refused:
        await broker.open()
    assert "wrong" not in str(refused.value)


def _pair(kind: int, number: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(bytes([number]) * 32, kind)))


def _jwt(issuer: Any, subject: Any, name: str, claims: dict[str, Any]) -> str:
    """A token as `nsc` makes them."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    names = {"jti": name, "iat": 1_700_000_000, "iss": issuer.public_key.decode(), "sub": subject.public_key.decode(), "name": name}
    parts = [{"typ": "JWT", "alg": "ed25519-nkey"}, {**names, "nats": {"version": 2, **claims}}]
    signed = ".".join(part(json.dumps(each).encode()) for each in parts)
    return f"{signed}.{part(issuer.sign(signed.encode()))}"


async def test_credentials(source: BinarySource, use: Use, tmp_path: Path) -> None:
    """A file with credentials, as operators hand them out, proves who we are; one that nobody signed is refused."""
    operator, account, system, user, stranger = (
        _pair(kind, number)
        for number, kind in enumerate(
            [
                nkeys.PREFIX_BYTE_OPERATOR,
                nkeys.PREFIX_BYTE_ACCOUNT,
                nkeys.PREFIX_BYTE_ACCOUNT,
                nkeys.PREFIX_BYTE_USER,
                nkeys.PREFIX_BYTE_ACCOUNT,
            ],
            start=1,
        )
    )
    names = ("subs", "data", "payload", "imports", "exports", "conn", "leaf", "mem_storage", "disk_storage", "streams", "consumer")
    limits = {**dict.fromkeys(names, -1), "wildcards": True}
    told = {
        account: _jwt(operator, account, "shop", {"type": "account", "limits": limits}),
        system: _jwt(operator, system, "SYS", {"type": "account", "limits": {**limits, "mem_storage": 0, "disk_storage": 0}}),
    }
    preloaded = "\n".join(f"{each.public_key.decode()}: {jwt}" for each, jwt in told.items())
    lines = (
        f"operator: {_jwt(operator, operator, 'op', {'type': 'operator'})}\nsystem_account: {system.public_key.decode()}\n"
        f"resolver: MEMORY\nresolver_preload: {{\n{preloaded}\n}}\n"
    )
    server = use(nodes.Node(source, lines + _JETSTREAM))
    for name, issuer in (("shop", account), ("stranger", stranger)):
        jwt = _jwt(issuer, user, name, {"type": "user", "subs": -1, "data": -1, "payload": -1})
        file = tmp_path / f"{name}.creds"
        file.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{bytes(user.seed).decode()}\n------END USER NKEY SEED------\n"
        )
        url = f"{server.url}?creds={file}&timeout=5"
        if name == "shop":
            async with flow.opened(url) as broker:
                assert not await broker.enqueue(flow.messages(3))
                assert not await flow.ack_for_good(broker, await flow.take(broker, 3))
        else:
            with pytest.raises(BrokerUnavailable, match="refused who we are"):
                await flow.build(url).open()


async def test_client_certificates(source: BinarySource, use: Use, tmp_path: Path) -> None:
    """Where the server asks for a certificate, ours proves who we are; without one we are refused."""
    authority = Authority(tmp_path)
    lines = authority.lines.replace("timeout: 5", f'timeout: 5, ca_file: "{authority.ca}", verify: true')
    server = use(nodes.Node(source, lines))
    url = f"{server.url.replace('nats', 'tls')}?ssl_ca_certs={authority.ca}&timeout=5"
    async with flow.opened(f"{url}&ssl_certfile={authority.cert}&ssl_keyfile={authority.key}") as broker:
        assert not await broker.enqueue(flow.messages(1))
        assert not await flow.ack_for_good(broker, await flow.take(broker, 1))
    with pytest.raises(BrokerUnavailable, match="name one by the options ssl_certfile and ssl_keyfile"):
        await flow.build(url).open()


def _rights(role: str) -> str:
    """The permissions that the README gives a role, for the namespace `t`."""
    text = README.read_text()
    found = re.search(rf"^ *# {role}\n(.*?)^ *\}} \}}\n", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the README has no rights for a {role}"
    return "{\n" + found[1].replace("NAMESPACE", "t") + "}"


async def test_each_role_can_do_its_work(source: BinarySource, use: Use) -> None:
    """With the rights of the README a producer enqueues, a worker works, an operator repairs; and a producer cannot do more."""
    rights = {role: _rights(role) for role in ("producer", "worker", "operator")}
    if not topology.Features.of(source.version).schedules:  # as the README says
        rights["producer"] = rights["producer"].replace('"$JS.API.INFO"', '"$JS.API.INFO", "$JS.API.STREAM.CREATE.*"')
    users = ", ".join(f"{{ user: {role}, password: secret, permissions: {granted} }}" for role, granted in rights.items())
    server = use(nodes.Node(source, f"authorization {{ users: [ {users}, {_NOBODY} ] }}\nno_auth_user: nobody\n{_JETSTREAM}"))
    urls = {role: f"nats://{role}:secret@{server.url.removeprefix('nats://')}?timeout=2" for role in rights}
    async with flow.opened(urls["worker"], lease=30.0) as worker:
        producer = flow.build(urls["producer"])
        await producer.open()
        await flow.enqueue_for_good(producer, [*flow.messages(4), *flow.messages(1, "later", delay_ms=60_000)])
        assert not await producer.enqueue(flow.messages(1))
        with pytest.raises(BrokerUnavailable, match="lacks a permission"):
            await producer.declare([QueueSpec("q", lease=7.0)])
        await producer.close()
        one, two, three, four = await flow.take(worker, 4)
        letter = DeadLetter(two.message, Reason.REJECTED, 1)
        assert not await worker.extend([one])
        assert not await worker.settle([Nack(one), Dead(two, letter), Nack(three, 60.0)])
        assert not await flow.ack_for_good(worker, [four])
        operator = flow.build(urls["operator"])
        await operator.open()
        [stats] = await operator.stats()
        assert (stats.queue, stats.ready, stats.scheduled, stats.dead) == ("q", 1, 2, 1)
        assert not await operator.replay(
            "q", [Replay(two.message.id, Message(two.message.id, "q", Priority.HIGH, b"", generation=1))]
        )
        assert len((await operator.peek("q", State.SCHEDULED)).entries) == 2
        assert await operator.purge("q", State.SCHEDULED) == 2
        if State.READY in operator.capabilities.removable:
            assert not await operator.remove("q", State.READY, [two.message.id])
        await operator.close()
