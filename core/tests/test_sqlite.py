"""What is special about the SQLite backend: its file, its neighbours in other processes, its disk and its thread.

What it shares with every backend is in the conformance suite.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from crossdock.backends.sqlite import database, desk, location, schema, tables
from crossdock.backends.sqlite.broker import SqliteBroker
from crossdock.backends.sqlite.engine import Engine
from crossdock.backends.sqlite.store import Store
from crossdock.backends.sqlite.watch import Watch
from crossdock.clock import SystemClock, VirtualClock
from crossdock.errors import (
    BrokerClosed,
    BrokerUnavailable,
    ConfigurationError,
    EnqueueFailed,
    EnqueueUnknown,
    LeaseLost,
    QueueFull,
    SettleUnknown,
)
from crossdock.spi import (
    LEVELS,
    Ack,
    BrokerSettings,
    Clock,
    Connected,
    Dead,
    DeadLetter,
    Delivery,
    Disconnected,
    Lane,
    Message,
    Nack,
    Priority,
    QueueSpec,
    Reason,
    Refusal,
    Replay,
    State,
    StateLost,
    Survives,
)

PATIENCE = 20.0
"""Real seconds after which a test gives up waiting for something that must happen."""

LANES = [Lane("q", level, 10) for level in LEVELS]


def build(file: Path, clock: Clock | None = None, events: list[Any] | None = None, **options: Any) -> SqliteBroker:
    """A Broker on a file, not open yet."""
    settings = BrokerSettings(
        url=f"sqlite:///{file}",
        clock=clock or SystemClock(),
        report=(lambda event: None) if events is None else events.append,
        options=options,
    )
    return SqliteBroker(settings)


@asynccontextmanager
async def opened(
    file: Path, clock: Clock | None = None, events: list[Any] | None = None, **options: Any
) -> AsyncGenerator[Any, None]:
    """An open Broker, closed afterwards."""
    broker = build(file, clock, events, **options)
    await broker.open()
    try:
        yield broker
    finally:
        await broker.close()


def message(id: str, queue: str = "q", body: bytes = b"body", **fields: Any) -> Message:
    return Message(id, queue, Priority.NORMAL, body, **fields)


async def take(broker: SqliteBroker, limit: int = 100, wait: float = 0.0) -> list[Delivery]:
    return list(await broker.receive(LANES, limit, wait))


async def ready(broker: SqliteBroker) -> list[str]:
    page = await broker.peek("q", State.READY, limit=1000)
    return [entry.message.id for entry in page.entries]


async def inside(broker: SqliteBroker, run: Callable[[Store], Any]) -> Any:
    """Do something in the Broker's thread, in a transaction."""
    engine = broker._engine
    assert isinstance(engine, Engine)
    return await engine.call(run)


async def pragma(broker: SqliteBroker, name: str) -> Any:
    return await inside(broker, lambda store: store.database.execute(f"PRAGMA {name}").fetchone()[0])


async def together(*verbs: Awaitable[Any]) -> list[Any]:
    """Ask for several things at once; what is raised is among the results."""
    return [*await asyncio.gather(*verbs, return_exceptions=True)]


async def until(fact: Callable[[], bool]) -> None:
    """Wait for a fact."""
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.005)


def errors(refusals: Sequence[Refusal]) -> dict[int, type[Exception]]:
    return {refusal.index: type(refusal.error) for refusal in refusals}


def check_integrity(file: Path) -> None:
    """The file is sound, and each message is in exactly one state, as the figures say."""
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        everywhere = " UNION ALL ".join(f"SELECT message, queue, '{state.value}' AS state FROM {state.value}" for state in State)
        keys = [key for (key,) in connection.execute(f"SELECT message FROM ({everywhere}) ORDER BY 1")]
        assert keys == [key for (key,) in connection.execute("SELECT key FROM message ORDER BY 1")]
        for row in connection.execute("SELECT id, ready, scheduled, leased, dead FROM queue"):
            sql = f"SELECT state, count(*) FROM ({everywhere}) WHERE queue = ? GROUP BY state"
            counted = dict(connection.execute(sql, (row[0],)).fetchall())
            assert [counted.get(state, 0) for state in ("ready", "scheduled", "leased", "dead")] == list(row[1:])
    connection.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def read_link(number: str) -> str:
    """What a file descriptor of this process refers to; "" if it is no longer there."""
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return ""


def log_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


PRELUDE = """
import asyncio, os, resource, signal, sys
from pathlib import Path
from crossdock.backends.sqlite.broker import SqliteBroker
from crossdock.clock import SystemClock
from crossdock.spi import *
file = Path(sys.argv[1])
LANES = [Lane("q", level, 10) for level in LEVELS]
def build():
    return SqliteBroker(BrokerSettings(url=f"sqlite:///{file}", clock=SystemClock()))
def message(id):
    return Message(id, "q", Priority.NORMAL, b"body of " + id.encode())
"""


@contextmanager
def process(program: str, *arguments: object) -> Generator[subprocess.Popen[str], None, None]:
    """Another Python process with `PRELUDE` and a program; ended when the block is left."""
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def outcome(child: subprocess.Popen[str]) -> list[str]:
    """The lines a process printed, once it has ended well."""
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, err) == (0, "")
    return out.splitlines()


