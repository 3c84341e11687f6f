"""`crossdock dlq`."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from crossdock import codec
from crossdock.backends.memory import MemoryBroker
from crossdock.clock import VirtualClock
from crossdock.errors import BrokerUnavailable
from crossdock.spi import Broker, Dead, DeadLetter, Lane, Priority, Reason, State
from crossdock_cli.options import read_rate
from crossdock_cli.selection import Pace

MINUTE_MS = 60_000
DIED_MS = 1_767_225_660_000  # 2026-01-01T00:01:00Z
MANY = [f"n{number:03}" for number in range(450)]  # more than two pages


def fill(store: Any) -> None:
    """Four dead letters in two queues."""
    store.kill("a1", queue="emails", task="shop.send", arguments={"to": "x", "n": 1}, error=TimeoutError("slow"), died_ms=DIED_MS)
    store.kill("a2", queue="emails", task="shop.send", arguments={"to": "y"}, died_ms=DIED_MS + MINUTE_MS)
    store.kill(
        "a3", queue="emails", task="shop.bill", reason=Reason.REJECTED, error=LookupError("gone"), died_ms=DIED_MS + 2 * MINUTE_MS
    )
    store.kill("b1", queue="images", task="img.resize", error=asyncio.InvalidStateError("odd"), died_ms=DIED_MS)


def ids(result: Any) -> list[str]:
    """Ids of a listing."""
    return [each["id"] for each in result.json]


# --- list -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list", "ls"])
def test_list_shows_every_letter(run: Any, store: Any, name: str) -> None:
    """Queue by queue, in order of dying, with what matters at a glance."""
    fill(store)
    result = run("dlq", name)
    rows = [line.split() for line in result.out.splitlines()]
    assert rows[0] == ["ID", "QUEUE", "TASK", "REASON", "ATTEMPT", "DIED", "ERROR"]
    assert [row[0] for row in rows[1:]] == ["a1", "a2", "a3", "b1"]
    assert rows[1][1:5] == ["emails", "shop.send", "attempts_exhausted", "1"]
    assert rows[1][-2:] == ["TimeoutError:", "slow"]
    assert (result.code, result.err) == (0, "")


def test_list_as_json(run: Any, store: Any) -> None:
    """The documented shape."""
    fill(store)
    first = run("dlq", "list", "--json").json[0]
    assert {**first, "fingerprint": ""} == {
        "id": "a1",
        "queue": "emails",
        "task": "shop.send",
        "reason": "attempts_exhausted",
        "error_type": "TimeoutError",
        "text": "slow",
        "fingerprint": "",
        "died_ms": DIED_MS,
        "attempt": 1,
        "replays": 0,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--queue", "images"], ["b1"]),
        (["-q", "images", "-q", "emails"], ["b1", "a1", "a2", "a3"]),
        (["--task", "shop.send"], ["a1", "a2"]),
        (["--task", "shop.*"], ["a1", "a2", "a3"]),
        (["--task", "send"], []),
        (["--reason", "rejected"], ["a3"]),
        (["--reason", "rejected", "--reason", "poison"], ["a3"]),
        (["--error", "TimeoutError"], ["a1"]),
        (["--error", "asyncio.exceptions.InvalidStateError"], ["b1"]),
        (["--error", "InvalidStateError"], ["b1"]),
        (["--error", "*Error", "--queue", "images"], ["b1"]),
        (["--since", "2026-01-01T00:02:00Z"], ["a2", "a3"]),
        (["--until", "2026-01-01T00:02:00Z"], ["a1", "b1"]),
        (["--since", "1m"], []),
        (["--id", "a2", "--id", "b1"], ["a2", "b1"]),
        (["--id", "a2", "--task", "shop.bill"], []),
        (["--task", "shop.*", "--error", "*Error", "--reason", "attempts_exhausted", "--since", "2026-01-01T00:02:00Z"], ["a2"]),
        (["--limit", "2"], ["a1", "a2"]),
        (["--limit", "0"], ["a1", "a2", "a3", "b1"]),
    ],
)
def test_filters_combine(run: Any, store: Any, options: list[str], expected: list[str]) -> None:
    """Each filter alone, and together: all must hold."""
    fill(store)
    assert ids(run("dlq", "list", "--json", *options)) == expected


def test_a_limit_that_hides_something_is_told(run: Any, store: Any) -> None:
    """Beside the data; and not told when nothing is hidden."""
    fill(store)
    assert run("dlq", "list", "--limit", "3").err == "the first 3 are shown; --limit shows more\n"
    assert run("dlq", "list", "--limit", "4").err == ""


def test_long_listings_are_whole(run: Any, store: Any) -> None:
    """More letters than a page holds: each once."""
    store.kill(*MANY)
    assert ids(run("dlq", "list", "--limit", "0", "--json")) == MANY


def test_nothing_dead(run: Any, url: str) -> None:
    """An empty list, said beside the data."""
    assert run("dlq", "list") == (0, "", "there are no such dead letters\n")
    assert run("dlq", "list", "--json") == (0, "[]\n", "")


# --- show -----------------------------------------------------------------------------------------


def test_show_tells_the_whole_story(run: Any, store: Any) -> None:
    """Reason, error, traceback, attempts, arguments and headers."""
    fill(store)
    shown = run("dlq", "show", "a1")
    assert shown.code == 0
    for part in (
        "reason       attempts_exhausted",
        "died         2026-01-01 00:01:00+00:00",
        '    to = "x"\n    n = 1',
        "    h: 1",
        "    1  2026-01-01 00:01:00+00:00  TimeoutError: slow",
        "    Traceback (most recent call last):",
        "    TimeoutError: slow",
    ):
        assert part in shown.out


def test_show_as_json(run: Any, store: Any) -> None:
    """The documented shape."""
    fill(store)
    shown = run("dlq", "show", "a1", "--json").json
    assert shown["arguments"] == {"to": "x", "n": 1}
    assert shown["headers"] == {"h": "1"}
    assert shown["attempts"] == [{"attempt": 1, "at_ms": DIED_MS, "error_type": "TimeoutError", "text": "slow", "worker": "w1"}]
    assert "TimeoutError: slow" in shown["traceback"]
    assert (shown["generation"], shown["priority"], shown["undecodable"], shown["body_base64"]) == (0, "normal", None, None)


def test_show_of_a_body_that_is_no_envelope(run: Any, store: Any) -> None:
    """It says why, and gives the bytes."""
    store.kill("raw", body=b"\xff\x00", reason=Reason.UNDECODABLE)
    shown = run("dlq", "show", "raw", "--json").json
    assert shown["arguments"] is None
    assert "no envelope" in shown["undecodable"]
    assert shown["body_base64"] == "/wA="
    assert "/wA=" in run("dlq", "show", "raw").out


def test_show_of_an_unknown_id(run: Any, store: Any) -> None:
    """One sentence that names it."""
    fill(store)
    assert run("dlq", "show", "zz") == (1, "", "error: there is no dead letter 'zz'\n")
    assert run("dlq", "show", "a1", "--queue", "images") == (1, "", "error: there is no dead letter 'a1' in queue images\n")


def test_show_of_an_id_in_two_queues(run: Any, store: Any) -> None:
    """It asks which is meant."""
    store.kill("twin", queue="emails")
    store.kill("twin", queue="images")
    assert run("dlq", "show", "twin").err == "error: 'twin' is dead in several queues, emails, images: say which by --queue\n"
    assert run("dlq", "show", "twin", "-q", "images", "--json").json["queue"] == "images"


# --- replay ---------------------------------------------------------------------------------------


def test_replay_by_id(run: Any, store: Any) -> None:
    """The letter is gone, the task ready again, in its queue, with its arguments."""
    fill(store)
    assert run("dlq", "replay", "a1", "b1") == (0, "2 dead letters replayed\n", "")
    assert store.arguments("emails", "a1") == {"to": "x", "n": 1}
    assert "b1" in store.entries("images", State.READY)
    assert set(store.entries("emails", State.DEAD)) == {"a2", "a3"}


def test_replay_by_filter_to_another_queue_with_other_arguments(run: Any, store: Any) -> None:
    """`--set` changes what it names, JSON where it is JSON; `--to` moves."""
    fill(store)
    options = ("--task", "shop.send", "--to", "fixed", "--set", "to=z@example.com", "--set", "n=2")
    assert run("dlq", "replay", *options, "--json").json == {"selected": 2, "replayed": 2, "failed": [], "dry_run": False}
    assert store.arguments("fixed", "a1") == {"to": "z@example.com", "n": 2}
    assert store.arguments("fixed", "a2") == {"to": "z@example.com", "n": 2}
    replayed = store.entries("fixed", State.READY)["a1"].message
    assert replayed.generation == 1
    assert codec.decode(replayed.body).attempt == 1


def test_replay_dry_run_changes_nothing(run: Any, store: Any) -> None:
    """It shows what it would take."""
    fill(store)
    result = run("dlq", "replay", "--queue", "emails", "--dry-run")
    assert result.out.splitlines()[-1] == "3 dead letters would be replayed"
    assert "a2" in result.out
    shown = run("dlq", "replay", "--all", "--dry-run", "--json")
    assert shown.json == {"selected": 4, "replayed": 0, "failed": [], "dry_run": True}
    assert len(store.entries("emails", State.DEAD)) == 3


def test_replay_all(run: Any, store: Any) -> None:
    """Every queue; and a limit takes the first to die."""
    fill(store)
    assert run("dlq", "replay", "--all", "--limit", "2").out == "2 dead letters replayed\n"
    assert set(store.entries("emails", State.READY)) == {"a1", "a2"}
    assert run("dlq", "replay", "--all").out == "2 dead letters replayed\n"
    assert run("dlq", "list", "--json").json == []


def test_replay_of_more_than_a_page(run: Any, store: Any) -> None:
    """Replaying while listing misses none and takes none twice."""
    store.kill(*MANY)
    assert run("dlq", "replay", "--all", "--json").json["replayed"] == 450
    assert len(store.entries("default", State.READY)) == 450


def test_what_dies_again_meanwhile_is_not_replayed_again(run: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that fails as fast as it is replayed would otherwise keep the command busy for ever."""
    store.kill(*MANY)
    whole, replayed = MemoryBroker.replay, []

    async def fails_at_once(self: MemoryBroker, queue: str, replays: Any) -> Any:
        refusals = await whole(self, queue, replays)
        replayed.extend(replay.id for replay in replays)
        assert len(replayed) <= len(MANY)
        for delivery in await self.receive([Lane(queue, Priority.NORMAL, len(replays))], len(replays), 0):
            letter = DeadLetter(delivery.message, Reason.REJECTED, died_ms=DIED_MS * 2)
            await self.settle([Dead(delivery, letter)])
        return refusals

    monkeypatch.setattr(MemoryBroker, "replay", fails_at_once)
    assert run("dlq", "replay", "--all").out == "450 dead letters replayed\n"
    assert replayed == MANY
    assert len(store.entries("default", State.DEAD)) == len(MANY)


