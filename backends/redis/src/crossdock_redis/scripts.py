"""The Lua scripts: loaded from their files, called by their digest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from importlib.resources import files
from typing import Final


@dataclass(frozen=True)
class Script:
    """One script as the server knows it."""

    name: str
    text: str
    digest: str


_ALL: Final = ("common", "time", "place")
NEEDS: Final = {
    "enqueue": ("common",),
    "enqueue_one": ("common",),
    "store": _ALL,
    "cycle": ("common", "time"),
    "extend": ("common",),
    "declare": ("common",),
    "stats": _ALL,
    "remove": _ALL,
    "purge": _ALL,
    "replay": _ALL,
    "peek": _ALL,
    "erase": ("common", "time"),
}
"""Each script, and the files that are put before it. A function that is not needed costs time at each call all the same."""


def _load(name: str) -> Script:
    folder = files("crossdock_redis") / "lua"
    text = "\n".join((folder / f"{part}.lua").read_text("utf-8") for part in (*NEEDS[name], name))
    return Script(name, text, sha1(text.encode()).hexdigest())


@cache
def by_digest() -> dict[str, Script]:
    """Every script, by its digest."""
    return {script.digest: script for script in map(_load, NEEDS)}


@cache
def digest(name: str) -> str:
    """What EVALSHA calls a script by."""
    return next(script.digest for script in by_digest().values() if script.name == name)
