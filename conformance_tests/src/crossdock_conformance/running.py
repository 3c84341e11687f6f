"""Running a scenario on a target: what it may find wrong, what it must not leave behind, and what its end means."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from crossdock.errors import UnsupportedCapability
from crossdock_conformance.lab import Lab
from crossdock_conformance.outcome import NotRun, Verdict
from crossdock_conformance.scenario import Hook, Need, Scenario, Without
from crossdock_conformance.target import Target

_DESCRIPTORS: Final = Path("/proc/self/fd")
_GOODBYE: Final = 5.0
"""Real seconds for what is closing to be gone."""
_LITTLE_PATIENCE: Final = 1.5
"""Real seconds after which something counts as not happening where the backend declares that it may not happen."""


def reason_not_to_run(scenario: Scenario, target: Target) -> str:
    """Why a scenario cannot be tried on a target; "" if it can."""
    for hook in sorted(scenario.hooks, key=lambda hook: hook.value):
        if getattr(target, hook.value) is None:
            return {
                Hook.SERVER: "nobody said how to stop and start the server",
                Hook.CUT: "nobody said how to cut connections to the server",
            }[hook]
    for need in scenario.needs:
        if need.without is Without.NOTHING and not need.declared(target.capabilities):
            return f"it is not declared that the backend {need.name}"
    return ""


def run(scenario: Scenario, target: Target) -> tuple[Verdict, str]:
    """Run a scenario. Returns PASSED, REFUSED or NOT_RUN with a note.

    Raises:
        AssertionError: The promise is broken; or it is kept, though the backend declares that it cannot keep it.
        Exception: Whatever the backend raised that it should not have.
    """
    if reason := reason_not_to_run(scenario, target):
        return Verdict.NOT_RUN, reason
    capabilities = target.capabilities  # asked before an event loop runs
    missing = [need for need in scenario.needs if not need.declared(capabilities)]
    with _nothing_left_behind(target):
        try:
            return _judge(scenario, target, missing)
        except NotRun as reason:
            return Verdict.NOT_RUN, str(reason)


def _judge(scenario: Scenario, target: Target, missing: Sequence[Need]) -> tuple[Verdict, str]:
    names = " and ".join(need.name for need in missing)
    ways = {need.without for need in missing}
    showing: dict[Without, type[Exception]] = {Without.REFUSED: UnsupportedCapability, Without.BROKEN: AssertionError}
    try:
        if inspect.iscoroutinefunction(scenario.function):
            asyncio.run(_in_a_lab(scenario, target, _LITTLE_PATIENCE if Without.BROKEN in ways else target.patience))
        else:
            scenario.function(target, **scenario.arguments)
    except tuple(kind for way, kind in showing.items() if way in ways) as error:
        return Verdict.REFUSED, str(error) if isinstance(error, UnsupportedCapability) else f"not declared: {names}"
    if missing:
        raise AssertionError(f"it is not declared that the backend {names}, yet this promise is kept: declare it, or refuse it")
    return Verdict.PASSED, ""


async def _in_a_lab(scenario: Scenario, target: Target, patience: float) -> None:
    lab = Lab(target)
    lab.patience = min(patience, target.patience)
    limit = asyncio.timeout(scenario.seconds)
    try:
        async with limit:
            if "broker" in inspect.signature(scenario.function).parameters:
                await scenario.function(broker=await lab.open(), lab=lab, **scenario.arguments)
            else:
                await scenario.function(lab=lab, **scenario.arguments)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise AssertionError(f"it did not end within {scenario.seconds:.0f} s") from error
    finally:
        await _close(lab, target.patience)
    left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    assert not left, f"background tasks outlived close(): {left}"


async def _close(lab: Lab, patience: float) -> None:
    try:
        async with asyncio.timeout(patience):
            await lab.close()
    except TimeoutError as error:
        raise AssertionError(f"closing what the scenario had opened did not end within {patience:.0f} s") from error


@contextmanager
def _nothing_left_behind(target: Target) -> Generator[None]:
    threads, descriptors = set(threading.enumerate()), _descriptors()
    residue = set(target.residue()) if target.residue else set[str]()
    gc.freeze()  # a collection then looks at what the scenario made, and not at all that pytest and others hold
    try:
        yield
        end = time.monotonic() + _GOODBYE
        for thread in set(threading.enumerate()) - threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), f"the thread {thread.name!r} was left running"
        gc.collect()
    finally:
        gc.unfreeze()
    _wait_until(lambda: not _descriptors() - descriptors, end, lambda: f"left open: {sorted(_descriptors() - descriptors)}")
    if (names := target.residue) is not None:
        _wait_until(lambda: not set(names()) - residue, end, lambda: f"left in the server: {sorted(set(names()) - residue)}")


def _wait_until(fact: Callable[[], bool], end: float, complaint: Callable[[], str]) -> None:
    while not fact():
        assert time.monotonic() < end, complaint()
        time.sleep(0.01)


def _descriptors() -> Counter[str]:
    """What this process has open, on Linux: files and sockets, by what they are."""
    found: Counter[str] = Counter()
    if not _DESCRIPTORS.exists():
        return found
    for number in os.listdir(_DESCRIPTORS):
        try:
            found[os.readlink(_DESCRIPTORS / number)] += 1
        except OSError:  # the one that the listing itself used
            continue
    return found
