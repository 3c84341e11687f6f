"""App: what it knows, what it needs, and how it behaves in programs that fork, thread and forget."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock import App, Handle, Queue, RetryPolicy
from crossdock.backends import memory
from crossdock.clock import VirtualClock
from crossdock.errors import ConfigurationError, InvalidArguments, InvalidName, UnknownBackend
from crossdock.events import Event
from crossdock.spi import Connected, Disconnected


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, where warnings are errors, but for the one about forking with threads."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "program.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=folder, check=False)


# --- what it knows --------------------------------------------------------------------------------


def test_an_app_needs_no_url_until_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules can be imported and tasks called anywhere; only a broker needs a URL, and the text tells how to give one."""
    monkeypatch.delenv("CROSSDOCK_URL", raising=False)
    app = App(directory=tmp_path)

    @app.task
    def double(n: int) -> int:
        return 2 * n

    assert double(4) == 8
    assert double.message(4).task == double.name
    with pytest.raises(ConfigurationError, match=r"no broker URL: give one to App\(...\) or --url, in \$CROSSDOCK_URL, or as"):
        double.enqueue_sync(4)
    with pytest.raises(ConfigurationError):
        app.make_broker()


def test_a_url_that_nobody_serves(tmp_path: Path) -> None:
    """It is told at the first enqueue, not at import."""
    app = App("memroy://", directory=tmp_path)

    @app.task
    def job() -> None: ...

    with pytest.raises(UnknownBackend, match="did you mean memory://"):
        job.enqueue_sync()


def test_queues_of_an_app() -> None:
    """Those of the settings first, then those of the tasks, each once; what is not listed has the defaults."""
    app = App("memory://", queues=[Queue("emails", weight=3), Queue("unused")])
    app.task(queue="reports", name="a")(_job)
    app.task(queue="emails", name="b")(_job)
    app.task(name="c")(_job)
    assert app.queue_names() == ["emails", "unused", "reports", "default"]
    assert app.queue("emails").weight == 3
    assert app.queue("reports") == Queue("reports")
    assert app.queue("emails") is app.queue("emails")
    with pytest.raises(InvalidName):
        app.queue("not a name")
    with pytest.raises(ConfigurationError, match="the queue 'a' is described twice"):
        App("memory://", queues=[Queue("a"), Queue("a")])


async def _job() -> None: ...


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"namespace": "a b"}, "'a b' is not a valid namespace"),
        ({"retry": 3}, "retry must be a RetryPolicy such as"),
        ({"middleware": [App]}, "middleware must be instances of"),
    ],
)
def test_bad_settings_of_an_app(settings: dict[str, object], said: str) -> None:
    """They are refused where they are given."""
    with pytest.raises(ConfigurationError, match=said):
        App("memory://", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"weight": 0}, "queue 'q': weight must be from 1 to 1,000 in whole numbers, not 0"),
        ({"weight": "2"}, "queue 'q': weight must be from 1 to 1,000 in whole numbers, not '2'"),
        ({"weight": 1.5}, "queue 'q': weight must be from 1 to 1,000 in whole numbers, not 1.5"),
        ({"weight": None}, "queue 'q': weight must be from 1"),
        ({"lease": 0.5}, "queue 'q': lease must be from 1 to 3,600, not 0.5"),
        ({"lease": float("nan")}, "queue 'q': lease must be from 1 to 3,600, not nan"),
        ({"concurrency": 0}, "queue 'q': concurrency must be from 1"),
        ({"max_ready": 0}, "queue 'q': max_ready must be from 1"),
        ({"max_attempts": 0}, "queue 'q': max_attempts must be from 1"),
        ({"max_deliveries": None}, "queue 'q': max_deliveries must be from 1"),
        ({"max_deliveries": True}, "queue 'q': max_deliveries must be from 1"),
        ({"timeout": 0}, "queue 'q': timeout must be from 0.001"),
        ({"keep_dead": 0}, "queue 'q': keep_dead must be from 1"),
        ({"keep_dead_count": -1}, "queue 'q': keep_dead_count must be from 0"),
        ({"priorities": "loose"}, "queue 'q': priorities is 'fair' or 'strict', not 'loose'"),
        ({"on_expired": "keep"}, "queue 'q': on_expired is 'dead_letter' or 'drop', not 'keep'"),
        ({"retry": 5}, "retry must be a RetryPolicy such as"),
        ({"name": ""}, "'' is not a valid queue name"),
    ],
    ids=lambda part: str(part)[:30],
)
def test_bad_settings_of_a_queue(settings: dict[str, object], said: str) -> None:
    """Each is refused with the queue, the setting and its range; nothing fails later in a worker."""
    with pytest.raises(ConfigurationError) as caught:
        Queue(**{"name": "q", **settings})  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_what_a_backend_is_told_of_a_queue() -> None:
    """Lease, limit and retention; all else is policy, and core's."""
    spec = Queue("q", lease=45, max_ready=5, keep_dead=60, keep_dead_count=7, weight=3).spec()
    assert (spec.name, spec.lease, spec.max_ready, spec.dead_max_age, spec.dead_max_count) == ("q", 45, 5, 60, 7)


