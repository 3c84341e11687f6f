"""Addresses: from a broker URL to what is to be connected to, and how. Pure.

nats://[user:password@ or token@]host[:4222][,host...]    one cluster, known by any of its servers
tls://...                                                 the same, and never without TLS
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from crossdock.errors import ConfigurationError
from crossdock.spi import redact, urls

Storage = Literal["file", "memory"]

_STORAGE: Final[Callable[[str], Storage]] = urls.one_of("file", "memory")
_SUBJECT: Final = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@dataclass(frozen=True)
class Address:
    """What a broker URL says."""

    hosts: tuple[tuple[str, int], ...]
    """Host and port of some servers."""
    shown: str
    """The URL without its secrets, for people."""
    user: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    creds: str | None = None
    """File with credentials (a JWT and its key), as operators hand them out."""
    nkey: str | None = None
    """File with the seed of an NKEY."""
    tls_only: bool = False
    """Refuse a server that does not speak TLS."""
    tls: urls.Tls = field(default_factory=urls.Tls)
    tls_first: bool = False
    """Whether the server begins with TLS, before it says who it is."""
    timeout: float = 5.0
    """Seconds after which connecting, or a call that has no answer, gives up."""
    replicas: int = 1
    """On how many servers each new stream is kept."""
    storage: Storage = "file"
    """Where each new stream is kept."""
    domain: str = ""
    """JetStream domain; "" = the server's own."""
    inbox: str = "_INBOX"
    """What the subjects of answers begin with."""


def parse(url: str, options: Mapping[str, str]) -> Address:
    """Read a broker URL.

    Args:
        url: As in this module's heading.
        options: Its query: `timeout` (seconds), `replicas` (1 to 5), `storage` (file or memory), `domain`, `inbox`, `creds` and `nkey`
            (files), and for TLS `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_check_hostname`, `ssl_cert_reqs` and
            `tls_first`.

    Raises:
        ConfigurationError: It cannot be read, or has an option that is not known.
    """
    parts = urlsplit(url)
    if parts.path.strip("/"):
        raise urls.unusable(url, "nothing stands behind the host; a namespace is a setting of its own")
    given = urls.Options(parts.scheme, options, "crossdock-nats' README")
    login, at, places = parts.netloc.rpartition("@")
    name, colon, password = login.partition(":")
    address = Address(
        urls.hosts(url, places, 4222),
        redact(url),
        user=unquote(name) if at and colon else None,
        password=unquote(password) if at and colon else None,
        token=unquote(name) if at and not colon else None,
        creds=given.file("creds"),
        nkey=given.file("nkey"),
        tls_only=parts.scheme == "tls",
        tls=given.tls(),
        tls_first=given.flag("tls_first", False),
        timeout=given.seconds("timeout", 5.0),
        replicas=given.take("replicas", urls.whole(1, 5), "a whole number from 1 to 5", 1),
        storage=given.take("storage", _STORAGE, "file or memory", "file"),
        domain=given.take("domain", _subject, "a JetStream domain", ""),
        inbox=given.take("inbox", _subject, "the beginning of a subject", "_INBOX"),
    )
    given.refuse_rest()
    if address.creds and address.nkey:
        raise ConfigurationError("The broker URL names both creds and nkey: leave one of them out.")
    if (address.creds or address.nkey) and at:
        raise ConfigurationError("The broker URL names a file with credentials and credentials of its own: leave one of them out.")
    return address


def _subject(text: str) -> str:
    if _SUBJECT.fullmatch(text) is None:
        raise ValueError(text)
    return text
