"""Report: what a run of the suite found, for people (a table), for programs (JSON) and for documentation (Markdown)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any, Final

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from crossdock.spi import API_VERSION, redact
from crossdock_conformance.outcome import Outcome, Verdict
from crossdock_conformance.scenarios import GROUPS
from crossdock_conformance.target import Target

SUITE_VERSION: Final = "1.0"
"""Of the scenarios: the second number rises when some are added, the first when one asks for something that was not promised before."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What was tested."""

    backend: str
    """The plugin's name."""
    url: str
    """Without secrets."""
    server: str
    version: str
    """Of the server."""
    time: str
    """`virtual` or `real`."""
    capabilities: dict[str, Any]
    """As declared: `crossdock.spi.Capabilities`, in plain values."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found on one target. Written as JSON by `--crossdock-report`, in a list with one for each target."""

    suite_version: str = SUITE_VERSION
    api_version: int = API_VERSION
    target: Description
    outcomes: Sequence[Outcome]

    def count(self, verdict: Verdict, group: str = "") -> int:
        """How many scenarios ended so, of all or of one group."""
        return sum(outcome.verdict is verdict and group in ("", outcome.group) for outcome in self.outcomes)

    @property
    def groups(self) -> list[str]:
        """In the order of the suite."""
        return list(dict.fromkeys(outcome.group for outcome in self.outcomes))

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.count(Verdict.FAILED)


def describe(target: Target) -> Description:
    """Say what a target is. Raises what opening it raises."""
    capabilities = target.capabilities
    return Description(
        backend=target.plugin.name if target.plugin else target.url.partition(":")[0],
        url=redact(target.url),
        server=capabilities.server,
        version=capabilities.version,
        time="virtual" if target.virtual else "real",
        capabilities=_plain(capabilities),
    )


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(value)
    for name, part in plain.items():
        if isinstance(getattr(value, name), frozenset):
            plain[name] = sorted(part)
        elif part == float("inf"):
            plain[name] = None  # JSON knows no infinity
    return plain


def collect(properties: Iterable[Any]) -> list[Report]:
    """Put the outcomes that tests carried together, by target."""
    targets: dict[tuple[str, ...], Description] = {}
    outcomes: dict[tuple[str, ...], list[Outcome]] = {}
    for described, ended in properties:
        target = msgspec.convert(described, Description)
        key = (target.backend, target.server, target.version, target.time)  # a store of its own for each scenario is one target
        targets.setdefault(key, target)
        outcomes.setdefault(key, []).append(msgspec.convert(ended, Outcome))
    return [Report(target=target, outcomes=sorted(outcomes[key], key=_place)) for key, target in targets.items()]


def _place(outcome: Outcome) -> tuple[int, str]:
    """Tests may have run in any order, in several processes."""
    return GROUPS.index(outcome.group), outcome.id


def as_json(reports: Sequence[Report]) -> bytes:
    """For programs."""
    return msgspec.json.format(msgspec.json.encode(reports), indent=2) + b"\n"


# --- for people ---

_COLUMNS: Final = (
    (Verdict.PASSED, "passed"),
    (Verdict.REFUSED, "refused as declared"),
    (Verdict.NOT_RUN, "not run"),
    (Verdict.FAILED, "failed"),
)


def as_text(report: Report, width: int = 100) -> str:
    """The table for a terminal, and below it what was not run and what failed."""
    target = report.target
    table = Table(
        title=f"{target.backend}: {target.server} {target.version}, {target.time} time; suite {report.suite_version}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
    )
    table.add_column("scenarios")
    for _, title in _COLUMNS:
        table.add_column(title, justify="right")
    for group in report.groups:
        table.add_row(group.replace("_", " "), *(str(report.count(verdict, group) or "") for verdict, _ in _COLUMNS))
    table.add_section()
    table.add_row("all", *(str(report.count(verdict)) for verdict, _ in _COLUMNS))
    text = StringIO()
    console = Console(file=text, width=width, no_color=True)
    console.print(table)
    for note, ids in _by_note(report, Verdict.NOT_RUN).items():
        console.print(f"Not run, as {note}: {', '.join(ids)}", highlight=False, markup=False)
    for note, ids in _by_note(report, Verdict.FAILED).items():
        console.print(f"FAILED {', '.join(ids)}: {note}", highlight=False, markup=False)
    return text.getvalue()


def _by_note(report: Report, verdict: Verdict) -> dict[str, list[str]]:
    notes: dict[str, list[str]] = {}
    for outcome in report.outcomes:
        if outcome.verdict is verdict:
            notes.setdefault(outcome.note, []).append(outcome.id)
    return notes


# --- for documentation ---


def as_markdown(reports: Sequence[Report]) -> str:
    """The capability table: one column per target, what it declares and what of that was proven."""
    targets = [report.target for report in reports]
    lines = [
        f"Conformance suite {SUITE_VERSION}, interface {API_VERSION}.",
        "",
        _row("", *(f"{target.backend} ({target.server} {target.version})" for target in targets)),
        _row("---", *("---" for _ in targets)),
    ]
    names = list(dict.fromkeys(name for target in targets for name in target.capabilities if name not in ("server", "version")))
    lines += [_row(name.replace("_", " "), *(_cell(target.capabilities.get(name)) for target in targets)) for name in names]
    lines += [_row(f"scenarios {title}", *(str(report.count(verdict)) for report in reports)) for verdict, title in _COLUMNS]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Any) -> str:
    match value:
        case {"support": support, "note": note}:
            return f"{support}. {note}" if note else str(support)
        case []:
            return "none"
        case [*parts]:
            return ", ".join(map(str, parts))
        case None:
            return "no limit"
        case float():
            return f"{value:g} s"
        case _:
            return str(value)
