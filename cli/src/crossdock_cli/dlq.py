"""`crossdock dlq`: dead letters, listed, shown, replayed and discarded."""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossdock_cli.options import DryRun, Json, Namespace, Url, Yes, read_assignments, read_past, read_rate
from crossdock_cli.output import (
    Cell,
    Column,
    confirm,
    error,
    note,
    one_line,
    plain,
    print_json,
    print_json_list,
    print_table,
    progress,
    safe,
)

if TYPE_CHECKING:
    from crossdock.spi import Broker, DeadLetter
    from crossdock_cli.selection import Filters, Outcome

cli = typer.Typer(help="List, repair, replay and discard dead letters.", no_args_is_help=True)

PREVIEW = 20
"""Most letters shown by a dry run, and most failures told one by one."""

# Filters, the same for list, replay and discard. All that are given must hold.
Ids = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Only these.", show_default=False)]
Queues = Annotated[list[str] | None, typer.Option("--queue", "-q", metavar="NAME", help="Only of this queue; repeatable.")]
Task = Annotated[str | None, typer.Option("--task", metavar="NAME", help="Only of this task, or of a pattern: 'shop.*'.")]
Reasons = Annotated[list[str] | None, typer.Option("--reason", metavar="REASON", help="Only dead for this reason; repeatable.")]
ErrorType = Annotated[str | None, typer.Option("--error", metavar="TYPE", help="Only with this error: TimeoutError, or a pattern.")]
Since = Annotated[
    int | None,
    typer.Option("--since", parser=read_past, metavar="WHEN", help="Only dead since then: 2h (ago), 2026-01-01T10:00:00Z."),
]
Until = Annotated[int | None, typer.Option("--until", parser=read_past, metavar="WHEN", help="Only dead before then.")]
IdOption = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="Only this one; repeatable.")]
All = Annotated[bool, typer.Option("--all", envvar="CROSSDOCK_DLQ_ALL", help="Every dead letter, where no filter is given.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most so many, the first to die first.")]


@cli.callback()
def group() -> None:
    """List, repair, replay and discard dead letters."""


