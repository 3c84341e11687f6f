"""`crossdock queue`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from crossdock.backends.memory import MemoryBroker
from crossdock.errors import UnsupportedCapability
from crossdock.spi import QueueStats, State

FAR_MS = 4_102_444_800_000  # the year 2100


def fill(store: Any) -> None:
    """Two ready, one scheduled and one dead message in `emails`, one ready in `images`."""
    store.kill("dead1", queue="emails")
    store.enqueue("m1", "emails", task="shop.send")
    store.enqueue("m2", "emails", body=b"\xff\xff")
    store.enqueue("m3", "emails", eta_ms=FAR_MS)
    store.enqueue("m4", "images")


@pytest.mark.parametrize("name", ["list", "ls"])
def test_list_counts_by_state(run: Any, store: Any, name: str) -> None:
    """Every queue with its numbers; `ls` is the same command."""
    fill(store)
    result = run("queue", name)
    lines = [line.split() for line in result.out.splitlines()]
    assert lines[0] == ["QUEUE", "READY", "SCHEDULED", "LEASED", "DEAD", "OLDEST", "WORKERS"]
    assert [line[:5] for line in lines[1:]] == [["emails", "2", "1", "0", "1"], ["images", "1", "0", "0", "0"]]
    assert (result.code, result.err) == (0, "")


def test_list_as_json(run: Any, store: Any) -> None:
    """The documented shape, and nothing else on standard output."""
    fill(store)
    emails, images = run("queue", "list", "--json").json
    assert set(emails) == {"queue", "ready", "scheduled", "leased", "dead", "oldest_ready_age", "consumers", "dead_dropped"}
    assert (emails["queue"], emails["ready"], emails["scheduled"], emails["dead"]) == ("emails", 2, 1, 1)
    assert images["queue"] == "images"


def test_list_of_nothing(run: Any, url: str) -> None:
    """An empty namespace is an empty list, said beside the data."""
    assert run("queue", "list") == (0, "", "there are no queues in this namespace yet\n")
    assert run("queue", "list", "--json") == (0, "[]\n", "")


def test_list_of_some(run: Any, store: Any) -> None:
    """Queues can be named; a misspelt one is refused with the nearest."""
    fill(store)
    assert [each["queue"] for each in run("queue", "list", "images", "--json").json] == ["images"]
    result = run("queue", "list", "image")
    assert result == (1, "", "error: there is no queue 'image' in this namespace; did you mean 'images'?\n")


def test_list_where_queues_have_no_names(run: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that cannot tell its queues is asked for those that are named; without a name the error says how to give one."""
    ask = MemoryBroker.stats

    async def stats(self: MemoryBroker, queues: Sequence[str] | None = None) -> Sequence[QueueStats]:
        if queues is None:
            raise UnsupportedCapability("it cannot name its queues")
        return await ask(self, queues)

    fill(store)
    monkeypatch.setattr(MemoryBroker, "stats", stats)
    assert [each["queue"] for each in run("queue", "list", "images", "--json").json] == ["images"]
    for command in ("queue", "dlq"):
        result = run(command, "list")
        assert (result.code, result.out) == (1, "")
        how = "name those that you mean, as in `crossdock queue list NAME` and `crossdock dlq list --queue NAME`"
        assert result.err == f"error: it cannot name its queues; {how}\n"


def test_show_lists_the_first_messages(run: Any, store: Any) -> None:
    """Numbers, then messages by state, a body that is no envelope among them."""
    fill(store)
    result = run("queue", "show", "emails")
    assert result.code == 0
    rows = {line.split()[0]: line.split() for line in result.out.splitlines() if line}
    assert rows["m1"][1:4] == ["ready", "shop.send", "normal"]
    assert rows["m2"][1:3] == ["ready", "(undecodable)"]
    assert rows["m3"][1] == "scheduled"
    assert rows["dead1"][1] == "dead"


def test_show_as_json(run: Any, store: Any) -> None:
    """The documented shape."""
    fill(store)
    shown = run("queue", "show", "emails", "--json").json
    assert shown["stats"]["ready"] == 2
    assert shown["entries"][0] == {
        "id": "m1",
        "state": "ready",
        "task": "shop.send",
        "priority": "normal",
        "attempt": 1,
        "delivery_count": shown["entries"][0]["delivery_count"],
        "enqueued_ms": 1_767_225_600_000,
        "eta_ms": None,
    }
    assert [entry["id"] for entry in shown["entries"]] == ["m1", "m2", "m3", "dead1"]
    assert shown["entries"][2]["eta_ms"] == FAR_MS


def test_show_is_limited(run: Any, store: Any) -> None:
    """`--limit` is per state; 0 shows the numbers alone."""
    fill(store)
    assert [each["id"] for each in run("queue", "show", "emails", "--limit", "1", "--json").json["entries"]] == [
        "m1",
        "m3",
        "dead1",
    ]
    assert run("queue", "show", "emails", "--limit", "0", "--json").json["entries"] == []


def test_purge_deletes_one_state(run: Any, store: Any) -> None:
    """Only the state that was named, and only that queue."""
    fill(store)
    assert run("queue", "purge", "emails", "--yes") == (0, "deleted 2 ready messages of queue 'emails'\n", "")
    assert run("queue", "purge", "emails", "--state", "scheduled", "-y", "--json").json == {
        "queue": "emails",
        "state": "scheduled",
        "purged": 1,
        "dry_run": False,
    }
    assert list(store.entries("emails", State.DEAD)) == ["dead1"]
    assert list(store.entries("images", State.READY)) == ["m4"]


def test_purge_dry_run_changes_nothing(run: Any, store: Any) -> None:
    """It counts, and needs no leave."""
    fill(store)
    assert run("queue", "purge", "emails", "--dry-run") == (0, "would delete 2 ready messages of queue 'emails'\n", "")
    assert run("queue", "purge", "emails", "--dry-run", "--json").json["purged"] == 2
    assert len(store.entries("emails", State.READY)) == 2


def test_purge_needs_leave(run: Any, store: Any) -> None:
    """Where nobody can be asked, only `--yes` deletes; at a terminal the answer decides."""
    fill(store)
    result = run("queue", "purge", "emails")
    assert result.code == 2
    assert "Delete 2 ready messages of queue 'emails'? Nobody can be asked here: give --yes" in result.err
    refused = run("queue", "purge", "emails", stdin="\n")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err == "Delete 2 ready messages of queue 'emails'? [y/N] nothing was changed\n"
    assert len(store.entries("emails", State.READY)) == 2
    assert run("queue", "purge", "emails", stdin="y\n").code == 0
    assert store.entries("emails", State.READY) == {}


def test_purge_never_takes_leased_ones(run: Any, store: Any) -> None:
    """`leased` is no state to purge, nor is a word that is none."""
    fill(store)
    for state in ("leased", "rdy"):
        result = run("queue", "purge", "emails", "--state", state, "--yes")
        assert result.code == 2
        assert f"'{state}' is not one of ready, scheduled, dead" in result.err