@pytest.mark.parametrize("command", ["replay", "discard"])
def test_an_unknown_id_fails_and_the_others_are_done(run: Any, store: Any, command: str) -> None:
    """It is named, and the exit code is 1."""
    fill(store)
    result = run("dlq", command, "a1", "zz")
    assert result == (
        1,
        f"1 dead letter {command}ed\n",
        "error: zz: there is no such dead letter\n",
    )
    shown = run("dlq", command, "zz", "--json")
    assert shown.code == 1
    assert shown.json["failed"] == [{"id": "zz", "queue": None, "error": "there is no such dead letter"}]


@pytest.mark.parametrize("command", ["replay", "discard"])
@pytest.mark.parametrize("options", [(), ("--limit", "1"), ("--dry-run",)])
def test_nothing_chosen_is_wrong_use(run: Any, store: Any, command: str, options: tuple[str, ...]) -> None:
    """Neither ids nor filters nor `--all`: nothing happens."""
    fill(store)
    result = run("dlq", command, *options)
    assert result == (2, "", "error: say which dead letters are meant: ids, filters such as --queue or --task, or --all\n")


def test_arguments_of_a_raw_body_cannot_be_changed(run: Any, store: Any) -> None:
    """It is told for that letter, which stays; the others go. Unchanged it can be replayed."""
    fill(store)
    store.kill("raw", queue="emails", body=b"\xff", reason=Reason.UNDECODABLE)
    result = run("dlq", "replay", "raw", "a1", "--set", "n=5")
    assert (result.code, result.out) == (1, "1 dead letter replayed\n")
    assert result.err.startswith("error: raw: its arguments cannot be changed: the body is no envelope")
    assert run("dlq", "replay", "raw").code == 0
    assert "raw" in store.entries("emails", State.READY)