# --- the URL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///tasks.db", "tasks.db"),
        ("sqlite:///data/tasks.db", "data/tasks.db"),
        ("sqlite:////var/tasks.db", "/var/tasks.db"),
        ("sqlite:///a%20b%23%3F.db", "a b#?.db"),
    ],
)
def test_url_names_a_file(url: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes and a relative path, or four for an absolute one, percent-decoded; relative to the folder of the moment."""
    monkeypatch.chdir(tmp_path)
    assert location.parse(url, {}) == (tmp_path / path, "full")


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://tasks.db",
        "sqlite://host/tasks.db",
        "sqlite:///a.db#b",
        "sqlite:///a/",
        "sqlite:///a%00b",
    ],
)
def test_url_without_a_file(url: str) -> None:
    """A URL that names no file is refused with the form it should have."""
    with pytest.raises(ConfigurationError, match=r"sqlite:///relative\.db"):
        location.parse(url, {})


def test_memory_database_is_refused() -> None:
    """SQLite's own memory database would be another one for each Broker; the text names what to use."""
    with pytest.raises(ConfigurationError, match="memory://"):
        location.parse("sqlite:///:memory:", {})


@pytest.mark.parametrize("options", [{"durability": "none"}, {"durability": ""}, {"journal": "wal"}])
def test_options(options: dict[str, str]) -> None:
    """Unknown options and values are refused, and the known ones named."""
    assert location.parse("sqlite:///a.db", {"durability": "relaxed"}).durability == "relaxed"
    with pytest.raises(ConfigurationError, match=r"durability.*full.*relaxed"):
        location.parse("sqlite:///a.db", options)


# --- the file and its folder ----------------------------------------------------------------------------


async def refusal_of(file: Path) -> str:
    """Why a file cannot be opened; nothing may be left open by the attempt."""
    before = threading.active_count()
    broker = build(file)
    with pytest.raises(ConfigurationError) as raised:
        await broker.open()
    assert threading.active_count() == before
    with pytest.raises(BrokerClosed):
        await broker.stats()
    text = str(raised.value)
    assert str(file) in text
    assert "\n" not in text
    return text


@pytest.mark.asyncio
async def test_bad_places(tmp_path: Path) -> None:
    """What cannot be a store is refused with one sentence that says why."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "fifo")
    assert "does not exist; create it" in await refusal_of(tmp_path / "missing" / "a.db")
    assert "it is a folder" in await refusal_of(tmp_path / "folder")
    assert "is not a folder" in await refusal_of(tmp_path / "file" / "a.db")
    assert "not a regular file" in await refusal_of(tmp_path / "fifo")
    assert "file name too long" in await refusal_of(tmp_path / ("x" * 300))


@pytest.mark.asyncio
async def test_folder_that_everybody_writes(tmp_path: Path) -> None:
    """Where anybody could replace the file there is no store; the sticky bit, as on /tmp, makes it safe."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    assert "chmod o-w" in await refusal_of(folder / "a.db")
    folder.chmod(0o1777)
    async with opened(folder / "a.db"):
        pass


@pytest.mark.parametrize(("mode", "text"), [(0o555, "read-only"), (0o666, "read-only")])
def test_read_only_folder(tmp_path: Path, mode: int, text: str) -> None:
    """A folder that this user may not write is refused; the superuser, who may, tests it as somebody else."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for parent in [*tmp_path.parents][:-1]:
        if parent.stat().st_uid == os.getuid():
            parent.chmod(parent.stat().st_mode | 0o055)
    tmp_path.chmod(0o755)
    folder.chmod(mode & ~0o002)
    program = """
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            asyncio.run(build().open())
        except Exception as error:
            print(type(error).__name__, error)
    """
    with process(program, folder / "a.db") as child:
        (line,) = outcome(child)
    folder.chmod(0o755)
    assert line.startswith("ConfigurationError")
    assert text in line


@pytest.mark.parametrize("system", ["nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "ext4", "btrfs", "tmpfs", "overlay"])
def test_network_file_systems(tmp_path: Path, system: str) -> None:
    """A folder on a network file system is refused, a local one is not."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"20 1 254:0 / / rw - ext4 /dev/vda rw\n21 20 0:9 / {tmp_path} rw,relatime shared:1 - {system} host:/x rw\n")
    if system in {"ext4", "btrfs", "tmpfs", "overlay"}:
        location.prepare(tmp_path / "a.db", mounts)
    else:
        with pytest.raises(ConfigurationError, match=re.escape(f"network file system ({system})")):
            location.prepare(tmp_path / "a.db", mounts)
        assert not (tmp_path / "a.db").exists()


def test_mount_table(tmp_path: Path) -> None:
    """The deepest mount counts, of two on one point the later, and octal escapes are read; without a table nothing is known."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "20 1 254:0 / / rw - ext4 /dev/vda rw\n"
        "21 20 0:9 / /mnt/a\\040b rw - nfs host:/x rw\n"
        "22 21 0:9 / /mnt/a\\040b/c rw - tmpfs tmpfs rw\n"
        "23 20 0:9 / /srv rw - nfs host:/x rw\n"
        "24 23 0:9 / /srv rw - xfs /dev/vdb rw\n"
    )
    found = {
        folder: location.file_system_of(Path(folder), mounts) for folder in ("/mnt", "/mnt/a b", "/mnt/a b/c/d", "/srv/x", "/srvx")
    }
    assert found == {"/mnt": "ext4", "/mnt/a b": "nfs", "/mnt/a b/c/d": "tmpfs", "/srv/x": "xfs", "/srvx": "ext4"}
    assert location.file_system_of(Path("/"), tmp_path / "none") is None


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
@pytest.mark.asyncio
async def test_file_mode(tmp_path: Path, umask: int) -> None:
    """The file and those beside it are for their owner only, whatever the umask."""
    old = os.umask(umask)
    try:
        async with opened(tmp_path / "a.db") as broker:
            await broker.enqueue([message("m")])
            found = modes(tmp_path)
    finally:
        os.umask(old)
    assert found == dict.fromkeys(("a.db", "a.db-wal", "a.db-shm"), 0o600)


@pytest.mark.asyncio
async def test_existing_mode_is_left(tmp_path: Path) -> None:
    """Who shares a store with a group on purpose may do so."""
    file = tmp_path / "a.db"
    async with opened(file):
        pass
    file.chmod(0o660)
    async with opened(file) as broker:
        await broker.enqueue([message("m")])
    assert modes(tmp_path) == {"a.db": 0o660}


@pytest.mark.asyncio
async def test_foreign_files_are_not_touched(tmp_path: Path) -> None:
    """A file of somebody else's is refused and stays as it is, to the byte, with nothing beside it."""
    (tmp_path / "notes.txt").write_text("not a database, but longer than a header would be " * 9)
    (tmp_path / "short").write_text("x")
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE t (x)")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    before = contents(tmp_path)
    assert "not a SQLite database" in await refusal_of(tmp_path / "notes.txt")
    assert "not a SQLite database" in await refusal_of(tmp_path / "short")
    assert "of another program" in await refusal_of(tmp_path / "other.db")
    assert contents(tmp_path) == before


@pytest.mark.asyncio
async def test_newer_version(tmp_path: Path) -> None:
    """A store of a newer crossdock is refused with a sentence, and not changed."""
    file = tmp_path / "a.db"
    async with opened(file):
        pass
    connection = sqlite3.connect(file)
    connection.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
    connection.close()
    assert "update crossdock" in await refusal_of(file)
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(schema.MIGRATIONS) + 1,)
    connection.close()


