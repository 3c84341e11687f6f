"""TLS: who is trusted, what is said where it goes wrong; and messages of all sizes, with it and without."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from rabbitmq_nodes import TlsNode
from rabbitmq_traffic import PATIENCE, erase, lanes_of, message, new_namespace, opened

from crossdock.errors import BrokerUnavailable, ConfigurationError
from crossdock.spi import Ack

pytestmark = pytest.mark.timeout(180)

A_FRAME = 131_072 - 8
"""Bytes of a body that fit into one frame, as servers are by default."""
SIZES = (0, 1, A_FRAME - 1, A_FRAME, A_FRAME + 1, 2 * A_FRAME, 2 * A_FRAME + 1, 1_000_000)


async def _messages_of_all_sizes(url: str) -> None:
    """They come as they went, whatever they are split into, also when several levels come at once."""
    namespace = new_namespace()
    bodies = {f"m{number}": random.randbytes(size) for number, size in enumerate(SIZES)}
    bodies |= {f"small{number}": b"x" * number for number in range(300)}
    queues = ("q", "r")
    async with opened(url, namespace, queues=queues) as broker:
        sent = [message(id, queues[number % 2], body) for number, (id, body) in enumerate(bodies.items())]
        assert not await broker.enqueue(sent)
        came: dict[str, bytes] = {}
        while len(came) < len(bodies):
            deliveries = await broker.receive(lanes_of(*queues, quota=20), 100, PATIENCE)
            assert deliveries, f"only {len(came)} came"
            came |= {delivery.message.id: delivery.message.body for delivery in deliveries}
            assert not await broker.settle([Ack(delivery) for delivery in deliveries])
        assert came == bodies
    await erase(url, namespace, queues)


async def _refused(url: str) -> str:
    """The sentence that says why."""
    with pytest.raises(BrokerUnavailable) as caught:
        async with opened(url, new_namespace()):
            pass
    assert "guest:guest" not in str(caught.value)
    return str(caught.value)


@pytest.mark.asyncio
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_messages_of_all_sizes(server: TlsNode, tls: bool) -> None:
    """Bodies around the size of a frame come whole, also when several queues come at once."""
    await _messages_of_all_sizes(f"{server.tls_url}?ssl_ca_certs={server.certificates.ca_file}" if tls else server.url)


def test_tls_under_uvloop(server: TlsNode) -> None:
    """uvloop has a TLS of its own, and the tap stands in it as well."""
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_messages_of_all_sizes(f"{server.tls_url}?ssl_ca_certs={server.certificates.ca_file}"))


@pytest.mark.asyncio
async def test_the_server_is_checked(server: TlsNode) -> None:
    """A certificate by an authority that is not trusted, or for another host, is refused unless the URL says that it does not matter."""
    ours, wrong = f"ssl_ca_certs={server.certificates.ca_file}", f"ssl_ca_certs={server.certificates.wrong_ca_file}"
    by_name = server.tls_url.replace("127.0.0.1", "localhost")
    for url in (f"{server.tls_url}?{wrong}", server.tls_url, f"{by_name}?{ours}"):
        assert "is not trusted" in await _refused(f"{url}{'&' if '?' in url else '?'}timeout=5")
    for url in (f"{by_name}?{ours}&ssl_check_hostname=false", f"{by_name}?ssl_cert_reqs=none"):
        namespace = new_namespace()
        async with opened(url, namespace) as broker:
            assert not await broker.enqueue([message("m")])
        await erase(url, namespace)


@pytest.mark.asyncio
async def test_our_certificate(server: TlsNode) -> None:
    """The server lets us in with a certificate of its authority, and not with one of another."""
    url = f"{server.tls_url}?timeout=5&ssl_ca_certs={server.certificates.ca_file}&ssl_certfile="
    namespace = new_namespace()
    async with opened(f"{url}{server.certificates.client_file}", namespace) as broker:
        assert not await broker.enqueue([message("m")])
    await erase(f"{url}{server.certificates.client_file}", namespace)
    said = await _refused(f"{url}{server.certificates.wrong_client_file}")
    assert "TLS" in said or "reset" in said, said


@pytest.mark.asyncio
async def test_tls_on_one_side_only(server: TlsNode) -> None:
    """A plain URL to a port that speaks TLS, and the reverse, end soon with a sentence that has TLS in it."""
    assert "TLS" in await _refused(f"{server.tls_url.replace('amqps:', 'amqp:')}?timeout=5")
    assert "TLS" in await _refused(f"{server.url.replace('amqp:', 'amqps:')}?timeout=5")


@pytest.mark.asyncio
async def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    """They are a mistake in the URL, and nothing is sent."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    for option in ("ssl_ca_certs", "ssl_certfile"):
        with pytest.raises(ConfigurationError, match="certificates that the broker URL names cannot be used"):
            async with opened(f"amqps://127.0.0.1:1/?{option}={empty}", "t"):
                pass
