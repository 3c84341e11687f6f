"""The sentences that the suite proves, as a page of documentation: "What a backend promises".

`python -m crossdock_conformance.sentences` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from crossdock.spi import API_VERSION
from crossdock_conformance.report import SUITE_VERSION
from crossdock_conformance.scenario import Scenario, all_scenarios

_HEAD = f"""# What a backend promises

Every sentence here is a scenario of the conformance suite, version {SUITE_VERSION}, for version {API_VERSION} of `crossdock.spi`. A
backend that passes keeps all of them on the server it was tested with, but for what it declares not to have. This page is written by
`python -m crossdock_conformance.sentences`.
"""


def as_page(scenarios: Sequence[Scenario]) -> str:
    """The page, as Markdown."""
    parts = [_HEAD]
    for group in dict.fromkeys(scenario.group for scenario in scenarios):
        module = import_module(f"crossdock_conformance.scenarios.{group}")
        title, _, _ = (module.__doc__ or "").partition("\n")
        parts.append(f"## {group.replace('_', ' ').capitalize()}\n\n{title}\n")
        names = dict.fromkeys(scenario.name for scenario in scenarios if scenario.group == group)
        parts.append("\n".join(_item([s for s in scenarios if (s.group, s.name) == (group, name)]) for name in names) + "\n")
    return "\n".join(parts)


def _item(cases: Sequence[Scenario]) -> str:
    first = cases[0]
    labels = [case.case for case in cases if case.case]
    told = len(labels) <= 8 and not all(label.isdigit() for label in labels)
    shown = f" *({', '.join(labels) if told else f'{len(labels)} cases'})*" if labels else ""
    return f"- {first.promise}{shown}\n  `{first.group}.{first.name}`"


if __name__ == "__main__":
    print(as_page(all_scenarios()), end="")
