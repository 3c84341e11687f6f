"""`crossdock worker`: running tasks."""

from __future__ import annotations

from typing import Annotated

import typer

from crossdock_cli.options import AppReference, read_duration
from crossdock_cli.output import note

cli = typer.Typer(help="Run tasks.", no_args_is_help=True)


@cli.callback()
def group() -> None:
    """Run tasks."""


@cli.command()
def run(
    app: AppReference,
    queue: Annotated[
        list[str] | None,
        typer.Option(
            "--queue",
            "-q",
            metavar="NAME[=WEIGHT]",
            help="A queue and its share of the slots, 1 to 1000; repeatable. Default: every queue that the tasks name.",
        ),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=100_000, help="Most tasks at once, in each process.")] = 100,
    processes: Annotated[int, typer.Option(min=1, max=1000, help="Processes; one that dies is started again.")] = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Serve queues strictly in order, not by weight.")] = False,
    burst: Annotated[bool, typer.Option("--burst", help="End when nothing is ready any more.")] = False,
    grace: Annotated[
        float,
        typer.Option(parser=read_duration, metavar="DURATION", show_default="30s", help="Time for running tasks to end at a stop."),
    ] = 30.0,
    lease: Annotated[
        float | None,
        typer.Option(
            parser=read_duration,
            metavar="DURATION",
            help="Time after which a dead worker's tasks go to another, 1s to 1h. Default: as the queues say (30s).",
        ),
    ] = None,
) -> None:
    """Run tasks until told to stop.

    SIGTERM or Ctrl-C stops it gently: nothing new is taken, and what runs gets the grace period. A second one stops it at once.
    """
    from crossdock import Worker, WorkerOptions, supervisor
    from crossdock.loading import load_app

    weights = _read_weights(queue) if queue else None
    options = WorkerOptions(queues=weights, concurrency=concurrency, strict=strict, burst=burst, grace=grace, lease=lease)
    Worker.check(load_app(app), options)  # what is wrong is told before the banner says that something runs
    size = f"{concurrency} tasks at once" + (f" in each of {processes} processes" if processes > 1 else "")
    note(f"crossdock: running {app}, {size}; Ctrl-C to stop")
    raise typer.Exit(supervisor.run(app, options, processes))


def _read_weights(texts: list[str]) -> dict[str, int]:
    """Read `name=weight` or `name`. Raises `ConfigurationError`, also for a queue given twice."""
    from crossdock import ConfigurationError, Queue

    weights: dict[str, int] = {}
    for text in texts:
        name, equals, weight = text.partition("=")
        if equals and not (weight.isascii() and weight.isdigit() and len(weight) < 10):
            raise ConfigurationError(f"{text!r} is no queue with a weight: write it like critical=6")
        queue = Queue(name, weight=int(weight) if equals else 1)  # checks both
        if queue.name in weights:
            raise ConfigurationError(f"the queue {name!r} is given twice: keep one")
        weights[queue.name] = queue.weight
    return weights
