"""The one grammar of names, the same on every broker. Each check returns its argument or says the rule."""

from __future__ import annotations

import re

from crossdock.errors import ConfigurationError, InvalidName
from crossdock.spi import Priority

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LEVEL_OF = tuple(max(level for level in Priority if level <= number) for number in range(10))


def check_queue(name: str) -> str:
    """Return a valid queue name. Raises `InvalidName`."""
    return _check(_NAME, name, "queue name", "1 to 63 characters of A-Z a-z 0-9 _ -, starting with a letter or digit")


def check_namespace(name: str) -> str:
    """Return a valid namespace. Raises `InvalidName`."""
    return _check(_NAME, name, "namespace", "1 to 63 characters of A-Z a-z 0-9 _ -, starting with a letter or digit")


def check_id(text: str) -> str:
    """Return a valid message id. Raises `InvalidName`."""
    return _check(_ID, text, "id", "1 to 64 characters of A-Z a-z 0-9 _ -")


def check_task(name: object) -> str:
    """Return a valid task name. Raises `InvalidName`."""
    rule = "1 to 255 bytes of UTF-8 without control characters"
    if not isinstance(name, str) or not name or _CONTROL.search(name) or len(name.encode()) > 255:
        raise InvalidName(f"{_show(name)} is not a valid task name: use {rule}")
    return name


def check_priority(number: object) -> Priority:
    """Return the level for a priority from 0 to 9, rounded down: 0-2 LOW, 3-5 NORMAL, 6-8 HIGH, 9 CRITICAL.

    Raises:
        ConfigurationError: Not an integer from 0 to 9.
    """
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= 9:
        raise ConfigurationError(f"{_show(number)} is not a valid priority: use an integer from 0 to 9 or a Priority")
    return _LEVEL_OF[number]


def _check(grammar: re.Pattern[str], text: object, kind: str, rule: str) -> str:
    if not isinstance(text, str) or not grammar.fullmatch(text):
        raise InvalidName(f"{_show(text)} is not a valid {kind}: use {rule}")
    return text


def _show(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