@pytest.mark.asyncio
async def test_old_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SQLite library that cannot do what we need is named, with the version it takes."""
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(ConfigurationError, match=r"3\.35\.0 or newer"):
        await build(tmp_path / "a.db").open()


@pytest.mark.asyncio
async def test_durability_is_really_set(tmp_path: Path) -> None:
    """`full` waits for the disk at each commit and survives a power loss, `relaxed` does neither; both keep a log."""
    cases: list[tuple[dict[str, Any], int, set[Survives]]] = [
        ({}, 2, {Survives.PROCESS, Survives.POWER}),
        ({"durability": "full"}, 2, {Survives.PROCESS, Survives.POWER}),
        ({"durability": "relaxed"}, 1, {Survives.PROCESS}),
    ]
    for options, synchronous, survives in cases:
        async with opened(tmp_path / "a.db", **options) as broker:
            assert await pragma(broker, "synchronous") == synchronous
            assert await pragma(broker, "journal_mode") == "wal"
            assert broker.capabilities.survives == survives


# --- versions -------------------------------------------------------------------------------------------


def next_version(tmp_path: Path, script: str) -> str:
    """A program's beginning that knows one more version."""
    (tmp_path / "next.sql").write_text(script)
    return f"""
        from crossdock.backends.sqlite import schema
        schema.MIGRATIONS = (*schema.MIGRATIONS, {str(tmp_path / "next.sql")!r})
    """


@pytest.mark.asyncio
async def test_migration_raced(tmp_path: Path) -> None:
    """Several processes that meet an older file bring it up to date once, and lose nothing of it."""
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        await broker.enqueue([message("m")])
    program = (
        next_version(tmp_path, "CREATE TABLE more (x);\nINSERT INTO more VALUES (1);\n")
        + """
        async def main():
            broker = build()
            await broker.open()
            print((await broker.stats())[0].ready)
            await broker.close()
        asyncio.run(main())
    """
    )
    with process(program, file) as one, process(program, file) as two, process(program, file) as three:
        assert [outcome(child) for child in (one, two, three)] == [["1"], ["1"], ["1"]]
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT count(*) FROM more").fetchone() == (1,)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()
    assert "update crossdock" in await refusal_of(file)


@pytest.mark.asyncio
async def test_migration_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that dies half-way leaves the file as it was, in its old version."""
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        await broker.enqueue([message("m")])
    script = tmp_path / "next.sql"
    script.write_text("CREATE TABLE more (x);\nINSERT INTO nowhere VALUES (1);\n")
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, str(script)))
    with pytest.raises(BrokerUnavailable, match="nowhere"):
        await build(file).open()
    monkeypatch.undo()
    async with opened(file) as broker:
        assert await ready(broker) == ["m"]
        assert (
            await inside(
                broker, lambda store: store.database.execute("SELECT name FROM sqlite_master WHERE name = 'more'").fetchall()
            )
            == []
        )


# --- other processes --------------------------------------------------------------------------------------


def test_made_by_many_at_once(tmp_path: Path) -> None:
    """Processes that find no file, and all make it at the same moment, share one."""
    program = """
        async def main():
            broker = build()
            sys.stdin.readline()
            await broker.open()
            assert not await broker.enqueue([message(sys.argv[2])])
            await broker.close()
        asyncio.run(main())
    """
    file = tmp_path / "a.db"
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(file)]
    children = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(6)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        with child:
            assert outcome(child) == []
    check_integrity(file)
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT ready FROM queue").fetchall() == [(6,)]
    connection.close()


def test_made_beside_a_reader(tmp_path: Path) -> None:
    """Somebody who reads the file while its tables are being made is waited for, not taken for a reason to fail."""
    file = tmp_path / "a.db"
    reader = sqlite3.connect(file, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM sqlite_master").fetchall()

    made = database.Database(location.parse(f"sqlite:///{file}", {}), lambda _seconds: reader.execute("ROLLBACK"))

    assert made.execute("SELECT count(*) FROM queue").fetchall() == [(0,)]
    made.close()
    reader.close()


def test_eight_processes_on_one_file(tmp_path: Path) -> None:
    """Eight processes enqueue, receive and settle at once, beside a reader that holds its view: nothing is lost, doubled or "locked"."""
    program = """
        async def main():
            broker = build()
            await broker.open()
            done = []
            async def produce():
                for n in range(0, 200, 10):
                    assert not await broker.enqueue([message(f"{sys.argv[2]}-{m}") for m in range(n, n + 10)])
            async def consume():
                while deliveries := await broker.receive(LANES, 20, 1.0):
                    assert not await broker.settle([Ack(delivery) for delivery in deliveries])
                    done.extend((delivery.message.id, delivery.delivery_count) for delivery in deliveries)
            await asyncio.gather(produce(), consume())
            await broker.close()
            for id, count in done:
                print(id, count)
        asyncio.run(main())
    """
    file = tmp_path / "a.db"
    children: list[subprocess.Popen[str]] = []
    try:
        for n in range(8):
            command = [sys.executable, "-c", PRELUDE + textwrap.dedent(program), str(file), str(n)]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        done = [line for child in children for line in outcome(child)]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert sorted(done) == sorted(f"{n}-{m} 1" for n in range(8) for m in range(200))
    check_integrity(file)


@pytest.mark.parametrize("after", [5, 60, 200])
def test_killed_writer(tmp_path: Path, after: int) -> None:
    """A process killed in the middle of its work leaves a sound file, with everything in it that was acknowledged."""
    program = """
        async def main():
            broker = build()
            await broker.open()
            await broker.declare([QueueSpec("q", lease=3600)])
            n = 0
            while True:
                batch = [message(f"{n}-{m}") for m in range(7)]
                assert not await broker.enqueue(batch)
                print(*[message.id for message in batch], flush=True)
                first, *_ = deliveries = await broker.receive(LANES, 5, 0)
                await broker.settle([Nack(delivery) for delivery in deliveries])
                n += 1
        asyncio.run(main())
    """
    file = tmp_path / "a.db"
    acknowledged: list[str] = []
    with process(program, file) as child:
        assert child.stdout is not None
        for _ in range(after):
            acknowledged += child.stdout.readline().split()
        child.send_signal(signal.SIGKILL)
        acknowledged += child.stdout.read().split()
    assert len(acknowledged) >= 7 * after
    check_integrity(file)
    connection = sqlite3.connect(file)
    stored = {id for (id,) in connection.execute("SELECT id FROM message")}
    connection.close()
    assert set(acknowledged) <= stored
    assert len(stored) - len(acknowledged) in (0, 7)


def test_other_process_is_noticed(tmp_path: Path) -> None:
    """A receive that waits gets what another process enqueues, and a dead process's message when its lease is over."""
    program = """
        async def main():
            broker = build()
            await broker.open()
            await broker.declare([QueueSpec("q", lease=0.5)])
            await broker.enqueue([message("m")])
            if sys.argv[2] == "die":
                await broker.receive(LANES, 1, 0)
                os._exit(0)
            await broker.close()
        asyncio.run(main())
    """

    async def wait_for(fate: str, file: Path) -> tuple[str, int]:
        async with opened(file) as broker:
            receive = asyncio.ensure_future(take(broker, wait=PATIENCE))
            with process(program, file, fate) as child:
                await asyncio.to_thread(outcome, child)
            (delivery,) = await receive
            return delivery.message.id, delivery.delivery_count

    assert asyncio.run(wait_for("live", tmp_path / "a.db")) == ("m", 1)
    assert asyncio.run(wait_for("die", tmp_path / "b.db")) in {("m", 1), ("m", 2)}


