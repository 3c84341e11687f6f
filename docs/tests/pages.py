"""Reading the documentation: which pages there are, and what of a page can be checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^(?P<ticks>```+)(?P<info>[^`\n]*)\n(?P<text>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
_CODE = re.compile(r"`+([^`]+)`+")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_TITLE = re.compile(r'title="([^"]+)"')
_SOURCE = re.compile(r'from="([^"]+)"')
_NO_TEST = re.compile(r"no-test: (.+)")


@dataclass(frozen=True)
class Fence:
    """A fenced block."""

    line: int
    """Of its first line of text, from 1."""
    language: str
    title: str
    """The file that the block is; "" for none."""
    source: str
    """The file of this repository that the block is an excerpt of; "" for none."""
    no_test: str
    """Why it is not executed; "" if it is."""
    text: str


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path
    text: str

    @property
    def name(self) -> str:
        """The path as people say it: `docs/index.md`."""
        return self.path.relative_to(ROOT).as_posix() if self.path.is_relative_to(ROOT) else self.path.name

    @property
    def fences(self) -> list[Fence]:
        """Every fenced block, in order."""
        return [self._fence(match) for match in _FENCE.finditer(self.text)]

    def _fence(self, match: re.Match[str]) -> Fence:
        info = match["info"].strip()
        title, source, no_test = _TITLE.search(info), _SOURCE.search(info), _NO_TEST.search(info)
        return Fence(
            line=self.text.count("\n", 0, match.start("text")) + 1,
            language=info.partition(" ")[0],
            title=title[1] if title else "",
            source=source[1] if source else "",
            no_test=no_test[1] if no_test else "",
            text=match["text"],
        )

    @property
    def prose(self) -> str:
        """The text without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def headings(self) -> list[str]:
        """The text of every heading, in order."""
        return _HEADING.findall(self.prose)

    @property
    def anchors(self) -> set[str]:
        """What a link to a part of this page may end with, as Git hosts make it of the headings."""
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in self.headings}

    @property
    def links(self) -> list[str]:
        """Where its links lead."""
        return _LINK.findall(_CODE.sub("", self.prose))

    def section(self, heading: str) -> str:
        """The text below a heading, up to the next of its level or above. Fails if there is not exactly one."""
        found = [*re.finditer(rf"^(#+) {re.escape(heading)}\s*$", self.text, re.MULTILINE)]
        assert len(found) == 1, f"{self.name} has {len(found)} headings {heading!r}"
        rest = self.text[found[0].end() :]
        end = re.search(rf"^#{{1,{len(found[0][1])}}} ", _FENCE.sub(lambda fence: " " * len(fence[0]), rest), re.MULTILINE)
        return rest[: end.start()] if end else rest


@cache
def read_page(name: str) -> Page:
    """Read one page, such as `docs/index.md`."""
    path = ROOT / name
    return Page(path, path.read_text(encoding="utf-8"))


def all_pages() -> list[Page]:
    """The README, those of the backends, and everything below `docs/`, but not what belongs to tests and examples."""
    folders = ("adr", "explanation", "how-to", "reference", "tutorial")
    paths = [*sorted((ROOT / "backends").glob("*/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
    names = ["README.md", *(path.relative_to(ROOT).as_posix() for path in paths)]
    for folder in folders:
        names += [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs" / folder).rglob("*.md"))]
    return [read_page(name) for name in names]


def tables(text: str) -> list[list[list[str]]]:
    """Every table of a text, as rows of cells, without its head and rule."""
    blocks = re.findall(r"(?:^\|.*\|[ ]*\n)+", text + "\n", re.MULTILINE)
    return [[_cells(line) for line in block.splitlines()[2:]] for block in blocks]


def _cells(line: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def code(cell: str) -> list[str]:
    """The texts set as code in a cell."""
    return _CODE.findall(cell)
