"""Broker URLs: what they say, and what is said about those that say nothing. Nobody is connected to."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from topologies import Certificates

from crossdock.errors import ConfigurationError
from crossdock.plugins import create_broker
from crossdock.spi.urls import Tls
from crossdock_redis.address import SCHEMES, Address, parse


def read(url: str) -> Address:
    """As `create_broker` has it read."""
    return parse(url, dict(parse_qsl(urlsplit(url).query, keep_blank_values=True)))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", {"kind": "server", "hosts": (("localhost", 6379),), "database": 0, "tls": None, "login": ("", "")}),
        ("redis://host", {"hosts": (("host", 6379),)}),
        ("valkey://host:7000/3", {"kind": "server", "hosts": (("host", 7000),), "database": 3}),
        ("redis://host?db=4", {"database": 4}),
        ("redis://host/5?db=4", {"database": 5}),
        ("redis://[::1]:7000", {"hosts": (("::1", 7000),)}),
        ("redis://ann:p%40ss%3A%2F@host", {"login": ("ann", "p@ss:/"), "hosts": (("host", 6379),)}),
        ("redis://:secret@host", {"login": ("", "secret")}),
        ("redis://host?timeout=0.5&protocol=3", {"timeout": 0.5, "protocol": 3}),
        ("redis://host?wait_replicas=2&wait_timeout=0.1", {"wait_replicas": 2, "wait_timeout": 0.1}),
        ("unix:///run/redis.sock", {"kind": "socket", "path": "/run/redis.sock", "hosts": (), "database": 0}),
        ("unix://:secret@/run/my%20redis.sock?db=2", {"path": "/run/my redis.sock", "database": 2, "login": ("", "secret")}),
        (
            "redis+sentinel://a,b:26000/shop/1?sentinel_username=eve&sentinel_password=x",
            {
                "kind": "sentinel",
                "hosts": (("a", 26379), ("b", 26000)),
                "master": "shop",
                "database": 1,
                "login": ("", ""),
                "sentinel_login": ("eve", "x"),
            },
        ),
        ("redis+cluster://a:7000,b", {"kind": "cluster", "hosts": (("a", 7000), ("b", 6379)), "tls": None}),
        ("rediss+cluster://a", {"kind": "cluster", "tls": Tls()}),
        ("rediss://host", {"kind": "server", "tls": Tls()}),
        ("valkeys://host?ssl_check_hostname=false", {"tls": Tls(check_hostname=False)}),
        ("rediss://host?ssl_cert_reqs=none", {"tls": Tls(verify=False)}),
    ],
)
def test_what_a_url_says(url: str, expected: dict[str, Any]) -> None:
    """Host, port, database, login and options of each kind of URL, with their defaults."""
    address = read(url)
    assert {name: getattr(address, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis://host:port", "no host and port"),
        ("redis://host:99999", "no host and port"),
        ("redis://host/one", "at most the number of a database"),
        ("redis://host/1/2", "at most the number of a database"),
        ("redis://host?db=-1", "no database has a negative number"),
        ("redis://host?db=x", "option db of a redis:// URL must be a whole number"),
        ("redis://host?timeout=0", "option timeout of a redis:// URL must be a number of seconds above 0"),
        ("redis://host?timeout=nan", "above 0"),
        ("redis://host?timeout=inf", "above 0"),
        ("redis://host?protocol=4", "must be 2 or 3"),
        ("redis://host?wait_replicas=-1", "must be a whole number from 0"),
        ("redis://host?wait_replicas=1&wait_timeout=5", "wait_timeout must be less than timeout"),
        ("redis://host?colour=red", "redis:// has no option 'colour'"),
        ("redis://host?ssl_cert_reqs=none", "redis:// has no option 'ssl_cert_reqs'"),
        ("rediss://host?ssl_cert_reqs=optional", "must be required or none"),
        ("rediss://host?ssl_check_hostname=perhaps", "must be true or false"),
        ("rediss://host?ssl_ca_certs=/no/such/file", "must be a file that is there"),
        ("unix://host/path", "write unix:///path/of/the.sock"),
        ("unix://", "write unix:///path/of/the.sock"),
        ("redis+sentinel://host", "write redis[+]sentinel://HOST:26379/MASTER"),
        ("redis+cluster://host/1", "a Cluster has database 0 only"),
        ("redis+cluster://host,,other", "no host and port"),
    ],
)
def test_urls_that_say_nothing(url: str, words: str) -> None:
    """One sentence that names what is wrong, before anything is sent."""
    with pytest.raises(ConfigurationError, match=words):
        read(url)


SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"redis://ann:{SECRET}@host/one",
        f"redis://{SECRET}@host/one",
        f"redis://ann:{SECRET}@host:port",
        f"redis://ann:{SECRET}@host,ann:{SECRET}@other:port",
        f"unix://ann:{SECRET}@host/path",
        f"redis+sentinel://ann:{SECRET}@host?sentinel_password={SECRET}",
        f"redis+cluster://ann:{SECRET}@host/1",
        f"redis://ann:{SECRET}@host?timeout={SECRET}",
        f"rediss://ann:{SECRET}@host?ssl_ca_certs={SECRET}",
    ],
)
def test_no_secret_is_in_what_is_said(url: str) -> None:
    """Whatever is wrong with a URL, its password is not shown."""
    with pytest.raises(ConfigurationError) as caught:
        read(url)
    assert SECRET not in str(caught.value)


def test_no_secret_is_in_what_is_shown() -> None:
    """The URL for people, and the address as a whole."""
    address = read(f"redis+sentinel://ann:{SECRET}@host:26379/shop?sentinel_password={SECRET}")
    assert SECRET not in address.shown
    assert SECRET not in repr(address)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_installed(scheme: str) -> None:
    """`create_broker` finds this backend by each of its schemes."""
    place = {"unix": "/run/x.sock"}.get(scheme, "host/shop" if scheme.endswith("sentinel") else "host")
    assert type(create_broker(f"{scheme}://{place}", namespace="n")).__name__ == "RedisBroker"


def test_what_tls_means(certificates: Certificates, tmp_path: Path) -> None:
    """Server and host are checked unless the URL says otherwise; files that are no certificates are refused."""
    checked = Tls(ca_certs=str(certificates.ca_file), certfile=str(certificates.client_file)).context
    assert (checked.verify_mode, checked.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert checked.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert Tls(check_hostname=False).context.verify_mode == ssl.CERT_REQUIRED
    assert Tls(verify=False).context.verify_mode == ssl.CERT_NONE
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigurationError, match="cannot be used"):
        _ = Tls(ca_certs=str(tmp_path / "empty")).context