@pytest.mark.asyncio
async def test_waits_while_others_write(tmp_path: Path) -> None:
    """While another connection holds the lock our verbs wait, and the event loop does not."""
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        verbs = asyncio.ensure_future(together(broker.enqueue([message("m")]), broker.stats()))
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not verbs.done()
        other.execute("COMMIT")
        other.close()
        assert (await verbs)[0] == []


@pytest.mark.asyncio
async def test_gives_up_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is held for too long makes every verb say so, having done nothing; afterwards all is well."""
    monkeypatch.setattr(database, "PATIENCE", 0.05)
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        await broker.enqueue([message("m")])
        (delivery,) = await take(broker)
        other = sqlite3.connect(file, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        for verb in (
            broker.enqueue([message("n")]),
            broker.settle([Ack(delivery)]),
            broker.extend([delivery]),
            broker.declare([QueueSpec("q")]),
            broker.purge("q", State.READY),
            broker.replay("q", [Replay("x", message("x"))]),
        ):
            with pytest.raises(BrokerUnavailable, match="kept it locked"):
                await verb
        other.close()
        assert not await broker.settle([Ack(delivery)])
        assert await ready(broker) == []


@pytest.mark.asyncio
async def test_purge_under_a_reader(tmp_path: Path) -> None:
    """A purge of more than one step is complete beside a reader that holds an old view, and beside a producer."""
    file = tmp_path / "a.db"
    count = 2 * tables.STEP + 10
    async with opened(file, durability="relaxed") as broker:
        await broker.enqueue([message(str(n)) for n in range(count)])
        reader = sqlite3.connect(file, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM ready").fetchone() == (count,)
        results = await together(broker.purge("q", State.READY), broker.enqueue([message("late", queue="other")]))
        assert results == [count, []]
        assert reader.execute("SELECT count(*) FROM ready").fetchone() == (count,)
        reader.close()
        assert [(stats.queue, stats.ready) for stats in await broker.stats()] == [("other", 1), ("q", 0)]
    check_integrity(file)


@pytest.mark.asyncio
async def test_log_is_bounded(tmp_path: Path) -> None:
    """However much goes through a store, its log stays small."""
    file = tmp_path / "a.db"
    async with opened(file, durability="relaxed") as broker, opened(file, durability="relaxed") as other:
        for n in range(40):
            await broker.enqueue([message(f"{n}-{m}", body=bytes(1000)) for m in range(500)])
            await other.settle([Ack(delivery) for delivery in await take(other, 500)])
            assert len(log_of(file).read_bytes()) < 16_000_000


# --- the thread -------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_group_commit(tmp_path: Path) -> None:
    """Calls that come while a commit is under way share the next one."""
    async with opened(tmp_path / "a.db") as broker:
        commits = 0

        def count_commits(store: Store) -> None:
            real = store.database.commit

            def commit() -> None:
                nonlocal commits
                commits += 1
                real()

            store.database.commit = commit  # type: ignore[method-assign]

        await inside(broker, count_commits)
        await asyncio.gather(*(broker.enqueue([message(str(n))]) for n in range(200)))
        assert commits <= 50
        assert len(await ready(broker)) == 200


@pytest.mark.asyncio
async def test_one_command_spoils_no_other(tmp_path: Path) -> None:
    """What cannot be done fails alone, though it came in one group with others."""
    async with opened(tmp_path / "a.db") as broker:
        bad = "no text: \ud800"
        results = await together(
            broker.enqueue([message("a")]),
            broker.enqueue([message(bad), message("with it")]),
            broker.peek("q", State.READY, after="nonsense"),
            broker.enqueue([message("huge", generation=2**70), message("b")]),
            broker.stats([bad]),
            broker.enqueue([message("c")]),
        )
        assert results[0] == results[5] == []
        assert errors(results[1]) == {0: EnqueueFailed, 1: EnqueueFailed}
        assert isinstance(results[2], ConfigurationError)
        assert errors(results[3]) == {0: EnqueueFailed}
        assert isinstance(results[4], BrokerUnavailable)
        assert sorted(await ready(broker)) == ["a", "b", "c"]


@pytest.mark.asyncio
async def test_late_settlement_said_twice(tmp_path: Path) -> None:
    """A settlement that comes after its lease, and twice in one batch, is done once."""
    clock = VirtualClock()
    async with opened(tmp_path / "a.db", clock) as broker:
        await broker.enqueue([message("a"), message("b")])
        a, b = await take(broker)
        clock.advance(31)
        assert (await broker.stats())[0].ready == 2
        assert not await broker.settle([Nack(a, 5.0), Nack(a, 5.0), Ack(b), Ack(b)])
        stats = (await broker.stats())[0]
        assert (stats.ready, stats.scheduled, stats.leased) == (0, 1, 0)
    check_integrity(tmp_path / "a.db")


@pytest.mark.asyncio
async def test_names_are_data(tmp_path: Path) -> None:
    """No name or id ever becomes SQL."""
    evil = "'; DROP TABLE message; --\" % _ ?"
    async with opened(tmp_path / "a.db") as broker:
        await broker.declare([QueueSpec(evil)])
        assert not await broker.enqueue([message(evil, evil)])
        (delivery,) = await broker.receive([Lane(evil, Priority.NORMAL, 1)], 1, 0)
        assert not await broker.settle([Nack(delivery)])
        assert [entry.message.id for entry in (await broker.peek(evil, State.READY, ids=[evil])).entries] == [evil]
        assert not await broker.remove(evil, State.READY, [evil])
        assert [stats.queue for stats in await broker.stats()] == [evil]
    check_integrity(tmp_path / "a.db")


WALK = re.compile(r"SCAN (message|ready|scheduled|leased|dead)\b|USE TEMP B-TREE FOR ORDER BY")
"""Steps of a query plan that go through all there is."""
QUEUE_WALK = re.compile(r"SEARCH (message|ready|scheduled|leased|dead) .*\((queue=\?|queue=\? AND priority=\?)\)$")
"""Steps that go through all of one queue, unless something stops them."""


def plan(sql: str, store: Store) -> list[str]:
    return [row[3] for row in store.database.execute(f"EXPLAIN QUERY PLAN {sql}")]


@pytest.mark.asyncio
async def test_cost_does_not_grow(tmp_path: Path) -> None:
    """No statement of any verb walks through a table of messages from end to end."""
    clock = VirtualClock()
    async with opened(tmp_path / "a.db", clock) as broker:
        seen: set[str] = set()
        await inside(broker, lambda store: store.database._connection.set_trace_callback(seen.add))
        await broker.declare([QueueSpec("q", max_ready=1000, dead_max_age=60.0, dead_max_count=3)])
        for n in range(6):
            await broker.enqueue([message(f"{n}"), message(f"{n}x", delay_ms=1000), message(f"{n}y", "q2")])
            deliveries = await take(broker)
            await broker.extend(deliveries)
            letter = DeadLetter(deliveries[0].message, Reason.REJECTED, clock.time_ms())
            await broker.settle([Dead(deliveries[0], letter), *map(Ack, deliveries[1:3]), *map(Nack, deliveries[3:])])
            clock.advance(31)
        for state in State:
            page = await broker.peek("q", state, limit=1)
            await broker.peek("q", state, after=page.next)
            await broker.peek("q", state, ids=["1"])
        await broker.replay("q", [Replay("5", message("5", generation=1))])
        await broker.remove("q", State.READY, ["5"])
        await broker.purge("q", State.DEAD)
        await broker.stats()
        receive = asyncio.ensure_future(take(broker, wait=1.0))
        await asyncio.sleep(0.01)
        clock.advance(1)
        await receive
        verbs = {"SELECT", "INSERT", "UPDATE", "DELETE"}
        plans = [(sql, await inside(broker, partial(plan, sql))) for sql in sorted(seen) if sql.split()[0] in verbs]
        assert len(plans) > 40
        assert [(step, sql) for sql, steps in plans for step in steps if WALK.match(step)] == []
        endless = [(sql, steps) for sql, steps in plans if not re.search(r"\bLIMIT\b|\bmin\(|\bEXISTS\b", sql)]
        assert [(step, sql) for sql, steps in endless for step in steps if QUEUE_WALK.match(step)] == []


@pytest.mark.asyncio
async def test_more_due_than_one_step(tmp_path: Path) -> None:
    """When far more falls due at once than one transaction moves, all of it is delivered, in order."""
    clock = VirtualClock()
    count = tables.STEP + 500
    async with opened(tmp_path / "a.db", clock, durability="relaxed") as broker:
        await broker.enqueue([message(str(n), delay_ms=1000 + n % 7) for n in range(count)])
        clock.advance(2)
        got: list[int] = []
        while len(got) < count:
            deliveries = await take(broker, 1000, wait=1.0)
            await broker.settle([Ack(delivery) for delivery in deliveries])
            got += [int(delivery.message.id) for delivery in deliveries]
        assert got == sorted(range(count), key=lambda n: (n % 7, n))


@pytest.mark.asyncio
async def test_close_waits_for_what_was_asked(tmp_path: Path) -> None:
    """What was asked before a close is done and answered, and the thread is gone afterwards."""
    broker = build(tmp_path / "a.db")
    await broker.open()
    enqueues = [asyncio.ensure_future(broker.enqueue([message(str(n))])) for n in range(20)]
    await asyncio.sleep(0)
    await broker.close()
    assert await asyncio.gather(*enqueues) == [[]] * 20
    assert not [thread for thread in threading.enumerate() if thread.name == "crossdock-sqlite"]
    assert names(tmp_path) == ["a.db"]


def test_loop_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that closes its event loop and forgets the Broker loses its thread, and no message."""
    monkeypatch.setattr(desk, "_NAP", 0.05)
    file = tmp_path / "a.db"

    async def forgetful(wait: bool) -> None:
        broker = build(file)
        await broker.open()
        await broker.enqueue([message(f"m{wait}")])
        if wait:
            asyncio.get_running_loop().call_later(0.05, asyncio.get_running_loop().stop)
            await broker.receive([Lane("empty", Priority.NORMAL, 1)], 1, 3600)

    def stop(task: asyncio.Task[None]) -> None:
        task.get_loop().stop()

    for wait in (False, True):
        loop = asyncio.new_event_loop()
        task = loop.create_task(forgetful(wait))
        task.add_done_callback(stop)
        loop.run_forever()
        if not task.done():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        for thread in threading.enumerate():
            if thread.name == "crossdock-sqlite":
                thread.join(PATIENCE)
                assert not thread.is_alive()
    assert sorted(asyncio.run(listed(file))) == ["mFalse", "mTrue"]


