"""Options that several commands share, and how people's words in them are read."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar, cast

import typer

from crossdock_cli.output import safe

T = TypeVar("T")

# Every option has an environment variable. Those of one command are named by Typer, CROSSDOCK_<GROUP>_<COMMAND>_<OPTION>; those
# shared by many have one name for all, stated here.

Url = Annotated[
    str | None,
    typer.Option(
        "--url", envvar="CROSSDOCK_URL", metavar="URL", help="The broker; else `url` in crossdock.toml.", show_default=False
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", envvar="CROSSDOCK_NAMESPACE", metavar="NAME", help="The namespace; else as in crossdock.toml."),
]
Json = Annotated[bool, typer.Option("--json", envvar="CROSSDOCK_JSON", help="Print JSON instead of tables.")]
DryRun = Annotated[bool, typer.Option("--dry-run", envvar="CROSSDOCK_DRY_RUN", help="Say what would be done, and change nothing.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", envvar="CROSSDOCK_YES", help="Do not ask; needed where nobody can be asked.")]


AppReference = Annotated[str, typer.Argument(metavar="APP", help="module:attribute or path/to/file.py:attribute.")]


def _refuse_badly(read: Callable[[str], T]) -> Callable[[Any], T]:
    """Make a reader for `typer.Option(parser=...)`: what it refuses is wrong use, told with the option's name."""

    def reader(text: Any) -> T:
        from crossdock import ConfigurationError

        if not isinstance(text, str):
            return cast("T", text)  # the default
        try:
            return read(text)
        except ConfigurationError as error:
            raise typer.BadParameter(safe(str(error))) from error

    return reader


@_refuse_badly
def read_duration(text: str) -> float:
    """Read `10m` as seconds."""
    from crossdock.durations import parse_duration

    return parse_duration(text)


@_refuse_badly
def read_datetime(text: str) -> datetime:
    """Read `2026-01-01T10:00:00Z`."""
    from crossdock.durations import parse_datetime

    return parse_datetime(text)


@_refuse_badly
def read_past(text: str) -> int:
    """Read an instant, or how long ago it was, as milliseconds since the Unix epoch."""
    from crossdock.durations import parse_instant

    return parse_instant(text, time.time_ns() // 1_000_000)


@_refuse_badly
def read_time_to_live(text: str) -> float | datetime:
    """Read a duration as seconds, or an instant."""
    from crossdock.durations import parse_datetime, parse_duration

    return parse_datetime(text) if re.match(r"\s*[0-9]{4}-", text) else parse_duration(text)


@_refuse_badly
def read_priority(text: str) -> int:
    """Read a level by its name or number."""
    from crossdock import ConfigurationError, Priority

    level = Priority.__members__.get(text.upper())
    if level is not None:
        return level
    if re.fullmatch("[0-9]", text):
        return int(text)
    raise ConfigurationError(f"{text!r} is no priority: use {', '.join(Priority.__members__).lower()}, or 0 to 9")


@_refuse_badly
def read_rate(text: str) -> float:
    """Read `100/s`, `10/m` or `500/10s` as items per second; a plain number is per second."""
    from crossdock import ConfigurationError
    from crossdock.durations import parse_duration

    count, slash, period = text.strip().partition("/")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", count) and (period or not slash):
        seconds = parse_duration(f"1{period}" if period.isalpha() else period) if slash else 1.0
        if seconds and 0 < float(count) / seconds < 1e9:
            return float(count) / seconds
    raise ConfigurationError(f"{text!r} is no rate: write it like 100/s, 10/m or 500/h")


def read_json_object(option: str, text: str | None) -> dict[str, Any]:
    """Read `{"name": value, ...}`, and nothing as an empty one. Raises `typer.BadParameter` naming the option."""
    import msgspec

    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise typer.BadParameter(
            f'{error}: write a JSON object like \'{{"to": "a@example.com"}}\'', param_hint=f"'{option}'"
        ) from error


def read_assignments(option: str, texts: list[str]) -> dict[str, Any]:
    """Read `name=value` pairs: a value that is JSON is taken as such, any other as text. Raises `typer.BadParameter`."""
    import msgspec

    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is no assignment: write name=value", param_hint=f"'{option}'")
        if name in values:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=f"'{option}'")
        try:
            values[name] = msgspec.json.decode(value)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            values[name] = value
    return values