def test_time_chance_and_ids_are_injected() -> None:
    """A simulation can hold all three."""
    app = App("memory://", clock=VirtualClock(5000), rng=random.Random(1), new_id=lambda: "the-id", retry=RetryPolicy.fixed(1))
    task = app.task(_job)
    assert app.now_ms() == 5000
    assert task.message().id == app.new_id() == "the-id"
    assert app.environment.rng.random() == random.Random(1).random()


def test_broker_events_are_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """A lost connection is a warning; observers get it too."""
    app = App("memory://")
    told: list[Event] = []
    app.on("broker_event")(told.append)
    with caplog.at_level("INFO", logger="crossdock.broker"):
        app._report(Connected())
        app._report(Disconnected("reset by peer"))
    assert [(record.name, record.levelname) for record in caplog.records] == [
        ("crossdock.broker", "INFO"),
        ("crossdock.broker", "WARNING"),
    ]
    assert "reset by peer" in caplog.text
    assert [event.detail for event in told] == ["Connected()", "Disconnected(reason='reset by peer')"]


@pytest.mark.asyncio
async def test_an_enqueued_task_is_told_after_it_is_stored() -> None:
    """With its name, id and queue."""
    app = App("memory://told", clock=VirtualClock(5000))
    told: list[Event] = []
    app.on("task_enqueued")(told.append)
    task = app.task(name="job", queue="mail")(_job)
    handle = await task.enqueue()
    many = await app.enqueue_many([task.message()])
    await app.close()
    memory.forget("told")
    assert [(event.task, event.id, event.queue, event.at_ms) for event in told] == [
        ("job", handle.id, "mail", 5000),
        ("job", many[0].id, "mail", 5000),
    ]
    assert handle == Handle(handle.id, "mail", "job")


@pytest.mark.asyncio
async def test_the_same_id_is_stored_once() -> None:
    """While the first is there, the second counts as done."""
    app = App("memory://")
    task = app.task(_job)
    async with app.testing() as t:
        outgoing = task.options(id="order-1").message()
        assert await app.enqueue(outgoing) == await app.enqueue(outgoing)
        await task.options(id="order-1").enqueue()
        assert await t.run_until_idle() == 1


# --- programs -------------------------------------------------------------------------------------

FORGETS = """
import asyncio, contextlib, os, sys, threading
from crossdock import App

app = App(sys.argv[1])

@app.task
async def job(n: int) -> None: ...

async def main() -> None:
    await asyncio.gather(*(job.enqueue(n) for n in range(20)))

def open_files():
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield os.readlink("/proc/self/fd/" + fd)

for _ in range(2):
    asyncio.run(main())
    print([thread.name for thread in threading.enumerate()], [file for file in open_files() if "tasks.db" in file])
"""


