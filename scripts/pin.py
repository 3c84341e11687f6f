"""Write constraints.txt: one version of every third-party package that any distribution, group or build needs.

    python scripts/pin.py                    keeps what is pinned, adds what is missing, drops what nobody needs
    python scripts/pin.py --upgrade          takes the newest of everything

The versions are the same on every Python: they are found on the first and must fit the others. Name the Pythons where they
are not called python3.11, python3.12 and python3.13: `python scripts/pin.py /opt/py312/bin/python ...`, oldest first.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from distributions import ROOT, project_files, read, requirements, sibling

CONSTRAINTS = ROOT / "constraints.txt"
WITHOUT_WHEELS = "nkeys"
HEADER = "# Written by `python scripts/pin.py`; do not edit. The versions that nox and .ci/run install.\n"


def third_party_requirements() -> list[str]:
    """Everything that is asked for anywhere in the repository, less our own distributions."""
    wanted: set[str] = set()
    for file in project_files():
        content = read(file)
        wanted.update(content["build-system"]["requires"], requirements(content["project"]))
        for group in content.get("dependency-groups", {}).values():
            wanted.update(entry for entry in group if isinstance(entry, str))
    return sorted(requirement for requirement in wanted if not sibling(requirement))


def resolve(python: str, wanted: list[str], pins: dict[str, str], folder: Path) -> dict[str, str]:
    """The versions that pip would install with this Python, holding to `pins`. Nothing is installed."""
    constraints, report = folder / "constraints.txt", folder / "report.json"
    constraints.write_text(as_text(pins), encoding="utf-8")
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--dry-run", "--ignore-installed"]
    pip += ["--only-binary=:all:", f"--no-binary={WITHOUT_WHEELS}"]
    subprocess.run([*pip, "--report", str(report), "-c", str(constraints), *wanted], check=True)
    metadata = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    return {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"] for entry in metadata}


def as_text(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=["python3.11", "python3.12", "python3.13"])
    parser.add_argument("--upgrade", action="store_true", help="forget the present pins")
    arguments = parser.parse_args()

    held: dict[str, str] = {}
    if CONSTRAINTS.exists() and not arguments.upgrade:
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        held = dict(line.split("==") for line in lines if "==" in line)
    wanted, used = third_party_requirements(), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        for python in arguments.pythons:
            used |= resolve(python, wanted, held | used, Path(folder))
    CONSTRAINTS.write_text(HEADER + as_text(used), encoding="utf-8")
    print(f"{len(used)} packages pinned for {', '.join(arguments.pythons)}")


if __name__ == "__main__":
    main()
