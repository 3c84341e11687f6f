"""Which servers a test run must have, and which it did not get.

CROSSDOCK_REQUIRE is a list of kinds, such as `redis,nats,rabbitmq`: a test that needs one of these and finds none fails, where it
is skipped otherwise. With a version, `redis:7.0`, it is that version that must be there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from crossdock_conformance.servers.errors import ServerNotFound
from crossdock_conformance.servers.versions import matches


def required() -> frozenset[str]:
    """The entries of CROSSDOCK_REQUIRE, in lower case: kinds, and kinds with a version behind a colon."""
    entries = (entry.strip().lower() for entry in os.environ.get("CROSSDOCK_REQUIRE", "").split(","))
    return frozenset(filter(None, entries))


def is_required(missing: ServerNotFound) -> bool:
    """Whether a test that missed this server fails rather than being skipped.

    A kind that is required without a version is there if any of its versions is; a test for another version is then skipped.
    """
    for entry in required():
        kind, _, version = entry.partition(":")
        if kind == missing.kind and (
            missing.version is None or not missing.found or (version != "" and matches(missing.version, version))
        ):
            return True
    return False


class NotRun:
    """The servers that tests asked for and did not get, in one test run."""

    def __init__(self) -> None:
        self._why: dict[tuple[str, str], str] = {}

    def add(self, missing: ServerNotFound) -> None:
        """Note one."""
        self._why[missing.kind, missing.version or ""] = str(missing)

    def add_entries(self, entries: Iterable[tuple[str, str, str]]) -> None:
        """Note those of another process."""
        self._why.update({(kind, version): why for kind, version, why in entries})

    def entries(self) -> list[tuple[str, str, str]]:
        """Kind, version asked for (empty for any) and the reason, of each; sorted."""
        return [(*server, why) for server, why in sorted(self._why.items())]