@pytest.mark.parametrize("url", ["memory://", "sqlite:///tasks.db"])
def test_a_program_that_forgets_to_close_leaves_nothing(tmp_path: Path, url: str) -> None:
    """asyncio.run without app.close(): no thread, no open file and no warning is left."""
    ran = run(tmp_path, FORGETS, url)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == ["['MainThread'] []", "['MainThread'] []"]


SYNC = """
import sys, threading
from crossdock import App

app = App(sys.argv[1])

@app.task
def job(n: int) -> None: ...

threads = [threading.Thread(target=job.enqueue_sync, args=(n,)) for n in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len({job.enqueue_sync(n).id for n in range(3)}))
"""


@pytest.mark.parametrize("url", ["memory://", "sqlite:///tasks.db"])
def test_a_sync_program_ends_by_itself(tmp_path: Path, url: str) -> None:
    """The twins' thread keeps no process alive and its end is quiet."""
    ran = run(tmp_path, SYNC, url)
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", "3\n")


FORKS = """
import asyncio, os, sys
from crossdock import App
from crossdock.spi import State

app = App({url!r})

@app.task(name="job")
async def job(name: str) -> None: ...

def child(name: str) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            {child}
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"

def enqueue(name: str) -> None:
    {parent}

enqueue("before")
child("child 1")
enqueue("between")
child("child 2")
enqueue("after")

async def count() -> None:
    broker = app.make_broker()
    await broker.open()
    page = await broker.peek("default", State.READY)
    print(len(page.entries), len({{entry.message.id for entry in page.entries}}))
    await broker.close()

asyncio.run(count())
"""
ASYNC_PROGRAM = """
import asyncio, os
from crossdock import App

app = App("sqlite:///tasks.db")

@app.task(name="job")
async def job(name: str) -> None: ...

async def main() -> None:
    await job.enqueue("before")
    pid = os.fork()
    if pid == 0:
        # The child is in the middle of the parent's coroutine; it leaves the loop alone.
        try:
            job.enqueue_sync("child")
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"
    await asyncio.gather(*(job.enqueue("after") for _ in range(10)))
    await app.close()
    broker = app.make_broker()
    await broker.open()
    (stats,) = await broker.stats(["default"])
    print(stats.ready)
    await broker.close()

asyncio.run(main())
"""
BY_TWIN = "job.enqueue_sync(name)"
BY_LOOP = "asyncio.run(job.enqueue(name))"


@pytest.mark.parametrize(("parent", "child"), [(BY_TWIN, BY_TWIN), (BY_TWIN, BY_LOOP), (BY_LOOP, BY_TWIN)])
@pytest.mark.parametrize(("url", "stored"), [("sqlite:///tasks.db", 5), ("memory://", 3)])
def test_forked_children_enqueue_and_leave_the_parent_alone(tmp_path: Path, url: str, stored: int, parent: str, child: str) -> None:
    """A child makes a connection and ids of its own, whatever the parent used before; a memory store belongs to its process."""
    ran = run(tmp_path, FORKS.format(url=url, parent=parent, child=child))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == f"{stored} {stored}\n"


def test_a_fork_in_the_middle_of_a_running_loop(tmp_path: Path) -> None:
    """The child uses the twins; the parent's loop and connection go on."""
    ran = run(tmp_path, ASYNC_PROGRAM)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "12\n"


@pytest.mark.asyncio
async def test_what_is_no_message_is_named_and_nothing_is_stored() -> None:
    """`enqueue_many` says which item is not from `task.message(...)`."""
    app = App("memory://never-opened")
    with pytest.raises(InvalidArguments, match="item 0 is of type int"):
        await app.enqueue_many([1])  # type: ignore[list-item]


def test_settings_show_no_password() -> None:
    """The settings' repr, as it lands in logs and assertions, hides what the URL hides."""
    assert "canary" not in repr(App("amqp://user:canary@host").settings)


def test_a_url_that_is_no_text_is_refused() -> None:
    """At once, where it was given."""
    with pytest.raises(ConfigurationError, match="not int"):
        App(5)  # type: ignore[arg-type]
