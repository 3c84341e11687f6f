"""What a server tells of its own work: processor, memory, keys, and the time that each script took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from crossdock_conformance.servers.redis_server import Connection
from crossdock_redis.scripts import by_digest

_SLOW_US = 100
_SLOW_ENTRIES = 20_000
_FREED_WITHIN = 30.0
_ANSWER_WITHIN = 60.0


class Calls(NamedTuple):
    """The script calls of a while."""

    number: int
    mean_ms: float
    longest_ms: Mapping[str, float]
    """By script; one that never took as long as 0.1 ms is not there."""
    above_2_ms: int


class Observed:
    """One server, asked through a connection of its own.

    Args:
        url: `redis://` or `rediss://`.

    Raises:
        OSError: It does not answer.
        ServerFailed: It answers with an error. All methods raise these two.
    """

    def __init__(self, url: str) -> None:
        self._connection = Connection(url, _ANSWER_WITHIN)
        self._database = urlsplit(url).path.strip("/") or "0"
        told = self._info("server")
        self.title = f"Valkey {told['valkey_version']}" if "valkey_version" in told else f"Redis {told['redis_version']}"
        self.title += f", appendonly {'yes' if self._info('persistence')['aof_enabled'] == '1' else 'no'}"

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        told = self._info("cpu")
        return float(told["used_cpu_user"]) + float(told["used_cpu_sys"])

    def memory(self) -> int:
        """Bytes that it has allocated for everything, once it has freed what was deleted."""
        deadline = time.monotonic() + _FREED_WITHIN
        while (told := self._info("memory"))["lazyfree_pending_objects"] != "0" and time.monotonic() < deadline:
            time.sleep(0.02)
        return int(told["used_memory"])

    def key_names(self) -> list[str]:
        """The names of all keys of the URL's database, sorted."""
        return sorted(self._connection.keys(self._database))

    @contextmanager
    def calls(self) -> Iterator[list[Calls]]:
        """Observe the script calls of a `with` block; afterwards the list has its one item. Empties the server's slow log."""
        settings = {"slowlog-log-slower-than": _SLOW_US, "slowlog-max-len": _SLOW_ENTRIES}
        before = {name: self._connection.call("CONFIG", "GET", name)[1].decode() for name in settings}
        for name, value in settings.items():
            self._connection.call("CONFIG", "SET", name, str(value))
        self._connection.call("SLOWLOG", "RESET")
        number, micros = self._evalsha()
        observed: list[Calls] = []
        try:
            yield observed
            number_after, micros_after = self._evalsha()
            slow = [(_script(entry[3]), entry[2] / 1e3) for entry in self._connection.call("SLOWLOG", "GET", str(_SLOW_ENTRIES))]
            scripts = sorted((name, ms) for name, ms in slow if name)  # so that the longest of each comes last
            mean_ms = (micros_after - micros) / max(1, number_after - number) / 1e3
            observed.append(Calls(number_after - number, mean_ms, dict(scripts), sum(ms > 2 for _, ms in scripts)))
        finally:
            self._connection.call("SLOWLOG", "RESET")
            for name, value in before.items():
                self._connection.call("CONFIG", "SET", name, value)

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def _info(self, section: str) -> dict[str, str]:
        lines = self._connection.call("INFO", section).decode().splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def _evalsha(self) -> tuple[int, int]:
        """How many calls of scripts there were, and the microseconds that they took."""
        told = self._info("commandstats").get("cmdstat_evalsha", "calls=0,usec=0")
        fields = dict(field.split("=") for field in told.split(","))
        return int(fields["calls"]), int(fields["usec"])


def _script(command: list[bytes]) -> str:
    """Which script a command calls; empty if none."""
    if command[0].upper() != b"EVALSHA":
        return ""
    digest = command[1].decode()
    script = by_digest().get(digest)
    return script.name if script else digest
