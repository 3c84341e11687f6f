"""Worker processes on one SQLite file: killed, frozen, stopped, supervised. Judged by histories that the tasks themselves write."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from crossdock import App, WorkerOptions
from crossdock.spi import Priority, QueueStats
from crossdock.task import Outgoing

APP = Path(__file__).parent / "apps" / "history.py"
WITHOUT_UVLOOP = Path(__file__).parent / "apps" / "without_uvloop"
"""A folder that hides uvloop from a Python that is told to look there first."""
LEASE = 2.0
SWEEP = 0.5
DEADLINE = 45.0


class Line(NamedTuple):
    """One line of a history."""

    seconds: float
    event: str
    fields: tuple[str, ...]


class Site:
    """A folder with a SQLite file, worker processes and their histories."""

    def __init__(self, folder: Path, loop: str = "asyncio") -> None:
        self.folder = folder
        self.loop = loop
        self.url = f"sqlite:///{folder}/tasks.db"
        self.processes: list[subprocess.Popen[bytes]] = []

    def enqueue(self, task: str, *calls: dict[str, object]) -> None:
        """Store calls."""
        outgoing = [
            Outgoing(task, msgspec.msgpack.encode(call), f"{task}-{number}", "default", Priority.NORMAL)
            for number, call in enumerate(calls)
        ]

        async def store() -> None:
            async with App(self.url) as app:
                await app.enqueue_many(outgoing)

        asyncio.run(store())

    def start(self, processes: int = 1, *, kill_at: str = "", burst: bool = False, grace: float = 30.0) -> subprocess.Popen[bytes]:
        """Start a worker, or a supervisor of several."""
        script = "import sys, msgspec; from crossdock import supervisor, WorkerOptions\n"
        script += "options = msgspec.json.decode(sys.argv[2], type=WorkerOptions)\n"
        script += "sys.exit(supervisor.run(sys.argv[1], options, int(sys.argv[3])))"
        options = msgspec.json.encode(WorkerOptions(burst=burst, grace=grace)).decode()
        environment = {
            **os.environ,
            "CROSSDOCK_URL": self.url,
            "HISTORY": str(self.folder),
            "LEASE": str(LEASE),
            "KILL_AT": kill_at,
            "PYTHONPATH": str(WITHOUT_UVLOOP) if self.loop == "asyncio" else "",
        }
        log = (self.folder / "log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-c", script, f"{APP}:app", options, str(processes)],
            env=environment,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        log.close()
        self.processes.append(process)
        return process

    def history(self) -> list[Line]:
        """All lines of all processes in true order: CLOCK_MONOTONIC is one for all processes of a host."""
        lines = []
        for file in self.folder.glob("*.history"):
            *complete, _ = file.read_text().split("\n")  # what comes after the last line end is still being written
            for text in complete:
                at, event, *fields = text.split()
                lines.append(Line(int(at) / 1e9, event, tuple(fields)))
        return sorted(lines)

    def count(self, event: str) -> int:
        """Lines of one kind."""
        return sum(line.event == event for line in self.history())

    def stats(self) -> QueueStats:
        """How the queue stands."""

        async def look() -> QueueStats:
            broker = App(self.url).make_broker()
            await broker.open()
            try:
                return (await broker.stats(["default"]))[0]
            finally:
                await broker.close()

        return asyncio.run(look())

    def log(self) -> str:
        """What the workers logged."""
        return (self.folder / "log").read_text()

    def until(self, fact: Callable[[], bool]) -> None:
        """Return when `fact` holds; fail after a deadline."""
        end = time.monotonic() + DEADLINE
        while not fact():
            assert time.monotonic() < end, f"not in time; the log says:\n{self.log()}"
            time.sleep(0.02)

    def children(self, supervisor: subprocess.Popen[bytes]) -> list[int]:
        """Process ids of a supervisor's children."""
        return [int(pid) for pid in Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()]


@pytest.fixture(params=["asyncio", "uvloop"])
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A fresh site, for each event loop; whatever still runs at the end is killed."""
    with _clean(Site(tmp_path, request.param)) as site:
        yield site


@contextmanager
def _clean(site: Site) -> Iterator[Site]:
    try:
        yield site
    finally:
        for process in site.processes:
            family = site.children(process) if process.poll() is None else []
            for pid in [process.pid, *family]:
                if process.poll() is None or pid in family:
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def test_uvloop_is_used_where_it_is_installed(site: Site) -> None:
    """Both loops of a worker are uvloop's if that can be imported, and asyncio's if not."""
    site.enqueue("loops", {})
    assert site.start(burst=True).wait(DEADLINE) == 0
    (line,) = (line for line in site.history() if line.event == "loops")
    assert {name.split(".")[0] for name in line.fields} == {site.loop}


@pytest.mark.parametrize("phase", ["received", "running", "finished"])
def test_a_killed_worker_loses_nothing(site: Site, phase: str) -> None:
    """Of 2,000 tasks and two workers, one killed in this phase: all end, every second run has a higher delivery count, and the dead
    worker's tasks start elsewhere within lease + sweep."""
    site.enqueue("work", *({"number": number} for number in range(2000)))
    site.start(kill_at=phase)
    site.start(kill_at=phase)
    site.until(lambda: len({line.fields[0] for line in site.history() if line.event == "end"}) == 2000)
    site.until(lambda: (stats := site.stats()).leased == 0 and stats.ready == 0)

    history = site.history()
    (killed_at,) = (line.seconds for line in history if line.event == "kill")
    starts = defaultdict(list)
    for line in history:
        if line.event == "start":
            starts[line.fields[0]].append(line)
    again = {number: lines for number, lines in starts.items() if len(lines) > 1}
    assert len(starts) == 2000
    assert all([int(line.fields[2]) for line in lines] == [1, 2] for lines in again.values())
    assert all(line.fields[1] == "1" for line in history if line.event == "start"), "a crash spends no attempt"
    # What had ended frees its slot while its ack is under way, so up to as many again may have been begun.
    assert len(again) <= 200, "no more than what the killed worker held, and the endings under way, run again"
    taken_over = [line.seconds - killed_at for lines in starts.values() for line in lines if line.fields[2] == "2"]
    assert taken_over, "the killed worker held something"
    assert max(taken_over) <= LEASE + SWEEP + 2, "a busy machine may be late; a lease that nobody looks after is later"


