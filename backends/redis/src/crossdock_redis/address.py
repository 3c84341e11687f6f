"""Addresses: from a broker URL to what is to be connected to, and how. Pure.

redis://[user:password@]host[:6379][/db]                     one server; also valkey://
rediss://...                                                 the same over TLS; also valkeys://
unix://[user:password@]/path/of/socket[?db=0]                one server on this host
redis+sentinel://[user:password@]host:26379,.../master[/db]  whichever server Sentinel calls the master; rediss+sentinel://
redis+cluster://[user:password@]host:port,...                a Cluster, known by any of its nodes; rediss+cluster://
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from crossdock.errors import ConfigurationError
from crossdock.spi import redact, urls

Kind = Literal["server", "socket", "sentinel", "cluster"]

SCHEMES: Final[Mapping[str, tuple[Kind, bool]]] = {
    "redis": ("server", False),
    "rediss": ("server", True),
    "unix": ("socket", False),
    "valkey": ("server", False),
    "valkeys": ("server", True),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
"""What each scheme means: the kind of address, and whether it is over TLS."""


Login = tuple[str, str]
"""User and password; "" where there is none."""


@dataclass(frozen=True)
class Address:
    """What a broker URL says."""

    kind: Kind
    hosts: tuple[tuple[str, int], ...]
    """Host and port of the server, of each Sentinel, or of some nodes of the Cluster."""
    shown: str
    """The URL without its secrets, for people."""
    path: str = ""
    """The socket, where the kind is one."""
    master: str = ""
    """What the Sentinels call the set of servers."""
    login: Login = field(default=("", ""), repr=False)
    sentinel_login: Login = field(default=("", ""), repr=False)
    """For the Sentinels themselves."""
    database: int = 0
    protocol: int = 2
    """Version of RESP, the protocol: 2 or 3."""
    tls: urls.Tls | None = None
    timeout: float = 5.0
    """Seconds after which a call that has no answer gives up."""
    wait_replicas: int = 0
    """How many replicas must have a message before it counts as stored."""
    wait_timeout: float = 1.0
    """Seconds to wait for them."""


def parse(url: str, options: Mapping[str, str]) -> Address:
    """Read a broker URL.

    Args:
        url: As in this module's heading.
        options: Its query: `db`, `protocol` (2 or 3), `timeout` (seconds), `wait_replicas`, `wait_timeout` (seconds), for TLS
            `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_check_hostname` and `ssl_cert_reqs`, and for Sentinel
            `sentinel_username` and `sentinel_password`.

    Raises:
        ConfigurationError: It cannot be read, or has an option that is not known.
    """
    parts = urlsplit(url)
    kind, tls = SCHEMES[parts.scheme]
    given = urls.Options(parts.scheme, options, "crossdock-redis' README")
    user, at, places = parts.netloc.rpartition("@")
    name, _, password = user.partition(":") if at else ("", "", "")
    names = [unquote(part) for part in parts.path.split("/") if part]
    path = master = ""
    if kind == "socket":
        path, names = unquote(parts.path), []
        if places or not path:
            raise urls.unusable(url, "write unix:///path/of/the.sock")
    elif kind == "sentinel":
        if not names:
            raise urls.unusable(url, "it does not say what the Sentinels call the master: write redis+sentinel://HOST:26379/MASTER")
        master = names.pop(0)
    address = Address(
        kind,
        () if kind == "socket" else urls.hosts(url, places, 26379 if kind == "sentinel" else 6379),
        redact(url),
        path=path,
        master=master,
        login=(unquote(name), unquote(password)),
        sentinel_login=(given.take("sentinel_username", str, "text", ""), given.take("sentinel_password", str, "text", "")),
        database=_database(url, kind, names, given.take("db", int, "a whole number", None)),
        protocol=int(given.take("protocol", urls.one_of("2", "3"), "2 or 3", "2")),
        tls=given.tls() if tls else None,
        timeout=given.seconds("timeout", 5.0),
        wait_replicas=given.take("wait_replicas", urls.whole(0), "a whole number from 0", 0),
        wait_timeout=given.seconds("wait_timeout", 1.0),
    )
    given.refuse_rest()
    if address.wait_replicas and address.wait_timeout >= address.timeout:
        raise ConfigurationError("wait_timeout must be less than timeout: an answer that waits for replicas would come too late.")
    return address


def _database(url: str, kind: Kind, names: list[str], option: int | None) -> int:
    if len(names) > 1 or (names and not names[0].isdecimal()):
        raise urls.unusable(url, "behind the host stands at most the number of a database")
    database = int(names[0]) if names else option or 0
    if database < 0 or (database and kind == "cluster"):
        raise urls.unusable(url, "a Cluster has database 0 only" if kind == "cluster" else "no database has a negative number")
    return database
