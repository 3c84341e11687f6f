"""Settings from arguments, environment and files, and which of them wins.

Arguments win over the environment (`CROSSDOCK_URL`, `CROSSDOCK_NAMESPACE`), which wins over the file: the nearest `crossdock.toml`,
or `pyproject.toml` with a table `[tool.crossdock]`, in the working directory or a folder above it. The file's form::

    url = "sqlite:///shop.db"
    namespace = "shop"

    [queues.emails]            # the fields of crossdock.Queue
    weight = 2

    [queues.emails.retry]      # the arguments of RetryPolicy.fixed, .linear or .exponential
    kind = "exponential"
    max_attempts = 8
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from crossdock import names
from crossdock.errors import ConfigurationError
from crossdock.queues import Queue
from crossdock.retry import RetryPolicy
from crossdock.spi import redact

URL_VARIABLE: Final = "CROSSDOCK_URL"
NAMESPACE_VARIABLE: Final = "CROSSDOCK_NAMESPACE"

_FILE_KEYS = ("url", "namespace", "queues")
_QUEUE_KEYS = tuple(field for field in Queue.__struct_fields__ if field != "name")
_RETRY_KINDS: Final[dict[str, tuple[Callable[..., RetryPolicy], tuple[str, ...]]]] = {
    "fixed": (RetryPolicy.fixed, ("max_attempts", "delay", "give_up_after")),
    "linear": (RetryPolicy.linear, ("max_attempts", "step", "max_backoff", "give_up_after")),
    "exponential": (RetryPolicy.exponential, ("max_attempts", "min_backoff", "max_backoff", "give_up_after")),
}


class Settings(msgspec.Struct, frozen=True):
    """What a program or command knows before it has a broker."""

    url: str | None = None
    """The broker URL, with its secrets; None = nobody gave one."""
    namespace: str = "default"
    """Isolates everything in the broker."""
    queues: tuple[Queue, ...] = ()
    """Queues that somebody described; each name once."""

    def __repr__(self) -> str:
        url = None if self.url is None else redact(self.url)
        return f"Settings(url={url!r}, namespace={self.namespace!r}, queues={self.queues!r})"


def load_settings(
    *,
    url: str | None = None,
    namespace: str | None = None,
    queues: Iterable[Queue] = (),
    directory: Path | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Settings:
    """Gather the settings.

    Args:
        url: Wins over the environment and the file. No URL at all is fine here; see `require_url`.
        namespace: Likewise; the default is `default`.
        queues: Each wins, whole, over the file's table of the same name.
        directory: Where to look for the file, and upwards from there; the default is the working directory.
        environ: The environment. An empty variable counts as not set.

    Raises:
        ConfigurationError: A file cannot be read, has an unknown key or a wrong value, or a name breaks its rule. The text names
            the file and the key.
    """
    _check_url(url)
    from_file = _from_file(directory)
    by_name = {queue.name: queue for queue in from_file.queues}
    given: set[str] = set()
    for queue in queues:
        if queue.name in given:
            raise ConfigurationError(f"the queue {queue.name!r} is described twice: keep one")
        given.add(queue.name)
        by_name[queue.name] = queue
    return Settings(
        url=url or environ.get(URL_VARIABLE) or from_file.url,
        namespace=names.check_namespace(namespace or environ.get(NAMESPACE_VARIABLE) or from_file.namespace),
        queues=tuple(by_name.values()),
    )


def _check_url(url: object) -> None:
    if url is not None and not isinstance(url, str):
        raise ConfigurationError(f"a broker URL must be a text like sqlite:///shop.db, not {type(url).__name__}")


def require_url(settings: Settings) -> str:
    """Return the broker URL.

    Raises:
        ConfigurationError: There is none; the text says how to give one.
    """
    if settings.url is None:
        raise ConfigurationError(
            f"no broker URL: give one to App(...) or --url, in ${URL_VARIABLE}, or as `url` in crossdock.toml (e.g. sqlite:///shop.db)"
        )
    return settings.url


# --- the file -------------------------------------------------------------------------------------


def _from_file(directory: Path | None) -> Settings:
    found = _find(directory)
    if found is None:
        return Settings()
    where, table = found
    _check_keys(table, _FILE_KEYS, where)
    queue_tables = _table(table.get("queues", {}), f"{where}: `queues`")
    namespace = _text(table, "namespace", where) or "default"
    with _at(where):
        names.check_namespace(namespace)
    return Settings(
        url=_text(table, "url", where),
        namespace=namespace,
        queues=tuple(_queue(where, name, value) for name, value in queue_tables.items()),
    )


def _find(directory: Path | None) -> tuple[str, dict[str, Any]] | None:
    """The nearest table of ours, and how to call it in a text."""
    try:
        start = (directory or Path.cwd()).absolute()
    except FileNotFoundError:  # the working directory was deleted
        return None
    for folder in (start, *start.parents):
        own = folder / "crossdock.toml"
        if _exists(own):
            return str(own), _read(own)
        project = folder / "pyproject.toml"
        # Somebody else's broken pyproject.toml is none of our business.
        if _exists(project) and b"crossdock" in _bytes(project):
            tool = _read(project).get("tool")
            if isinstance(tool, dict) and "crossdock" in tool:
                where = f"{project} [tool.crossdock]"
                return where, _table(cast("dict[str, Any]", tool)["crossdock"], where)
    return None


def _exists(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder above that we may not look into
        return False


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_bytes(path).decode())
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not valid TOML: {error}") from error


def _queue(where: str, name: str, value: object) -> Queue:
    place = f"{where}: [queues.{name}]"
    table = _table(value, place)
    _check_keys(table, _QUEUE_KEYS, place)
    plain = {key: entry for key, entry in table.items() if key != "retry"}
    with _at(place):
        queue = msgspec.convert({**plain, "name": name}, Queue)
    if "retry" not in table:
        return queue
    return msgspec.structs.replace(queue, retry=_retry(f"{where}: [queues.{name}.retry]", table["retry"]))


def _retry(place: str, value: object) -> RetryPolicy:
    table = _table(value, place)
    kind = table.get("kind", "exponential")
    if not isinstance(kind, str) or kind not in _RETRY_KINDS:
        raise ConfigurationError(f"{place}: `kind` is one of {', '.join(_RETRY_KINDS)}, not {kind!r}")
    build, keys = _RETRY_KINDS[kind]
    _check_keys(table, ("kind", *keys), place)
    arguments: dict[str, Any] = {}
    for key in table.keys() - {"kind"}:
        with _at(f"{place}: `{key}`"):
            arguments[key] = msgspec.convert(table[key], int if key == "max_attempts" else float)
    with _at(place):
        return build(**arguments)


@contextmanager
def _at(place: str) -> Generator[None]:
    """Say where in the file a value is that somebody else refused."""
    try:
        yield
    except (ConfigurationError, msgspec.ValidationError) as error:
        what, _, path = str(error).partition(" - at `$.")
        raise ConfigurationError(f"{place}: `{path} {what}" if path else f"{place}: {what}") from error


def _check_keys(table: Mapping[str, object], known: tuple[str, ...], place: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it knows {', '.join(known)}"
            raise ConfigurationError(f"{place} has an unknown key {key!r}: {hint}")


def _table(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigurationError(f"{place} must be a table, not a {type(value).__name__}")
    return cast("dict[str, Any]", value)


def _text(table: Mapping[str, object], key: str, place: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{place}: `{key}` must be a string, not a {type(value).__name__}")
    return value
