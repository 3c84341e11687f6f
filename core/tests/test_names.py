"""The one grammar of names."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock import names
from crossdock.errors import ConfigurationError, InvalidName
from crossdock.spi import Priority

LETTERS_AND_DIGITS = string.ascii_letters + string.digits
PLACE_NAMES = [names.check_queue, names.check_namespace]


@pytest.mark.parametrize("check", PLACE_NAMES)
@pytest.mark.parametrize("name", ["a", "9", "emails", "A-b_9", "0" * 63, "a-", "a_"])
def test_queue_and_namespace_names_that_are_allowed(check: Callable[[Any], str], name: str) -> None:
    """1 to 63 letters, digits, - and _, starting with a letter or digit, come back unchanged."""
    assert check(name) == name


@pytest.mark.parametrize("check", PLACE_NAMES)
@pytest.mark.parametrize(
    "name", ["", "a" * 64, "-a", "_a", "a b", "a.b", "a\n", "\na", "ä", "a\x00", "a/b", "٣", None, 3, b"a", ["a"]]
)
def test_queue_and_namespace_names_that_are_refused(check: Callable[[Any], str], name: object) -> None:
    """Anything else is refused in one printable sentence that states the rule."""
    with pytest.raises(InvalidName, match=r"is not a valid .*: use 1 to 63 characters of A-Z a-z 0-9 _ -, starting with") as caught:
        check(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("id", ["a", "-", "_", "x" * 64, "019a8b7c-5a31-7c2e-9f10-2f6a1c0e8d44"])
def test_ids_that_are_allowed(id: str) -> None:
    """1 to 64 letters, digits, - and _, in any place."""
    assert names.check_id(id) == id


@pytest.mark.parametrize("id", ["", "x" * 65, "a b", "a.b", "a\n", "ä", None, 7])
def test_ids_that_are_refused(id: Any) -> None:
    """Anything else is refused with the rule."""
    with pytest.raises(InvalidName, match="is not a valid id: use 1 to 64 characters of A-Z a-z 0-9 _ -"):
        names.check_id(id)


@pytest.mark.parametrize("name", ["a", "shop.tasks.pay", "pay now!", "zahlung ausführen", "支付", "x" * 255, "ä" * 127, "a/b:c#d"])
def test_task_names_that_are_allowed(name: str) -> None:
    """Any text up to 255 bytes."""
    assert names.check_task(name) == name


@pytest.mark.parametrize(
    "name", ["", "x" * 256, "ä" * 128, "a\nb", "a\x00", "a\x1b[31m", "\x7f", "a\x85b", "a\u2028b", "\ud800", None, 3, b"pay"]
)
def test_task_names_that_are_refused(name: object) -> None:
    """Control characters, half surrogate pairs, too many bytes and what is no text are refused, and not echoed raw."""
    with pytest.raises(InvalidName, match="is not a valid task name: use 1 to 255 bytes of UTF-8 without control") as caught:
        names.check_task(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@given(st.text(max_size=70))
def test_a_queue_name_is_ascii_of_one_form(name: str) -> None:
    """The rule and the check agree for arbitrary text."""
    allowed = 1 <= len(name) <= 63 and set(name) <= set(LETTERS_AND_DIGITS + "-_") and name[0] in LETTERS_AND_DIGITS
    try:
        names.check_queue(name)
    except InvalidName:
        assert not allowed
    else:
        assert allowed


@pytest.mark.parametrize(
    ("number", "level"),
    list(enumerate([Priority.LOW] * 3 + [Priority.NORMAL] * 3 + [Priority.HIGH] * 3 + [Priority.CRITICAL])),
)
def test_priorities_are_rounded_down(number: int, level: Priority) -> None:
    """Each integer from 0 to 9 is the nearest level below it."""
    assert names.check_priority(number) is level


@pytest.mark.parametrize("number", [-1, 10, 3.0, True, "3", None])
def test_priorities_that_are_refused(number: object) -> None:
    """Everything else is refused with the rule."""
    with pytest.raises(ConfigurationError, match="is not a valid priority: use an integer from 0 to 9 or a Priority"):
        names.check_priority(number)
