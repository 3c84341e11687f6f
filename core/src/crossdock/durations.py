"""Durations and instants as people write them: `10m`, `1h30m`, `2026-01-01T10:00:00Z`. Pure."""

from __future__ import annotations

import math
import re
from datetime import datetime
from typing import Final

from crossdock.errors import ConfigurationError

_UNITS: Final = {"w": 604800.0, "d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_LONGEST: Final = 1e10
"""About 317 years: beyond it a number is a slip, and the arithmetic of instants ends."""
_PART = r"[0-9]+(?:\.[0-9]+)?"
_NUMBER = re.compile(_PART)
# Each unit at most once, the largest first.
_COMBINED = re.compile("".join(rf"(?:(?P<{unit}>{_PART}){unit})?" for unit in _UNITS))


def parse_duration(text: str) -> float:
    """Return the seconds in a duration written by a person.

    Args:
        text: Numbers with the units w, d, h, m, s, ms, the largest first, such as `10m`, `1h30m`, `1.5h` or `250ms`. A plain number
            is in seconds.

    Raises:
        ConfigurationError: It is no duration, negative, or longer than 300 years.
    """
    written = text.strip()
    if _NUMBER.fullmatch(written):
        seconds = float(written)
    else:
        match = _COMBINED.fullmatch(written)
        if match is None or not written:
            raise ConfigurationError(f"{_show(text)} is no duration: write it like 30s, 10m, 1h30m, 2d or 250ms")
        seconds = sum(float(number) * _UNITS[unit] for unit, number in match.groupdict().items() if number)
    if seconds > _LONGEST:
        raise ConfigurationError(f"{_show(text)} is too long for a duration: the limit is 300 years")
    return seconds


def format_duration(seconds: float) -> str:
    """Return a duration for people, by its two largest units: `250ms`, `2.5s`, `1h30m`, `3d4h`; infinity is `forever`."""
    if seconds < 0:
        return f"-{format_duration(-seconds)}"
    if math.isinf(seconds):
        return "forever"
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    if round(seconds, 1) < 60:
        return f"{round(seconds, 1):g}s"
    rest = round(seconds)
    parts: list[str] = []
    for unit in ("w", "d", "h", "m", "s"):
        count, rest = divmod(rest, round(_UNITS[unit]))
        if count:
            parts.append(f"{count}{unit}")
        elif parts:
            break
        if len(parts) == 2:
            break
    return "".join(parts)


def parse_datetime(text: str) -> datetime:
    """Return the aware datetime written as ISO 8601 with a time zone, such as `2026-01-01T10:00:00Z`.

    Raises:
        ConfigurationError: It is none, or has no time zone.
    """
    try:
        instant = datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise ConfigurationError(f"{_show(text)} is no instant: write it like 2026-01-01T10:00:00Z") from error
    if instant.tzinfo is None:
        raise ConfigurationError(f"{_show(text)} has no time zone: write it like 2026-01-01T10:00:00Z or ...+02:00")
    return instant


def parse_instant(text: str, now_ms: int) -> int:
    """Return a past instant in milliseconds since the Unix epoch.

    Args:
        text: ISO 8601 with a time zone, or a duration: that long before now.
        now_ms: Now, in milliseconds since the Unix epoch.

    Raises:
        ConfigurationError: It is neither.
    """
    if re.match(r"\s*[0-9]{4}-", text):
        return round(parse_datetime(text).timestamp() * 1000)
    try:
        return now_ms - round(parse_duration(text) * 1000)
    except ConfigurationError as error:
        raise ConfigurationError(f"{_show(text)} is no instant: write it like 2026-01-01T10:00:00Z or 2h (ago)") from error


def _show(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
