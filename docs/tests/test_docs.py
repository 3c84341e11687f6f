"""Every snippet and command of the documentation does what its page says. `run_page.py` has the rules of what is executed."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import pytest
import servers_of_reader
from pages import ROOT, Page, all_pages, read_page
from run_page import Mismatch, check, commands

from crossdock_conformance.servers import ServerNotFound
from crossdock_conformance.servers.fixtures import skip_or_fail

RUN_PAGE = ROOT / "docs" / "tests" / "run_page.py"
PATIENCE = 55.0
"""Seconds that one page may take, a little more than it gives itself."""
AT_ONCE = 3
"""Pages executed at the same time."""

EXECUTED = {"python", "console", "output"}
SHOWN = {"text", "mermaid", "json", "toml", "ini", "dockerfile"}
"""Languages of blocks that are looked at, not executed. A block without a language, or with another, is a mistake."""
EXEMPT = {"README.md": 3}
"""How many blocks a page may leave out by `no-test:`. The README's setup commands are run by CI itself."""

PAGES = [page for page in all_pages() if not page.name.startswith("docs/adr/")]
"""Decision records quote commands of the day they were written."""
RUNNABLE = [page for page in PAGES if any(fence.language in EXECUTED and not fence.no_test for fence in page.fences)]


def follow(page: Page, place: Path) -> subprocess.CompletedProcess[str]:
    """Execute a page as a reader would.

    There is this installation, a home of one's own, no settings, and a folder that is empty but for the examples of the documentation.
    Whatever pip installs comes from the disk, and goes to a folder of its own. A page that mentions a server has one.

    Args:
        page: The page.
        place: Where to put home and folders.

    Raises:
        ServerNotFound: The page needs a server, and there is none.
    """
    if servers_of_reader.needed(page):
        with servers_of_reader.started(page, place / "servers") as (with_addresses, programs):
            return _follow(with_addresses, place, programs)
    return _follow(page, place)


