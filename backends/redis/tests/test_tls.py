"""TLS: who is trusted, by default and otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from topologies import OTHER_HOST, Certificates, configured
from traffic import lanes_of, message, opened

from crossdock.errors import BrokerUnavailable, ConfigurationError
from crossdock.spi import Ack

pytestmark = [pytest.mark.timeout(120), pytest.mark.asyncio]


async def works(url: str, **options: Any) -> None:
    """A task's way through."""
    async with opened(url, **options) as broker:
        assert await broker.enqueue([message("a")]) == []
        [delivery] = await broker.receive(lanes_of("q", quota=1), 1, 5)
        assert await broker.settle([Ack(delivery)]) == []


async def is_refused(words: str, url: str, **options: Any) -> None:
    """A sentence that says why."""
    with pytest.raises(BrokerUnavailable, match=words):
        async with opened(url, timeout=3, **options):
            pass


async def test_the_server_is_checked(tls_server: Any, certificates: Certificates) -> None:
    """With the right authority it works, by address and by name. With another one, or none, or without TLS, it is refused."""
    url: str = tls_server().url
    await works(url, ssl_ca_certs=certificates.ca_file, protocol=3)
    await works(url.replace("127.0.0.1", "localhost"), ssl_ca_certs=certificates.ca_file)
    await works(url.replace("rediss:", "valkeys:"), ssl_ca_certs=certificates.ca_file)
    await is_refused(
        r"certificate of 127\.0\.0\.1:\d+ is not trusted: .*ssl_ca_certs", url, ssl_ca_certs=certificates.wrong_ca_file
    )
    await is_refused("is not trusted", url)
    await is_refused("closed the connection|cannot be reached|reset", url.replace("rediss:", "redis:"))


async def test_the_host_is_checked(tls_server: Any, certificates: Certificates) -> None:
    """A certificate for another host is refused, unless the URL says that this does not matter."""
    url: str = tls_server(host=OTHER_HOST).url
    await is_refused("is not trusted: .*not valid for '127.0.0.1'", url, ssl_ca_certs=certificates.ca_file)
    await works(url, ssl_ca_certs=certificates.ca_file, ssl_check_hostname="false")
    await works(url, ssl_cert_reqs="none")
    await is_refused("is not trusted", url, ssl_check_hostname="false")  # which is about the host only


async def test_our_certificate(tls_server: Any, certificates: Certificates) -> None:
    """A server that wants one takes the right one, and refuses none and a wrong one."""
    url: str = tls_server(client_certificates="yes").url
    trust = {"ssl_ca_certs": certificates.ca_file}
    await works(url, **trust, ssl_certfile=certificates.client_file, ssl_keyfile=certificates.client_file)
    await works(url, **trust, ssl_certfile=certificates.client_file)
    await is_refused("TLS|closed|reset|cannot be reached", url, **trust)
    await is_refused("TLS|closed|reset|cannot be reached", url, **trust, ssl_certfile=certificates.wrong_client_file)


async def test_files_that_are_not_there_or_no_certificates(certificates: Certificates, tmp_path: Any) -> None:
    """The option is named, and nothing is sent."""
    empty = tmp_path / "empty.pem"
    empty.touch()
    with pytest.raises(ConfigurationError, match="ssl_ca_certs of a rediss:// URL must be a file that is there"):
        async with opened("rediss://127.0.0.1:1", ssl_ca_certs=tmp_path / "none.pem"):
            pass
    for options in ({"ssl_ca_certs": empty}, {"ssl_certfile": empty}):
        with pytest.raises(ConfigurationError, match="certificates that the broker URL names cannot be used"):
            async with opened("rediss://127.0.0.1:1", **options):
                pass


async def test_a_server_without_tls(a_source: Any, use: Any) -> None:
    """rediss:// to a server that speaks plain text never falls back to that."""
    server = use(configured(a_source))
    await is_refused("agree on TLS|no answer|closed", server.url.replace("redis:", "rediss:"))
