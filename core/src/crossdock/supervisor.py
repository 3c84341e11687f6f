"""Running workers as processes: signals, logging, and several processes kept alive.

With one process the worker runs right here. With several, this process starts each as `python -m crossdock.supervisor`, forwards
signals and restarts what dies. A child whose supervisor dies notices it (its standard input ends) and shuts down by itself.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Final

import msgspec

from crossdock.errors import ConfigurationError, CrossdockError
from crossdock.loading import load_app
from crossdock.logs import log_to_stderr
from crossdock.worker import Worker, WorkerOptions

SUCCESS: Final = 0
FAILURE: Final = 1
USAGE: Final = 2
RESTART_PAUSE: Final = 0.5
"""Seconds before a process that died is started again; doubled while it keeps dying young."""
RESTART_PAUSE_MAX: Final = 30.0
YOUNG: Final = 10.0
"""Seconds of life under which a process counts as having died young."""
MAX_PROCESSES: Final = 1000

_log = logging.getLogger("crossdock.worker")


class _Order(msgspec.Struct):
    """What a child is told on its command line."""

    reference: str
    options: WorkerOptions


def run(reference: str, options: WorkerOptions, processes: int = 1) -> int:
    """Run workers until they are told to stop by SIGTERM or SIGINT; a second signal ends the grace period.

    Args:
        reference: `module:attribute` or `path/to/file.py:attribute` of the App.
        options: For each process.
        processes: How many, 1 to 1,000.

    Returns:
        Exit code: 0 stopped or, in burst mode, done; 1 the broker cannot be reached or broke; 2 wrong configuration.
        Errors of the user are one line on standard error.
    """
    log_to_stderr()
    try:
        if not 1 <= processes <= MAX_PROCESSES:
            raise ConfigurationError(f"processes must be from 1 to {MAX_PROCESSES:,}, not {processes}")
        if processes == 1:
            return _run_one(reference, options)
        Worker.check(load_app(reference), options)  # say what is wrong once, not once per process
        return asyncio.run(_Supervisor(_Order(reference, options), processes).run())
    except CrossdockError as error:
        _log.error("%s", error)
        return USAGE if isinstance(error, ConfigurationError) else FAILURE


def _run_one(reference: str, options: WorkerOptions, *, supervised: bool = False) -> int:
    app = load_app(reference)
    # What is loaded by now lives as long as the process: the collector need not look at it again and again.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_work(Worker(app, options), supervised=supervised))
    return SUCCESS


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed (the extra `uvloop`), else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def _work(worker: Worker, *, supervised: bool) -> None:
    loop = asyncio.get_running_loop()

    def stop(why: str) -> None:
        _log.info("%s: stopping; again to stop at once", why)
        worker.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    if supervised:

        def orphaned() -> None:
            loop.remove_reader(sys.stdin.fileno())
            stop("the supervisor is gone")

        loop.add_reader(sys.stdin.fileno(), orphaned)
    names = ", ".join(f"{queue.name}={weight}" for queue, weight in worker.queues)
    _log.info(
        "worker %s: %d tasks, queues %s, concurrency %d", worker.name, len(worker.app.tasks), names, worker.options.concurrency
    )
    try:
        report = await worker.run()
    finally:
        await worker.app.close()
    _log.info(
        "worker %s ended: %d executed, %d returned, %d leases lost",
        worker.name,
        report.executed,
        report.returned,
        report.leases_lost,
    )
    await asyncio.to_thread(worker.app.close_sync)  # sync handlers may have used the sync twins
    if report.still_running:
        # asyncio.run would wait for them, a thread could not even be told: neither has ended when it was asked to.
        _log.warning("%d handlers still run; the process ends without them", report.still_running)
        logging.shutdown()
        os._exit(SUCCESS)


class _Supervisor:
    def __init__(self, order: _Order, processes: int) -> None:
        self._order = order
        self._count = processes
        self._children: dict[int, asyncio.subprocess.Process] = {}
        self._stopping = asyncio.Event()
        self._misconfigured = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number.name)
        await asyncio.gather(*(self._keep(number) for number in range(1, self._count + 1)))
        return USAGE if self._misconfigured else SUCCESS

    def _stop(self, why: str) -> None:
        _log.info("%s: stopping %d processes; again to stop at once", why, len(self._children))
        self._stopping.set()
        for child in self._children.values():
            child.send_signal(signal.SIGTERM)

    async def _keep(self, number: int) -> None:
        """Keep one process running until it ends well or all are to stop."""
        loop = asyncio.get_running_loop()
        pause = RESTART_PAUSE
        while not self._stopping.is_set():
            born = loop.time()
            code = await self._run_child(number)
            if self._stopping.is_set() or code == SUCCESS:
                return
            if code == USAGE:
                self._misconfigured = True
                self._stop(f"process {number} found the configuration wrong")
                return
            pause = RESTART_PAUSE if loop.time() - born >= YOUNG else min(pause * 2, RESTART_PAUSE_MAX)
            what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            _log.error("process %d %s; starting another in %g s", number, what, pause)
            try:
                await asyncio.wait_for(self._stopping.wait(), pause)
            except TimeoutError:
                continue

    async def _run_child(self, number: int) -> int:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "crossdock.supervisor",
            msgspec.json.encode(self._order).decode(),
            stdin=asyncio.subprocess.PIPE,  # ends with us, which tells the child
            start_new_session=True,  # a terminal's Ctrl-C reaches us only, and is forwarded once
        )
        self._children[number] = child
        if self._stopping.is_set():
            child.send_signal(signal.SIGTERM)
        try:
            return await child.wait()
        finally:
            del self._children[number]


def _run_child_process() -> int:
    order = msgspec.json.decode(sys.argv[1], type=_Order)
    log_to_stderr()
    try:
        return _run_one(order.reference, order.options, supervised=True)
    except CrossdockError as error:
        _log.error("%s", error)
        return USAGE if isinstance(error, ConfigurationError) else FAILURE


if __name__ == "__main__":
    sys.exit(_run_child_process())
