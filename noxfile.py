"""Every habit of the project, one session each.

`./run` lists them, `./run NAME` runs one, `./run checks` what CI runs. Virtual environments are kept in .nox, one that most
sessions share, and installed into again only when a pyproject.toml or constraints.txt changed.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

from distributions import project_files, read, sibling  # noqa: E402

CONSTRAINTS = ROOT / "constraints.txt"
PLACES = [str(file.parent.relative_to(ROOT)) for file in project_files()]  # "." is the meta-distribution, which has no code
CODE = PLACES[1:]
SUITE = "conformance_tests"
BACKENDS = [place for place in CODE if place.startswith("backends/")]
LONG = [
    str(file.relative_to(ROOT))
    for place in BACKENDS
    for pattern in ("test_conformance_cluster.py", "test_slow_*.py")
    for file in sorted((ROOT / place / "tests").glob(pattern))
]
"""Tests that take too long for CI."""
EXAMPLE = "docs/examples/crossdock-plainfiles"
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
OTHER_PYTHONS = [version for version in ("3.11", "3.12", "3.13") if version != THIS_PYTHON]

# What CI runs, and the seconds each part may take there on two cores with nothing installed or cached. The sum stays below
# CI_LIMIT for good: who needs more takes it from another line.
CI_LIMIT = 18 * 60
BUDGETS = {
    "versions": 2,
    "lint": 5,
    "types": 55,
    f"tests-{THIS_PYTHON}": 80,
    "conformance": 150,
    "redis": 165,
    "rabbitmq": 260,
    "nats": 110,
    "docs": 115,
    "demo": 50,
    "package": 65,
}
assert sum(BUDGETS.values()) < CI_LIMIT

nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.sessions = list(BUDGETS)

# A broker or an option from the caller's shell must not reach the tests. CROSSDOCK_REQUIRE and CROSSDOCK_TEST_... are meant for them.
MEANT_FOR_TESTS = ("CROSSDOCK_REQUIRE", "CROSSDOCK_TEST_")
for variable in [name for name in os.environ if name.startswith("CROSSDOCK_") and not name.startswith(MEANT_FOR_TESTS)]:
    del os.environ[variable]


def is_installed(version: str) -> bool:
    """Whether this Python runs here. To be on PATH is not enough: pyenv puts stand-ins there for those not selected."""
    try:
        return subprocess.run([f"python{version}", "-c", ""], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


PYTHONS = [THIS_PYTHON, *filter(is_installed, OTHER_PYTHONS)]


# --- what sessions share ------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What one session came to."""

    name: str
    seconds: float
    passed: int
    failed: int
    skipped: int


outcomes: list[Outcome] = []
last_end = time.monotonic()


def part(function: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
    """Note the session's seconds (since the one before, so that making its environment counts) and what passed and failed."""

    @functools.wraps(function)
    def noted(session: nox.Session) -> None:
        global last_end
        results(session).unlink(missing_ok=True)
        succeeded = False
        try:
            function(session)
            succeeded = True
        finally:
            now = time.monotonic()
            outcomes.append(Outcome(session.name, now - last_end, *count(results(session), succeeded)))
            last_end = now

    return noted


def results(session: nox.Session) -> Path:
    """Where the session's pytest, if it runs one, writes its results."""
    return ROOT / ".nox" / "results" / f"{session.name}.xml"


def count(file: Path, succeeded: bool) -> tuple[int, int, int]:
    """Passed, failed and skipped tests. A session without tests counts as one."""
    if not file.exists():
        return int(succeeded), int(not succeeded), 0
    suite = ElementTree.parse(file).getroot()[0]
    total, failures, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed = max(failures + errors, int(not succeeded))
    return total - failures - errors - skipped, failed, skipped


@atexit.register
def report() -> None:
    """Print seconds against budgets and, last, how many tests passed and failed."""
    if not outcomes:
        return
    print("\n  seconds  budget  part")
    for outcome in outcomes:
        budget = BUDGETS.get(outcome.name)
        late = "  OVER BUDGET" if budget and outcome.seconds > budget else ""
        print(f"  {outcome.seconds:7.1f}  {budget or '':>6}  {outcome.name}{late}")
    print(f"  {sum(outcome.seconds for outcome in outcomes):7.1f}  {CI_LIMIT:>6}  all (the limit is CI's)")
    passed, failed, skipped = (sum(column) for column in list(zip(*outcomes, strict=True))[2:])
    print(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ""))


def group(*names: str) -> list[str]:
    """The requirements of these dependency groups."""
    return list(nox.project.dependency_groups(nox.project.load_toml(ROOT / "pyproject.toml"), *names))