@cli.command("ls", hidden=True)
@cli.command("list")
def list_letters(
    queue: Queues = None,
    task: Task = None,
    reason: Reasons = None,
    error: ErrorType = None,
    since: Since = None,
    until: Until = None,
    id: IdOption = None,
    limit: Annotated[int, typer.Option(min=0, help="At most so many, the first to die first; 0 = all.")] = 100,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """List dead letters, queue by queue, in order of dying.

    With --json an array of {"id", "queue", "task", "reason", "error_type", "text", "fingerprint", "died_ms", "attempt", "replays"}.
    """
    from crossdock_cli.selection import letters, read_filters
    from crossdock_cli.session import existing_queues, with_broker

    filters = read_filters(
        ids=id or (),
        task=task,
        error=error,
        reasons=reason or (),
        since_ms=since,
        until_ms=until,
        limit=limit + 1 if limit else None,
    )

    async def collect(broker: Broker) -> list[dict[str, Any]]:
        names = [stats.queue for stats in await existing_queues(broker, queue or [])]
        return [_summary(letter) async for letter in letters(broker, names, filters)]

    found = with_broker(url, namespace, collect)
    shown = found[:limit] if limit else found
    if as_json:
        print_json_list(shown)
    else:
        _print_summaries(shown)
    if len(found) > len(shown):
        note(f"the first {limit} are shown; --limit shows more")


@cli.command()
def show(
    id: Annotated[str, typer.Argument(metavar="ID", help="Id of the dead letter.")],
    queue: Queues = None,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Show one dead letter: what it was, why it died, and every attempt.

    With --json what `dlq list` has, and {"traceback", "attempts": [{"attempt", "at_ms", "error_type", "text", "worker"}],
    "delivery_count", "worker", "enqueued_ms", "origin", "generation", "priority", "arguments", "headers", "undecodable",
    "body_base64"}; the last is set where the body is no envelope, and says why in "undecodable".
    """
    from crossdock.errors import ConfigurationError, NotFound
    from crossdock_cli.selection import letters, read_filters
    from crossdock_cli.session import existing_queues, with_broker

    filters = read_filters(ids=[id])

    async def find(broker: Broker) -> list[DeadLetter]:
        names = [stats.queue for stats in await existing_queues(broker, queue or [])]
        return [letter async for letter in letters(broker, names, filters)]

    found = with_broker(url, namespace, find)
    if not found:
        raise NotFound(f"there is no dead letter {id!r}" + (f" in queue {', '.join(queue)}" if queue else ""))
    if len(found) > 1:
        queues = ", ".join(letter.message.queue for letter in found)
        raise ConfigurationError(f"{id!r} is dead in several queues, {queues}: say which by --queue")
    whole = _whole(found[0])
    if as_json:
        print_json(whole)
    else:
        _print_whole(whole)


@cli.command()
def replay(
    ids: Ids = None,
    queue: Queues = None,
    task: Task = None,
    reason: Reasons = None,
    error: ErrorType = None,
    since: Since = None,
    until: Until = None,
    id: IdOption = None,
    limit: Limit = None,
    everything: All = False,
    rate: Annotated[float | None, typer.Option(parser=read_rate, metavar="RATE", help="At most so fast: 100/s, 10/m.")] = None,
    to: Annotated[str | None, typer.Option("--to", metavar="QUEUE", help="Put them into this queue instead of their own.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", envvar="CROSSDOCK_DLQ_REPLAY_SET", help="Change an argument; repeatable."),
    ] = None,
    dry_run: DryRun = False,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Bring dead letters back to life at attempt 1, with their own arguments or, by --set, changed ones.

    Interrupted, it loses nothing: what was not replayed is still dead. Of --set, a value that is JSON is taken as such.

    With --json {"selected", "replayed", "failed": [{"id", "queue", "error"}], "dry_run"}.
    """
    from crossdock.names import check_queue
    from crossdock_cli import selection
    from crossdock_cli.session import existing_queues, with_broker

    filters = _read_filters([*(ids or ()), *(id or ())], queue, task, reason, error, since, until, limit, everything)
    arguments = read_assignments("--set", changes or [])
    if to is not None:
        check_queue(to)
    outcome = selection.Outcome()
    present: set[str] = set()

    async def work(broker: Broker) -> None:
        queues = await existing_queues(broker, queue or [])
        selected = selection.letters(broker, [stats.queue for stats in queues], filters, present)
        if dry_run:
            outcome.selected = await _preview(selected, quiet=as_json)
            return
        unfiltered = filters == selection.Filters(limit=limit)
        total = limit or (sum(stats.dead or 0 for stats in queues) if unfiltered else None)
        with progress("replaying", total) as advance:
            pace = selection.Pace(rate)
            await selection.replay(broker, selected, outcome, to=to, changes=arguments, pace=pace, advance=advance)

    with _telling(outcome, "replayed"):
        with_broker(url, namespace, work)
    _finish(outcome, filters, present, "replayed", dry_run=dry_run, as_json=as_json)


@cli.command()
def discard(
    ids: Ids = None,
    queue: Queues = None,
    task: Task = None,
    reason: Reasons = None,
    error: ErrorType = None,
    since: Since = None,
    until: Until = None,
    id: IdOption = None,
    limit: Limit = None,
    everything: All = False,
    dry_run: DryRun = False,
    yes: Yes = False,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Delete dead letters for good. Asks first, unless each is named by its id.

    With --json {"selected", "discarded", "failed": [{"id", "queue", "error"}], "dry_run"}.
    """
    from crossdock_cli import selection
    from crossdock_cli.session import existing_queues, with_broker

    filters = _read_filters([*(ids or ()), *(id or ())], queue, task, reason, error, since, until, limit, everything)
    outcome = selection.Outcome()
    present: set[str] = set()

    async def choose(broker: Broker) -> dict[str, list[str]]:
        queues = await existing_queues(broker, queue or [])
        selected = selection.letters(broker, [stats.queue for stats in queues], filters, present)
        chosen: dict[str, list[str]] = {}
        if dry_run:
            outcome.selected = await _preview(selected, quiet=as_json)
            return chosen
        async for letter in selected:
            chosen.setdefault(letter.message.queue, []).append(letter.message.id)
            outcome.selected += 1
        return chosen

    async def delete(broker: Broker) -> None:
        with progress("discarding", outcome.selected) as advance:
            await selection.discard(broker, chosen, outcome, advance=advance)

    chosen = with_broker(url, namespace, choose)
    if chosen:
        if not filters.ids:
            confirm(f"Discard {_letters(outcome.selected)} for good?", yes=yes)
        with _telling(outcome, "discarded"):
            with_broker(url, namespace, delete)
    _finish(outcome, filters, present, "discarded", dry_run=dry_run, as_json=as_json)


# --- choosing and telling -------------------------------------------------------------------------


def _read_filters(
    ids: list[str],
    queues: list[str] | None,
    task: str | None,
    reasons: list[str] | None,
    error: str | None,
    since_ms: int | None,
    until_ms: int | None,
    limit: int | None,
    everything: bool,
) -> Filters:
    """Read what to change. Raises `ConfigurationError` if nothing says which letters are meant."""
    from crossdock.errors import ConfigurationError
    from crossdock_cli.selection import read_filters

    if not everything and not any((ids, queues, task, reasons, error, since_ms is not None, until_ms is not None)):
        raise ConfigurationError("say which dead letters are meant: ids, filters such as --queue or --task, or --all")
    return read_filters(ids=ids, task=task, error=error, reasons=reasons or (), since_ms=since_ms, until_ms=until_ms, limit=limit)


async def _preview(selected: AsyncIterator[DeadLetter], *, quiet: bool) -> int:
    """Count the letters and show the first of them."""
    count, first = 0, list[dict[str, Any]]()
    async for letter in selected:
        count += 1
        if len(first) < PREVIEW:
            first.append(_summary(letter))
    if not quiet:
        _print_summaries(first)
        if count > len(first):
            note(f"the first {len(first)} are shown")
    return count


@contextmanager
def _telling(outcome: Outcome, done: str) -> Generator[None]:
    """Say how far it came, if it does not come to its end."""
    try:
        yield
    except BaseException:
        note(f"{_letters(outcome.done)} {done} before this; run it again for the others")
        raise


def _finish(outcome: Outcome, filters: Filters, present: set[str], done: str, *, dry_run: bool, as_json: bool) -> None:
    """Tell the outcome. Ends the command with exit code 1 if anything failed."""
    from crossdock_cli.selection import Failed

    if filters.limit is None:
        outcome.failed += [Failed(id, None, "there is no such dead letter") for id in sorted(filters.ids - present)]
    if as_json:
        print_json({"selected": outcome.selected, done: outcome.done, "failed": outcome.failed, "dry_run": dry_run})
    elif dry_run:
        print(f"{_letters(outcome.selected)} would be {done}")
    else:
        print(f"{_letters(outcome.done)} {done}")
    for failed in outcome.failed[:PREVIEW]:
        error(f"{failed.id}: {failed.error}")
    if len(outcome.failed) > PREVIEW:
        error(f"and {len(outcome.failed) - PREVIEW:,} more failed; --json lists them")
    if outcome.failed:
        raise typer.Exit(1)


def _letters(count: int) -> str:
    return f"{count:,} dead letter{'' if count == 1 else 's'}"


# --- showing --------------------------------------------------------------------------------------


def _summary(letter: DeadLetter) -> dict[str, Any]:
    from crossdock.letters import read_story

    story = read_story(letter)
    return {
        "id": letter.message.id,
        "queue": letter.message.queue,
        "task": letter.task,
        "reason": letter.reason.value,
        "error_type": letter.error_type,
        "text": story.text,
        "fingerprint": letter.fingerprint,
        "died_ms": letter.died_ms,
        "attempt": story.attempt,
        "replays": story.replays,
    }


def _whole(letter: DeadLetter) -> dict[str, Any]:
    from crossdock import codec
    from crossdock.errors import CodecError
    from crossdock.letters import read_story

    story = read_story(letter)
    whole = {
        **_summary(letter),
        "traceback": story.traceback,
        "attempts": story.attempts,
        "delivery_count": story.delivery_count,
        "worker": story.worker,
        "enqueued_ms": story.enqueued_ms or None,
        "origin": story.origin,
        "generation": letter.message.generation,
        "priority": letter.message.priority.name.lower(),
        "arguments": None,
        "headers": None,
        "undecodable": None,
        "body_base64": None,
    }
    try:
        envelope = codec.describe(letter.message.body)
    except CodecError as failure:
        return {**whole, "undecodable": str(failure), "body_base64": b64encode(letter.message.body).decode()}
    arguments = {name: plain(value) for name, value in envelope["arguments"].items()}
    return {**whole, "arguments": arguments, "headers": envelope["headers"]}


def _print_summaries(summaries: Sequence[dict[str, Any]]) -> None:
    if not summaries:
        note("there are no such dead letters")
        return
    columns = [
        Column("ID"),
        Column("QUEUE"),
        Column("TASK", shrink=True),
        Column("REASON"),
        Column("ATTEMPT", right=True),
        Column("DIED", right=True),
        Column("ERROR", shrink=True),
    ]
    print_table(columns, [_row(each) for each in summaries])


def _row(summary: dict[str, Any]) -> tuple[Cell, ...]:
    from crossdock.durations import format_duration

    kind = summary["error_type"].rpartition(".")[2]
    return (
        summary["id"],
        summary["queue"],
        summary["task"] or None,
        summary["reason"],
        summary["attempt"],
        f"{format_duration((time.time() * 1000 - summary['died_ms']) / 1000)} ago",
        one_line(": ".join(part for part in (kind, summary["text"]) if part)),
    )


def _print_whole(whole: dict[str, Any]) -> None:
    facts: list[tuple[str, Cell]] = [
        ("id", whole["id"]),
        ("task", whole["task"] or None),
        ("queue", whole["queue"]),
        ("priority", whole["priority"]),
        ("reason", whole["reason"]),
        ("error", whole["error_type"] or None),
        ("died", _instant(whole["died_ms"])),
        ("enqueued", _instant(whole["enqueued_ms"])),
        ("attempt", whole["attempt"]),
        ("delivery", whole["delivery_count"]),
        ("replays", whole["replays"]),
        ("worker", whole["worker"] or None),
        ("fingerprint", whole["fingerprint"] or None),
    ]
    for name, value in facts:
        print(f"{name:<12} {'-' if value is None else safe(str(value))}")
    _print_part("what happened", whole["text"])
    if whole["undecodable"] is None:
        arguments: dict[str, Any] = whole["arguments"]
        _print_part("arguments", "\n".join(f"{name} = {json.dumps(value)}" for name, value in arguments.items()) or "(none)")
        _print_part("headers", "\n".join(f"{name}: {value}" for name, value in whole["headers"].items()))
    else:
        _print_part("body", f"{whole['undecodable']}\n{whole['body_base64']}")
    attempts = (f"{each.attempt}  {_instant(each.at_ms)}  {each.error_type}: {each.text}" for each in whole["attempts"])
    _print_part("attempts", "\n".join(line.replace("\n", " ") for line in attempts))
    _print_part("traceback", whole["traceback"])


def _print_part(title: str, text: str) -> None:
    if text:
        print(f"\n{title}")
        for line in safe(text, lines=True).rstrip("\n").split("\n"):
            print(f"    {line}".rstrip())


def _instant(at_ms: int | None) -> str | None:
    return None if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds")
