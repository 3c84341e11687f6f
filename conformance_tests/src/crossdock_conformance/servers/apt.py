"""Installs a server with apt-get, where the user asked for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Generator

from crossdock_conformance.servers.errors import ServerFailed

_INSTALL_WITHIN = 600.0


def is_wanted() -> bool:
    """Whether CROSSDOCK_TEST_INSTALL is 1, and can be followed: we are root, and there is apt-get."""
    return os.environ.get("CROSSDOCK_TEST_INSTALL") == "1" and os.geteuid() == 0 and shutil.which("apt-get") is not None


def install(package: str) -> None:
    """Install a Debian package, saying so on standard error. Its own service is not started where the system allows us to ask for that.

    Raises:
        ServerFailed: apt-get fails; shows the end of what it wrote.
    """
    command = ["apt-get", "install", "--yes", "--no-install-recommends", package]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    print(f"CROSSDOCK_TEST_INSTALL=1: {' '.join(command)}", file=sys.__stderr__, flush=True)
    with _alone():
        for each in (["apt-get", "update"], command):
            try:
                done = subprocess.run(
                    each,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    text=True,
                    timeout=_INSTALL_WITHIN,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise ServerFailed(f"{' '.join(each)}: {error}") from error
        if done.returncode != 0:  # of the installation; the lists may do although one could not be fetched
            tail = "\n".join(done.stdout.splitlines()[-20:])
            raise ServerFailed(f"{' '.join(command)} failed with status {done.returncode}\nThe end of what it wrote:\n{tail}")


@contextlib.contextmanager
def _alone() -> Generator[None]:
    """One of our test processes at a time: the others then find the work done. The lock is on a folder, so that no file is left."""
    folder = os.open("/var/lib", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
