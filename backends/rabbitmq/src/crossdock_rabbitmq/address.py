"""Addresses: from a broker URL to what is to be connected to, and how. Pure.

amqp://[user:password@]host[:5672][,host...][/vhost]    one server, or any node of a cluster
amqps://...                                             the same over TLS, port 5671
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from crossdock.spi import redact, urls

QueueType = Literal["quorum", "classic"]

_PORTS: Final = {"amqp": 5672, "amqps": 5671}
_QUEUE_TYPE: Final[Callable[[str], QueueType]] = urls.one_of("quorum", "classic")


@dataclass(frozen=True)
class Address:
    """What a broker URL says."""

    hosts: tuple[tuple[str, int], ...]
    """Host and port of each node that may be connected to."""
    shown: str
    """The URL without its secrets, for people."""
    vhost: str = "/"
    user: str = "guest"
    password: str = field(default="guest", repr=False)
    tls: urls.Tls | None = None
    timeout: float = 5.0
    """Seconds after which a call that has no answer gives up."""
    heartbeat: int | None = None
    """Seconds between signs of life; None: a third of the shortest lease, at most 10."""
    queue_type: QueueType = "quorum"
    """Type of the queues that are made."""
    consumer_timeout: float = 1800.0
    """Seconds for which the server lets a delivery be held."""
    management: str | None = field(default=None, repr=False)
    """URL of the management plugin, perhaps with a login of its own."""


def parse(url: str, options: Mapping[str, str]) -> Address:
    """Read a broker URL.

    Args:
        url: As in this module's heading.
        options: Its query: `timeout`, `heartbeat`, `consumer_timeout` (seconds), `queue_type` (quorum or classic), `management` (a URL),
            and for TLS `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_check_hostname` and `ssl_cert_reqs`.

    Raises:
        ConfigurationError: It cannot be read, or has an option that is not known.
    """
    parts = urlsplit(url)
    given = urls.Options(parts.scheme, options, "crossdock-rabbitmq's README")
    credentials, at, places = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":") if at else ("guest", "", "guest")
    vhost = parts.path.removeprefix("/")
    if "/" in vhost:
        raise urls.unusable(url, "behind the host stands the name of one virtual host; a slash in it is written %2F")
    address = Address(
        urls.hosts(url, places, _PORTS[parts.scheme]),
        redact(url),
        vhost=unquote(vhost) or "/",
        user=unquote(user),
        password=unquote(password),
        tls=given.tls() if parts.scheme == "amqps" else None,
        timeout=given.seconds("timeout", 5.0),
        heartbeat=given.take("heartbeat", urls.whole(1, 3600), "a whole number of seconds from 1 to 3600", None),
        queue_type=given.take("queue_type", _QUEUE_TYPE, "quorum or classic", "quorum"),
        consumer_timeout=given.seconds("consumer_timeout", 1800.0),
        management=given.take("management", _management, "a URL such as http://HOST:15672", None),
    )
    given.refuse_rest()
    return address


def _management(text: str) -> str:
    parts = urlsplit(text)
    _ = parts.port  # raises ValueError for what is no port
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(text)
    return text
