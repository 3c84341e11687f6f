"""Where this repository's distributions are and what they say of themselves, for the other scripts and noxfile.py."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLACES = ("", "core/", "cli/", "backends/*/", "conformance_tests/")
SIBLING = re.compile(r"crossdock(-[a-z]+)?(?![\w-])")


def project_files() -> list[Path]:
    """The `pyproject.toml` of every distribution, the meta-distribution's first."""
    return [file for place in PLACES for file in sorted(ROOT.glob(f"{place}pyproject.toml"))]


def read(file: Path) -> dict[str, Any]:
    """What one `pyproject.toml` says."""
    return tomllib.loads(file.read_text(encoding="utf-8"))


def requirements(project: dict[str, Any]) -> list[str]:
    """What the distribution needs at run time, with and without its extras."""
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    return [*project.get("dependencies", []), *(requirement for extra in extras.values() for requirement in extra)]


def sibling(requirement: str) -> str | None:
    """The name of the distribution of ours that is required, or None if the requirement is for somebody else's."""
    match = SIBLING.match(requirement)
    return match[0] if match else None
