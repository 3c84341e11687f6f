"""One process and its SQLite connections: POSIX gives locks to processes, and a fork copies what SQLite believes it holds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from crossdock.plugins import create_broker
from crossdock.spi import Broker, Lane, Message, Priority

VISIT = """
import asyncio, sys
from crossdock.plugins import create_broker
from crossdock.spi import Message, Priority

async def visit():
    broker = create_broker(sys.argv[1])
    await broker.open()
    await broker.enqueue([Message("visitor", "q", Priority.NORMAL, b"")])
    await broker.close()

asyncio.run(visit())
"""

FORK = """
import os, subprocess, sys
from crossdock import App

app = App(sys.argv[1])

@app.task(name="t")
def t(number: int) -> None: ...

ready, go = os.pipe(), os.pipe()
t.enqueue_sync(0)
child = os.fork()
if child == 0:
    t.enqueue_sync(1)
    os.write(ready[1], b".")
    os.read(go[0], 1)
    for number in range(2, 50):
        t.enqueue_sync(number)
    os._exit(0)
os.read(ready[0], 1)
t.enqueue_sync(50)
app.close_sync()
subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], check=True)
os.write(go[1], b".")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


async def opened(url: str) -> Broker:
    """An open broker."""
    broker = create_broker(url)
    await broker.open()
    return broker


async def ready_in(url: str, queue: str) -> int:
    """How many messages are ready."""
    broker = await opened(url)
    try:
        (stats,) = await broker.stats([queue])
        return stats.ready
    finally:
        await broker.close()


@pytest.mark.asyncio
async def test_a_second_broker_in_the_process_keeps_the_first_ones_locks(tmp_path: Path) -> None:
    """With two Brokers open here, a process that comes and goes does not take itself for the last and delete the log."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    first, second = await opened(url), await opened(url)
    await first.enqueue([Message("a", "q", Priority.NORMAL, b"")])
    subprocess.run([sys.executable, "-c", VISIT, url], check=True)
    assert (tmp_path / "tasks.db-wal").exists()
    assert await first.enqueue([Message("b", "q", Priority.NORMAL, b"")]) == []
    await second.close()
    await first.close()
    assert await ready_in(url, "q") == 3


def test_a_forked_child_and_its_parent_both_go_on(tmp_path: Path) -> None:
    """Parent and child enqueue after a fork; the parent closes, another process comes and goes; everything is stored."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    # From Python 3.12 on a fork with threads warns; this one is meant.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, url, VISIT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert asyncio.run(ready_in(url, "default")) == 51
    assert asyncio.run(ready_in(url, "q")) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.asyncio
async def test_a_waiting_receive_survives_a_fork(tmp_path: Path) -> None:
    """A fork closes the file for a moment; a receive that waits in the parent still gets what comes after it."""
    url = f"sqlite:///{tmp_path}/tasks.db"
    broker = await opened(url)
    waiting = asyncio.create_task(broker.receive([Lane("q", Priority.NORMAL, 1)], 1, 30.0))
    await broker.stats(["q"])  # the receive is with the broker's thread by now
    child = os.fork()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    subprocess.run([sys.executable, "-c", VISIT, url], check=True)
    (delivery,) = await asyncio.wait_for(waiting, 20)
    assert delivery.message.id == "visitor"
    await broker.close()