def install(session: nox.Session, *groups: str, siblings: bool = False) -> None:
    """Install requirement groups and, if asked, all our distributions as editable, into the session's own environment."""
    install_into(Path(session.virtualenv.location), session, *groups, siblings=siblings)


def install_into(home: Path, session: nox.Session, *groups: str, siblings: bool) -> None:
    """As `install`, into any environment, unless it has just that already."""
    wanted = group(*groups)
    if siblings:
        wanted += [option for place in PLACES for option in ("--editable", place)]
    state = "\n".join([str(ROOT), *wanted, *(file.read_text() for file in (CONSTRAINTS, *project_files()))])
    installed = home / "crossdock-installed.txt"
    if installed.exists() and installed.read_text() == state:
        session.log("everything is installed already")
        return
    installed.unlink(missing_ok=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
    if siblings:  # first the build backend, or pip fetches it again for each of them
        session.run(*pip, *group("build"))
    session.run(*pip, "--no-build-isolation", *wanted)
    installed.write_text(state)


def use_shared(session: nox.Session) -> Path:
    """Return where the programs are of the environment that sessions without their own share; it is made and filled if need be."""
    home = ROOT / ".nox" / "shared"
    if not (home / "pyvenv.cfg").exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(home))
    install_into(home, session, "test", "servers", siblings=True)
    programs = home / "bin"
    session.env["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return programs


def run_each(session: nox.Session, *commands: list[str]) -> None:
    """Run every command, also when one before it failed; then fail if any did."""
    failed: list[str] = []
    for command in commands:
        try:
            session.run(*command)
        except CommandFailed:
            failed.append(" ".join(command))
    if failed:
        session.error("failed: " + ", ".join(failed))


def pytest(session: nox.Session, programs: Path, *places: str) -> None:
    """Run the tests of these places, or of those that the caller names after `--`."""
    arguments = session.posargs
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        arguments = [*places, *arguments]
    session.run(str(programs / "pytest"), f"--junit-xml={results(session)}", *arguments)


def backend(session: nox.Session, place: str, processes: int) -> None:
    """The tests of a backend on real servers, but for the long ones, in so many processes: they wait more than they compute."""
    pytest(session, use_shared(session), f"{place}/tests", "-n", str(processes), *(f"--ignore={file}" for file in LONG))


# --- sessions -----------------------------------------------------------------------------------------


@nox.session(venv_backend="none")
@part
def versions(session: nox.Session) -> None:
    """One version in all distributions, siblings pinned to it."""
    session.run(sys.executable, "scripts/set_version.py", "--check")


@nox.session
@part
def lint(session: nox.Session) -> None:
    """ruff: format and lint. `./run lint -- --fix` repairs what it can."""
    install(session, "lint")
    if "--fix" in session.posargs:
        run_each(session, ["ruff", "format"], ["ruff", "check", "--fix"])
    else:
        run_each(session, ["ruff", "format", "--check"], ["ruff", "check"])


@nox.session
@part
def types(session: nox.Session) -> None:
    """mypy and pyright, both strict: each distribution, the typing tests of the public API, the tooling."""
    install(session, "types", "test", "nox", siblings=True)
    places = [*(f"{place}/src" for place in CODE), "core/typing_tests", f"{EXAMPLE}/src"]
    run_each(session, ["mypy", *places], ["pyright", *places], ["mypy", "noxfile.py", "scripts"])


@nox.session(python=PYTHONS)
@part
def tests(session: nox.Session) -> None:
    """pytest on every distribution that needs no server, and the examples. What follows -- goes to pytest."""
    install(session, "test", siblings=True)
    places = [f"{place}/tests" for place in CODE if place not in (SUITE, *BACKENDS)]
    pytest(session, Path(session.bin), *places, "examples/tests", "-n", "3")


@nox.session(venv_backend="none")
@part
def conformance(session: nox.Session) -> None:
    """The conformance suite, its own tests and the embedded backends under it; or the brokers whose URLs follow --."""
    programs = use_shared(session)
    if urls := [argument for argument in session.posargs if "://" in argument]:
        run_each(session, *([str(programs / "crossdock"), "conformance", url] for url in urls))
    else:
        pytest(session, programs, f"{SUITE}/tests", "-n", "4")


@nox.session(venv_backend="none")
@part
def redis(session: nox.Session) -> None:
    """The Redis backend on real servers, each version that is found or that CROSSDOCK_REQUIRE names: the suite, and its own tests."""
    backend(session, "backends/redis", 6)


@nox.session(venv_backend="none")
@part
def rabbitmq(session: nox.Session) -> None:
    """The RabbitMQ backend on real servers, each version that is found or that CROSSDOCK_REQUIRE names: the suite, and its own tests."""
    backend(session, "backends/rabbitmq", 6)


@nox.session(venv_backend="none")
@part
def nats(session: nox.Session) -> None:
    """The NATS backend on real servers, each version that is found or that CROSSDOCK_REQUIRE names: the suite, and its own tests."""
    backend(session, "backends/nats", 6)


@nox.session(venv_backend="none")
@part
def long(session: nox.Session) -> None:
    """What takes too long for CI: the suite on clusters, nodes lost and many restarts."""
    programs = use_shared(session)
    run_each(session, *([str(programs / "pytest"), file, "-n", "2"] for file in LONG))


@nox.session(venv_backend="none")
@part
def real_time(session: nox.Session) -> None:
    """The conformance suite on the embedded backends with the system's clock, as it runs on servers."""
    programs = use_shared(session)
    with tempfile.TemporaryDirectory() as folder:
        urls = ["memory://conformance", f"sqlite:///{folder}/conformance.db"]
        run_each(session, *([str(programs / "crossdock"), "conformance", "--real-time", url] for url in urls))


@nox.session(venv_backend="none")
@part
def docs(session: nox.Session) -> None:
    """Run every snippet and command of the documentation."""
    pytest(session, use_shared(session), "docs/tests", "-n", "2")


@nox.session
@part
def demo(session: nox.Session) -> None:
    """The shop: 5,000 orders, two workers, one of them killed, and the sums checked."""
    install(session, siblings=True)  # its own, without the tests' tools: for many it is the first thing to run
    session.run("python", "examples/shop/demo.py", *session.posargs)


@nox.session
@part
def package(session: nox.Session) -> None:
    """Build every sdist and from it the wheel; install each wheel in a clean environment; run the demo from there."""
    install(session, "package")
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    for place in PLACES:
        session.run("python", "-m", "build", "--no-isolation", "--outdir", str(dist), place, silent=True)
    session.run("python", "scripts/check_artefacts.py", str(dist))

    projects = {project["name"]: project for project in (read(file)["project"] for file in project_files())}
    for name, project in projects.items():
        with tempfile.TemporaryDirectory() as folder, session.chdir(folder):
            ours = with_siblings(name, projects)
            wheels = [str(wheel) for each in ours for wheel in dist.glob(f"{each.replace('-', '_')}-*.whl")]
            session.run(sys.executable, "-m", "virtualenv", "--quiet", "env", external=True)
            python = f"{folder}/env/bin/python"
            session.run(python, "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), *wheels, external=True)
            session.run(python, "-m", "pip", "check", external=True)
            check = str(ROOT / "scripts" / "check_installed.py")
            session.run(python, "-I", check, ",".join(ours), project["version"], external=True)
            if name == "crossdock":
                session.run(f"{folder}/env/bin/crossdock", "--version", external=True)
                shutil.copytree(ROOT / "examples" / "shop", "shop", ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
                session.run(python, "shop/demo.py", "--orders", "500", external=True)  # all of them are the session demo's


def with_siblings(name: str, projects: dict[str, dict[str, Any]]) -> list[str]:
    """This distribution and those of ours that it needs, directly or not; no extras."""
    names = [name]
    for each in names:
        needed = (sibling(requirement) for requirement in projects[each].get("dependencies", []))
        names += [other for other in needed if other and other not in names]
    return names


@nox.session(venv_backend="none")
@part
def bench(session: nox.Session) -> None:
    """Measure memory, SQLite and each server that is found. What follows -- goes to the benchmark; --growth and --scale are others."""
    benchmarks = {"--growth": "core/benchmarks/growth.py", "--scale": "backends/redis/benchmarks/scale.py"}
    chosen = [benchmarks[option] for option in session.posargs if option in benchmarks] or ["core/benchmarks/run.py"]
    session.run(str(use_shared(session) / "python"), *chosen, *(option for option in session.posargs if option not in benchmarks))


@nox.session(venv_backend="none")
def dev(session: nox.Session) -> None:
    """Install everything editable into .venv: for your editor, and to run pytest, mypy and ruff by hand."""
    python = str(ROOT / ".venv" / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--constraint", str(CONSTRAINTS)]
    groups = group("test", "types", "lint", "package", "nox")
    session.run(*pip, *group("build"))
    session.run(*pip, "--no-build-isolation", *groups, *(option for place in PLACES for option in ("--editable", place)))


@nox.session(venv_backend="none")
def checks(session: nox.Session) -> None:
    """All that CI runs."""
    for name in BUDGETS:
        session.notify(name)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Everything: what CI runs, the tests on every Python that is installed, the suite in real time, the benchmark."""
    for name in (*BUDGETS, *(f"tests-{python}" for python in PYTHONS), "real_time", "long", "bench"):
        session.notify(name)
    for python in set(OTHER_PYTHONS).difference(PYTHONS):
        session.warn(f"the tests do not run on Python {python}: it is not installed")
