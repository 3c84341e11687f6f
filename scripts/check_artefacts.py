"""Check what was built: one wheel and one sdist of each distribution, with honest metadata and all files.

    python scripts/check_artefacts.py dist

Exits 1 and says what is wrong.
"""

from __future__ import annotations

import email
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

from distributions import ROOT, project_files, read, requirements


def main(folder: Path) -> int:
    problems = [problem for file in project_files() for problem in check(folder, file.parent, read(file)["project"])]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(project_files())} wheels and sdists are complete and well described")
    return 1 if problems else 0


def check(folder: Path, place: Path, project: dict[str, Any]) -> list[str]:
    """One sentence for each fault of this distribution's wheel and sdist."""
    stem = f"{project['name'].replace('-', '_')}-{project['version']}"
    wheel_file, sdist_file = folder / f"{stem}-py3-none-any.whl", folder / f"{stem}.tar.gz"
    missing = [f"{file} was not built" for file in (wheel_file, sdist_file) if not file.exists()]
    if missing:
        return missing

    with zipfile.ZipFile(wheel_file) as wheel:
        in_wheel = set(wheel.namelist())
        metadata = email.message_from_bytes(wheel.read(f"{stem}.dist-info/METADATA"))
        license_name = f"{stem}.dist-info/licenses/LICENSE"
        license_text = wheel.read(license_name) if license_name in in_wheel else b""
    with tarfile.open(sdist_file) as sdist:
        in_sdist = {name.removeprefix(f"{stem}/") for name in sdist.getnames()}

    faults = wrong_metadata(metadata, project)
    if license_text != (ROOT / "LICENSE").read_bytes():
        faults.append("the LICENSE in the wheel is not the repository's")
    source = place / "src"
    ours = {str(file.relative_to(source)) for file in source.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    packaged = {name for name in in_wheel if ".dist-info/" not in name}
    faults += [f"the wheel lacks {name}" for name in sorted(ours - packaged)]
    faults += [f"the wheel has {name}, which is not in src/" for name in sorted(packaged - ours)]
    faults += [
        f"the package {name} has no py.typed" for name in {n.split("/")[0] for n in ours} if f"{name}/py.typed" not in packaged
    ]
    needed = {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO", *(f"src/{name}" for name in ours)}
    faults += [f"the sdist lacks {name}" for name in sorted(needed - in_sdist)]
    return [f"{project['name']}: {fault}" for fault in faults]


def wrong_metadata(metadata: Message, project: dict[str, Any]) -> list[str]:
    """One clause for each field that an index or an installer would take amiss."""
    expected = {
        "Name": project["name"],
        "Version": project["version"],
        "Requires-Python": ">=3.11",
        "License-Expression": "MIT",
        "License-File": "LICENSE",
        "Summary": project["description"],
        "Description-Content-Type": "text/markdown",
    }
    faults = [f"{name} is {metadata[name]!r}, not {value!r}" for name, value in expected.items() if metadata[name] != value]
    if len(str(metadata.get_payload()).strip()) < 100:
        faults.append("the description (README.md) is empty or nearly so")
    if len(metadata.get_all("Requires-Dist", [])) != len(requirements(project)):
        faults.append("Requires-Dist is not the list in pyproject.toml")
    return faults


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
