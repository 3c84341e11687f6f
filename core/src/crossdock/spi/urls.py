"""Broker URLs: what those of servers have in common, so that they are read alike whatever the broker. Pure.

An option is called the same, and wrong values are refused in the same words, wherever it exists.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from crossdock.errors import ConfigurationError
from crossdock.spi.redaction import redact

T = TypeVar("T")
Word = TypeVar("Word", bound=str)

_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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


class Options:
    """The query of a URL, taken out word by word; what is left over in the end is unknown.

    Args:
        scheme: Of the URL.
        given: Its query.
        manual: Where the options are explained, such as "crossdock-redis' README".
    """

    def __init__(self, scheme: str, given: Mapping[str, str], manual: str) -> None:
        self._scheme = scheme
        self._given = dict(given)
        self._manual = manual

    def take(self, name: str, read: Callable[[str], T], what: str, default: T) -> T:
        """Take an option out.

        Args:
            name: Its name.
            read: Makes the value of its text; raises ValueError or KeyError for one that cannot be meant.
            what: What it must be, for people: "a whole number".
            default: The value if it is not given.

        Raises:
            ConfigurationError: It was given and cannot be meant. Its text is not repeated, as it may be a secret.
        """
        text = self._given.pop(name, None)
        if text is None:
            return default
        try:
            return read(text)
        except (ValueError, KeyError) as error:
            raise ConfigurationError(f"The option {name} of a {self._scheme}:// URL must be {what}.") from error

    def seconds(self, name: str, default: float) -> float:
        """Take out an option that is a time in seconds, above 0. Raises `ConfigurationError`."""
        return self.take(name, _positive, "a number of seconds above 0", default)

    def flag(self, name: str, default: bool) -> bool:
        """Take out an option that is true or false. Raises `ConfigurationError`."""
        return self.take(name, lambda text: _TRUTH[text.lower()], "true or false", default)

    def file(self, name: str) -> str | None:
        """Take out an option that is the path of a file; None if it is not given. Raises `ConfigurationError`."""
        return self.take(name, _file, "a file that is there", None)

    def tls(self) -> Tls:
        """Take out `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_check_hostname` and `ssl_cert_reqs`. Raises `ConfigurationError`."""
        return Tls(
            ca_certs=self.file("ssl_ca_certs"),
            certfile=self.file("ssl_certfile"),
            keyfile=self.file("ssl_keyfile"),
            check_hostname=self.flag("ssl_check_hostname", True),
            verify=self.take("ssl_cert_reqs", one_of("required", "none"), "required or none", "required") == "required",
        )

    def refuse_rest(self) -> None:
        """Raise `ConfigurationError` if there is an option that nobody took."""
        if self._given:
            raise ConfigurationError(f"{self._scheme}:// has no option {next(iter(self._given))!r}; see {self._manual}.")


def hosts(url: str, netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    """Host and port of each server of a URL.

    Args:
        url: The whole of it, for the error.
        netloc: Servers, separated by commas, without credentials; "" is localhost.
        default_port: Of those that name none.

    Raises:
        ConfigurationError: One of them is no host and port.
    """
    found: list[tuple[str, int]] = []
    for place in netloc.split(","):
        try:
            parts = urlsplit(f"//{place}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host and netloc:
            raise unusable(url, "one of its servers is no host and port")
        found.append((host or "localhost", port or default_port))
    return tuple(found)


def whole(least: int, most: float = math.inf) -> Callable[[str], int]:
    """For `Options.take`: reads a whole number within these bounds."""

    def read(text: str) -> int:
        number = int(text)
        if not least <= number <= most:
            raise ValueError(text)
        return number

    return read


def one_of(*words: Word) -> Callable[[str], Word]:
    """For `Options.take`: reads one of these words."""
    return {str(word): word for word in words}.__getitem__


def unusable(url: str, why: str) -> ConfigurationError:
    """The error for a URL that cannot be used; `why` is a sentence without its full stop."""
    return ConfigurationError(f"The broker URL {redact(url)!r} cannot be used: {why}.")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(text)
    return text
