"""Management: what AMQP does not tell and RabbitMQ's management plugin does, where the broker URL names it (option `management`).

The plugin counts every few seconds (`collect_statistics_interval` of the server, 5 s unless it is set), so what it tells is that old.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from http.client import HTTPException
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import HTTPSHandler, OpenerDirector, ProxyHandler, Request, build_opener

from crossdock_rabbitmq.address import Address

_log = logging.getLogger("crossdock.broker")
_WHY: Final = {
    401: "it refuses the user and password",
    403: "this user has none of the tags management, monitoring and administrator",
    404: "this user may not look into the virtual host, or there is no management plugin at that address",
}


class Management:
    """The plugin of one server, asked by HTTP.

    Args:
        address: Names it, and who we are there if it does not say that itself.
    """

    def __init__(self, address: Address) -> None:
        assert address.management is not None
        parts = urlsplit(address.management)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        login = f"{unquote(user)}:{unquote(password)}" if user else f"{address.user}:{address.password}"
        self._shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._request = Request(
            f"{self._shown}{parts.path.rstrip('/')}/api/queues/{quote(address.vhost, safe='')}?columns=name,messages_unacknowledged",
            headers={"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"},
        )
        # No proxy, as on the way to the broker itself.
        self._opener: OpenerDirector = build_opener(
            ProxyHandler({}), HTTPSHandler(context=address.tls.context if address.tls else None)
        )
        self._timeout = address.timeout
        self._told = False

    async def unacked(self) -> dict[str, int] | None:
        """By name of the server's queue, how many of its messages are handed out; None, logged once, if the plugin does not tell."""
        try:
            found = await asyncio.to_thread(self._ask)
            counts = {str(queue["name"]): int(queue.get("messages_unacknowledged", 0)) for queue in found}
        except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
            self._tell(error)
            return None
        self._told = False
        return counts

    def _ask(self) -> Any:
        with self._opener.open(self._request, timeout=self._timeout) as answer:
            return json.load(answer)

    def _tell(self, error: Exception) -> None:
        match error:
            case HTTPError():
                why = _WHY.get(error.code, f"it answers {error.code}")
                error.close()
            case URLError():
                why = f"it cannot be reached: {error.reason}"
            case OSError():
                why = f"it cannot be reached: {error}"
            case _:
                why = "what it answers is not what the management plugin answers"
        if not self._told:
            self._told = True
            _log.warning("RabbitMQ's management at %s does not tell how many tasks are leased: %s.", self._shown, why)
