"""The README of the Redis backend lists what there is: each table is compared with the code that it describes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pages import ROOT, code, read_page, tables

from crossdock import plugins
from crossdock.spi import Message, Priority, QueueSpec, Survives, urls
from crossdock_redis import address, crossdock_backend, facts, keys, limits, record, scripts

PAGE = read_page("backends/redis/README.md")
LUA = ROOT / "backends" / "redis" / "src" / "crossdock_redis" / "lua"


def test_every_scheme_is_explained_and_known() -> None:
    """The forms of URLs are those that the plugin serves, and core knows what to install for each of them."""
    schemes = {*crossdock_backend().schemes}
    explained = [text.partition("://")[0] for row in tables(PAGE.section("URLs"))[0] for cell in row for text in code(cell)]

    assert {*explained} & schemes == schemes == {*address.SCHEMES}
    assert {plugins._KNOWN_DISTRIBUTIONS.get(scheme) for scheme in schemes} == {"crossdock-redis"}


def test_every_option_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are those that a URL may have, with their defaults."""
    taken: dict[str, Any] = {}
    take: Any = urls.Options.take

    def note(self: Any, name: str, read: Any, what: str, default: Any) -> Any:
        taken[name] = default
        return take(self, name, read, what, default)

    monkeypatch.setattr(urls.Options, "take", note)
    address.parse("rediss://localhost", {})
    explained = {code(row[0])[0]: row[1] for row in tables(PAGE.section("URLs"))[1]}

    assert {*explained} == {*taken}
    for name in ("timeout", "protocol", "wait_replicas", "wait_timeout"):
        assert float(explained[name]) == float(taken[name])
    for name in ("sentinel_username", "sentinel_password", "ssl_certfile"):
        assert (explained[name], bool(taken[name])) == ("none", False)
    assert (explained["db"], explained["ssl_check_hostname"], explained["ssl_cert_reqs"]) == ("0", "true", "required")
    assert (taken["ssl_check_hostname"], taken["ssl_cert_reqs"]) == (True, "required")


SERVERS: dict[str, tuple[dict[str, str], str]] = {
    "`appendonly no`": ({"aof_enabled": "0"}, ""),
    "`appendfsync no`": ({"aof_enabled": "1"}, "no"),
    "`appendfsync everysec`": ({"aof_enabled": "1"}, "everysec"),
    "`appendfsync always`": ({"aof_enabled": "1"}, "always"),
    "`wait_replicas`": ({"aof_enabled": "0", "connected_slaves": "2"}, ""),
}
"""Servers of the table, by what tells them apart: fields of INFO, and appendfsync."""


def test_durability_is_what_the_backend_reports() -> None:
    """A row says "kept" of the faults that a Broker on such a server declares to survive, and of no others."""
    rows = tables(PAGE.section("Durability"))[0]
    assert len(rows) == len(SERVERS)
    for (word, (info, fsync)), row in zip(SERVERS.items(), rows, strict=True):
        assert word in row[0]
        options = {"wait_replicas": "2"} if word == "`wait_replicas`" else {}
        told = facts.Facts("Redis", "7.0", 0, 0.0, info, {"appendfsync": fsync})
        survives, _ = facts.durability(told, address.parse("redis://localhost", options))
        said = {fault for fault, cell in zip(Survives, row[1:], strict=True) if cell.startswith("kept")}
        assert said == survives, row[0]


def test_every_key_is_explained() -> None:
    """The keys are those that `keys.py` explains, in its order, and the fixed ones are among them."""
    explained = [code(row[0]) for row in tables(PAGE.section("What is stored"))[0]]
    names = re.findall(r"^    (\S+(?: r\d| w\d)*) +(?:hash|list|zset|set|string) ", keys.__doc__ or "", re.MULTILINE)

    assert explained == [each.split() for each in names]
    fixed = [key.removeprefix("p:") for key in keys.fixed("p:")]
    assert {*fixed} == {name for row in explained for name in row if "<" not in name}
    assert f"`{keys.prefix('NAMESPACE', 'QUEUE')}`" in PAGE.text
    assert f"`{keys.registry('NAMESPACE')}`" in PAGE.text


def test_fields_of_a_queue_are_explained() -> None:
    """Every field that the scripts read or write in `q` is named in its row."""
    (row,) = [row for row in tables(PAGE.section("What is stored"))[0] if row[0] == "`q`"]
    used: set[str] = set()
    for file in LUA.glob("*.lua"):
        for arguments in re.findall(r"'H(?:GET|MGET|INCRBY|SET|DEL)', \w+ \.\. 'q', ([^)]*)", file.read_text("utf-8")):
            used |= {*re.findall(r"'(\w+)'", arguments)}
    used |= {*re.findall(r"'(\w+)'", (LUA / "declare.lua").read_text("utf-8").partition("fields = ")[2].splitlines()[0])}

    assert {name.removesuffix("<level>") for name in code(row[2])} == used
    assert "lease_ms" in used


def test_a_value_is_as_the_table_says() -> None:
    """A value that was packed has each field at the bytes that the page gives it."""
    message = Message(id="a", queue="q", priority=Priority.HIGH, body=b"body", generation=2**32 - 1)
    value = record.pack(message, due_ms=1_700_000_000_000, now_ms=0)
    fields = [[int(number) for number in row[0].split("-")] for row in tables(PAGE.section("What is stored"))[1]]
    parts = [value[field[0] - 1 : field[-1]] for field in fields]

    assert parts[0] == b"6"
    assert [int.from_bytes(part) for part in parts[1:]] == [1, 0, 2**32 - 1, 1_700_000_000_000]
    assert value[fields[-1][-1] :] == b"body"


def test_every_script_is_explained() -> None:
    """Each script has its paragraph, and is a file."""
    explained = re.findall(r"^- \*\*`(\w+)\.lua`\*\*", PAGE.section("How messages flow"), re.MULTILINE)

    assert sorted(explained) == sorted(scripts.NEEDS)
    assert {file.stem for file in LUA.glob("*.lua")} == {*explained, "common", "time", "place"}


def test_limits_are_the_code_s() -> None:
    """The numbers of the last section, and the lease that a queue has by itself."""
    assert (limits.MAX_BODY, limits.BATCH, limits.BATCH_BYTES) == (16 * 2**20, 1000, 8 * 2**20)
    for text in ("16 MiB", "1,000 messages", "8 MiB", "a thousand years"):
        assert text in PAGE.section("Limits").replace("\n", " ")
    assert f"{facts.OLDEST[0]}.{facts.OLDEST[1]} or later" in PAGE.text
    assert QueueSpec("q").lease == 30.0