async def listed(file: Path) -> list[str]:
    async with opened(file) as broker:
        return await ready(broker)


@pytest.mark.asyncio
async def test_brokers_of_one_process_keep_their_locks(tmp_path: Path) -> None:
    """Opening and closing a second Broker takes no lock from the first, so another process does not think itself the last one."""
    file = tmp_path / "a.db"
    program = """
        async def main():
            broker = build()
            await broker.open()
            await broker.enqueue([message("theirs")])
            await broker.close()
        asyncio.run(main())
    """
    async with opened(file) as broker:
        await broker.enqueue([message("ours")])
        async with opened(file) as second:
            await second.enqueue([message("second")])
        with process(program, file) as child:
            await asyncio.to_thread(outcome, child)
        assert names(tmp_path) == ["a.db", "a.db-shm", "a.db-wal"]
        assert await ready(broker) == ["ours", "second", "theirs"]
    check_integrity(file)


def test_fork(tmp_path: Path) -> None:
    """A forked child cannot use, and by using the file and ending does not harm, what it inherited; its own Broker works."""
    program = """
        import gc, warnings
        warnings.simplefilter("ignore")  # fork beside threads is what we are here for
        loop = asyncio.new_event_loop()
        run = loop.run_until_complete
        broker = build()
        run(broker.open())
        assert not run(broker.enqueue([message("parent")]))
        gone_on, (read, write) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            async def own():
                try:
                    await broker.enqueue([message("never")])
                except Exception as error:
                    print(type(error).__name__, flush=True)
                mine = build()
                await mine.open()
                assert not await mine.enqueue([message("child")])
                os.write(write, b"x")
                os.read(gone_on[0], 1)
                for n in range(50):
                    assert not await mine.enqueue([message(f"child{n}")])
                await mine.close()
            asyncio.run(own())
            del broker
            gc.collect()
            sys.exit(0)
        os.read(read, 1)
        assert not run(broker.enqueue([message("after")]))
        print([stats.ready for stats in run(broker.stats())])
        run(broker.close())  # the last in this process, but not in the child
        run(broker.open())
        os.write(gone_on[1], b"x")
        for n in range(50):
            assert not run(broker.enqueue([message(f"parent{n}")]))
        assert os.waitpid(child, 0)[1] == 0
        print([stats.ready for stats in run(broker.stats())])
        run(broker.close())
    """
    with process(program, tmp_path / "a.db") as parent:
        assert outcome(parent) == ["BrokerClosed", "[3]", "[103]"]
    check_integrity(tmp_path / "a.db")


