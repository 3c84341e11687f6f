"""The README of the RabbitMQ backend lists what there is: each table is compared with the code that it describes."""

from __future__ import annotations

import re
from typing import Any, Final

import pytest
from pages import code, read_page, tables

from crossdock import plugins
from crossdock.spi import LEVELS, DeadLetter, Message, Priority, Reason, State, Support, urls
from crossdock_rabbitmq import address, crossdock_backend, delays, facts, names, record, topology, wire

PAGE = read_page("backends/rabbitmq/README.md")
TYPES: Final[tuple[address.QueueType, ...]] = ("quorum", "classic")


def test_every_scheme_is_explained_and_known() -> None:
    """The forms of URLs are those that the plugin serves, and core knows what to install for each of them."""
    explained = {text.partition("://")[0] for row in tables(PAGE.section("URLs"))[0] for text in code(row[0])}

    assert explained == {*crossdock_backend().schemes}
    assert {plugins._KNOWN_DISTRIBUTIONS.get(scheme) for scheme in explained} == {"crossdock-rabbitmq"}


def test_every_option_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are those that a URL may have, with their defaults."""
    taken: dict[str, Any] = {}
    take: Any = urls.Options.take

    def note(self: Any, name: str, read: Any, what: str, default: Any) -> Any:
        taken[name] = default
        return take(self, name, read, what, default)

    monkeypatch.setattr(urls.Options, "take", note)
    address.parse("amqps://localhost", {})
    explained = {code(row[0])[0]: row[1] for row in tables(PAGE.section("URLs"))[1]}

    assert {*explained} == {*taken}
    for name in ("timeout", "consumer_timeout"):
        assert float(explained[name]) == taken[name]
    assert (explained["queue_type"], explained["ssl_cert_reqs"]) == (taken["queue_type"], taken["ssl_cert_reqs"])
    assert (explained["ssl_check_hostname"], taken["ssl_check_hostname"]) == ("true", True)


def test_what_amqp_cannot_do_is_what_is_declared() -> None:
    """What the page says cannot be listed, counted or removed is what a Broker declares, on every version and type of queue."""
    said = " ".join(PAGE.section("What AMQP cannot do").split())
    assert "scheduled, ready and leased tasks cannot be listed, and only dead letters can be removed by id" in said
    assert "`stats` without names, and commands that list queues, are refused" in said
    assert "nothing is deduplicated" in said
    for version in ("3.10.8", "4.3.6"):
        for queue_type in TYPES:
            declared = facts.capabilities({"product": "RabbitMQ", "version": version}, queue_type)
            assert declared.listable == declared.removable == {State.DEAD}
            assert declared.list_queues.support is declared.deduplication.support is Support.UNSUPPORTED


def test_everything_that_is_stored_is_explained() -> None:
    """The names of the table are those of the queues and exchanges that are declared; no other name is in it, and none is missing."""
    explained = {text for row in tables(PAGE.section("What is stored"))[0] for text in code(row[0])}
    definitions = [*topology.of_delay("quorum"), *topology.of_queue("NAMESPACE", "QUEUE", "quorum", (4, 3))]
    made = {definition.name for definition in definitions if isinstance(definition, topology.Queue | topology.Exchange)}
    made |= {names.queue_lock("NAMESPACE", "QUEUE"), names.dead_lock("NAMESPACE", "QUEUE")}

    assert {*_spelt_out(explained)} == made


def _spelt_out(explained: set[str]) -> set[str]:
    found: set[str] = set()
    for text in explained:
        if text.startswith(".p"):
            found.add(f"{names.ready('NAMESPACE', 'QUEUE', LEVELS[0]).rpartition('.')[0]}{text}")
        elif text in {"cd.delay.x0", "cd.delay.0"}:
            found |= {f"{text.removesuffix('0')}{level}" for level in range(delays.LEVELS)}
        elif text not in {".x30", f"cd.delay.{delays.LEVELS - 1}"}:
            found.add(text)
    return found


def test_every_header_is_explained() -> None:
    """The headers of a message and of a dead letter that are ours are those that the page names."""
    said = set(re.findall(r"`(cd-[a-z]+)`", PAGE.section("What is stored")))
    message = Message(id="a", queue="q", priority=Priority.HIGH, body=b"", generation=3)
    letter = DeadLetter(message, Reason.POISON, 1, "task", "Error", "fingerprint", b"story")
    written: set[str] = set()
    for properties in (record.properties(message, losses=2), record.letter_properties(letter)):
        _, headers = wire.read_properties(bytes(12) + properties)  # behind class, weight and size
        written |= {name.decode() for name in headers}

    assert said == written
