"""The README of the NATS backend lists what there is: each table is compared with the code that it describes."""

from __future__ import annotations

from typing import Any

import pytest
from pages import code, read_page, tables

from crossdock.spi import State, Survives, urls
from crossdock_nats import address, crossdock_backend, facts, names, topology

PAGE = read_page("backends/nats/README.md")


def test_every_scheme_is_explained() -> None:
    """The forms of URLs are those that the plugin serves."""
    explained = {text.partition("://")[0] for row in tables(PAGE.section("URLs"))[0] for text in code(row[0])}

    assert explained == {*crossdock_backend().schemes}


def test_every_option_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are those that a URL may have, with their defaults."""
    taken: dict[str, Any] = {}
    take: Any = urls.Options.take

    def note(self: Any, name: str, read: Any, what: str, default: Any) -> Any:
        taken[name] = default
        return take(self, name, read, what, default)

    monkeypatch.setattr(urls.Options, "take", note)
    address.parse("nats://localhost", {})
    explained = {name: row[1] for row in tables(PAGE.section("URLs"))[1] for name in code(row[0])}

    assert {*explained} == {*taken}
    assert float(explained["replicas"]) == taken["replicas"]
    assert float(explained["timeout"]) == taken["timeout"]
    assert (explained["storage"], explained["inbox"]) == (taken["storage"], taken["inbox"])


@pytest.mark.parametrize(
    ("url", "survives"),
    [
        ("nats://h", {Survives.PROCESS}),
        ("nats://h?replicas=3", set(Survives)),
        ("nats://h?storage=memory", set[Survives]()),
    ],
)
def test_durability_is_what_the_backend_reports(url: str, survives: set[Survives]) -> None:
    """What the table promises is what a Broker declares."""
    options = dict(part.split("=") for part in url.partition("?")[2].split("&") if part)
    declared = facts.capabilities("2.15.1", 1024 * 1024, address.parse(url.partition("?")[0], options))

    assert declared.survives == survives


def test_versions_are_as_the_backend_declares() -> None:
    """What older servers cannot do, by the table, is what a Broker on one declares."""
    columns = {"2.9.10": 1, "2.10.0": 1, "2.11.3": 2, "2.12.0": 3, "2.15.1": 3}
    rows = tables(PAGE.section("Versions"))[0]
    for version, column in columns.items():
        declared = facts.capabilities(version, 1024 * 1024, address.parse("nats://h", {}))
        assert ("own schedules" in rows[0][column]) == topology.Features.of(version).schedules
        assert (rows[2][column] == "yes") == (State.READY in declared.removable)


def test_subjects_are_as_they_are_told() -> None:
    """The subjects of the table are those that messages are stored under."""
    told = [code(row[0]) for row in tables(PAGE.section("What is stored"))[0]]
    subjects = names.Subjects("NAMESPACE", "QUEUE", "LIFE", keyed=True)

    assert told[0][0].encode() == subjects.level(9, "ID")
    assert told[1][0].replace("MS", "5").encode() == subjects.keyed_place(names.SCHEDULED, "ID", 5)
    assert told[2][0].replace("MS", "5").encode() == subjects.keyed_place(names.DEAD, "ID", 5)
