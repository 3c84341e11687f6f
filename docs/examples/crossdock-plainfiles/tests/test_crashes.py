"""Dying: at each step of each verb by SIGKILL, and what a power loss would leave.

The suite kills processes at some moment. Here a forked process is killed before each system call that changes the disk, one after the
other, and a Store that knows nothing looks at what it left.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crossdock_plainfiles import location, queue
from crossdock_plainfiles.store import NOTHING_SEEN, Store

from crossdock.clock import VirtualClock
from crossdock.spi import (
    LEVELS,
    Ack,
    Dead,
    DeadLetter,
    Delivery,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    Reason,
    Replay,
    State,
)

CALLS = ("mkdir", "open", "write", "pwrite", "fsync", "rename", "unlink", "rmdir")
LANES = [Lane("q", level, 0) for level in LEVELS]


def message(id: str, queue: str = "q", **fields: Any) -> Message:
    return Message(id, queue, Priority.NORMAL, b"body of " + id.encode(), **fields)


def retry(delivery: Delivery) -> Nack:
    return Nack(delivery, 0.0, message(delivery.message.id, generation=1))


def dead(delivery: Delivery) -> Dead:
    return Dead(delivery, DeadLetter(delivery.message, Reason.REJECTED, 1))


class Bench:
    """A folder in which a verb is about to be called: "held1" and "held2" are LEASED, "dead1" and "dead2" DEAD, and so on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = VirtualClock()
        location.claim(folder)
        self.store = self.new_store()
        self.store.declare([QueueSpec("q", dead_max_count=2)])
        self.store.enqueue([message(id) for id in ("dead1", "dead2", "held1", "held2")])
        dead1, dead2, *self.held = self.receive(4)
        self.store.settle([dead(dead1), dead(dead2)])
        self.store.enqueue([message("ready1"), message("ready2"), message("later", delay_ms=1000)])

    def new_store(self) -> Store:
        """A Store that knows nothing, as in a new process."""
        queue.shared.clear()
        return Store(self.folder, "default", self.clock, lambda event: None)

    def receive(self, limit: int) -> Sequence[Delivery]:
        return self.store.receive(LANES, limit, NOTHING_SEEN)[0]

    def receive_overdue(self) -> None:
        self.clock.advance(31)
        self.receive(9)


VERBS: dict[str, Callable[[Bench], object]] = {
    "declare": lambda bench: bench.store.declare([QueueSpec("q", lease=5, dead_max_count=2), QueueSpec("new")]),
    "enqueue": lambda bench: bench.store.enqueue([message("new1"), message("new2", "other"), message("new3", delay_ms=5)]),
    "receive": lambda bench: bench.receive(2),
    "receive what is due or overdue": lambda bench: bench.receive_overdue(),
    "extend": lambda bench: bench.store.extend(bench.held),
    "ack": lambda bench: bench.store.settle([Ack(held) for held in bench.held]),
    "give back": lambda bench: bench.store.settle([Nack(bench.held[0]), Nack(bench.held[1], 5.0)]),
    "retry": lambda bench: bench.store.settle([retry(held) for held in bench.held]),
    "dead-letter beyond the retention": lambda bench: bench.store.settle([dead(held) for held in bench.held]),
    "remove": lambda bench: bench.store.remove("q", State.READY, ["ready1", "ready2"]),
    "purge": lambda bench: bench.store.purge("q", State.DEAD),
    "replay": lambda bench: bench.store.replay("q", [Replay(id, message(id, generation=1)) for id in ("dead1", "dead2")]),
    "replay to another queue": lambda bench: bench.store.replay("q", [Replay("dead1", message("dead1", "other", generation=1))]),
    "erase": lambda bench: bench.store.erase(["q"]),
}


class Seen(NamedTuple):
    """One stored message, as a listing shows it."""

    queue: str
    state: State
    generation: int
    delivery_count: int | None


def look(bench: Bench) -> tuple[dict[str, list[Seen]], int]:
    """What a Store that knows nothing finds: messages by id, and how many letters retention has dropped."""
    store = bench.new_store()
    found: dict[str, list[Seen]] = {}
    stats = store.stats(None)
    for name in [each.queue for each in stats]:
        for state in State:
            for entry in store.peek(name, state, (), None, 1000).entries:
                seen = Seen(name, state, entry.message.generation, entry.delivery_count)
                found.setdefault(entry.message.id, []).append(seen)
    return found, sum(each.dead_dropped or 0 for each in stats)


