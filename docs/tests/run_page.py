"""Execute the snippets of one page, in order, as a reader would: in one folder, one Python and one terminal.

    python docs/tests/run_page.py docs/tutorial/first-task.md       # in an empty folder

- A block with a title is a file, whatever its language, and is written: ```python title="tasks.py".
- A block with `from="path"` is an excerpt of a file of this repository. It is compared with the file, not executed.
- Any other ```python is executed in one Python process for the whole page; `await` works at the top level.
- ```output is what the Python block before it printed.
- ```console holds commands, each after `$ ` (`> ` goes on with the line before), and what they print, error output included. They
  run in one shell for the whole page. A command must succeed, unless the next one is `echo $?`, which then shows its exit code.
- What the shell itself says about its background jobs does not count.
- In what is printed, `...` stands for anything in a line, and alone on a line for any number of lines. Several spaces count as one,
  since columns are as wide as what stands in them.
- no-test: REASON, behind the language, leaves a block out.

Exit code 0 if everything came as printed; otherwise 1, and the first difference on standard error.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import difflib
import inspect
import io
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

from pages import Fence, Page

PATIENCE = 30.0
"""Seconds that one command may take."""
PAGE_PATIENCE = 50
"""Seconds that a page may take."""
_END = "=-=-= end of command"
_JOB_NOTICE = re.compile(r"^bash: line \d+: +\d+ (Killed|Terminated)\b.*\n", re.MULTILINE)


class Mismatch(Exception):
    """The page does not hold; the text says where and how."""


class Interpreter:
    """One Python for all of a page's snippets."""

    def __init__(self) -> None:
        self._module = types.ModuleType("snippet")
        sys.modules["snippet"] = self._module
        self._runner = asyncio.Runner()
        self.printed = ""

    def run(self, page: Page, fence: Fence) -> None:
        """Execute a block; keep what it prints."""
        code = compile("\n" * (fence.line - 1) + fence.text, page.name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                outcome = eval(code, vars(self._module))
                if inspect.iscoroutine(outcome):
                    self._runner.run(outcome)
        except BaseException as error:
            raise Mismatch("the snippet raised\n" + "".join(traceback.format_exception(error))) from error
        self.printed = output.getvalue()

    def close(self) -> None:
        """End the event loop, and what lives in it."""
        self._runner.close()


class Terminal:
    """One shell for all of a page's commands."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._code = 0

    def run(self, command: str) -> tuple[str, int]:
        """Return what a command prints, and its exit code. It has nothing to read."""
        assert self._shell.stdin is not None
        script = f"(exit {self._code})\n{{ {command}\n}} </dev/null\nprintf '%s %s\\n' $'\\n{_END}' $?\n"
        self._shell.stdin.write(script.encode())
        self._shell.stdin.flush()
        printed = self._read(command)
        output, _, code = printed.rpartition(f"\n{_END} ")
        self._code = int(code)
        return _JOB_NOTICE.sub("", output), self._code

    def _read(self, command: str) -> str:
        assert self._shell.stdout is not None
        deadline = time.monotonic() + PATIENCE
        printed = b""
        while not re.search(rf"\n{_END} \d+\n\Z".encode(), printed):
            readable, _, _ = select.select([self._shell.stdout], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._shell.stdout.fileno(), 65536) if readable else b""
            if not chunk:
                what = "ended the shell" if readable else f"did not end within {PATIENCE:g} s"
                raise Mismatch(f"`{command}` {what}; it printed\n{printed.decode(errors='replace')}")
            printed += chunk
        return printed.decode(errors="replace")

    def close(self) -> None:
        """End the shell, and whatever it still runs in the background."""
        with self._shell:  # closes its pipes and waits
            os.killpg(self._shell.pid, signal.SIGKILL)


def commands(fence: Fence) -> list[tuple[int, str, str]]:
    """The commands of a console block: line, command, and what it is to print."""
    found: list[tuple[int, str, str]] = []
    for number, line in enumerate(fence.text.splitlines(), fence.line):
        if line.startswith("$ "):
            found.append((number, line[2:], ""))
        elif not found:
            raise Mismatch(f"line {number} is printed by no command: commands start with `$ `")
        elif line.startswith("> ") and not found[-1][2]:
            found[-1] = (found[-1][0], f"{found[-1][1]}\n{line[2:]}", "")
        else:
            found[-1] = (*found[-1][:2], f"{found[-1][2]}{line}\n")
    return found


def check(shown: str, printed: str) -> None:
    """Compare what a page shows with what was printed."""
    expected, actual = _lines(shown), _lines(printed)
    pattern = ""
    for line in expected:
        pattern += r"(?:.*\n)*?" if line.strip() == "..." else ".*?".join(re.escape(part) for part in line.split("...")) + r"\n"
    if not re.fullmatch(pattern, "".join(f"{line}\n" for line in actual)):
        difference = "\n".join(difflib.unified_diff(expected, actual, "the page", "what was printed", lineterm="", n=100))
        raise Mismatch(f"something else was printed\n{difference}")


def _lines(text: str) -> list[str]:
    return [re.sub(" +", " ", line.rstrip()) for line in text.strip("\n").splitlines()]


def run_page(page: Page) -> None:
    """Execute a page in the current folder. Raises `Mismatch`."""
    interpreter, terminal = Interpreter(), Terminal()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PAGE_PATIENCE)
    try:
        for fence in page.fences:
            if not fence.no_test and not fence.source:
                _run_fence(page, fence, interpreter, terminal)
    finally:
        signal.alarm(0)
        interpreter.close()
        terminal.close()


def _too_long(number: int, frame: types.FrameType | None) -> None:
    raise Mismatch(f"the page takes longer than {PAGE_PATIENCE} s")


def _run_fence(page: Page, fence: Fence, interpreter: Interpreter, terminal: Terminal) -> None:
    line = fence.line
    try:
        if fence.title:
            file = Path(fence.title)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(fence.text, encoding="utf-8")
        elif fence.language == "python":
            interpreter.run(page, fence)
        elif fence.language == "output":
            check(fence.text, interpreter.printed)
        elif fence.language == "console":
            pending = 0  # the exit code that the next command is to show
            for at, command, shown in commands(fence):
                line = at
                if pending and command != "echo $?":
                    raise Mismatch(f"the command before this one ended with exit code {pending}")
                printed, code = terminal.run(command)
                check(shown, printed)
                pending = code
            if pending:
                raise Mismatch(f"the command ended with exit code {pending}")
    except Mismatch as mismatch:
        raise Mismatch(f"{page.name}:{line}: {mismatch}") from mismatch


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    sys.path[0] = os.getcwd()  # the reader's folder, not this one
    try:
        run_page(Page(path, path.read_text(encoding="utf-8")))
    except Mismatch as mismatch:
        sys.exit(f"{mismatch}")