def _follow(page: Page, place: Path, *programs: Path) -> subprocess.CompletedProcess[str]:
    tools = Path(sys.executable).parent
    assert (tools / "crossdock").exists(), f"there is no command crossdock beside {sys.executable}: install crossdock-cli"
    home, plugins, folder = place / "home", place / "plugins", place / "work"
    home.mkdir()
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name in ("LD_LIBRARY_PATH", "TMPDIR")} | {
        "PATH": os.pathsep.join([*map(str, programs), str(tools), os.environ.get("PATH", os.defpath)]),
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "TZ": "UTC",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",  # standard output and error in order, as on a terminal
        "PYTHONPATH": str(plugins),
        "PIP_TARGET": str(plugins),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # "false" is how pip's environment says that there is none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }
    return subprocess.run(
        [sys.executable, "-W", "error", str(RUN_PAGE), str(page.path)],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.fixture(scope="session")
def followed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The pages that this session tests, by name, on their way: several at once, since they wait a lot."""
    tests = [
        item
        for item in request.session.items
        if item.name.startswith(f"{test_snippets_and_commands_do_what_the_page_says.__name__}[")
    ]
    wanted = [page for page in RUNNABLE if any(item.name.endswith(f"[{page.name}]") for item in tests)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {page.name: pool.submit(follow, page, tmp_path_factory.mktemp("page")) for page in wanted}


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_snippets_and_commands_do_what_the_page_says(
    page: Page, followed: dict[str, Future[subprocess.CompletedProcess[str]]], pytestconfig: pytest.Config
) -> None:
    """A reader who follows the page gets what it shows."""
    try:
        ended = followed[page.name].result()
    except ServerNotFound as error:
        skip_or_fail(error, pytestconfig)

    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, f"{page.name} left something unclean:\n{ended.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_block_says_what_it_is(page: Page) -> None:
    """Nothing evades its execution by a language that only looks like one."""
    for fence in page.fences:
        assert fence.language in EXECUTED | SHOWN, f"{page.name}:{fence.line}: use one of {sorted(EXECUTED | SHOWN)}"
        assert not (fence.no_test and fence.title), f"{page.name}:{fence.line}: a file is written, not executed"


def test_only_what_cannot_run_is_left_out() -> None:
    """`no-test` is rare, and each one is known here."""
    left_out = Counter(page.name for page in PAGES for fence in page.fences if fence.no_test)

    assert dict(left_out) == EXEMPT


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.name)
def test_files_that_a_page_shows_are_used(page: Page) -> None:
    """A file that nothing imports or runs would never have been executed."""
    fences = page.fences
    for number, fence in enumerate(fences):
        if fence.title:
            later = "".join(other.text for other in fences[number + 1 :] if other.language in EXECUTED)
            implied = Path(fence.title).name in ("crossdock.toml", "pyproject.toml")
            assert implied or Path(fence.title).stem in later, f"{page.name}:{fence.line}: {fence.title} is never used"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_excerpts_are_what_the_file_says(page: Page) -> None:
    """A block that comes from a file of the repository is in it, line by line; a method may be shown without its indentation."""
    for fence in page.fences:
        if fence.source:
            whole = (ROOT / fence.source).read_text(encoding="utf-8")
            shown = fence.text in whole or textwrap.indent(fence.text, "    ") in whole
            assert shown, f"{page.name}:{fence.line}: this is not in {fence.source}"


# --- the judge is judged --------------------------------------------------------------------------


def write_page(text: str, folder: Path) -> Page:
    """Make a page of this text."""
    path = folder / "page.md"
    path.write_text(text.replace("'''", "```"), encoding="utf-8")
    return Page(path, path.read_text(encoding="utf-8"))


WRONG = {
    "a snippet that raises": "'''python\nassert 1 == 2\n'''\n",
    "a snippet that prints something else": "'''python\nprint(1)\n'''\n'''output\n2\n'''\n",
    "a command that fails": "'''console\n$ false\n'''\n",
    "a command that fails before another": "'''console\n$ false\n$ true\n'''\n",
    "a command that prints something else": "'''console\n$ echo one\ntwo\n'''\n",
    "a command that prints more": "'''console\n$ printf 'one\\ntwo\\n'\none\n'''\n",
    "a command that prints what is not shown": "'''console\n$ echo one\n'''\n",
    "another exit code": "'''console\n$ (exit 3)\n$ echo $?\n2\n'''\n",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_wrong_page_is_found_out(text: str, tmp_path: Path) -> None:
    """What is not so fails, and the failure names the line."""
    ended = follow(write_page(text, tmp_path), tmp_path)

    assert ended.returncode == 1
    assert re.match(r"page\.md:\d+: ", ended.stderr)


def test_a_right_page_passes(tmp_path: Path) -> None:
    """Files, state between blocks, `await`, exit codes, wildcards and lines that go on work as `run_page.py` says."""
    page = write_page(
        "'''python title=\"eggs.py\"\nN = 3\n'''\n"
        "'''python\nimport asyncio, eggs\nawait asyncio.sleep(0)\nprint(eggs.N, 'a b c')\n'''\n'''output\n3 a ... c\n'''\n"
        "'''console\n$ x=7\n$ echo $x; \\\n> (exit 2)\n7\n$ echo $?\n2\n$ seq 5\n1\n...\n5\n'''\n",
        tmp_path,
    )
    ended = follow(page, tmp_path)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_nothing_outlives_a_page(tmp_path: Path) -> None:
    """What a page leaves in the background is ended with it, also when the page is wrong."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        page = write_page(f"'''console\n$ sleep 1000 > {pipe} &\n$ echo > {pipe}\n$ false\n'''\n", tmp_path)
        ended = follow(page, tmp_path)

        assert ended.returncode == 1
        assert os.read(reader, 1) == b"\n"
        readable, _, _ = select.select([reader], [], [], 10.0)
        assert readable, "the process still holds its end of the pipe"
        assert os.read(reader, 1) == b""
    finally:
        os.close(reader)


def test_a_page_that_mentions_redis_has_one(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """It is empty, `redis-cli` asks it and answers as on a terminal, and the address on the page leads to it."""
    asked = '$ redis-cli DBSIZE\n(integer) 0\n$ redis-cli RPUSH list a\n(integer) 1\n$ redis-cli LRANGE list 0 9\n1) "a"\n'
    page = write_page(f"'''console\n{asked}$ redis-cli --raw -u redis://localhost:6379/0 LRANGE list 0 9\na\n'''\n", tmp_path)
    try:
        ended = follow(page, tmp_path)
    except ServerNotFound as error:
        skip_or_fail(error, pytestconfig)

    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_page_without_its_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not executed with whatever else there is; who follows it is told what is missing."""

    def missing(kind: str) -> NoReturn:
        raise ServerNotFound(f"there is no {kind} server", kind)

    monkeypatch.setattr(servers_of_reader, "find_servers", lambda kind: [])
    monkeypatch.setattr(servers_of_reader, "start_server", missing)
    page = write_page("'''console\n$ redis-cli PING\nPONG\n'''\n", tmp_path)

    with pytest.raises(ServerNotFound):
        follow(page, tmp_path)


def test_which_pages_need_a_server() -> None:
    """Those with a block that is executed and mentions it, not those that talk about it."""
    blocks = {"console": True, 'python title="a.py"': True, "text": False, "console no-test: no server": False}
    for info, needed in blocks.items():
        for kind in servers_of_reader.KINDS:
            page = Page(ROOT / "page.md", f"redis-cli\n\n```{info}\n$ x any://{kind.address}\n```\n")
            assert servers_of_reader.needed(page) == [kind] * needed, info


def test_a_wildcard_stays_in_its_line() -> None:
    """`...` in a line does not swallow the lines below."""
    check("a ... c\n", "a b c\n")
    check("a\n...\nd\n", "a\nd\n")
    with pytest.raises(Mismatch):
        check("a ... c\n", "a b\nb c\n")


def test_printed_lines_belong_to_a_command() -> None:
    """A console block that shows output before any command is a mistake."""
    fences = Page(ROOT / "page.md", "```console\nwhat is this\n```\n").fences

    with pytest.raises(Mismatch, match="no command"):
        commands(fences[0])


# --- pages belong together ------------------------------------------------------------------------


@pytest.mark.parametrize("page", all_pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Page) -> None:
    """Every relative link leads to a file that is there, and to a heading that it has."""
    for link in page.links:
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), f"{page.name}: {link} leads nowhere"
        assert path.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        if anchor:
            name = path.relative_to(ROOT).as_posix()
            assert anchor in read_page(name).anchors, f"{page.name}: {name} has no heading #{anchor}"


def test_every_page_can_be_found() -> None:
    """The index leads to every page, but for the decision records, which it names as a folder."""
    index = read_page("docs/index.md")
    linked = {(index.path.parent / link.partition("#")[0]).resolve() for link in index.links if "://" not in link}

    assert {page.path for page in PAGES} - {index.path} <= linked


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_headings_of_a_page_differ(page: Page) -> None:
    """One title, and no two headings with one anchor, so that links are unambiguous."""
    assert len(page.anchors) == len(page.headings)
    assert page.prose.startswith("# ")
