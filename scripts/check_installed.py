"""Check an installation from the inside: run with the environment's own Python, from outside the checkout.

    python -I check_installed.py crossdock-core,crossdock-cli 0.1.0

Exits 1 unless just these of our distributions are there, in this version, imported from the environment, with entry points
that load.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path


def main(names: list[str], version: str) -> int:
    environment = Path(sys.prefix).resolve()
    ours = {d.name: d for d in importlib.metadata.distributions() if d.name.split("-")[0] == "crossdock"}
    faults = [f"{name} is missing" for name in sorted(set(names) - set(ours))]
    faults += [f"{name} came along uninvited" for name in sorted(set(ours) - set(names))]
    for name, distribution in sorted(ours.items()):
        if distribution.version != version:
            faults.append(f"{name} has version {distribution.version}, not {version}")
        packages = {file.parts[0] for file in distribution.files or () if file.name == "__init__.py"}
        for package in sorted(packages):
            module = importlib.import_module(package)
            if environment not in Path(str(module.__file__)).resolve().parents:
                faults.append(f"{package} is imported from {module.__file__}, not from the environment")
        for entry_point in distribution.entry_points:
            entry_point.load()
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1].split(","), sys.argv[2]))
