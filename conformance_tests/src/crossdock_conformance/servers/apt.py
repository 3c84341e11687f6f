"""Installs a server with apt-get, where the user asked for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Sequence
from pathlib import Path

from crossdock_conformance.servers.errors import ServerFailed

_INSTALL_WITHIN = 600.0
_SYSTEMD = Path("/run/systemd/system")
"""Is there where systemd runs the machine's services."""


def is_wanted(kind: str) -> bool:
    """Whether CROSSDOCK_TEST_INSTALL is 1 or names this kind, and can be followed: we are root, and there is apt-get."""
    named = os.environ.get("CROSSDOCK_TEST_INSTALL", "").split(",")
    return ("1" in named or kind in named) and os.geteuid() == 0 and shutil.which("apt-get") is not None


def offered(package: str) -> str | None:
    """The version of the program in a Debian package that is not installed and could be, such as "7.0.15".

    None if there is no such package, or it is installed: then what is there is for its owner to change.

    Raises:
        ServerFailed: apt-get or apt-cache does not run.
    """
    with _alone():
        _run(["apt-get", "update"])  # the lists that are here may do where they cannot be fetched
        told = _run(["apt-cache", "policy", package]).stdout
    found = dict(re.findall(r"^  (Installed|Candidate): (\S+)$", told, re.MULTILINE))
    if found.get("Installed") != "(none)":
        return None
    version = re.match(r"(?:\d+:)?(\d[\d.]*)", found.get("Candidate", ""))  # without Debian's epoch and revision
    return version[1] if version else None


def install(package: str) -> None:
    """Install a Debian package that is not installed, saying so on standard error. Its own service is not left running.

    Raises:
        ServerFailed: apt-get fails; shows the end of what it wrote.
    """
    command = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    print(f"CROSSDOCK_TEST_INSTALL: {' '.join(command)}", file=sys.__stderr__, flush=True)
    with _alone():
        done = _run(command)
        if _SYSTEMD.is_dir():  # which takes no notice of RUNLEVEL
            _run(["systemctl", "disable", "--now", package])
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-20:])
        raise ServerFailed(f"{' '.join(command)} failed with status {done.returncode}\nThe end of what it wrote:\n{tail}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, with nobody to answer it and the services of packages left alone, its messages in English."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1", "LC_ALL": "C"},
            text=True,
            timeout=_INSTALL_WITHIN,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerFailed(f"{' '.join(command)}: {error}") from error


@contextlib.contextmanager
def _alone() -> Generator[None]:
    """One of our test processes at a time: the others then find the work done. The lock is on a folder, so that no file is left."""
    folder = os.open("/var/lib", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
