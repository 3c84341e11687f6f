"""How the suite runs a scenario, what it makes of its end, and what it lets nobody leave behind."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from crossdock.errors import UnsupportedCapability
from crossdock.spi import State
from crossdock_conformance import Lab, Need, NotRun, Scenario, Target, Verdict, all_scenarios, running, scenarios
from crossdock_conformance.running import run
from crossdock_conformance.scenario import Hook, Without, listing, scenario, scenarios_of

HAS = Need("has it", lambda capabilities: True)
LACKS = Need("lacks it", lambda capabilities: False)
LACKS_SILENTLY = Need("lacks it", lambda capabilities: False, Without.BROKEN)
CANNOT_TRY = Need("lacks it", lambda capabilities: False, Without.NOTHING)


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    """The memory broker, for scenarios that leave things behind for good."""
    monkeypatch.setattr(running, "_GOODBYE", 0.2)
    return Target("memory://machinery", patience=2.0)


def made(function: Callable[..., Any], **options: Any) -> Scenario:
    """One scenario of a function."""
    (only,) = scenarios_of({"f": scenario(**options)(function)}, "made")
    return only


async def good(lab: Lab) -> None:
    """It holds."""


async def wrong(lab: Lab) -> None:
    """It does not hold."""
    raise AssertionError("no")


async def refused(lab: Lab) -> None:
    """It is refused."""
    raise UnsupportedCapability("This broker cannot do that.")


# --- verdicts ---


@pytest.mark.parametrize(
    ("function", "need", "verdict"),
    [
        (good, HAS, Verdict.PASSED),
        (refused, LACKS, Verdict.REFUSED),
        (wrong, LACKS_SILENTLY, Verdict.REFUSED),
        (wrong, CANNOT_TRY, Verdict.NOT_RUN),
    ],
)
def test_verdicts(target: Target, function: Callable[..., Any], need: Need, verdict: Verdict) -> None:
    """What is declared must hold; what is declared missing must show as that kind of lack does."""
    assert run(made(function, needs=[need]), target)[0] is verdict


@pytest.mark.parametrize(
    ("function", "need", "text"),
    [
        (wrong, HAS, "no"),
        (refused, HAS, "cannot do that"),
        (good, LACKS, "declare it, or refuse it"),
        (good, LACKS_SILENTLY, "declare it, or refuse it"),
        (wrong, LACKS, "no"),
    ],
)
def test_failures(target: Target, function: Callable[..., Any], need: Need, text: str) -> None:
    """A broken promise fails, and so does a kept one that was declared impossible, and a lack that shows in the wrong way."""
    with pytest.raises((AssertionError, UnsupportedCapability), match=text):
        run(made(function, needs=[need]), target)


def test_what_cannot_be_tried_is_said(target: Target) -> None:
    """A scenario that needs a hook that nobody gave, or finds itself impossible, is not run, for a reason."""

    async def impossible(lab: Lab) -> None:
        raise NotRun("there is no moon tonight")

    assert run(made(impossible), target) == (Verdict.NOT_RUN, "there is no moon tonight")
    assert run(made(good, hooks=[Hook.SERVER]), target)[1] == "nobody said how to stop and start the server"
    assert run(made(good, hooks=[Hook.CUT]), dataclasses.replace(target, cut=lambda: None))[0] is Verdict.PASSED


def test_a_scenario_that_hangs_fails(target: Target) -> None:
    """A scenario has a time limit of its own."""

    async def hangs(lab: Lab) -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="did not end within 1 s"):
        run(made(hangs, seconds=1.0), target)


def test_a_scenario_that_lacks_something_may_still_find_itself_impossible(target: Target) -> None:
    """Whatever is declared missing, "not run" is no failure."""

    async def impossible(lab: Lab) -> None:
        raise NotRun("there is no moon tonight")

    assert run(made(impossible, needs=[LACKS]), target)[0] is Verdict.NOT_RUN


# --- what is left behind ---


def test_tasks_threads_and_descriptors_are_found(target: Target) -> None:
    """What a scenario leaves running or open fails it, by name."""
    kept: list[Any] = []
    stop = threading.Event()

    async def leaves_a_task(lab: Lab) -> None:
        kept.append(asyncio.create_task(asyncio.sleep(3600), name="left-task"))

    async def leaves_a_thread(lab: Lab) -> None:
        thread = threading.Thread(target=stop.wait, name="left-thread")
        thread.start()

    async def leaves_a_socket(lab: Lab) -> None:
        kept.append(socket.socket())

    async def leaves_a_file(lab: Lab) -> None:
        kept.append(tempfile.TemporaryFile())  # noqa: SIM115 - left open is what it is about

    try:
        for function, text in (
            (leaves_a_task, "left-task"),
            (leaves_a_thread, "left-thread"),
            (leaves_a_socket, "socket"),
            (leaves_a_file, "left open"),
        ):
            with pytest.raises(AssertionError, match=text):
                run(made(function), target)
    finally:
        stop.set()
        for thing in kept[1:]:
            thing.close()


def test_residue_in_the_server_is_found(target: Target) -> None:
    """What the target names after a scenario and not before fails it; what was there before does not."""
    names = {"old"}

    def residue() -> Iterable[str]:
        return names

    async def leaves_a_key(lab: Lab) -> None:
        names.add("key-of-mine")

    target = dataclasses.replace(target, residue=residue)
    assert run(made(good), target)[0] is Verdict.PASSED
    with pytest.raises(AssertionError, match="key-of-mine"):
        run(made(leaves_a_key), target)

    async def leaves_another(lab: Lab) -> None:
        names.add("another-key")
        raise UnsupportedCapability("This broker cannot do that.")

    with pytest.raises(AssertionError, match="another-key"):
        run(made(leaves_another, needs=[LACKS]), target)


def test_the_lab_cleans_up(tmp_path: Path) -> None:
    """After a scenario no queue is left in the store, whatever was in it."""
    target = Target(f"sqlite:///{tmp_path}/a.db")

    async def leaves_messages(lab: Lab) -> None:
        broker, other = await lab.open(), await lab.open("-x", queues=("y",))
        await lab.enqueue(broker, *lab.messages(3), lab.message(queue="another"))
        await lab.enqueue(other, lab.message(queue="z"))
        await lab.take(broker, limit=1)
        spaces.extend([lab.namespace, lab.namespace + "-x"])

    spaces: list[str] = []
    run(made(leaves_messages), target)

    async def look(namespace: str) -> int:
        broker = target.make_broker(namespace, Lab(target).clock)
        await broker.open()
        try:
            return len(await broker.stats())
        finally:
            await broker.close()

    assert [asyncio.run(look(namespace)) for namespace in spaces] == [0, 0]


# --- labs ---


def test_time_is_virtual_where_it_can_be(tmp_path: Path) -> None:
    """On a backend that lives by the given clock hours pass at once; in real time they do not."""

    async def an_hour(lab: Lab) -> None:
        before = lab.clock.time_ms()
        await lab.pass_time(3600 if lab.virtual else 0.01)
        passed.append(lab.clock.time_ms() - before)

    passed: list[int] = []
    began = time.monotonic()
    run(made(an_hour), Target("memory://machinery"))
    run(made(an_hour), Target("memory://machinery", real_time=True))
    assert passed[0] == 3_600_001
    assert 10 <= passed[1] < 60_000
    assert time.monotonic() - began < 60


def test_holds_sees_each_difference(target: Target) -> None:
    """A wrong id, a wrong order, a wrong state and a wrong count each fail."""

    async def looks(lab: Lab) -> None:
        broker = await lab.open()
        await lab.enqueue(broker, lab.message("a"), lab.message("b"), lab.message("later", delay_ms=9_000_000))
        right = {State.READY: ["a", "b"], State.SCHEDULED: ["later"]}
        await lab.holds(broker, right)
        await lab.holds(broker, {**right, State.READY: ["b", "a"]}, in_order=False)
        for bad in ({**right, State.READY: ["b", "a"]}, {**right, State.READY: ["a"]}, {State.READY: ["a", "b"]}, {}):
            with pytest.raises(AssertionError):
                await lab.holds(broker, bad)

    run(made(looks), target)


# --- the list of scenarios ---


def test_scenarios_are_well_formed() -> None:
    """Every scenario has an id of its own, a group that is its module, and a sentence."""
    scenarios = all_scenarios()
    ids = [each.id for each in scenarios]
    assert len(ids) == len(set(ids))
    for each in scenarios:
        assert each.promise.endswith("."), f"{each.id} states nothing"
        assert not each.promise[0].islower(), f"{each.id} states no sentence"


def test_cases_multiply() -> None:
    """Cases of several parameters combine; labels come from names where there are names; needs may depend on the case."""

    async def f(lab: Lab, state: State, size: int) -> None:
        """It holds."""

    cases = scenarios_of(
        {
            "f": scenario(state=[State.READY, State.DEAD], size={"small": 1, "big": 9}, needs=lambda state, size: [listing(state)])(
                f
            )
        },
        "made",
    )
    assert [case.id for case in cases] == [f"made.f[{state},{size}]" for state in ("ready", "dead") for size in ("small", "big")]
    assert [case.needs[0].name for case in cases[::2]] == ["lists ready messages", "lists dead messages"]


def test_every_group_is_listed() -> None:
    """No module of scenarios is forgotten, and a scenario that is imported from another group counts once."""
    folder = Path(str(scenarios.__file__)).parent
    assert sorted(scenarios.GROUPS) == sorted(file.stem for file in folder.glob("*.py") if file.stem != "__init__")
