"""From `module:attribute` or `file.py:attribute` to an App, and what is said when there is none."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossdock import App
from crossdock.errors import AppNotFound
from crossdock.loading import load_app

Program = Callable[..., str]

APP = """
from crossdock import App

app = App("memory://loading")
tasks = App("memory://loading")
number = 5

@app.task
def work() -> None: ...
"""

_numbers = itertools.count()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Write a program into the working directory; returns its module's name, which is never used twice."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)

    def write(source: str = APP, folder: str = ".") -> str:
        name = f"program_{next(_numbers)}"
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.py").write_text(source)
        return name

    return write


def test_a_module_of_the_working_directory(program: Program) -> None:
    """`module:attribute`, and `module` alone for its `app`."""
    name = program()
    assert isinstance(load_app(f"{name}:tasks"), App)
    assert load_app(name) is load_app(f"{name}:app")


def test_a_file_anywhere(program: Program, tmp_path: Path) -> None:
    """A path leads to the same App twice, and its neighbours can be imported by it."""
    helper = program("VALUE = 1", "sub")
    name = program(f"import {helper}\n{APP}", "sub")
    by_path = load_app(f"sub/{name}.py:app")
    assert load_app(f"{tmp_path}/sub/{name}.py") is by_path


def test_task_names_are_the_same_by_every_way(program: Program, tmp_path: Path) -> None:
    """By file, by module and by `python file.py` a task has one name, so producers and workers agree."""
    name = program(APP + "\nif __name__ == '__main__':\n    print(*app.tasks)\n")
    by_file = set(load_app(f"{name}.py").tasks)
    by_module = set(load_app(name).tasks)
    run = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=30)
    assert by_file == by_module == set(run.stdout.split()) == {f"{name}.work"}


@pytest.mark.parametrize("reference", ["", ":", ":app", "shop:", "shop:a b", "shop:app()"])
def test_what_is_no_reference(reference: str) -> None:
    """The form is stated."""
    with pytest.raises(AppNotFound, match=r"names no App: write it as module:attribute or path/to/file\.py:attribute"):
        load_app(reference)


@pytest.mark.parametrize("reference", ["no_such_module:app", "no_such.module:app", "json.no_such:app", "no_such_module"])
def test_no_such_module(program: Program, reference: str) -> None:
    """Its name and where it was looked for."""
    with pytest.raises(AppNotFound, match=r"there is no module '.*no_such.*' in /.* or on sys\.path"):
        load_app(reference)


@pytest.mark.parametrize("reference", ["no_such.py:app", "sub/no_such.py"])
def test_no_such_file(program: Program, reference: str) -> None:
    """The path as it was written."""
    with pytest.raises(AppNotFound, match=f"there is no file {reference.removesuffix(':app')}: write it as"):
        load_app(reference)


def test_a_file_of_another_kind(program: Program, tmp_path: Path) -> None:
    """Only Python files are imported."""
    (tmp_path / "shop.txt").write_text("x")
    with pytest.raises(AppNotFound, match=r"\./shop\.txt is no Python file"):
        load_app("./shop.txt:app")


def test_a_file_named_like_a_loaded_module(program: Program, tmp_path: Path) -> None:
    """`json.py` would be taken for the standard library's by everything else, so it is refused."""
    (tmp_path / "json.py").write_text(APP)
    with pytest.raises(AppNotFound, match="a module of that name is loaded already; rename the file"):
        load_app("json.py")


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1\n1 / 0", "raised ZeroDivisionError at {path}:2: division by zero"),
        ("\n\nimport no_such_thing", "raised ModuleNotFoundError at {path}:3: No module named 'no_such_thing'"),
        ("import sys\nsys.exit('bye')", "raised SystemExit at {path}:2: bye"),
        ("x = 1\ndef f(:\n", "raised SyntaxError at {path}:2: invalid syntax"),
        ("import json\njson.loads('{')", "raised JSONDecodeError at {path}:2: "),
        ("from crossdock import Queue\nQueue('a', weight=0)", "raised ConfigurationError at {path}:2: queue 'a': weight must be"),
        ("class E(Exception):\n  def __str__(self): 1/0\nraise E", "raised E at {path}:3"),
        ("raise ValueError('a\\nb' * 1000)", "raised ValueError at {path}:1: a ba b"),
    ],
)
def test_a_program_that_raises(program: Program, tmp_path: Path, source: str, said: str, by_file: bool) -> None:
    """Its exception and its own line, in one sentence."""
    name = program(source)
    target = f"{name}.py" if by_file else name
    with pytest.raises(AppNotFound) as caught:
        load_app(f"{target}:app")
    text = str(caught.value)
    assert text.startswith(f"importing {target} " + said.format(path=tmp_path / f"{name}.py"))
    assert "\n" not in text
    assert len(text) < 800
    assert name not in sys.modules


def test_no_such_attribute(program: Program) -> None:
    """The nearest App, or all there are, or that there is none."""
    name = program()
    with pytest.raises(AppNotFound, match=rf"{name} has no attribute 'task'; did you mean {name}:tasks\?"):
        load_app(f"{name}:task")
    with pytest.raises(AppNotFound, match=f"has no attribute 'zzz'; its Apps: {name}:app, {name}:tasks"):
        load_app(f"{name}:zzz")
    empty = program("x = 1")
    with pytest.raises(AppNotFound, match="has no attribute 'app'; it has no App at its top level"):
        load_app(empty)


def test_an_attribute_that_is_no_app(program: Program) -> None:
    """Its kind, and the Apps there are."""
    name = program()
    with pytest.raises(AppNotFound, match=f"{name}:number is of type int, not an App; its Apps: {name}:app"):
        load_app(f"{name}:number")
