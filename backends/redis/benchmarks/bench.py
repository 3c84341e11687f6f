"""What the steps have in common: where they work, how they enqueue, and what they return."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from observed import Observed

from crossdock.spi import Priority

CHUNK = 10_000
"""Tasks of one `enqueue_many`."""
FAR = 30 * 86_400.0
"""Seconds of delay of what does not become due here."""

Row = dict[str, str | float]
"""One line of a table; the keys are its columns."""


class Table(NamedTuple):
    """What a step returns."""

    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Bench:
    """Where the steps work, and how much."""

    url: str
    server: Observed
    program: Any
    """The server's program, a `BinarySource`; None if the server was given by its URL."""
    tasks: int
    """What is a million in the descriptions of the steps."""
    sample: int
    """Tasks that one rate is measured over."""
    repeat: int
    """Times each cost is measured."""


@dataclass(frozen=True)
class Load:
    """What kind of tasks, and who executes them."""

    queues: Mapping[str, int] = field(default_factory=lambda: {"q0": 1})
    """The queues that the tasks go to in turn, and their weights."""
    levels: Sequence[Priority] = (Priority.NORMAL,)
    """The levels that they have in turn."""
    text: str = "hello"
    """The argument that makes them long."""
    processes: int = 1


async def fill(app: Any, count: int, load: Load, **options: Any) -> float:
    """Enqueue so many tasks and return the seconds it took."""
    ways = [app.tasks["noop"].options(queue=queue, priority=level, **options) for level in load.levels for queue in load.queues]
    turn = itertools.cycle(ways)
    began = time.perf_counter()
    for start in range(0, count, CHUNK):
        await app.enqueue_many([next(turn).message(i, i + 1, load.text) for i in range(start, min(start + CHUNK, count))])
    return time.perf_counter() - began
