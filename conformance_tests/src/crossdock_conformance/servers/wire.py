"""The little networking that asking a server needs, so that no driver is needed for it."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
from typing import Any
from urllib.parse import unquote, urlsplit

_TLS_SCHEMES = frozenset({"rediss", "valkeys", "tls", "amqps", "https"})


def connect(
    url: str, default_port: int, timeout: float, *, tls: bool | None = None, context: ssl.SSLContext | None = None
) -> socket.socket:
    """A connection to the host and port of this URL, under TLS where its scheme says so, or where `tls` does.

    The server's certificate is checked as `context` says, or else as this machine does.

    Raises:
        OSError: Nothing answers there within `timeout` seconds. The same limit then holds for each read and write.
    """
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    connection = socket.create_connection((host, parts.port or default_port), timeout)
    if tls is False or (tls is None and parts.scheme not in _TLS_SCHEMES):
        return connection
    return over_tls(connection, host, context)


def over_tls(connection: socket.socket, host: str, context: ssl.SSLContext | None = None) -> socket.socket:
    """Go on under TLS, its certificate checked as `context` says, or else as this machine does."""
    try:
        return (context or ssl.create_default_context()).wrap_socket(connection, server_hostname=host)
    except OSError:
        connection.close()
        raise


def login(url: str) -> tuple[str | None, str | None]:
    """The user and the password of a URL, decoded."""
    parts = urlsplit(url)
    user, password = parts.username, parts.password
    return user and unquote(user), password and unquote(password)


def http_json(url: str, path: str, timeout: float) -> Any:
    """The JSON that a GET of `path` below an http or https URL answers.

    Raises:
        OSError: It does not answer, or not with 200.
    """
    parts = urlsplit(url)
    connection = (http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection)(
        parts.hostname or "127.0.0.1", parts.port, timeout=timeout
    )
    user, password = login(url)
    headers = {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()} if user else {}
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=headers)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise ConnectionError(f"GET {path} was answered {response.status} {body[:200].decode(errors='replace')}")
        return json.loads(body)
    except (http.client.HTTPException, ValueError) as error:
        raise ConnectionError(f"GET {path} was answered with something else than HTTP and JSON") from error
    finally:
        connection.close()


def text(name: bytes) -> str:
    """Bytes that are mostly text, readable in any case."""
    return name.decode("utf-8", "backslashreplace")
