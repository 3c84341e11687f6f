"""An app whose tasks write what happens to them into files, and that can kill its own worker at a chosen moment.

Environment: HISTORY (folder), CROSSDOCK_URL, LEASE (seconds), KILL_AT (`received`, `running`, `finished` or nothing).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from pathlib import Path

from crossdock import App, Event, Queue, current_context

FOLDER = Path(os.environ["HISTORY"])
KILL_AT = os.environ.get("KILL_AT", "")
KILL_AFTER = 300

app = App(queues=[Queue("default", lease=float(os.environ.get("LEASE", "2")))])
_file = os.open(FOLDER / f"{os.getpid()}.history", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
_seen = 0


def note(event: str, *fields: object) -> None:
    """Append one line in one write, so that it survives a kill."""
    os.write(_file, " ".join(map(str, (time.monotonic_ns(), event, *fields))).encode() + b"\n")


def perhaps_die(phase: str) -> None:
    """Kill this process, once in the whole test, in the chosen phase."""
    global _seen
    if phase != KILL_AT:
        return
    _seen += 1
    if _seen > KILL_AFTER:
        try:
            os.close(os.open(FOLDER / "killed", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        note("kill", os.getpid())
        os.kill(os.getpid(), signal.SIGKILL)


if KILL_AT == "received":

    @app.on("task_started")
    def received(event: Event) -> None:
        perhaps_die("received")


if KILL_AT == "finished":

    @app.on("task_succeeded")
    def finished(event: Event) -> None:
        perhaps_die("finished")


@app.task(name="work")
async def work(number: int) -> None:
    """Note start and end."""
    context = current_context()
    note("start", number, context.attempt, context.delivery_count)
    await asyncio.sleep(0)
    perhaps_die("running")
    note("end", number)


@app.task(name="hold")
async def hold(number: int, seconds: float) -> None:
    """Run for a while."""
    context = current_context()
    note("start", number, context.attempt, context.delivery_count)
    await asyncio.sleep(seconds)
    note("end", number)


@app.task(name="stubborn")
def stubborn(number: int) -> None:
    """Run in a thread that nobody can stop."""
    note("start", number, 0, 0)
    time.sleep(3600)


@app.task(name="deaf")
async def deaf(number: int) -> None:
    """Ignore every cancellation."""
    note("start", number, 0, 0)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)


@app.task(name="relay")
def relay(number: int) -> None:
    """Enqueue from a sync handler."""
    work.enqueue_sync(number)


@app.task(name="loops")
async def loops() -> None:
    """Note where the two event loops of this worker come from."""
    kinds = {type(thing) for thing in gc.get_objects() if isinstance(thing, asyncio.AbstractEventLoop) and thing.is_running()}
    note("loops", *(kind.__module__ for kind in kinds))
