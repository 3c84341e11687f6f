"""`crossdock task`: enqueuing by hand."""

from __future__ import annotations

import contextlib
import difflib
import sys
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock_cli.options import (
    AppReference,
    DryRun,
    Json,
    read_assignments,
    read_datetime,
    read_duration,
    read_json_object,
    read_priority,
    read_time_to_live,
)
from crossdock_cli.output import print_json, safe

if TYPE_CHECKING:
    from crossdock import App, Options, Task

cli = typer.Typer(help="Enqueue tasks.", no_args_is_help=True)


@cli.callback()
def group() -> None:
    """Enqueue tasks."""


@cli.command()
def enqueue(
    app: AppReference,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the task, or its last part if that is unique.")],
    args: Annotated[
        str | None, typer.Option("--args", metavar="JSON", help='Arguments by name: \'{"to": "a@example.com"}\'.')
    ] = None,
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", metavar="NAME=VALUE", help="One argument; repeatable. A value that is JSON is taken as such."),
    ] = None,
    delay: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="DURATION", help="Not before this long from now: 10m.")
    ] = None,
    eta: Annotated[
        datetime | None, typer.Option(parser=read_datetime, metavar="INSTANT", help="Not before then: 2026-01-01T10:00:00Z.")
    ] = None,
    expires: Annotated[
        Any, typer.Option(parser=read_time_to_live, metavar="DURATION|INSTANT", help="Useless after this long, or after then.")
    ] = None,
    priority: Annotated[
        int | None, typer.Option(parser=read_priority, metavar="LEVEL", help="low, normal, high, critical, or 0 to 9.")
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="The message's id. Default: a new one.")] = None,
    queue: Annotated[str | None, typer.Option("--queue", "-q", metavar="NAME", help="Another queue than the task's.")] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Enqueue a call of a task and print its id. The arguments are checked against the task's signature first.

    With --json: {"id", "queue", "task", "arguments", "dry_run"}.
    """
    from crossdock.loading import load_app

    arguments = {**read_json_object("--args", args), **read_assignments("--arg", arg or [])}
    given = {"delay": delay, "eta": eta, "expires": expires, "priority": priority, "id": id, "queue": queue}
    options: Options = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    with contextlib.redirect_stdout(sys.stderr):  # what the program prints when it is imported is no data of ours
        program = load_app(app)
    outgoing = find_task(program, task).message_from_arguments(arguments, options)
    if not dry_run:
        program.enqueue_sync(outgoing)
        program.close_sync()
    if as_json:
        shown = {"id": outgoing.id, "queue": outgoing.queue, "task": outgoing.task, "arguments": arguments, "dry_run": dry_run}
        print_json(shown)
    elif dry_run:
        print(f"would enqueue {safe(outgoing.task)} on queue {outgoing.queue} as {outgoing.id}")
    else:
        print(outgoing.id)


def find_task(program: App, name: str) -> Task[..., Any]:
    """Return the task of this name, or the only one whose name ends so.

    Raises:
        UnknownTask: There is none, or several; the text has the nearest names.
    """
    from crossdock import UnknownTask

    if name in program.tasks:
        return program.tasks[name]
    ending = [full for full in program.tasks if full.endswith(f".{name}")]
    if len(ending) == 1:
        return program.tasks[ending[0]]
    if ending:
        raise UnknownTask(f"several tasks end in {name!r}: {', '.join(ending)}")
    by_part = {full.rpartition(".")[2]: full for full in program.tasks}
    near = difflib.get_close_matches(name, program.tasks, n=3) or [
        by_part[part] for part in difflib.get_close_matches(name.rpartition(".")[2], by_part, n=3)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(program.tasks)) or 'none'}"
    raise UnknownTask(f"the App has no task {name!r}; {hint}")
