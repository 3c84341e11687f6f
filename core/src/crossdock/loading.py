"""From a reference such as `shop.main:app` or `path/to/shop.py:app` to the App it names."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

from crossdock.app import App
from crossdock.errors import AppNotFound

_CROSSDOCK = str(Path(__file__).parent)
_FORM = "write it as module:attribute or path/to/file.py:attribute"


def load_app(reference: str) -> App:
    """Import a program and return its App.

    A module is looked for with the working directory on `sys.path`, a file is imported under its stem with its folder there: so a
    task has the same name here, in a program that imports the module, and in `python file.py`.

    Args:
        reference: `module:attribute` or `path/to/file.py:attribute`; without `:attribute` it is `app`.

    Raises:
        AppNotFound: There is no such module, file or attribute, the module raises when it is imported, or the attribute is no App.
    """
    target, separator, attribute = reference.rpartition(":")
    if not separator:
        target, attribute = reference, "app"
    if not target or not attribute.isidentifier():
        raise AppNotFound(f"{reference!r} names no App: {_FORM}")
    is_file = target.endswith(".py") or "/" in target or os.sep in target
    module = _import_file(target) if is_file else _import_module(target)
    return _attribute_of(module, target, attribute)


def _import_module(name: str) -> ModuleType:
    folder = _working_directory()
    _search_first(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # One that is missing *inside* the module is the program's own fault, and told as such.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise AppNotFound(f"there is no module {error.name!r} in {folder} or on sys.path: {_FORM}") from error
        raise _raised(name, folder, error) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _raised(name, folder, error) from error


def _import_file(target: str) -> ModuleType:
    path = Path(target).absolute()
    if not path.is_file():
        raise AppNotFound(f"there is no file {target}: {_FORM}")
    if path.suffix != ".py":
        raise AppNotFound(f"{target} is no Python file: {_FORM}")
    name, folder = path.stem, str(path.parent)
    loaded = sys.modules.get(name)
    if loaded is not None:
        origin = getattr(loaded, "__file__", None)
        if origin is not None and Path(origin).resolve() == path.resolve():
            return loaded
        raise AppNotFound(f"{target} cannot be imported as {name!r}: a module of that name is loaded already; rename the file")
    _search_first(folder)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AppNotFound(f"{target} is no Python file: {_FORM}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        sys.modules.pop(name, None)
        if isinstance(error, Exception | SystemExit):
            raise _raised(target, folder, error) from error
        raise
    return module


def _attribute_of(module: ModuleType, target: str, attribute: str) -> App:
    found = [name for name, value in vars(module).items() if isinstance(value, App)]
    known = f"its Apps: {', '.join(f'{target}:{name}' for name in found)}" if found else "it has no App at its top level"
    if not hasattr(module, attribute):
        near = difflib.get_close_matches(attribute, found, n=1)
        raise AppNotFound(f"{target} has no attribute {attribute!r}; " + (f"did you mean {target}:{near[0]}?" if near else known))
    value = getattr(module, attribute)
    if not isinstance(value, App):
        raise AppNotFound(f"{target}:{attribute} is of type {type(value).__name__}, not an App; {known}")
    return value


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise AppNotFound("the working directory does not exist any more: change to another one") from error


def _search_first(folder: str) -> None:
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _raised(target: str, folder: str, error: BaseException) -> AppNotFound:
    """Say what a module raised when it was imported, and at which of the program's own lines."""
    if isinstance(error, SyntaxError) and error.filename:
        where, text = f"{error.filename}:{error.lineno}", error.msg
    else:
        frames = list(traceback.extract_tb(error.__traceback__))
        frames = [frame for frame in frames if not frame.filename.startswith(("<", _CROSSDOCK))] or frames
        own = [frame for frame in frames if frame.filename.startswith(folder) and "site-packages" not in frame.filename] or frames
        where, text = f"{own[-1].filename}:{own[-1].lineno}", _text_of(error)
    return AppNotFound(f"importing {target} raised {type(error).__name__} at {where}" + (f": {text}" if text else ""))


def _text_of(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:
        return ""
    return text if len(text) <= 300 else text[:297] + "..."