def test_forks_at_any_moment(tmp_path: Path) -> None:
    """However often, and at whatever moment, a process forks, its Brokers go on, waiting receives included."""
    program = """
        import threading, warnings
        warnings.simplefilter("ignore")
        done = threading.Event()
        async def produce(broker):
            for n in range(300):
                assert not await broker.enqueue([message(str(n))])
        async def consume(broker):
            seen = 0
            while seen < 300:
                deliveries = await broker.receive(LANES, 7, 10)
                assert not await broker.settle([Ack(delivery) for delivery in deliveries])
                seen += len(deliveries)
            print(seen, flush=True)
        async def main():
            one, two = build(), build()
            await asyncio.gather(one.open(), two.open())
            await asyncio.gather(produce(one), consume(two))
            await asyncio.gather(one.close(), two.close())
        def work():
            asyncio.run(main())
            done.set()
        threading.Thread(target=work).start()
        forks = 0
        while not done.wait(0.001):
            child = os.fork()
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
            forks += 1
        assert forks > 10, forks
    """
    with process(program, tmp_path / "a.db") as child:
        assert outcome(child) == ["300"]
    check_integrity(tmp_path / "a.db")


@pytest.mark.asyncio
@pytest.mark.parametrize("watched", [True, False])
async def test_quiet_receive_is_woken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: bool) -> None:
    """A receive that has waited long gets what somebody else stores: where the system says when a file is written it relies on that,
    where it does not it goes on asking."""
    quiet = asyncio.Event()
    loop = asyncio.get_running_loop()

    def arm(self: Watch, arm: Callable[[Watch], bool] = Watch.arm) -> bool:
        loop.call_soon_threadsafe(quiet.set)
        return watched and arm(self)

    monkeypatch.setattr(Watch, "arm", arm)
    monkeypatch.setattr(desk, "_WATCHED", 3600.0)
    async with opened(tmp_path / "a.db") as waiting, opened(tmp_path / "a.db") as other:
        for id in ("first", "second"):
            receive = asyncio.ensure_future(take(waiting, wait=3600.0))
            quiet.clear()
            await quiet.wait()
            await asyncio.sleep(0.01)  # not needed, but now it waits as long as it may
            await other.enqueue([message(id)])
            (delivery,) = await asyncio.wait_for(receive, PATIENCE)
            assert delivery.message.id == id


