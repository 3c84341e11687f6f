"""What commands print: tables for people, JSON for programs, notes and errors beside them.

Data goes to standard output, all else to standard error. Whatever came from a broker is shown with its control characters escaped:
a message can never move a terminal's cursor or set its title.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import typer

Cell = str | int | None

# Beside control characters: surrogates, line separators, and marks that make text run backwards.
_UNSAFE_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_BACKWARDS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


class Column(NamedTuple):
    """A column of a table."""

    title: str
    right: bool = False
    """Numbers stand right."""
    shrink: bool = False
    """Cut at the end where the terminal is too narrow."""


def safe(text: str, *, lines: bool = False) -> str:
    """Return text that does nothing to a terminal but appear.

    Args:
        text: Anything.
        lines: Keep line feeds, for tracebacks.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character if (lines and character == "\n") or not _is_unsafe(character) else ascii(character)[1:-1] for character in text
    )


def _is_unsafe(character: str) -> bool:
    return character in _BACKWARDS or unicodedata.category(character) in _UNSAFE_CATEGORIES


def one_line(text: str) -> str:
    """The first line of a text, safe for a table."""
    return safe(text.partition("\n")[0])


def note(text: str) -> None:
    """Tell people something beside the data."""
    print(safe(text), file=sys.stderr)


def error(text: str) -> None:
    """Tell what went wrong, in one sentence."""
    note("error: " + " ".join(text.split()))


# --- tables ---------------------------------------------------------------------------------------


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table: fitted to a terminal, or whole where the output goes elsewhere."""
    cells = [["-" if cell is None else safe(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _print_fitted(columns, cells)
        return
    titles = [column.title for column in columns]
    widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
    for row in (titles, *cells):
        padded = (
            cell.rjust(width) if column.right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(padded).rstrip())


def _print_fitted(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=not column.shrink)
    for row in cells:
        # Text, not str: square brackets in data are no markup.
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
    Console(highlight=False).print(table)


# --- JSON -----------------------------------------------------------------------------------------


def print_json(value: Any) -> None:
    """Print one value. Only ASCII, so any terminal and any pipe can take it."""
    print(json.dumps(plain(value), indent=2))


def print_json_list(values: Iterable[Any]) -> None:
    """Print an array, element by element."""
    separator = "["
    for value in values:
        print(separator, json.dumps(plain(value)), sep="\n", end="")
        separator = ","
    print("\n]" if separator == "," else "[]")


def plain(value: Any) -> Any:
    """Return a value as JSON can say it; bytes become Base64, what has no form becomes its text."""
    import msgspec

    try:
        return msgspec.json.decode(msgspec.json.encode(value, enc_hook=str))
    except (msgspec.MsgspecError, TypeError, ValueError, OverflowError):  # e.g. half a surrogate pair
        return safe(repr(value))


# --- asking and waiting ---------------------------------------------------------------------------


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that cannot be undone; ends the command unless the answer is yes.

    Raises:
        ConfigurationError: Nobody can be asked, and `--yes` was not given.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        from crossdock.errors import ConfigurationError

        raise ConfigurationError(f"{question} Nobody can be asked here: give --yes to do it, or --dry-run to see what it would do")
    print(f"{safe(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        note("nothing was changed")
        raise typer.Exit(1)


@contextmanager
def progress(what: str, total: int | None) -> Generator[Callable[[int], None]]:
    """Show a bar on a terminal while the block runs; gives the function that moves it on by so many items.

    Args:
        what: Title of the bar.
        total: Items in all; None = unknown.
    """
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        item = bar.add_task(what, total=total)
        yield lambda count: bar.advance(item, count)
