"""Addresses: from a broker URL to what is to be connected to, and how. Pure.

redis://[user:password@]host[:6379][/db]                     one server; also valkey://
rediss://...                                                 the same over TLS; also valkeys://
unix://[user:password@]/path/of/socket[?db=0]                one server on this host
redis+sentinel://[user:password@]host:26379,.../master[/db]  whichever server Sentinel calls the master; rediss+sentinel://
redis+cluster://[user:password@]host:port,...                a Cluster, known by any of its nodes; rediss+cluster://
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from crossdock.errors import ConfigurationError
from crossdock.spi import redact

Kind = Literal["server", "socket", "sentinel", "cluster"]
T = TypeVar("T")

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
class Tls:
    """How to speak TLS."""

    ca_certs: str | None = None
    """File with the certificates of those who are trusted; None: the system's."""
    certfile: str | None = None
    """File with our own certificate, for servers that ask for one."""
    keyfile: str | None = None
    """File with its key."""
    check_hostname: bool = True
    verify: bool = True

    @cached_property
    def context(self) -> ssl.SSLContext:
        """What the standard library calls that. Raises `ConfigurationError` for files that are no certificates."""
        try:
            context = ssl.create_default_context(cafile=self.ca_certs)
            if self.certfile is not None:
                context.load_cert_chain(self.certfile, self.keyfile)
        except (ssl.SSLError, OSError) as error:
            raise ConfigurationError(f"The certificates that the broker URL names cannot be used: {error}.") from error
        context.check_hostname = self.check_hostname and self.verify
        if not self.verify:
            context.verify_mode = ssl.CERT_NONE
        return context


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
    tls: Tls | None = None
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
    given = _Options(parts.scheme, dict(options))
    user, at, hosts = parts.netloc.rpartition("@")
    name, _, password = user.partition(":") if at else ("", "", "")
    names = [unquote(part) for part in parts.path.split("/") if part]
    path = master = ""
    if kind == "socket":
        path, names = unquote(parts.path), []
        if hosts or not path:
            raise _unusable(url, "write unix:///path/of/the.sock")
    elif kind == "sentinel":
        if not names:
            raise _unusable(url, "it does not say what the Sentinels call the master: write redis+sentinel://HOST:26379/MASTER")
        master = names.pop(0)
    address = Address(
        kind,
        () if kind == "socket" else _hosts(url, hosts, 26379 if kind == "sentinel" else 6379),
        redact(url),
        path=path,
        master=master,
        login=(unquote(name), unquote(password)),
        sentinel_login=(given.take("sentinel_username", str, "text", ""), given.take("sentinel_password", str, "text", "")),
        database=_database(url, kind, names, given.take("db", int, "a whole number", None)),
        protocol=given.take("protocol", _one_of(2, 3), "2 or 3", 2),
        tls=_tls(given) if tls else None,
        timeout=given.take("timeout", _positive, "a number of seconds above 0", 5.0),
        wait_replicas=given.take("wait_replicas", _count, "a whole number from 0", 0),
        wait_timeout=given.take("wait_timeout", _positive, "a number of seconds above 0", 1.0),
    )
    given.refuse_rest()
    if address.wait_replicas and address.wait_timeout >= address.timeout:
        raise ConfigurationError("wait_timeout must be less than timeout: an answer that waits for replicas would come too late.")
    return address


def _hosts(url: str, netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    found: list[tuple[str, int]] = []
    for place in netloc.split(","):
        try:
            parts = urlsplit(f"//{place}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host and netloc:
            raise _unusable(url, f"{redact('redis://' + place).removeprefix('redis://')!r} is no host and port")
        found.append((host or "localhost", port or default_port))
    return tuple(found)


def _database(url: str, kind: Kind, names: list[str], option: int | None) -> int:
    if len(names) > 1 or (names and not names[0].isdecimal()):
        raise _unusable(url, "behind the host stands at most the number of a database")
    database = int(names[0]) if names else option or 0
    if database < 0 or (database and kind == "cluster"):
        raise _unusable(url, "a Cluster has database 0 only" if kind == "cluster" else "no database has a negative number")
    return database


def _tls(given: _Options) -> Tls:
    return Tls(
        ca_certs=given.take("ssl_ca_certs", _file, "a file that is there", None),
        certfile=given.take("ssl_certfile", _file, "a file that is there", None),
        keyfile=given.take("ssl_keyfile", _file, "a file that is there", None),
        check_hostname=given.take("ssl_check_hostname", _flag, "true or false", True),
        verify=given.take("ssl_cert_reqs", lambda text: {"required": True, "none": False}[text], "required or none", True),
    )


class _Options:
    """The query of a URL, taken out word by word; what is left over is unknown."""

    def __init__(self, scheme: str, given: dict[str, str]) -> None:
        self._scheme = scheme
        self._given = given

    def take(self, name: str, read: Callable[[str], T], what: str, default: Any) -> Any:
        text = self._given.pop(name, None)
        if text is None:
            return default
        try:
            return read(text)
        except (ValueError, KeyError) as error:
            raise ConfigurationError(f"The option {name} of a {self._scheme}:// URL must be {what}.") from error

    def refuse_rest(self) -> None:
        if self._given:
            raise ConfigurationError(f"{self._scheme}:// has no option {next(iter(self._given))!r}; see crossdock-redis' README.")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def _flag(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]


def _one_of(*numbers: int) -> Callable[[str], int]:
    return lambda text: {str(number): number for number in numbers}[text]


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(text)
    return text


def _unusable(url: str, why: str) -> ConfigurationError:
    return ConfigurationError(f"The broker URL {redact(url)!r} cannot be used: {why}.")