def test_a_frozen_worker_loses_its_leases_and_settles_nothing(site: Site) -> None:
    """A worker stopped by SIGSTOP beyond its lease loses its tasks to another; when it wakes, its late endings are refused."""
    site.enqueue("hold", *({"number": number, "seconds": 0.5} for number in range(20)))
    frozen = site.start()
    site.until(lambda: site.count("start") == 20)
    frozen.send_signal(signal.SIGSTOP)
    site.start()
    site.until(lambda: site.count("end") == 20 and site.count("start") == 40)
    frozen.send_signal(signal.SIGCONT)
    site.until(lambda: (stats := site.stats()).leased == 0 and stats.ready == 0)
    frozen.send_signal(signal.SIGTERM)
    assert frozen.wait(DEADLINE) == 0
    assert "lease" in site.log()


def test_sigterm_finishes_short_tasks_and_returns_long_ones(site: Site) -> None:
    """SIGTERM: tasks that end in the grace period end; the others go back unspent at once; the exit code is 0."""
    calls = [{"number": number, "seconds": 0.3 if number < 5 else 600.0} for number in range(10)]
    site.enqueue("hold", *calls)
    worker = site.start(grace=1.0)
    site.until(lambda: site.count("start") == 10)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE) == 0
    stats = site.stats()
    assert (site.count("end"), stats.ready, stats.leased) == (5, 5, 0)

    site.start()
    site.until(lambda: site.count("start") == 15)
    assert {line.fields[1:] for line in site.history() if line.event == "start"} == {("1", "1")}, (
        "neither attempt nor delivery was spent"
    )


def test_a_second_sigterm_does_not_wait(site: Site) -> None:
    """The second SIGTERM ends a long grace period, also when a thread cannot be stopped."""
    site.enqueue("stubborn", {"number": 1})
    site.enqueue("hold", {"number": 1, "seconds": 600.0})
    worker = site.start(grace=3600.0)
    site.until(lambda: site.count("start") == 2)
    worker.send_signal(signal.SIGTERM)
    site.until(lambda: "again to stop at once" in site.log())
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE) == 0
    stats = site.stats()
    assert (stats.ready, stats.leased) == (2, 0)


def test_a_supervisor_restarts_a_killed_process(site: Site) -> None:
    """With two processes, one killed: it is started again, its tasks are taken over, and SIGTERM ends all with exit code 0."""
    supervisor = site.start(processes=2)
    site.until(lambda: site.log().count("tasks, queues") == 2)
    victim = site.children(supervisor)[0]
    os.kill(victim, signal.SIGKILL)
    site.until(lambda: site.log().count("tasks, queues") == 3)
    assert "killed by SIGKILL" in site.log()
    assert victim not in site.children(supervisor)
    site.enqueue("work", *({"number": number} for number in range(200)))
    site.until(lambda: site.count("end") == 200)
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(DEADLINE) == 0


def test_children_end_when_their_supervisor_is_killed(site: Site) -> None:
    """A killed supervisor leaves no worker behind: each notices and shuts down."""
    supervisor = site.start(processes=2)
    site.until(lambda: site.log().count("tasks, queues") == 2)
    children = site.children(supervisor)
    supervisor.kill()
    supervisor.wait()
    site.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert site.log().count("the supervisor is gone") == 2


def test_burst_processes_end_by_themselves(site: Site) -> None:
    """Two burst processes work a queue off together and exit 0."""
    site.enqueue("work", *({"number": number} for number in range(500)))
    supervisor = site.start(processes=2, burst=True)
    assert supervisor.wait(DEADLINE) == 0
    ended = [line.fields[0] for line in site.history() if line.event == "end"]
    assert sorted(ended, key=int) == [str(number) for number in range(500)]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_wrong_app_is_one_line_and_exit_code_2(tmp_path: Path, processes: int) -> None:
    """An App that does not exist: one line on standard error, no traceback, exit code 2."""
    script = "import sys; from crossdock import supervisor, WorkerOptions\n"
    script += f"sys.exit(supervisor.run('nowhere:app', WorkerOptions(), {processes}))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere" in done.stderr


def test_a_handler_that_swallows_its_cancellation_does_not_keep_the_process(site: Site) -> None:
    """An async handler that ignores timeout and shutdown: SIGTERM still ends the process, with the task given back."""
    site.enqueue("deaf", {"number": 1})
    worker = site.start(grace=0.5)
    site.until(lambda: site.count("start") == 1)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE) == 0
    assert "1 handlers still run" in site.log()
    assert (site.stats().ready, site.stats().leased) == (1, 0)


def test_sync_handlers_may_enqueue_and_the_worker_still_ends_well(site: Site) -> None:
    """The sync twins' connection, opened by a handler, is closed with the worker; the exit code is 0."""
    site.enqueue("relay", *({"number": number} for number in range(20)))
    worker = site.start()
    site.until(lambda: site.count("end") == 20)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(DEADLINE) == 0
    assert not (site.folder / "tasks.db-wal").exists(), "the last connection was closed"
