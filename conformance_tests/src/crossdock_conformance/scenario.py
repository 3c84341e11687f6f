"""Scenario: one promise of the interface, as a function that fails if the promise is not kept.

A scenario is an async function in a module of `scenarios`; the module is its group, its docstring the sentence that it proves::

    @scenario(state=State, needs=lambda state: [listing(state)])
    async def peek_changes_nothing(broker: Broker, lab: Lab, state: State) -> None:
        '''However often a state is listed, nothing in it changes.'''

It is called with an open Broker and a `Lab`, or with the `Lab` alone, and with one value of each of its cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from typing import Any, Final, TypeVar, cast

from crossdock.spi import Capabilities, State, Support, Survives

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE: Final = "crossdock_conformance.scenarios"
TIME_LIMIT: Final = 60.0
"""Real seconds a scenario may take unless it says otherwise."""


class Without(Enum):
    """What has to be seen where a need is declared to be unmet."""

    REFUSED = "refused"
    """Asking for it raises `UnsupportedCapability`, or refuses the item with that."""
    BROKEN = "broken"
    """There is nothing to refuse: the scenario's promise just does not hold."""
    NOTHING = "nothing"
    """It cannot be tried."""


@dataclass(frozen=True)
class Need:
    """Something a scenario takes for granted, which a backend may declare not to have."""

    name: str
    """Completes "it ..."."""
    declared: Callable[[Capabilities], bool]
    without: Without = Without.REFUSED


class Hook(Enum):
    """Something only whoever set up the server can do; see `Target`."""

    SERVER = "server"
    CUT = "cut"


def listing(*states: State) -> Need:
    """It lists these states."""
    names = ", ".join(state.value for state in states)
    return Need(f"lists {names} messages", lambda capabilities: capabilities.listable >= set(states))


def removing(state: State) -> Need:
    """It removes messages from this state."""
    return Need(f"removes {state.value} messages", lambda capabilities: state in capabilities.removable)


def purging(state: State) -> Need:
    """It purges this state."""
    return Need(f"purges {state.value} messages", lambda capabilities: state in capabilities.purgeable)


def _has(name: str) -> Callable[[Capabilities], bool]:
    return lambda capabilities: getattr(capabilities, name).support is not Support.UNSUPPORTED


DELAY: Final = Need("delays messages", _has("delay"))
BY_ID: Final = Need("finds messages by id", _has("by_id"))
LIST_QUEUES: Final = Need("lists queues", _has("list_queues"))
FENCING: Final = Need("refuses settlements of a lost lease", _has("fencing"), Without.BROKEN)
DEDUPLICATION: Final = Need("stores an (id, generation) once", _has("deduplication"), Without.BROKEN)
PROCESSES: Final = Need(
    "survives the end of a process", lambda capabilities: Survives.PROCESS in capabilities.survives, Without.NOTHING
)


@dataclass(frozen=True)
class Scenario:
    """One promise, perhaps one case of it."""

    group: str
    name: str
    case: str
    """What tells cases apart; "" if there is only one."""
    promise: str
    """The sentence it proves."""
    function: Callable[..., Any]
    arguments: Mapping[str, Any]
    needs: Sequence[Need]
    hooks: frozenset[Hook]
    seconds: float
    """Real seconds after which it has failed."""

    @property
    def id(self) -> str:
        """Its name in every report: `group.name[case]`."""
        return f"{self.group}.{self.name}" + (f"[{self.case}]" if self.case else "")


@dataclass(frozen=True)
class _Plan:
    cases: Mapping[str, Iterable[Any] | Mapping[str, Any]]
    needs: Callable[..., Sequence[Need]]
    hooks: frozenset[Hook]
    seconds: float


def scenario(
    *,
    needs: Sequence[Need] | Callable[..., Sequence[Need]] = (),
    hooks: Iterable[Hook] = (),
    seconds: float = TIME_LIMIT,
    **cases: Iterable[Any] | Mapping[str, Any],
) -> Callable[[F], F]:
    """Make a function a scenario.

    Args:
        needs: What it takes for granted, or a function that says so for the values of a case.
        hooks: What it does to the server.
        seconds: Real seconds after which it has failed.
        cases: For each of these parameters, its values, or labels and values. Every combination is a case.
    """

    def asked(**values: Any) -> Sequence[Need]:
        return needs(**values) if callable(needs) else needs

    def mark(function: F) -> F:
        function.__scenario__ = _Plan(cases, asked, frozenset(hooks), seconds)  # type: ignore[attr-defined]
        return function

    return mark


def all_scenarios() -> list[Scenario]:
    """Every scenario of the suite, group by group, in the order of `scenarios.GROUPS` and of the source."""
    modules = {group: import_module(f"{_PACKAGE}.{group}") for group in import_module(_PACKAGE).GROUPS}
    return [scenario for group, module in modules.items() for scenario in scenarios_of(vars(module), group)]


def scenarios_of(names: Mapping[str, Any], group: str) -> list[Scenario]:
    """The scenarios among the names of a module."""
    return [case for value in names.values() if hasattr(value, "__scenario__") for case in _expand(value, group)]


def _expand(function: Any, group: str) -> Iterable[Scenario]:
    plan: _Plan = function.__scenario__
    choices = [[(name, label, value) for label, value in _labelled(values)] for name, values in plan.cases.items()]
    for chosen in itertools.product(*choices):
        arguments = {name: value for name, _, value in chosen}
        yield Scenario(
            group=group,
            name=function.__name__,
            case=",".join(label for _, label, _ in chosen),
            promise=" ".join((function.__doc__ or "").split()),
            function=function,
            arguments=arguments,
            needs=tuple(plan.needs(**arguments)),
            hooks=plan.hooks,
            seconds=plan.seconds,
        )


def _labelled(values: Iterable[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Values with the labels that they bear in ids."""
    if isinstance(values, Mapping):
        return list(cast(Mapping[str, Any], values).items())
    return [(str(value.value) if isinstance(value, Enum) else str(value), value) for value in values]