@pytest.mark.asyncio
async def test_quiet_receive_notices_what_falls_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose time comes needs nobody who writes."""
    monkeypatch.setattr(desk, "_WATCHED", 3600.0)
    async with opened(tmp_path / "a.db") as broker:
        await broker.enqueue([message("later", delay_ms=400)])
        assert [delivery.message.id for delivery in await asyncio.wait_for(take(broker, wait=3600.0), PATIENCE)] == ["later"]


@pytest.mark.parametrize("closed", [True, False])
def test_watching_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: bool) -> None:
    """What watching the file takes is given back with the Broker, also where the event loop just ended."""
    monkeypatch.setattr(desk, "_QUIET", 0)
    before = set(os.listdir("/proc/self/fd"))

    async def wait_a_little() -> None:
        broker = build(tmp_path / "a.db")
        await broker.open()
        await take(broker, wait=0.1)
        assert "anon_inode:inotify" in {read_link(number) for number in descriptors()}
        if closed:
            await broker.close()

    def descriptors() -> set[str]:
        return set(os.listdir("/proc/self/fd")) - before

    monkeypatch.setattr(desk, "_NAP", 0.05)
    asyncio.run(wait_a_little())
    for thread in threading.enumerate():
        if thread.name == "crossdock-sqlite":
            thread.join(PATIENCE)
    assert not {link for link in map(read_link, descriptors()) if "inotify" in link}


def test_idle_worker_costs_little(tmp_path: Path) -> None:
    """A receive that waits for nothing uses next to no processor time."""
    program = """
        async def main():
            broker = build()
            await broker.open()
            await broker.receive(LANES, 10, 1.5)
            before = resource.getrusage(resource.RUSAGE_SELF)
            await broker.receive(LANES, 10, 3.0)
            after = resource.getrusage(resource.RUSAGE_SELF)
            print((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 3.0)
            await broker.close()
        asyncio.run(main())
    """
    with process(program, tmp_path / "a.db") as child:
        (share,) = outcome(child)
    assert float(share) < 0.02


# --- the disk ------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_disk_full(tmp_path: Path) -> None:
    """With no space left an enqueue is certainly not stored, nothing else is harmed, and with space again all goes on by itself."""
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        await broker.enqueue([message("before")])
        (delivery,) = await take(broker)
        pages = await pragma(broker, "page_count")
        await pragma(broker, f"max_page_count = {pages}")
        big = [message(f"big{n}", body=bytes(100_000)) for n in range(3)]
        results = await together(broker.enqueue(big), broker.enqueue([message("small")]), broker.extend([delivery]))
        assert errors(results[0]) == dict.fromkeys(range(3), EnqueueFailed)
        assert "disk is full" in str(results[0][0].error)
        assert results[1] == results[2] == []
        assert await ready(broker) == ["small"]
        await pragma(broker, "max_page_count = 1000000")
        assert not await broker.enqueue(big)
        assert not await broker.settle([Ack(delivery)])
        assert await ready(broker) == ["small", "big0", "big1", "big2"]
    check_integrity(file)


def test_file_size_limit(tmp_path: Path) -> None:
    """When the system cuts a write short, enqueues are refused with a type, what was acknowledged stays, and it goes on afterwards."""
    program = """
        async def main():
            broker = build()
            await broker.open()
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
            stored, kinds = [], set()
            for n in range(60):
                batch = [message(f"{n}-{m}") for m in range(50)]
                refusals = await broker.enqueue(batch)
                if refusals:
                    kinds.update(type(refusal.error).__name__ for refusal in refusals)
                else:
                    stored += [message.id for message in batch]
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert not await broker.enqueue([message("last")])
            print(*sorted(kinds))
            print(*stored, "last")
            await broker.close()
        asyncio.run(main())
    """
    file = tmp_path / "a.db"
    with process(program, file) as child:
        kinds, stored = outcome(child)
    assert kinds in {"EnqueueFailed", "EnqueueUnknown", "EnqueueFailed EnqueueUnknown"}
    check_integrity(file)
    connection = sqlite3.connect(file)
    assert {id for (id,) in connection.execute("SELECT id FROM message")} >= set(stored.split())
    connection.close()


async def fail_next_commit(broker: SqliteBroker) -> None:
    """Let the disk fail at the very end of the next transaction."""

    def prepare(store: Store) -> None:
        real = store.database.commit
        commits = 0

        def commit() -> None:
            nonlocal commits
            commits += 1
            if commits == 2:  # the first is that of this very command
                store.database.commit = real  # type: ignore[method-assign]
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
            real()

        store.database.commit = commit  # type: ignore[method-assign]

    await inside(broker, prepare)


@pytest.mark.asyncio
async def test_undone_receive_leaves_nothing(tmp_path: Path) -> None:
    """A receive whose transaction failed has taken nothing, and what it was to use to mark its leases goes to nobody twice."""
    async with opened(tmp_path / "a.db") as one, opened(tmp_path / "a.db") as two:
        await one.enqueue([message("a"), message("b")])
        await fail_next_commit(one)
        with pytest.raises(BrokerUnavailable, match="disk"):
            await take(one)
        assert await ready(one) == ["a", "b"]
        (b,) = await take(two, 1)
        (a,) = await take(one, 1)
        assert (a.delivery_count, b.delivery_count) == (1, 1)
        receipts: list[Any] = [a.receipt, b.receipt]
        assert receipts[0].fence != receipts[1].fence
        assert not await one.settle([Ack(a)])
        assert errors(await one.settle([Ack(b)])) == {0: LeaseLost}
        assert not await two.settle([Ack(b)])


@pytest.mark.asyncio
async def test_error_at_commit(tmp_path: Path) -> None:
    """If the very commit fails the outcome is unknown, and said to be; asking again settles it."""
    async with opened(tmp_path / "a.db") as broker:
        await broker.enqueue([message("a")])
        (delivery,) = await take(broker)
        await fail_next_commit(broker)
        (refusal,) = await broker.enqueue([message("b")])
        assert isinstance(refusal.error, EnqueueUnknown)
        assert refusal.error.safe_to_repeat
        assert refusal.error.message == message("b")
        assert not await broker.enqueue([message("b")])
        await fail_next_commit(broker)
        assert errors(await broker.settle([Ack(delivery)])) == {0: SettleUnknown}
        assert not await broker.settle([Ack(delivery)])
        assert await ready(broker) == ["b"]


# --- the file, while it is open --------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_file_removed(tmp_path: Path) -> None:
    """When the file is removed a new one takes its place, it is said once, and what was declared is declared again."""
    file, events = tmp_path / "a.db", list[Any]()
    async with opened(file, events=events) as broker, opened(file) as other:
        await broker.declare([QueueSpec("q", max_ready=1)])
        await broker.enqueue([message("lost")])
        (delivery,) = await take(broker)
        remove_all(tmp_path)
        assert not await broker.enqueue([message("m")])
        assert errors(await broker.enqueue([message("n")])) == {0: QueueFull}
        assert [type(event) for event in events] == [StateLost]
        assert str(file) in events[0].what
        assert errors(await broker.settle([Ack(delivery)]))
        assert await ready(other) == await ready(broker) == ["m"]
    assert names(tmp_path) == ["a.db"]
    assert await listed(file) == ["m"]


@pytest.mark.asyncio
async def test_erased_settings_stay_erased(tmp_path: Path) -> None:
    """What was erased is not declared again when a new file takes the place of a removed one."""
    file = tmp_path / "a.db"
    async with opened(file) as broker:
        await broker.declare([QueueSpec("q", max_ready=0), QueueSpec("other", max_ready=0)])
        await broker.erase(["q"])
        remove_all(tmp_path)
        assert errors(await broker.enqueue([message("a"), message("b", queue="other")])) == {1: QueueFull}


@pytest.mark.parametrize("last_act", ["enqueue", "close"])
@pytest.mark.asyncio
async def test_new_file_is_safe_from_the_old(tmp_path: Path, last_act: str) -> None:
    """A Broker that still has a removed file open does not harm the one that others have made since, however it notices."""
    file = tmp_path / "a.db"
    old = build(file)
    await old.open()
    await old.enqueue([message("lost")])
    remove_all(tmp_path)
    async with opened(file) as new:
        await new.enqueue([message("one")])
        before = names(tmp_path)
        if last_act == "enqueue":
            await old.enqueue([message("two")])
        else:
            await old.close()
        assert names(tmp_path) == before == ["a.db", "a.db-shm", "a.db-wal"]
        await new.enqueue([message("three")])
        assert set(await listed(file)) >= {"one", "three"}
    await old.close()
    check_integrity(file)


@pytest.mark.asyncio
async def test_waiting_receive_survives_removal(tmp_path: Path) -> None:
    """A receive that waits while the file is removed gets what is enqueued into the new one."""
    file, events = tmp_path / "a.db", list[Any]()
    async with opened(file, events=events) as broker:
        receive = asyncio.ensure_future(take(broker, wait=PATIENCE))
        await asyncio.sleep(0.02)
        remove_all(tmp_path)
        await until(lambda: bool(events))
        async with opened(file) as other:
            await other.enqueue([message("m")])
        assert [delivery.message.id for delivery in await receive] == ["m"]
        assert [type(event) for event in events] == [StateLost]


@pytest.mark.asyncio
async def test_file_replaced(tmp_path: Path) -> None:
    """A store moved over ours is used as it is: nothing of our log gets into it, and what we had goes along with our file."""
    file, backup, aside = tmp_path / "a.db", tmp_path / "backup.db", tmp_path / "aside.db"
    async with opened(backup) as broker:
        await broker.enqueue([message("backup")])
    events: list[Any] = []
    async with opened(file, events=events) as broker:
        await broker.enqueue([message("ours")])
        file.rename(aside)
        backup.rename(file)
        assert not await broker.enqueue([message("new")])
        assert await ready(broker) == ["backup", "new"]
        assert [type(event) for event in events] == [StateLost]
    check_integrity(file)
    assert await listed(file) == ["backup", "new"]
    assert (await listed(aside))[0] == "ours"


@pytest.mark.asyncio
async def test_log_removed(tmp_path: Path) -> None:
    """Without its log the store stops with a sentence that says what to do; then nothing is lost."""
    file, events = tmp_path / "a.db", list[Any]()
    async with opened(file, events=events) as broker:
        await broker.enqueue([message("m")])
        log_of(file).unlink()
        results = await together(broker.enqueue([message("n")]), broker.stats())
        for result in results:
            error = result if isinstance(result, BaseException) else result[0].error
            assert "stop every program that uses it" in str(error)
        with pytest.raises(BrokerUnavailable, match="stop every program"):
            await broker.stats()
        assert [type(event) for event in events] == [Disconnected]
    assert set(await listed(file)) >= {"m"}
    check_integrity(file)


@pytest.mark.asyncio
async def test_folder_comes_and_goes(tmp_path: Path) -> None:
    """While there is no place for the file verbs say so; once there is one again they work, and both is reported once."""
    folder, events = tmp_path / "folder", list[Any]()
    folder.mkdir()
    async with opened(folder / "a.db", events=events) as broker:
        await broker.enqueue([message("m")])
        folder.rename(tmp_path / "elsewhere")
        for _ in range(3):
            with pytest.raises(BrokerUnavailable, match="does not exist"):
                await broker.stats()
        folder.mkdir()
        assert not await broker.enqueue([message("n")])
        assert await ready(broker) == ["n"]
        assert Counter(map(type, events)) == {Disconnected: 1, StateLost: 1, Connected: 1}
    assert await listed(tmp_path / "elsewhere" / "a.db") == ["m"]
