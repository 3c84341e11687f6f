"""URLs: what they mean, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from crossdock.errors import ConfigurationError
from crossdock_nats.address import parse


def test_defaults() -> None:
    """A bare URL is one server on the usual port, without TLS, streams in files on one server."""
    address = parse("nats://localhost", {})
    assert (address.hosts, address.tls_only, address.replicas, address.storage, address.timeout) == (
        (("localhost", 4222),),
        False,
        1,
        "file",
        5.0,
    )
    assert (address.user, address.password, address.token) == (None, None, None)


def test_several_servers_and_options() -> None:
    """Servers are separated by commas; options are read as what they are."""
    address = parse("tls://a,b:4223,[::1]:1", {"replicas": "3", "storage": "memory", "timeout": "0.5", "domain": "hub"})
    assert address.hosts == (("a", 4222), ("b", 4223), ("::1", 1))
    assert (address.tls_only, address.replicas, address.storage, address.timeout, address.domain) == (True, 3, "memory", 0.5, "hub")


@pytest.mark.parametrize(
    ("url", "login"),
    [("nats://me:p%40ss@h", ("me", "p@ss", None)), ("nats://t%2Fken@h", (None, None, "t/ken")), ("nats://h", (None, None, None))],
)
def test_who_we_are(url: str, login: tuple[str | None, ...]) -> None:
    """User and password, or a token, stand before the host, percent-encoded; none of them shows."""
    address = parse(url, {})
    assert (address.user, address.password, address.token) == login
    assert all(secret not in repr(address) for secret in ("p@ss", "p%40ss", "t/ken", "t%2Fken"))


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("nats://h/path", {}, "nothing stands behind the host"),
        ("nats://h:port", {}, "no host and port"),
        ("nats://h", {"replica": "3"}, "has no option 'replica'"),
        ("nats://h", {"replicas": "6"}, "replicas of a nats:// URL must be a whole number from 1 to 5"),
        ("nats://h", {"storage": "disk"}, "storage of a nats:// URL must be file or memory"),
        ("nats://h", {"timeout": "0"}, "timeout of a nats:// URL must be a number of seconds above 0"),
        ("nats://h", {"inbox": "a b"}, "inbox of a nats:// URL must be the beginning of a subject"),
        ("nats://h", {"creds": "/nowhere"}, "creds of a nats:// URL must be a file that is there"),
    ],
)
def test_refused(url: str, options: dict[str, str], says: str) -> None:
    """What cannot be used is refused in a sentence."""
    with pytest.raises(ConfigurationError) as refused:
        parse(url, options)
    assert says in str(refused.value)


def test_one_way_to_say_who_we_are(tmp_path: Path) -> None:
    """A file with credentials, an NKEY and a login in the URL exclude each other."""
    file = str(tmp_path / "file")
    Path(file).write_text("x")
    for url, options in (("nats://h", {"creds": file, "nkey": file}), ("nats://me:word@h", {"creds": file})):
        with pytest.raises(ConfigurationError, match="leave one of them out"):
            parse(url, options)


def test_files_that_are_no_certificates(tmp_path: Path) -> None:
    """TLS files are read when they are needed, and what is wrong with them is told without a traceback."""
    file = tmp_path / "ca.pem"
    file.write_text("nonsense")
    with pytest.raises(ConfigurationError, match="certificates that the broker URL names cannot be used"):
        _ = parse("tls://h", {"ssl_ca_certs": str(file)}).tls.context
