"""`crossdock backend`: which brokers can be used, and what one of them can do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from crossdock_cli.options import Json, Namespace, Url
from crossdock_cli.output import Column, error, note, print_json, print_json_list, print_table, safe

if TYPE_CHECKING:
    from crossdock.spi import BrokerEvent, Capabilities

cli = typer.Typer(help="See which brokers can be used, and what one can do.", no_args_is_help=True)


@cli.callback()
def group() -> None:
    """See which brokers can be used, and what one can do."""


@cli.command("ls", hidden=True)
@cli.command("list")
def list_backends(as_json: Json = False) -> None:
    """List the installed backends, and why one cannot be used.

    With --json an array of {"scheme", "entry_point", "distribution", "version", "name", "example_url", "error"}.
    """
    from crossdock.plugins import installed_backends

    every = [
        {
            "scheme": backend.scheme,
            "entry_point": backend.entry_point,
            "distribution": backend.distribution,
            "version": backend.version,
            "name": backend.plugin.name if backend.plugin else None,
            "example_url": backend.plugin.example_url if backend.plugin else None,
            "error": backend.error,
        }
        for backend in installed_backends()
    ]
    if as_json:
        print_json_list(every)
        return
    columns = [Column("SCHEME"), Column("BACKEND"), Column("DISTRIBUTION"), Column("VERSION"), Column("EXAMPLE", shrink=True)]
    print_table(columns, [[each[key] for key in ("scheme", "name", "distribution", "version", "example_url")] for each in every])
    for each in every:
        if each["error"] is not None:
            error(each["error"])


@cli.command()
def doctor(
    target: Annotated[str | None, typer.Argument(metavar="URL", help="The broker; else as --url.", show_default=False)] = None,
    url: Url = None,
    namespace: Namespace = None,
    as_json: Json = False,
) -> None:
    """Open a broker and tell what it is, what it promises, and what is wrong. Exit code 1 if it cannot be opened.

    With --json {"url" (without secrets), "opened", "seconds" (to open), "problems": [sentences], "capabilities": {...} or null}.
    """
    import asyncio

    from crossdock.config import load_settings, require_url
    from crossdock.spi import redact

    settings = load_settings(url=target or url, namespace=namespace)
    examined = asyncio.run(_examine(require_url(settings), settings.namespace))
    capabilities, problems, seconds = examined
    shown = redact(require_url(settings))
    if as_json:
        print_json(
            {
                "url": shown,
                "opened": capabilities is not None,
                "seconds": round(seconds, 4),
                "problems": problems,
                "capabilities": _as_json(capabilities) if capabilities else None,
            }
        )
    elif capabilities:
        _print_report(shown, seconds, capabilities)
    for problem in problems:
        (note if capabilities else error)(problem)
    if capabilities is None:
        raise typer.Exit(1)


async def _examine(url: str, namespace: str) -> tuple[Capabilities | None, list[str], float]:
    from crossdock.errors import CrossdockError
    from crossdock.plugins import create_broker

    problems: list[str] = []

    def report(event: BrokerEvent) -> None:
        problem = _problem(event)
        if problem:
            problems.append(problem)

    broker = create_broker(url, namespace=namespace, report=report)
    started = time.monotonic()
    try:
        await broker.open()
    except CrossdockError as failure:
        return None, [str(failure)], time.monotonic() - started
    seconds = time.monotonic() - started
    capabilities = broker.capabilities
    await broker.close()
    weakness = _weakness(capabilities)
    return capabilities, [*problems, weakness] if weakness else problems, seconds


def _problem(event: BrokerEvent) -> str | None:
    """What an event while opening means, as a sentence; None if it is good news."""
    from crossdock.spi import Blocked, ClockSkew, Disconnected, StateLost

    match event:
        case Blocked(reason):
            return f"the server takes no messages: {reason}"
        case Disconnected(reason):
            return f"the connection was lost: {reason}"
        case StateLost(what):
            return f"the server lost what it had: {what}"
        case ClockSkew(seconds):
            return f"the server's clock is {abs(seconds):.3f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
        case _:
            return None


def _weakness(capabilities: Capabilities) -> str | None:
    """Why a server loses what it was given, as a sentence; None if it does not, or there is no server beside the process that asks."""
    from crossdock.spi import Survives

    if capabilities.clock == "client" or Survives.PROCESS in capabilities.survives:
        return None
    return f"what is enqueued does not survive a kill of the server: {capabilities.durability_note}"


_LIMITS = ("takeover", "delay_resolution", "delay_lateness", "delay_longest", "deduplication_window")


def _print_report(url: str, seconds: float, capabilities: Capabilities) -> None:
    from crossdock.durations import format_duration
    from crossdock.spi import Ability, State, Support, Survives

    faults = {Survives.PROCESS: "process kill", Survives.POWER: "power loss", Survives.NODE: "node loss"}
    survives = [text for fault, text in faults.items() if fault in capabilities.survives]
    print(f"{safe(url)} is {safe(capabilities.server)} {safe(capabilities.version)}, opened in {format_duration(seconds)}\n")
    rows: list[tuple[str, str, str]] = [
        ("durability", f"survives {', '.join(survives) or 'nothing'}", capabilities.durability_note),
        ("clock", capabilities.clock, ""),
    ]
    for name in capabilities.__struct_fields__:
        value = getattr(capabilities, name)
        if isinstance(value, Ability):
            rows.append((name, "no" if value.support is Support.UNSUPPORTED else value.support.value, value.note))
        elif name in _LIMITS:
            rows.append((name, "none" if value is None else format_duration(value), ""))
    for name in ("listable", "removable", "purgeable"):
        states: frozenset[State] = getattr(capabilities, name)
        rows.append((name, ", ".join(state.value for state in State if state in states) or "none", ""))
    rows.append(("max_body", f"{capabilities.max_body:,} bytes", ""))
    print_table([Column("CAPABILITY"), Column("VALUE"), Column("NOTE", shrink=True)], rows)


def _as_json(capabilities: Capabilities) -> dict[str, Any]:
    import msgspec

    shown: dict[str, Any] = msgspec.to_builtins(capabilities)
    # Sets have no order; a listing should have one.
    return {name: sorted(cast("list[str]", value)) if isinstance(value, list) else value for name, value in shown.items()}
