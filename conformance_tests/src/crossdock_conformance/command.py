"""`crossdock conformance URL`: the suite as a command, for those who run a broker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from crossdock.errors import ConfigurationError
from crossdock.spi import hookimpl
from crossdock_conformance.names import URL_VARIABLE

_BROKEN: Final = 1

Url = Annotated[str, typer.Argument(metavar="URL", envvar="CROSSDOCK_URL", show_envvar=True, help="Broker URL to test.")]
Teeth = Annotated[
    bool, typer.Option("--teeth", help="Instead of a URL: show that the suite finds out brokers that are broken on purpose.")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="GROUP", help="Run this group of scenarios, or this scenario; may be repeated."),
]
RealTime = Annotated[bool, typer.Option("--real-time", help="Use the system's clock even where time could be virtual.")]
ReportFile = Annotated[Path | None, typer.Option("--report", metavar="FILE", dir_okay=False, help="Write what was found as JSON.")]
TableFile = Annotated[
    Path | None, typer.Option("--table", metavar="FILE", dir_okay=False, help="Write the capability table as Markdown.")
]


@hookimpl
def crossdock_register_commands(cli: Any) -> None:
    """Add the command."""
    cli.command("conformance")(conformance)


def conformance(
    url: Url = "",
    teeth: Teeth = False,
    only: Only = None,
    real_time: RealTime = False,
    report: ReportFile = None,
    table: TableFile = None,
) -> None:
    """Prove that the broker behind a URL keeps what its backend promises.

    Stores, delivers and removes messages of its own, in namespaces of its own whose names begin with t and sixteen digits; takes no
    notice of others. Ends with exit code 1 if a promise is broken. What only the owner of the server can do (stop it, freeze it) is
    not tested, and said.
    """
    if teeth:
        _show_teeth()
        return
    if not url:
        raise ConfigurationError("name the broker to test: crossdock conformance URL, or set CROSSDOCK_URL")
    _test(url, only, real_time, report, table)


def _test(url: str, only: list[str] | None, real_time: bool, report: Path | None, table: Path | None) -> None:
    from crossdock_conformance import promises
    from crossdock_conformance.plugin import unwritable
    from crossdock_conformance.scenario import all_scenarios
    from crossdock_conformance.target import Target

    scenarios = all_scenarios()
    wanted = [scenario for scenario in scenarios if _chosen(scenario.group, scenario.name, scenario.id, only)]
    if not wanted:
        groups = ", ".join(dict.fromkeys(scenario.group for scenario in scenarios))
        raise ConfigurationError(f"--only {' '.join(only or ())!r} names no scenario; the groups are {groups}")
    for file in (report, table):
        if file is not None and (why := unwritable(file)):
            raise ConfigurationError(why)
    _ = Target(url).capabilities  # what is wrong with the URL or the server is said in a sentence, before anything else
    options = ["--crossdock-real-time"] if real_time else []
    options += [f"--crossdock-report={report.absolute()}"] if report else []
    options += [f"--crossdock-table={table.absolute()}"] if table else []
    with tempfile.TemporaryDirectory(prefix="crossdock-conformance-") as folder:
        # Nothing of the folder we are called from counts: no configuration, no conftest, no cache.
        config = Path(folder) / "pytest.ini"
        config.write_text("[pytest]\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-c", str(config), "--rootdir", folder]
        command += [option for plugin in ("cacheprovider", "randomly", "asyncio") for option in ("-p", f"no:{plugin}")]
        ids = [f"{promises.__file__}::test_promise[{scenario.id}]" for scenario in wanted]
        # The URL may hold a password, and everybody can read a command line.
        ended = subprocess.run([*command, *options, *ids], env={**os.environ, URL_VARIABLE: url}, check=False)
    if ended.returncode:
        raise typer.Exit(_BROKEN)


def _show_teeth() -> None:
    from crossdock_conformance.teeth.trials import trials

    escaped = 0
    for trial in trials():
        escaped += not trial.grounds
        print(f"{trial.accused.name}: {trial.accused.fault}")
        print(f"    {trial.scenario}: {trial.grounds or 'NOT FOUND OUT'}")
    if escaped:
        raise typer.Exit(_BROKEN)


def _chosen(group: str, name: str, id: str, only: list[str] | None) -> bool:
    return not only or any(each in (group, f"{group}.{name}", id) for each in only)
