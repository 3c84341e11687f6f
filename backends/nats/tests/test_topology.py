"""Streams and consumers as data, and what a server's version and the way streams are kept let a Broker promise."""

from __future__ import annotations

import pytest

from crossdock.spi import QueueSpec, State, Support, Survives
from crossdock_nats import facts, topology
from crossdock_nats.address import parse


@pytest.mark.parametrize(
    ("version", "schedules", "pauses", "ghosts"),
    [
        ("2.9.10", False, False, True),
        ("2.10.29", False, False, True),
        ("2.11.0", False, True, True),
        ("2.12.0-RC.3", True, True, True),
        ("3.0.1", True, True, False),
        ("what it is called next", False, False, True),
    ],
)
def test_features_go_by_the_version(version: str, schedules: bool, pauses: bool, ghosts: bool) -> None:
    """What a server can do is told by its number, and never by whether it took a setting: old ones take what they do not know."""
    features = topology.Features.of(version)
    assert (features.schedules, features.pauses, features.leaves_ghosts) == (schedules, pauses, ghosts)


@pytest.mark.parametrize(
    ("options", "version", "survives", "says"),
    [
        (
            {},
            "2.15.1",
            frozenset({Survives.PROCESS}),
            "last two minutes, which is the default sync_interval of the server: set sync_interval: always",
        ),
        (dict[str, str](), "2.9.10", frozenset({Survives.PROCESS}), "NATS 2.10 can sync always"),
        (
            {"replicas": "3"},
            "2.15.1",
            frozenset({Survives.PROCESS, Survives.POWER, Survives.NODE}),
            "a majority has a message before it is answered",
        ),
        ({"storage": "memory"}, "2.15.1", frozenset[Survives](), "what a server holds is gone when its process ends"),
    ],
)
def test_what_stored_messages_survive(options: dict[str, str], version: str, survives: frozenset[Survives], says: str) -> None:
    """A Broker says what its streams survive, and where something is lost what to set."""
    told, note = facts.durability(topology.Features.of(version), parse("nats://h", options))
    assert told == survives
    assert says in note


def test_what_old_versions_cannot_do() -> None:
    """Below 2.11 ready messages cannot be removed, below 2.12 due times and ids are looked after by Brokers: it is declared so."""
    told = {version: facts.capabilities(version, 1024 * 1024, parse("nats://h", {})) for version in ("2.9.10", "2.11.0", "2.12.0")}
    assert [State.READY in each.removable for each in told.values()] == [False, True, True]
    assert [each.delay.support for each in told.values()] == [Support.EMULATED, Support.EMULATED, Support.NATIVE]
    assert [each.deduplication.support for each in told.values()] == [Support.EMULATED, Support.EMULATED, Support.NATIVE]


def test_settings_in_a_description() -> None:
    """A queue's settings are read from a stream's description as they were written; one that somebody rewrote means the defaults."""
    spec = QueueSpec("q", lease=2.5, max_ready=7, dead_max_age=3600.0, dead_max_count=0)
    assert topology.read_spec("q", topology.write_spec(spec)) == spec
    assert topology.read_spec("q", topology.write_spec(QueueSpec("q"))) == QueueSpec("q")
    assert topology.read_spec("q", "my queue lease=long") == QueueSpec("q")
