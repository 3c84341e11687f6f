"""The command `crossdock`: its groups, its version, and how it tells errors."""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points, version
from typing import Annotated, Any, Final

import typer

from crossdock_cli import backend, dlq, queue, task, worker
from crossdock_cli.output import error, note

FAILED: Final = 1
WRONG_USE: Final = 2

cli = typer.Typer(
    name="crossdock",
    help="Run workers, look into queues and repair dead letters, the same on every broker.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use. Every option has an environment variable, shown by the command's --help.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"auto_envvar_prefix": "CROSSDOCK", "help_option_names": ["-h", "--help"]},
)
cli.add_typer(worker.cli, name="worker")
cli.add_typer(task.cli, name="task")
cli.add_typer(queue.cli, name="queue")
cli.add_typer(dlq.cli, name="dlq")
cli.add_typer(backend.cli, name="backend")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"crossdock {version('crossdock-cli')} (core {version('crossdock-core')})")
        raise typer.Exit


@cli.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", envvar="CROSSDOCK_DEBUG", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, show_envvar=False, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a group."""
    _wants.debug = debug


class _Wants:
    debug = False
    plugins = False  # they have been looked for


_wants = _Wants()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code.

    Args:
        arguments: What follows `crossdock`; the default is the process's own.
    """
    _wants.debug = False
    if sys.stdout is None:
        error("cannot write to standard output: it is closed")
        sys.exit(FAILED)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no reason to fail
    code: object
    try:
        _add_plugins(sys.argv[1:] if arguments is None else arguments)
        code = cli(arguments, prog_name="crossdock", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough. What is still buffered goes nowhere, also at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except typer.Abort:
        note("interrupted")
        code = 1
    except OSError as failure:
        if failure.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            code = _tell(failure)
        else:
            error(f"cannot write to standard output: {(failure.strerror or 'it failed').lower()}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = FAILED
    except Exception as failure:
        code = _tell(failure)
    sys.exit(code if isinstance(code, int) else 0)


def _tell(failure: Exception) -> int:
    """Say an error in one sentence, and return the exit code. Nobody sees a traceback who did not ask for it."""
    from crossdock.errors import ConfigurationError, CrossdockError

    if _wants.debug:
        traceback.print_exception(failure)
    if isinstance(failure, CrossdockError):
        error(str(failure))
        return WRONG_USE if isinstance(failure, ConfigurationError) else FAILED
    if hasattr(failure, "format_message"):  # Typer's own: a usage error; its classes have no public name
        return _tell_usage(failure)
    error(f"this is a fault of crossdock or of a plugin: {type(failure).__name__}: {failure}")
    if not _wants.debug:
        note("`crossdock --debug ...` shows where it happened; please report it")
    return FAILED


def _tell_usage(failure: Any) -> int:
    context = failure.ctx
    text: str = failure.format_message()
    if context is not None and text == context.get_help():  # a group without a command
        print(text)
        return WRONG_USE
    error(text)
    if context is not None:
        note(f"`{context.command_path} --help` tells more")
    return int(failure.exit_code)


def _add_plugins(arguments: Sequence[str]) -> None:
    """Add the commands of plugins, once, and only where they may be wanted: finding them doubles the time to start."""
    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    if _wants.plugins or first in {group.name for group in cli.registered_groups}:
        return
    _wants.plugins = True
    # The group's name stands here too, because importing the registry for nothing costs as much.
    if entry_points(group="crossdock.plugins"):
        from crossdock.plugins import load_command_plugins

        for problem in load_command_plugins(cli):
            note(problem)
