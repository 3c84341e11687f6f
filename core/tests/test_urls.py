"""What broker URLs have in common is read alike, and what cannot be meant is refused in a sentence without secrets."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossdock.errors import ConfigurationError
from crossdock.spi import urls


def options(**given: str) -> urls.Options:
    """The query of a URL."""
    return urls.Options("some", given, "the manual")


def test_what_is_given_is_taken_once() -> None:
    """Each option is read as what it is; what was not given has its default; what is left over is refused by name."""
    given = options(timeout="0.5", replicas="3", storage="file", quick="Yes", colour="red")
    assert given.seconds("timeout", 5.0) == 0.5
    assert given.seconds("wait", 1.0) == 1.0
    assert given.take("replicas", urls.whole(1, 5), "a whole number", 1) == 3
    assert given.take("storage", urls.one_of("file", "memory"), "file or memory", "memory") == "file"
    assert given.flag("quick", False) is True
    assert given.file("key") is None
    with pytest.raises(ConfigurationError, match="some:// has no option 'colour'; see the manual"):
        given.refuse_rest()
    _ = given.take("colour", str, "text", "")
    given.refuse_rest()


@pytest.mark.parametrize(
    ("text", "take", "says"),
    [
        ("0", lambda given: given.seconds("x", 1.0), "a number of seconds above 0"),
        ("nan", lambda given: given.seconds("x", 1.0), "a number of seconds above 0"),
        ("inf", lambda given: given.seconds("x", 1.0), "a number of seconds above 0"),
        ("s3cret", lambda given: given.seconds("x", 1.0), "a number of seconds above 0"),
        ("0", lambda given: given.take("x", urls.whole(1, 5), "from 1 to 5", 1), "from 1 to 5"),
        ("6", lambda given: given.take("x", urls.whole(1, 5), "from 1 to 5", 1), "from 1 to 5"),
        ("1.0", lambda given: given.take("x", urls.whole(1), "a whole number", 1), "a whole number"),
        ("s3cret", lambda given: given.take("x", urls.one_of("a", "b"), "a or b", "a"), "a or b"),
        ("perhaps", lambda given: given.flag("x", True), "true or false"),
        ("/no/s3cret", lambda given: given.file("x"), "a file that is there"),
        ("/", lambda given: given.file("x"), "a file that is there"),
    ],
)
def test_what_cannot_be_meant(text: str, take: Callable[[urls.Options], Any], says: str) -> None:
    """The error names the option and what it must be, and does not repeat the text."""
    with pytest.raises(ConfigurationError) as refused:
        take(options(x=text))
    assert str(refused.value) == f"The option x of a some:// URL must be {says}."


@pytest.mark.parametrize(
    ("netloc", "found"),
    [
        ("", (("localhost", 9),)),
        ("host", (("host", 9),)),
        ("a:1,b,[::1]:2", (("a", 1), ("b", 9), ("::1", 2))),
    ],
)
def test_hosts(netloc: str, found: tuple[tuple[str, int], ...]) -> None:
    """Servers are separated by commas, and those that name no port have the usual one."""
    assert urls.hosts("some://x", netloc, 9) == found


@pytest.mark.parametrize("netloc", ["host:port", "host:99999", "a,,b", ":1,", "[::1"])
def test_no_hosts(netloc: str) -> None:
    """What is no host and port is refused, and the URL is shown without its password."""
    with pytest.raises(ConfigurationError, match="one of its servers is no host and port") as refused:
        urls.hosts(f"some://ann:s3cret@{netloc}", netloc, 9)
    assert "s3cret" not in str(refused.value)


def test_tls(tmp_path: Path) -> None:
    """Certificates are checked, and for the right host, unless one says otherwise; a file that is none is told of when it is needed."""
    assert (urls.Tls().context.verify_mode, urls.Tls().context.check_hostname) == (ssl.CERT_REQUIRED, True)
    trusting = options(ssl_cert_reqs="none").tls().context
    assert (trusting.verify_mode, trusting.check_hostname) == (ssl.CERT_NONE, False)
    assert options(ssl_check_hostname="false").tls() == urls.Tls(check_hostname=False)

    file = tmp_path / "ca.pem"
    file.write_text("nonsense")
    with pytest.raises(ConfigurationError, match="certificates that the broker URL names cannot be used"):
        _ = options(ssl_ca_certs=str(file)).tls().context
