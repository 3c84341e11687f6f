"""What the server's refusals mean. Pure."""

from __future__ import annotations

import re
from typing import Final

_CODE: Final = re.compile(r"([A-Z]{3,})\b")
_INSIDE: Final = re.compile(r"-([A-Z]{3,}) ")
"""Before 7.0 a script's error is told as `ERR Error running script (...): ... -OOM command not allowed ...`."""

LATER: Final = frozenset({"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "MOVED", "ASK", "BUSY"})
"""Nothing was done; the same request will be, elsewhere or in a moment."""
ELSEWHERE: Final = frozenset({"READONLY", "MASTERDOWN", "CLUSTERDOWN", "MOVED", "ASK"})
"""Of these, those after which to find out anew who serves."""
BLOCKED: Final = frozenset({"OOM", "MISCONF", "NOREPLICAS"})
"""Nothing was stored: the server takes no writes."""
_FORBIDDEN: Final = frozenset({"NOPERM", "NOAUTH", "WRONGPASS", "DENIED", "MAXCLIENTS"})
_ADVICE: Final = {
    "OOM": "it has used its maxmemory: raise that, or work the queues off",
    "MISCONF": "it cannot save its data to disk: look at its log",
    "NOREPLICAS": "fewer replicas are connected than its min-replicas-to-write asks for",
    "NOPERM": "the user lacks a permission: crossdock-redis' README lists what is needed",
    "NOAUTH": "it wants a password: put user and password into the URL",
    "WRONGPASS": "user or password in the URL are wrong",
    "DENIED": "it is in protected mode: give it a password, or have it listen where only we are",
    "MAXCLIENTS": "it has as many connections as its maxclients allows: raise that, or use fewer processes",
    "LOADING": "it has just started and reads its data: it will serve in a moment",
}


class ServerError(Exception):
    """An error that the server answered."""

    @property
    def code(self) -> str:
        """The word that says which error it is, such as `OOM`; `ERR` where there is no special one."""
        text = str(self)
        found = _CODE.match(text)
        word = found[1] if found else "ERR"
        if word == "ERR":
            inside = _INSIDE.search(text)
            if inside:
                return inside[1]
            if "ACL failure" in text or "can't run this command" in text or "can't access" in text:
                return "NOPERM"
            if "invalid password" in text or "without any password configured" in text:
                return "WRONGPASS"
            if "max number of clients" in text:
                return "MAXCLIENTS"
        return word


def is_forbidden(error: ServerError) -> bool:
    """Whether it is about who we are and what we may, or the server has no place for us."""
    return error.code in _FORBIDDEN


def is_certain(error: ServerError) -> bool:
    """Whether the server surely changed nothing: it refused to begin, or its refusals come before a script's first write."""
    return error.code in BLOCKED or str(error).startswith(tuple(_FORBIDDEN))


def explain(error: ServerError) -> str:
    """A sentence's end: what the server said and what to do."""
    advice = _ADVICE.get(error.code)
    return f"it answered {str(error)!r}" + (f"; {advice}" if advice else "")