def die_at(step: int) -> None:
    """Make this process kill itself before its next change of the disk but `step`; of a write, half is done."""
    left = step

    def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal left
            if name == "open" and not args[1] & os.O_CREAT:
                return call(*args, **options)
            if left == 0:
                if name == "write":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **options)

        return counted

    for name in CALLS:
        setattr(os, name, deadly(name, getattr(os, name)))


def killed_at(step: int, bench: Bench, verb: Callable[[Bench], object]) -> bool:
    """Call the verb in a process that dies at this step; False if it had fewer steps."""
    child = os.fork()
    if child == 0:
        die_at(step)
        verb(bench)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def is_between(name: str, was: list[Seen], should_be: list[Seen], now_is: list[Seen]) -> bool:
    """Whether a message may be so while a verb is under way, being neither as it was nor as it should be."""
    match name:
        case "receive what is due or overdue":  # what time has done is a step of its own
            return [each.state for each in now_is] == [State.READY]
        case "replay to another queue":  # stored there, then removed here: for a moment it is in both
            return sorted(now_is, key=str) == sorted(was + should_be, key=str)
        case "dead-letter beyond the retention":  # with one letter stored, one is too many
            return not now_is
        case _:
            return False


def left_over(folder: Path) -> list[Path]:
    """Drafts, and files of one message in one queue beside each other."""
    files = [((path.parents[1], path.name.split(".")[-2]), path) for path in folder.glob("*/*/*/*.json")]
    return [path for message, path in files if path.parent.name == "new" or sum(message == each for each, _ in files) > 1]


@pytest.mark.parametrize("name", VERBS)
def test_killed_at_any_step(name: str, tmp_path: Path) -> None:
    """Each message is as it was or as it should be, no letter is dropped uncounted, nothing half done is left, and all goes on."""
    bench, verb = Bench(tmp_path / "store"), VERBS[name]
    shutil.copytree(bench.folder, tmp_path / "before")
    before, dropped = look(bench)
    assert not killed_at(10_000, bench, verb)
    after, dropped_after = look(bench)

    step = 0
    while True:
        shutil.rmtree(bench.folder)
        shutil.copytree(tmp_path / "before", bench.folder)
        if not killed_at(step, bench, verb):
            break
        step += 1
        found, dropped_now = look(bench)
        for id in before.keys() | after.keys():
            was, should_be, now_is = before.get(id, []), after.get(id, []), found.get(id, [])
            assert now_is in (was, should_be) or is_between(name, was, should_be, now_is), f"{id}, killed before step {step}"
        assert dropped_now - dropped == len(before) - len(found) if dropped_after else dropped_now == 0
        assert name == "erase" or not left_over(bench.folder)

        bench.new_store().enqueue([message("goes-on")])
        assert look(bench)[0]["goes-on"] == [Seen("q", State.READY, 0, 0)]
    assert step > 3


@pytest.mark.parametrize("name", VERBS)
def test_flushed_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is flushed before it is put in place, its directory before the older file goes, and all before the verb returns."""
    bench, verb = Bench(tmp_path / "store"), VERBS[name]
    unflushed: set[Path] = set()
    arrived: set[Path] = set()
    real = {call: getattr(os, call) for call in CALLS}

    def write(file: int, data: bytes) -> int:
        unflushed.add(Path(os.readlink(f"/proc/self/fd/{file}")))
        return real["write"](file, data)

    def fsync(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        unflushed.discard(path)
        arrived.discard(path)
        real["fsync"](file)

    def rename(path: Path, to: Path) -> None:
        assert path not in unflushed
        if path.parent.name == "new":
            arrived.add(to.parent)
        unflushed.update({path.parent, to.parent} if path.parent.name != "new" else {to.parent})
        real["rename"](path, to)

    def unlink(path: Path, **options: Any) -> None:
        if isinstance(path, Path):  # rmtree has names
            assert not arrived, f"{path} goes while {arrived} may be lost"
            unflushed.add(path.parent)
        real["unlink"](path, **options)

    for each in (write, fsync, rename, unlink):
        monkeypatch.setattr(os, each.__name__, each)
    verb(bench)
    assert name == "extend" or not [path for path in unflushed if path.exists()]  # an extension that is lost harms nobody
