"""Who may import whom, and who may look at the real clock. The rules are stated once, here, and kept by reading the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

CORE_NEEDS = {"msgspec", "pluggy"}
"""The third-party packages that core may import."""
CORE_MAY_USE = {("crossdock.supervisor", "uvloop")}
"""Extras, each in the one module that does without it, too."""

PUBLIC = {
    # for programs, and for their tests
    "crossdock",
    "crossdock.errors",
    "crossdock.testing",
    # for backends
    "crossdock.spi",
    # for tools that operate on brokers without a program, our own command line first
    "crossdock.clock",
    "crossdock.codec",
    "crossdock.config",
    "crossdock.durations",
    "crossdock.letters",
    "crossdock.loading",
    "crossdock.names",
    "crossdock.plugins",
    "crossdock.supervisor",
}
"""The modules of core that anybody may import: `__all__` of each, or without one what it defines without an underscore."""

MAY_IMPORT_BACKENDS = {"crossdock.testing"}
"""Core finds backends as anybody's: by entry point. Only the testing mode names the one it runs on."""

REAL_TIME_AND_CHANCE = {
    *(f"time.{name}" for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "sleep")),
    "asyncio.sleep",  # asyncio.sleep(0), which only lets others run, is free
    "datetime.datetime.now",
    "datetime.datetime.utcnow",
    "datetime.date.today",
    "os.urandom",
    "random.*",  # but random.Random is free as an annotation, and with a seed
    "secrets.*",
    "uuid.*",
}
"""What core takes from an injected Clock, Random or id source instead. Virtual clocks and seeded runs stand on that."""

ALLOWED = {
    # The real clock is here and nowhere else.
    "crossdock.clock": {"time.time_ns", "time.monotonic", "asyncio.sleep"},
    # What a program gets that brought no source of its own.
    "crossdock.app": {"random.Random"},
    "crossdock.ids": {"random.Random"},
}
"""Exceptions by module. Each says why."""


# --- reading ------------------------------------------------------------------------------------------


Sources = Mapping[str, ast.Module]


class Import(NamedTuple):
    """One import statement's name: `from target import name`, or `import target` with no name."""

    importer: str
    line: int
    target: str
    name: str | None
    for_types: bool
    """Under `if TYPE_CHECKING`: it does not happen at run time."""

    @property
    def top_level(self) -> str:
        return self.target.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.target}" + (f" ({self.name})" if self.name else "")


