"""Servers that do not let everybody in: by TLS, by users, by a password."""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import trustme
from redis_nodes import Node

from crossdock_conformance.servers import ServerFailed
from crossdock_conformance.servers.finding import BinarySource
from crossdock_conformance.servers.recipe import HOST
from crossdock_conformance.servers.redis_server import Setup

OTHER_HOST = "elsewhere.example"

_NO_TLS = ("Bad directive", "Failed finding TLS support")
"""What Redis and Valkey say of their configuration where they were built without TLS."""

ClientCertificates = Literal["no", "optional", "yes"]


class NoTls(Exception):
    """This program was built without TLS."""


class Certificates:
    """Two authorities, and what the first of them signed; as PEM files in a folder where a client needs files."""

    def __init__(self, folder: Path) -> None:
        self._authority = trustme.CA()
        self.ca_file = folder / "ca.pem"
        """The authority that signed what the server shows, and that the server asks clients for."""
        self.wrong_ca_file = folder / "wrong-ca.pem"
        """An authority that did not."""
        self.client_file = folder / "client.pem"
        """A client's certificate that the server takes, and its key, in one file."""
        self.wrong_client_file = folder / "wrong-client.pem"
        """The same by the wrong authority."""
        wrong = trustme.CA()
        self._authority.cert_pem.write_to_path(str(self.ca_file))
        wrong.cert_pem.write_to_path(str(self.wrong_ca_file))
        for authority, file in ((self._authority, self.client_file), (wrong, self.wrong_client_file)):
            authority.issue_cert("client@crossdock.example").private_key_and_cert_chain_pem.write_to_path(str(file))

    def for_server(self, host: str) -> dict[str, str]:
        """The files of a server that shows a certificate for this host."""
        issued = self._authority.issue_cert(*([host] if host != HOST else [HOST, "localhost"]))
        return {
            "ca.pem": self.ca_file.read_text(),
            "server.pem": issued.cert_chain_pems[0].bytes().decode(),
            "server.key": issued.private_key_pem.bytes().decode(),
        }

    def context(self) -> ssl.SSLContext:
        """How a client that has everything connects, whatever host the server is."""
        context = ssl.create_default_context(cafile=self.ca_file)
        context.check_hostname = False
        context.load_cert_chain(self.client_file)
        return context


def start_tls_server(source: BinarySource, certificates: Certificates, host: str, client_certificates: ClientCertificates) -> Node:
    """See `topologies.tls_server`."""
    lines = [
        "tls-ca-cert-file ca.pem",
        "tls-cert-file server.pem",
        "tls-key-file server.key",
        f"tls-auth-clients {client_certificates}",
    ]
    try:
        return Node(source, Setup(lines=lines, files=certificates.for_server(host), tls=certificates.context()))
    except ServerFailed as error:
        if any(words in str(error) for words in _NO_TLS):
            raise NoTls(f"{source.kind} {source.version} ({source.origin}) was built without TLS") from error
        raise


@dataclass(frozen=True)
class User:
    """A user of a server, as ACL SETUSER makes it."""

    name: str
    password: str
    rules: Sequence[str]
    """Such as "~t*", "&t*", "+@all", "-@dangerous"."""

    @property
    def line(self) -> str:
        """The line of the configuration."""
        # Up to Redis 6.2 a user has all channels, unless told otherwise.
        return " ".join(["user", self.name, "on", _quoted(f">{self.password}"), "resetchannels", *self.rules])

    @property
    def login(self) -> str:
        """The user and the password of a URL."""
        return f"{quote(self.name, safe='')}:{quote(self.password, safe='')}"


class GuardedServer(Node):
    """A server that nobody uses without logging in; `url` is without a login."""

    def __init__(self, source: BinarySource, users: Sequence[User], lines: Sequence[str], login: str) -> None:
        self.users = {user.name: user for user in users}
        """By name."""
        super().__init__(source, Setup(lines=lines, login=login))

    def url_as(self, user: str, password: str | None = None) -> str:
        """The broker URL with the login of a user, or with the user's name and another password."""
        login = self.users[user].login if password is None else f"{quote(user, safe='')}:{quote(password, safe='')}"
        return self.url.replace("://", f"://{login}@")


def start_server_with_users(source: BinarySource, users: Sequence[User]) -> GuardedServer:
    """See `topologies.with_users`."""
    ours = User("crossdock-tests", secrets.token_urlsafe(16), ("~*", "&*", "+@all"))
    return GuardedServer(source, users, ["user default off", *(user.line for user in (ours, *users))], ours.login)


def start_server_with_password(source: BinarySource, password: str) -> GuardedServer:
    """See `topologies.with_password`."""
    default = User("default", password, ())
    return GuardedServer(source, [default], [f"requirepass {_quoted(password)}"], default.login)


def _quoted(text: str) -> str:
    """As a word in redis.conf."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
