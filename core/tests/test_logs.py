"""A worker's log: one line a record, whatever a task puts into it."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from crossdock.logs import FORMAT, OneLineFormatter, escape_control, log_to_stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("Grüße 🚀", "Grüße 🚀"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x00\x7f\x85\x9b", r"\x00\x7f\x85\x9b"),
        ("a\u2028b\u2029", r"a\u2028b\u2029"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_control_characters_are_shown(text: str, shown: str) -> None:
    """As Python would write them; all else stays readable."""
    assert escape_control(text) == shown


def formatted(message: str, error: BaseException | None = None) -> str:
    """What stands in the log."""
    error_info = (type(error), error, error.__traceback__) if error else None
    record = logging.LogRecord("crossdock.task.t", logging.WARNING, __file__, 1, "order %s", (message,), error_info)
    return OneLineFormatter(FORMAT).format(record)


def test_a_record_is_one_line() -> None:
    """A task cannot make up lines of its own."""
    line = formatted("1\n2026-01-01 00:00:00,000 ERROR   1 crossdock.worker: all is lost")
    assert "\n" not in line
    assert r"order 1\n2026-01-01" in line
    assert "WARNING" in line


def test_a_traceback_follows_indented() -> None:
    """Its lines cannot be taken for records either, also where the error's text has lines and escape sequences."""
    try:
        raise ValueError("first\n2026-01-01 00:00:00,000 ERROR   1 crossdock.worker: all is lost\x1b[2J")
    except ValueError as error:
        first, *rest = formatted("1", error).split("\n")
    assert first.endswith("order 1")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)
    assert rest[-1] == r"    2026-01-01 00:00:00,000 ERROR   1 crossdock.worker: all is lost\x1b[2J"


def test_a_program_that_configured_logging_is_left_alone() -> None:
    """Its handlers stay the only ones."""
    own = logging.NullHandler()
    root = logging.getLogger()
    root.addHandler(own)
    before = list(root.handlers), root.level
    try:
        log_to_stderr()
        assert (root.handlers, root.level) == before
    finally:
        root.removeHandler(own)


def test_a_program_that_did_not_logs_to_standard_error() -> None:
    """From INFO on, in one form."""
    program = "import logging; from crossdock.logs import log_to_stderr; log_to_stderr(); logging.getLogger('a').info('x\\ny')"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout == ""
    assert ran.stderr.count("\n") == 1
    assert ran.stderr.endswith("a: x\\ny\n")
    assert " INFO " in ran.stderr
