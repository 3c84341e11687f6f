"""The example backend as a stranger would have it: installed by pip into an environment of its own, found, proven, put to work."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from pages import ROOT

from crossdock_conformance import all_scenarios

EXAMPLE = ROOT / "docs" / "examples" / "crossdock-plainfiles"
SHOP = ROOT / "examples" / "shop"
PATIENCE = 240.0
"""Seconds that one command may take on a busy machine; all together take less than one minute on two cores."""
PARTS = 3
"""Of the suite, which run at the same time."""

pytestmark = pytest.mark.timeout(PATIENCE + 10)


class Environment:
    """A virtual environment with the example in it. What else there is it shares with this one."""

    def __init__(self, folder: Path) -> None:
        self._bin = folder / "env" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True, timeout=PATIENCE)
        (packages,) = (folder / "env").glob("lib/*/site-packages")
        ours = [path for path in sys.path if path.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in ours]
        (packages / "shared.pth").write_text("".join(lines), encoding="utf-8")
        source = shutil.copytree(EXAMPLE, folder / EXAMPLE.name, ignore=shutil.ignore_patterns("__pycache__", "build"))
        pip: list[str | Path] = [sys.executable, "-m", "pip", "--python", self._bin / "python", "install", "--quiet"]
        subprocess.run([*pip, "--no-index", "--no-deps", "--no-build-isolation", source], check=True, timeout=PATIENCE)

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a Python module or program there, and return what it printed."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("CROSSDOCK_", "PYTEST_", "PYTHON"))
        }
        return subprocess.run(
            [self._bin / "python", *command],
            env=environment,
            cwd=self._bin.parent,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the example in it."""
    return Environment(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where flushing costs nothing, if there is such a place: tens of thousands of messages would measure this machine's disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def under_way(environment: Environment, folder: Path) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The suite in parts, the example's own tests and the shop, on their way: each waits a lot, so all at once."""
    groups = list(dict.fromkeys(scenario.group for scenario in all_scenarios()))
    with ThreadPoolExecutor() as pool:
        running = {
            f"suite{part}": pool.submit(
                environment.run,
                *("-m", "crossdock_cli", "conformance", f"plainfiles:///{folder}/suite", "--report", folder / f"report{part}.json"),
                *(f"--only={group}" for group in groups[part::PARTS]),
            )
            for part in range(PARTS)
        }
        own = [EXAMPLE / "tests" / f"test_{name}.py" for name in ("crashes", "folder")]
        pytest_there: list[str | Path] = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", folder / "own"]
        running["own"] = pool.submit(environment.run, *pytest_there, *own)
        url = f"plainfiles:///{folder}/broker"
        running["shop"] = pool.submit(environment.run, SHOP / "demo.py", "--orders", "300", "--keep", folder / "shop", "--url", url)
        yield running


def test_it_imports_the_interface_alone() -> None:
    """It is written from `crossdock.spi` and `crossdock.errors`, and needs no distribution but the core."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = {
        node.module
        for file in (EXAMPLE / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "crossdock"
    }

    assert imported == {"crossdock.spi", "crossdock.errors"}
    assert project["dependencies"] == ["crossdock-core"]


def test_it_is_found(environment: Environment) -> None:
    """Once it is installed, `crossdock backend list` has it, by its entry point."""
    ended = environment.run("-m", "crossdock_cli", "backend", "list", "--json")

    found = {each["scheme"]: each for each in json.loads(ended.stdout)}
    assert found["plainfiles"]["distribution"] == "crossdock-plainfiles"
    assert not found["plainfiles"]["error"]


def test_it_passes_the_suite(under_way: dict[str, Future[subprocess.CompletedProcess[str]]], folder: Path) -> None:
    """Every scenario, by the command: none fails, and what does not run needs a server that can be stopped, or a clock of its own."""
    verdicts: Counter[str] = Counter()
    for part in range(PARTS):
        ended = under_way[f"suite{part}"].result()
        assert ended.returncode == 0, ended.stdout[-10_000:] + ended.stderr
        (report,) = json.loads((folder / f"report{part}.json").read_bytes())
        verdicts.update(outcome["verdict"] for outcome in report["outcomes"])

    assert verdicts.total() == len(all_scenarios())
    assert set(verdicts) == {"passed", "refused", "not run"}
    assert verdicts["passed"] > 0.9 * verdicts.total()


def test_its_own_tests_pass(under_way: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    """Killed at each step of each verb nothing is lost, and what is special to a folder is so."""
    ended = under_way["own"].result()

    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_shop_runs_on_it(under_way: dict[str, Future[subprocess.CompletedProcess[str]]], folder: Path) -> None:
    """The demo, with its killed worker and repaired dead letters: every order is accounted for, and the broker was that folder."""
    ended = under_way["shop"].result()

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Every order is accounted for." in ended.stdout
    assert (folder / "broker" / "default" / "critical" / "lock").exists()
    assert not (folder / "shop" / "shop.db").exists()