def sources_below(folder: Path) -> dict[str, ast.Module]:
    """Every module below `folder`, by its dotted name."""
    found: dict[str, ast.Module] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports_of(importer: str, sources: Sources) -> Iterator[Import]:
    """Every import in the module, also those inside functions. `from package import module` is an import of that module."""
    for_types = {
        inner
        for node in ast.walk(sources[importer])
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(sources[importer]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, node.lineno, alias.name, None, node in for_types)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{importer}, line {node.lineno}: relative imports are not read here"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                target, name = (module, None) if module in sources else (node.module, alias.name)
                yield Import(importer, node.lineno, target, name, node in for_types)


def all_imports(sources: Sources) -> Iterator[Import]:
    return (found for importer in sources for found in imports_of(importer, sources))


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


# --- the rules: each returns one sentence per breach ----------------------------------------------------


def spi_stands_alone(sources: Sources) -> list[str]:
    """The plugin interface imports of crossdock only itself and the errors."""
    return [
        str(found)
        for found in all_imports(sources)
        if is_in(found.importer, "crossdock.spi") and is_in(found.target, "crossdock") and not found.for_types
        if not is_in(found.target, "crossdock.spi") and found.target != "crossdock.errors"
    ]


def backends_know_only_the_interface(sources: Sources) -> list[str]:
    """A built-in backend imports what a stranger's may, and what is its own."""
    breaches: list[str] = []
    for found in all_imports(sources):
        if not is_in(found.importer, "crossdock.backends") or not is_in(found.target, "crossdock"):
            continue
        own = ".".join(found.importer.split(".")[:3])
        if found.target not in {"crossdock.spi", "crossdock.errors"} and not is_in(found.target, own):
            breaches.append(str(found))
    return breaches


def core_names_no_backend(sources: Sources) -> list[str]:
    """Nothing in core but the testing mode imports a backend."""
    return [
        str(found)
        for found in all_imports(sources)
        if is_in(found.target, "crossdock.backends") and not is_in(found.importer, "crossdock.backends")
        if found.importer not in MAY_IMPORT_BACKENDS
    ]


def core_needs_little(sources: Sources) -> list[str]:
    """Core imports the standard library, itself and `CORE_NEEDS`, and an extra only where `CORE_MAY_USE` says."""
    free = {*sys.stdlib_module_names, *CORE_NEEDS, "crossdock"}
    return [
        str(found)
        for found in all_imports(sources)
        if is_in(found.importer, "crossdock") and found.top_level not in free
        if (found.importer, found.top_level) not in CORE_MAY_USE
    ]


def others_use_public_names(sources: Sources) -> list[str]:
    """What is not core imports of core only public names of public modules."""
    return [
        str(found)
        for found in all_imports(sources)
        if not is_in(found.importer, "crossdock") and is_in(found.target, "crossdock")
        if found.target not in PUBLIC or (found.name is not None and found.name not in public_names(sources[found.target]))
    ]


def public_names(module: ast.Module) -> set[str]:
    """What the module lists in `__all__`; without one, what it defines under a name without an underscore."""
    defined: set[str] = set()
    for node in module.body:
        match node:
            case ast.Assign(targets=[ast.Name("__all__")]):
                return set(ast.literal_eval(node.value))
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                defined.add(name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                defined.add(name)
            case _:
                pass
    return {name for name in defined if not name.startswith("_")}


def no_cycles(sources: Sources) -> list[str]:
    """No module of core leads back to itself by imports that happen at run time, inside functions or not."""
    edges: dict[str, set[str]] = {module: set() for module in sources}
    for found in all_imports(sources):
        if found.target in sources and found.target != found.importer and not found.for_types:
            edges[found.importer].add(found.target)
    breaches: list[str] = []
    while leaves := [module for module, targets in edges.items() if not targets]:
        edges = {module: targets.difference(leaves) for module, targets in edges.items() if module not in leaves}
    for start in edges:  # what is left is on a cycle or leads to one
        path = [start]
        while (following := min(edges[path[-1]])) not in path:
            path.append(following)
        if following == start == min(path):  # the same cycle is met from each of its modules
            breaches.append(" imports ".join([*path, start]))
    return breaches


def time_and_chance_are_injected(sources: Sources) -> list[str]:
    """Core reads no clock, sleeps on none and throws no dice but the injected ones, except where `ALLOWED` says why."""
    return [
        f"{module}, line {line}, uses {what}"
        for module, tree in sources.items()
        if is_in(module, "crossdock")
        for line, what in real_time_and_chance(tree)
        if what not in ALLOWED.get(module, ())
    ]


def real_time_and_chance(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every use of something in `REAL_TIME_AND_CHANCE`, under whatever name it was imported."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.asname: alias.name for alias in node.names if alias.asname}
            imported |= {alias.name.partition(".")[0]: alias.name.partition(".")[0] for alias in node.names if not alias.asname}
        elif isinstance(node, ast.ImportFrom):
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name | ast.Attribute):
            continue
        first, dot, rest = ast.unparse(node).partition(".")
        what = f"{imported.get(first, '')}{dot}{rest}"
        if what not in REAL_TIME_AND_CHANCE and ("." not in what or f"{what.partition('.')[0]}.*" not in REAL_TIME_AND_CHANCE):
            continue
        call = calls.get(node)
        repeatable = what == "random.Random" and (call is None or call.args)
        only_yields = what == "asyncio.sleep" and call is not None and ast.unparse(call.args[0]) == "0"
        if not repeatable and not only_yields:
            yield node.lineno, what


RULES = (
    spi_stands_alone,
    backends_know_only_the_interface,
    core_names_no_backend,
    core_needs_little,
    others_use_public_names,
    no_cycles,
    time_and_chance_are_injected,
)


# --- the repository keeps the rules ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def repository() -> Sources:
    """Every module of every distribution."""
    places = [file.parent / "src" for file in REPOSITORY.glob("*/pyproject.toml")]
    sources = {name: module for place in places for name, module in sources_below(place).items()}
    assert {"crossdock", "crossdock.spi", "crossdock_cli.main", "crossdock_conformance.lab"} <= set(sources)
    return sources


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_is_kept(repository: Sources, rule: Callable[[Sources], list[str]]) -> None:
    """Every rule about imports, clocks and chance holds for every module of every distribution."""
    assert rule(repository) == []


def test_exceptions_are_used(repository: Sources) -> None:
    """Every exception in `ALLOWED` and `MAY_IMPORT_BACKENDS` is still needed, so that the lists only hold what is true."""
    used = {module: {what for _, what in real_time_and_chance(repository[module])} for module in ALLOWED}
    assert {module: names - used[module] for module, names in ALLOWED.items() if names - used[module]} == {}
    assert {found.importer for found in all_imports(repository) if is_in(found.target, "crossdock.backends")} >= MAY_IMPORT_BACKENDS


# --- the rules bite -------------------------------------------------------------------------------------

SMALL = {
    "crossdock": "from crossdock.app import App\n__all__ = ['App']",
    "crossdock.app": "import msgspec\nfrom crossdock.spi import Broker",
    "crossdock.errors": "from collections.abc import Sequence\nclass CrossdockError(Exception): ...\n_private = 1",
    "crossdock.spi": "from crossdock.errors import CrossdockError\n__all__ = ['Broker']\nclass Broker: ...",
    "crossdock.backends.memory": "from crossdock.spi import Broker",
    "crossdock_cli": "from crossdock import App\nfrom crossdock.spi import Broker\nfrom crossdock.errors import CrossdockError",
}
"""A small repository that keeps every rule."""


def breaches(rule: Callable[[Sources], list[str]], **changed: str) -> list[str]:
    """What the rule finds when modules of `SMALL` are changed or added (`__` stands for the dot)."""
    sources = SMALL | {module.replace("__", "."): source for module, source in changed.items()}
    return rule({module: ast.parse(source) for module, source in sources.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_small_repository_keeps_the_rules(rule: Callable[[Sources], list[str]]) -> None:
    """No rule finds fault with a repository that has none."""
    assert breaches(rule) == []


@pytest.mark.parametrize(
    "source",
    ["import crossdock.app", "from crossdock.app import App", "from crossdock import app", "def f():\n  from crossdock import App"],
)
def test_spi_that_imports_core_is_found(source: str) -> None:
    """The plugin interface may not reach into core, not even inside a function."""
    [breach] = breaches(spi_stands_alone, crossdock__spi=source)
    assert breach.startswith("crossdock.spi, line ")


def test_spi_may_import_for_types() -> None:
    """An import for annotations alone does not bind the plugin interface to core."""
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from crossdock.app import App"
    assert breaches(spi_stands_alone, crossdock__spi=source) == []


@pytest.mark.parametrize(
    "source",
    [
        "from crossdock.app import App",
        "from crossdock import App",
        "from crossdock.backends.sqlite import schema",
        "from crossdock.spi.values import Message",
    ],
)
def test_backend_that_knows_more_than_a_strangers_is_found(source: str) -> None:
    """A built-in backend gets by with what a stranger's has: the front of the interface and the errors."""
    assert len(breaches(backends_know_only_the_interface, crossdock__backends__memory=source)) == 1


def test_backend_may_import_its_own_modules() -> None:
    """A backend of several modules may import these."""
    own = {"crossdock__backends__sqlite": "from crossdock.backends.sqlite import schema", "crossdock__backends__sqlite__schema": ""}
    assert breaches(backends_know_only_the_interface, **own) == []


@pytest.mark.parametrize("source", ["import crossdock.backends.memory", "from crossdock.backends import memory"])
def test_core_that_names_a_backend_is_found(source: str) -> None:
    """Core reaches backends through their entry points; the testing mode alone may name one."""
    assert len(breaches(core_names_no_backend, crossdock__app=source)) == 1
    assert breaches(core_names_no_backend, crossdock__testing=source) == []


@pytest.mark.parametrize(
    "source", ["import redis", "from google.protobuf import message", "def f():\n  import typer", "import uvloop"]
)
def test_new_dependency_of_core_is_found(source: str) -> None:
    """Core has no third-party import that its users did not agree to."""
    assert len(breaches(core_needs_little, crossdock__app=source)) == 1
    assert breaches(core_needs_little, crossdock_cli=source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import crossdock.app",
        "from crossdock import app",
        "from crossdock.app import App",
        "from crossdock.spi import secret",
        "from crossdock.errors import _private",
        "def f():\n  from crossdock.errors import Sequence",
    ],
)
def test_command_line_that_goes_behind_the_front_is_found(source: str) -> None:
    """The command line can do nothing that a user's own program could not."""
    assert len(breaches(others_use_public_names, crossdock_cli=source)) == 1


def test_cycle_is_found() -> None:
    """Modules that lead back to themselves are named in their order, once."""
    cycle = {
        "crossdock__a": "import crossdock.b",
        "crossdock__b": "def f():\n  from crossdock import c",
        "crossdock__c": "import crossdock.a",
    }
    assert breaches(no_cycles, **cycle) == ["crossdock.a imports crossdock.b imports crossdock.c imports crossdock.a"]


def test_importing_the_front_from_behind_is_a_cycle() -> None:
    """A core module that imports the package's front imports itself."""
    assert breaches(no_cycles, crossdock__app="from crossdock import Queue") == [
        "crossdock imports crossdock.app imports crossdock"
    ]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import time\ntime.sleep(1)", "time.sleep"),
        ("import time as t\nnow = t.monotonic", "time.monotonic"),
        ("from time import time\ntime()", "time.time"),
        ("from datetime import datetime, UTC\ndatetime.now(UTC)", "datetime.datetime.now"),
        ("import random\nrandom.random()", "random.random"),
        ("import random\nrandom.Random()", "random.Random"),
        ("from random import shuffle\nshuffle([])", "random.shuffle"),
        ("import uuid\nuuid.uuid4()", "uuid.uuid4"),
        ("import os\nos.urandom(8)", "os.urandom"),
        ("import asyncio\nasync def f(): await asyncio.sleep(1)", "asyncio.sleep"),
        ("import asyncio\nasync def f(x): await asyncio.sleep(x)", "asyncio.sleep"),
    ],
)
def test_own_clock_or_dice_are_found(source: str, what: str) -> None:
    """Core cannot look at the real time, wait in it, or throw dice of its own, under any name."""
    [breach] = breaches(time_and_chance_are_injected, crossdock__task=source)
    assert breach.startswith("crossdock.task, line ")
    assert breach.endswith(f", uses {what}")


def test_what_repeats_is_free() -> None:
    """The injected source's type, a seeded one, letting others run, and a parameter called `time` are no use of time or chance."""
    source = (
        "import asyncio, random\nrandom.Random(0)\nasync def f(rng: random.Random, time):\n  time.sleep(1); await asyncio.sleep(0)"
    )
    assert breaches(time_and_chance_are_injected, crossdock__task=source) == []
