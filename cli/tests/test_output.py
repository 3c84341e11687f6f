"""What is printed can neither hurt a terminal nor a program that reads it."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossdock_cli.output import Column, one_line, plain, print_json, print_json_list, print_table, safe


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain [text] äö 日本 🚚", "plain [text] äö 日本 🚚"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("title\x1b]0;x\x07", r"title\x1b]0;x\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\rb\tc\nd", r"a\rb\tc\nd"),
        ("file\u202etxt.exe", r"file\u202etxt.exe"),
        ("\u2028\u2066", r"\u2028\u2066"),
        ("\ud800", r"\ud800"),
        ("\x7f\x00", r"\x7f\x00"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    """Escape sequences, carriage returns, text that runs backwards and lone surrogates are shown, not done."""
    assert safe(text) == shown


@given(st.text())
def test_safe_text_is_one_printable_line(text: str) -> None:
    """Whatever a message holds; and it can be encoded."""
    shown = safe(text)
    shown.encode()
    assert len(shown.splitlines()) <= 1
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)


def test_lines_are_kept_on_demand() -> None:
    """Tracebacks keep their lines, tables only the first."""
    assert safe("a\nb\x1b", lines=True) == "a\nb\\x1b"
    assert one_line("a\nb") == "a"


def test_tables_off_a_terminal_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Aligned, never cut, without trailing spaces."""
    print_table([Column("A"), Column("N", right=True), Column("TEXT", shrink=True)], [("x", 1, "y" * 300), ("xx", 1000, None)])
    assert capsys.readouterr().out == f"A      N  TEXT\nx      1  {'y' * 300}\nxx  1000  -\n"


def test_json_is_ascii_and_indented(capsys: pytest.CaptureFixture[str]) -> None:
    """Any pipe and any terminal can take it."""
    print_json({"text": "ä\x1b\x9b\u202e", "bytes": b"\x00"})
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    assert json.loads(out) == {"text": "ä\x1b\x9b\u202e", "bytes": "AA=="}


def test_json_lists_are_arrays(capsys: pytest.CaptureFixture[str]) -> None:
    """Written as they come, also when empty."""
    print_json_list(iter([{"a": 1}, {"a": 2}]))
    assert json.loads(capsys.readouterr().out) == [{"a": 1}, {"a": 2}]
    print_json_list([])
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (math.inf, None),
        (math.nan, None),
        ({1: "a", "b": b"x"}, {"1": "a", "b": "eA=="}),
        (2**80, 2**80),
        (msgspec.msgpack.Ext(5, b"x"), str),
        ({(1, 2): "x"}, {"(1, 2)": "x"}),
        ("\ud800", str),
    ],
)
def test_values_json_has_no_word_for(value: Any, expected: Any) -> None:
    """They become something that it has; nothing fails."""
    shown = plain(value)
    json.dumps(shown)
    assert isinstance(shown, str) if expected is str else shown == expected