def test_a_replay_that_breaks_off_tells_how_far_it_came(run: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it can be run again for the others."""
    store.kill(*MANY)
    whole, calls = MemoryBroker.replay, []

    async def broken(self: Broker, queue: str, replays: Any) -> Any:
        calls.append(len(replays))
        if len(calls) == 2:
            raise BrokerUnavailable("the server went away")
        return await whole(self, queue, replays)  # type: ignore[arg-type]

    monkeypatch.setattr(MemoryBroker, "replay", broken)
    result = run("dlq", "replay", "--all")
    assert (result.code, result.out) == (1, "")
    assert result.err == "200 dead letters replayed before this; run it again for the others\nerror: the server went away\n"


# --- rate -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"), [("100", 100), ("100/s", 100), ("90/m", 1.5), ("7200/h", 2), ("500/10s", 50), ("0.5/s", 0.5)]
)
def test_rates_are_read(text: str, rate: float) -> None:
    """Items per second, minute, hour or any period."""
    assert read_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", "fast", "0", "-1/s", "1/", "/s", "1/fortnight", "1/0s", "1/s/s", "1" * 400])
def test_what_is_no_rate_is_wrong_use(run: Any, url: str, text: str) -> None:
    """With the form."""
    result = run("dlq", "replay", "--all", "--rate", text)
    assert result.code == 2
    assert "write it like 100/s, 10/m or 500/h" in result.err or "no duration" in result.err


@pytest.mark.asyncio
async def test_the_rate_is_kept() -> None:
    """So many per second, in small steps; the first at once."""
    clock = VirtualClock()
    pace = Pace(50.0, clock)
    assert pace.batch == 5
    assert Pace(0.1, clock).batch == 1
    at: list[float] = []

    async def go() -> None:
        for _ in range(5):
            await pace.wait(pace.batch)
            at.append(clock.monotonic())

    going = asyncio.ensure_future(go())
    while not going.done():
        await asyncio.sleep(0)
        if (seconds := clock.next_wakeup()) is not None:
            clock.advance(seconds)
    assert at == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


# --- discard --------------------------------------------------------------------------------------


def test_discard_by_id_does_not_ask(run: Any, store: Any) -> None:
    """Who names each one means it."""
    fill(store)
    assert run("dlq", "discard", "a1") == (0, "1 dead letter discarded\n", "")
    assert set(store.entries("emails", State.DEAD)) == {"a2", "a3"}
    assert store.entries("emails", State.READY) == {}


def test_discard_of_many_needs_leave(run: Any, store: Any) -> None:
    """Without a terminal only `--yes` deletes; with one the answer decides."""
    fill(store)
    result = run("dlq", "discard", "--all")
    assert result.code == 2
    assert "Discard 4 dead letters for good? Nobody can be asked here: give --yes" in result.err
    assert run("dlq", "discard", "--all", stdin="no\n").code == 1
    assert len(run("dlq", "list", "--json").json) == 4
    assert run("dlq", "discard", "--queue", "emails", stdin="yes\n").out == "3 dead letters discarded\n"
    assert run("dlq", "discard", "--all", "-y", "--json").json == {"selected": 1, "discarded": 1, "failed": [], "dry_run": False}


def test_discard_dry_run_changes_nothing(run: Any, store: Any) -> None:
    """It shows what it would take, and does not ask."""
    fill(store)
    result = run("dlq", "discard", "--task", "shop.*", "--dry-run")
    assert (result.code, result.out.splitlines()[-1]) == (0, "3 dead letters would be discarded")
    assert len(store.entries("emails", State.DEAD)) == 3


def test_what_dies_after_the_question_is_not_discarded(run: Any, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was counted is deleted."""
    fill(store)

    def answer(question: str, *, yes: bool) -> None:
        store.kill("late", queue="emails")

    monkeypatch.setattr("crossdock_cli.dlq.confirm", answer)
    assert run("dlq", "discard", "--all").out == "4 dead letters discarded\n"
    assert set(store.entries("emails", State.DEAD)) == {"late"}
