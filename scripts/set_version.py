"""The one version of all our distributions: write it everywhere, or check that it is the same everywhere.

    python scripts/set_version.py 0.2.0      writes it into every pyproject.toml, the pins between siblings and __version__
    python scripts/set_version.py --check    says what disagrees and exits 1

The root's `pyproject.toml` holds the version that the others follow.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from distributions import ROOT, project_files, read, requirements, sibling

VERSION = re.compile(r"\d+\.\d+\.\d+((a|b|rc)\d+)?(\.dev\d+)?")
VERSION_LINE = re.compile(r'^(version|__version__) = "([^"]*)"$', re.MULTILINE)
SIBLING_PIN = re.compile(r'"(crossdock(?:-[a-z]+)?(?:\[[a-z,-]+\])?)==[^"]*"')


def present_version() -> str:
    """The version in the root's `pyproject.toml`."""
    version: str = read(ROOT / "pyproject.toml")["project"]["version"]
    return version


def code_files() -> list[Path]:
    """The modules that hold a `__version__`."""
    files = (file for project in project_files() for file in project.parent.glob("src/*/__init__.py"))
    return [file for file in files if VERSION_LINE.search(file.read_text(encoding="utf-8"))]


def disagreements(wanted: str) -> list[str]:
    """One sentence for each version or pin that is not the wanted one."""
    found: list[str] = []
    for file in [*project_files(), *code_files()]:
        match = VERSION_LINE.search(file.read_text(encoding="utf-8"))
        if match is None or match[2] != wanted:
            found.append(f"{file.relative_to(ROOT)} has version {match and match[2]}, the root's pyproject.toml has {wanted}")
    for file in project_files():
        found += [
            f'{file.relative_to(ROOT)} needs "{requirement}"; siblings are pinned to =={wanted}'
            for requirement in requirements(read(file)["project"])
            if sibling(requirement) and not requirement.endswith(f"=={wanted}")
        ]
    return found


def write(version: str) -> None:
    """Put the version into every `pyproject.toml`, into the pins of siblings, and into every `__version__`."""
    for file in [*project_files(), *code_files()]:
        text = VERSION_LINE.sub(rf'\1 = "{version}"', file.read_text(encoding="utf-8"), count=1)
        file.write_text(SIBLING_PIN.sub(rf'"\1=={version}"', text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("version", nargs="?", help="the version to write")
    what.add_argument("--check", action="store_true", help="change nothing; exit 1 if anything disagrees")
    arguments = parser.parse_args()
    if arguments.version is not None:
        if not VERSION.fullmatch(arguments.version):
            parser.error(f"{arguments.version!r} is no version; write it as 0.2.0, 0.2.0rc1 or 0.2.0.dev1")
        write(arguments.version)
    found = disagreements(present_version())
    for sentence in found:
        print(sentence, file=sys.stderr)
    if found:
        print("`python scripts/set_version.py VERSION` writes one version everywhere", file=sys.stderr)
        return 1
    print(f"{len(project_files())} distributions have version {present_version()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
