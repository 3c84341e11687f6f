"""`crossdock backend`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

PLUGIN = """
from crossdock.backends.memory import MemoryBroker
from crossdock.errors import BrokerUnavailable
from crossdock.spi import Blocked, BackendPlugin, ClockSkew, Connected, hookimpl

class Down(MemoryBroker):
    def __init__(self, settings):
        self.report = settings.report

    async def open(self):
        raise BrokerUnavailable("nobody listens at host:1")

class Troubled(MemoryBroker):
    def __init__(self, settings):
        import msgspec
        super().__init__(msgspec.structs.replace(settings, url="memory://troubled", options={}))
        self.report = settings.report
        self.host = settings.url.partition("://")[2]

    async def open(self):
        import msgspec
        await super().open()
        if self.host == "forgetful":
            self.capabilities = msgspec.structs.replace(self.capabilities, clock="broker", durability_note="Nothing is on disk.")
            return
        self.report(Connected())
        self.report(ClockSkew(-2.5))
        self.report(Blocked("disk is full"))

def create(settings):
    return (Down if settings.url.startswith("down") else Troubled)(settings)

@hookimpl
def crossdock_backend():
    return BackendPlugin(name="Fake", api_version=1, schemes=("down", "troubled"), create=create, example_url="down://host")
"""

_numbers = itertools.count()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """An installed distribution with two backends that have troubles, and one that cannot be loaded."""
    module = f"fake_backend_{next(_numbers)}"
    site = tmp_path / "site"
    info = site / "crossdock_fake-1.2.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: crossdock-fake\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[crossdock.backends]\ndown = {module}\ntroubled = {module}\nbroken = no_such_driver\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize("name", ["list", "ls"])
def test_list_shows_installed_backends(run: Any, fake: None, name: str) -> None:
    """Good ones as a table, bad ones with the reason beside it."""
    result = run("backend", name)
    rows = {line.split()[0]: line.split() for line in result.out.splitlines()}
    assert rows["memory"][1:] == ["memory", "crossdock-core", "0.1.0", "memory://"]
    assert rows["down"][1:] == ["Fake", "crossdock-fake", "1.2", "down://host"]
    assert rows["broken"][1] == "-"
    assert "error: the plugin no_such_driver of crossdock-fake 1.2 cannot be imported" in result.err
    assert result.code == 0


def test_list_as_json(run: Any, fake: None) -> None:
    """The documented shape."""
    listed = {each["scheme"]: each for each in run("backend", "list", "--json").json}
    assert set(listed["down"]) == {"scheme", "entry_point", "distribution", "version", "name", "example_url", "error"}
    assert listed["down"]["error"] is None
    assert "no_such_driver" in listed["broken"]["error"]


def test_doctor_tells_what_a_broker_promises(run: Any, url: str) -> None:
    """Server, durability and every capability, with notes."""
    result = run("backend", "doctor", url)
    assert (result.code, result.err) == (0, "")
    assert "is memory Python" in result.out.splitlines()[0]
    rows = {line.split()[0]: line for line in result.out.splitlines()[2:]}
    assert "survives nothing" in rows["durability"]
    assert "end with it" in rows["durability"]
    assert "native" in rows["fencing"]
    assert "no " in rows["signals"]
    assert "scheduled, ready, dead" in rows["removable"]
    assert {"clock", "takeover", "delay_longest", "deduplication_window", "by_id", "listable", "purgeable", "max_body"} <= set(rows)


def test_doctor_as_json(run: Any, url: str) -> None:
    """The documented shape; the broker may come from the environment."""
    report = run("backend", "doctor", "--json").json
    assert set(report) == {"url", "opened", "seconds", "problems", "capabilities"}
    assert (report["opened"], report["problems"]) == (True, [])
    assert report["capabilities"]["fencing"]["support"] == "native"
    assert report["capabilities"]["listable"] == ["dead", "leased", "ready", "scheduled"]


def test_doctor_tells_problems(run: Any, fake: None) -> None:
    """What the broker reports while it opens, as sentences; good news is not a problem."""
    result = run("backend", "doctor", "troubled://host")
    assert result.code == 0
    assert result.err.splitlines() == [
        "the server's clock is 2.500 s behind this machine's",
        "the server takes no messages: disk is full",
    ]
    assert run("backend", "doctor", "troubled://host", "--json").json["problems"] == result.err.splitlines()


def test_doctor_tells_that_a_server_forgets(run: Any, fake: None) -> None:
    """A server that loses what it was given when its process is killed has a problem, with its own words on it."""
    result = run("backend", "doctor", "troubled://forgetful")
    assert result.code == 0
    assert result.err.splitlines() == ["what is enqueued does not survive a kill of the server: Nothing is on disk."]


def test_doctor_of_a_broker_that_is_not_there(run: Any, fake: None) -> None:
    """One sentence, exit code 1, and no secret."""
    assert run("backend", "doctor", "down://u:secret@host") == (1, "", "error: nobody listens at host:1\n")
    shown = run("backend", "doctor", "down://u:secret@host", "--json")
    assert shown.code == 1
    assert (shown.json["opened"], shown.json["problems"]) == (False, ["nobody listens at host:1"])
    assert shown.json["capabilities"] is None
    assert "secret" not in shown.out + shown.err


def test_every_command_tells_that_the_broker_is_not_there(run: Any, fake: None) -> None:
    """One sentence, exit code 1."""
    for command in (["queue", "list"], ["queue", "show", "x"], ["dlq", "list"], ["dlq", "replay", "--all"], ["dlq", "show", "x"]):
        result = run(*command, "--url", "down://u:secret@host")
        assert (result.code, result.out) == (1, "")
        assert "nobody listens at host:1" in result.err.splitlines()[-1]
        assert "secret" not in result.err
