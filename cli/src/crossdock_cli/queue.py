"""`crossdock queue`: looking into queues, and emptying them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock_cli.options import DryRun, Json, Namespace, Url, Yes
from crossdock_cli.output import Column, confirm, note, one_line, print_json, print_json_list, print_table

if TYPE_CHECKING:
    from crossdock.spi import Broker, Entry, QueueStats, State

cli = typer.Typer(help="Look into queues, and empty them.", no_args_is_help=True)

QueueName = Annotated[str, typer.Argument(metavar="QUEUE", help="Name of the queue.")]


@cli.callback()
def group() -> None:
    """Look into queues, and empty them."""


@cli.command("ls", hidden=True)
@cli.command("list")
def list_queues(
    queues: Annotated[list[str] | None, typer.Argument(metavar="QUEUE", help="Only these.")] = None,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List queues with their numbers of messages; `-` is what the broker cannot tell.

    With --json an array of {"queue", "ready", "scheduled", "leased", "dead", "oldest_ready_age" (seconds), "consumers",
    "dead_dropped"}.
    """
    from crossdock_cli.session import existing_queues, with_broker

    every = with_broker(url, namespace, lambda broker: existing_queues(broker, queues or []))
    if as_json:
        print_json_list(every)
    elif every:
        _print_stats(every)
    else:
        note("there are no queues in this namespace yet")


@cli.command()
def show(
    queue: QueueName,
    limit: Annotated[int, typer.Option(min=0, max=1000, help="Most messages shown of each state.")] = 10,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Show one queue and its first messages in each state.

    With --json {"stats": as of `queue list`, "entries": [{"id", "state", "task", "priority", "attempt", "delivery_count",
    "enqueued_ms", "eta_ms"}]}.
    """
    from crossdock_cli.session import existing_queues, with_broker

    async def look(broker: Broker) -> tuple[QueueStats, list[Entry]]:
        (stats,) = await existing_queues(broker, [queue])
        return stats, await _first_entries(broker, queue, limit) if limit else []

    stats, entries = with_broker(url, namespace, look)
    described = [_describe(entry) for entry in entries]
    if as_json:
        print_json({"stats": stats, "entries": described})
        return
    _print_stats([stats])
    if described:
        print()
        columns = [
            Column("ID"),
            Column("STATE"),
            Column("TASK", shrink=True),
            Column("PRIORITY"),
            Column("ATTEMPT", right=True),
            Column("ENQUEUED", right=True),
            Column("DUE", right=True),
        ]
        print_table(columns, [_row(entry) for entry in described])


@cli.command()
def purge(
    queue: QueueName,
    state: Annotated[str, typer.Option(metavar="STATE", help="ready, scheduled or dead.")] = "ready",
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Delete every message of a queue that is in one state, for good. Running tasks are never touched.

    With --json {"queue", "state", "purged", "dry_run"}; in a dry run "purged" is what would be, null if the broker cannot tell.
    """
    from crossdock_cli.session import existing_queues, with_broker

    chosen = _read_state(state)

    async def count(broker: Broker) -> int | None:
        (stats,) = await existing_queues(broker, [queue])
        present: int | None = getattr(stats, chosen.value)
        return present

    async def empty(broker: Broker) -> int:
        return await broker.purge(queue, chosen)

    purged = with_broker(url, namespace, count)
    what = f"{chosen.value} messages of queue {queue!r}"
    if not dry_run:
        confirm(f"Delete {'all' if purged is None else purged} {what}?", yes=yes)
        purged = with_broker(url, namespace, empty)
    if as_json:
        print_json({"queue": queue, "state": chosen.value, "purged": purged, "dry_run": dry_run})
    elif dry_run:
        print(f"would delete {'an unknown number of' if purged is None else purged} {what}")
    else:
        print(f"deleted {purged} {what}")


# --- reading and showing --------------------------------------------------------------------------


def _read_state(text: str) -> State:
    from crossdock.spi import State

    allowed = {state.value: state for state in (State.READY, State.SCHEDULED, State.DEAD)}
    if text not in allowed:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(allowed)}", param_hint="'--state'")
    return allowed[text]


async def _first_entries(broker: Broker, queue: str, limit: int) -> list[Entry]:
    from crossdock.spi import State

    entries: list[Entry] = []
    for state in (State.LEASED, State.READY, State.SCHEDULED, State.DEAD):
        if state in broker.capabilities.listable:
            entries += (await broker.peek(queue, state, limit=limit)).entries
        else:
            note(f"this broker cannot list {state.value} messages")
    return entries


def _describe(entry: Entry) -> dict[str, Any]:
    from crossdock import codec
    from crossdock.errors import CodecError

    message = entry.message
    try:
        envelope = codec.decode(message.body)
    except CodecError:
        envelope = None
    return {
        "id": message.id,
        "state": entry.state.value,
        "task": envelope.task if envelope else None,
        "priority": message.priority.name.lower(),
        "attempt": envelope.attempt if envelope else None,
        "delivery_count": entry.delivery_count,
        "enqueued_ms": envelope.enqueued_ms or None if envelope else None,
        "eta_ms": message.eta_ms or None,
    }


def _row(entry: dict[str, Any]) -> tuple[str | int | None, ...]:
    from crossdock.durations import format_duration

    now_ms = time.time_ns() // 1_000_000
    due = entry["eta_ms"] if entry["state"] == "scheduled" else None
    return (
        entry["id"],
        entry["state"],
        "(undecodable)" if entry["task"] is None else one_line(entry["task"]),
        entry["priority"],
        entry["attempt"],
        None if entry["enqueued_ms"] is None else f"{format_duration((now_ms - entry['enqueued_ms']) / 1000)} ago",
        None if due is None else f"in {format_duration((due - now_ms) / 1000)}",
    )


def _print_stats(every: Sequence[QueueStats]) -> None:
    from crossdock.durations import format_duration

    numbers = ("READY", "SCHEDULED", "LEASED", "DEAD", "OLDEST", "WORKERS")
    print_table(
        [Column("QUEUE"), *(Column(title, right=True) for title in numbers)],
        [
            (
                stats.queue,
                stats.ready,
                stats.scheduled,
                stats.leased,
                stats.dead,
                None if stats.oldest_ready_age is None else format_duration(stats.oldest_ready_age),
                stats.consumers,
            )
            for stats in every
        ],
    )
