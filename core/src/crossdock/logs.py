"""Logging for a worker process: one line a record, on standard error, with nothing in it that could be taken for another line."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any, Final

FORMAT: Final = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class OneLineFormatter(logging.Formatter):
    """Escapes control characters in messages; a traceback follows on indented lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format without the traceback, and escape."""
        return escape_control(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        """Format a traceback; its last lines are the error's text, which can be anything."""
        return "\n".join(f"    {escape_control(line)}" for line in super().formatException(ei).split("\n"))


def escape_control(text: str) -> str:
    """Show control characters, escape sequences and line separators as `\\xNN` or `\\uNNNN`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send what crossdock and the program log to standard error, unless the program configured logging itself."""
    if logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter(FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
