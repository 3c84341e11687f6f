"""What has to be known of one kind of server: where it is found, how it is started, how it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

HOST = "127.0.0.1"

_IN_ROOT = """\
[ -e "$0/proc/self" ] || mount -t proc proc "$0/proc"
exec chroot "$0" "$@"
"""


@dataclass(frozen=True)
class Binary:
    """A server program on this machine."""

    path: str
    """Absolute, as seen from inside `root`."""
    origin: str
    """Where it was found, for people."""
    root: Path | None = None
    """The folder that is the program's file system, such as debootstrap makes; None for this machine's own."""

    def command(self, *arguments: str) -> list[str]:
        """The command line that runs it. In a root of its own it has /proc, in a mount namespace that ends with it."""
        if self.root is None:
            return [self.path, *arguments]
        private = [] if (self.root / "proc" / "self").exists() else ["unshare", "--mount"]
        return [*private, "sh", "-ec", _IN_ROOT, str(self.root), self.path, *arguments]

    def inside(self, path: Path) -> str:
        """A path as the program sees it."""
        return str(path) if self.root is None else f"/{path.relative_to(self.root)}"


@dataclass(frozen=True)
class Launch:
    """How to start a binary."""

    argv: list[str]
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Changes to our own environment."""


@dataclass(frozen=True)
class Image:
    """How to run a container of the official image, or one that takes the same arguments."""

    name: str
    client_port: int
    admin_port: int | None = None
    command: list[str] | None = None
    """None: the image's own."""
    env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Reach:
    """Where a server is asked."""

    url: str
    """The broker URL."""
    admin: str | None = None
    """Where it is asked what it holds, if that is another port than the broker's."""


class Recipe(ABC):
    """One kind of server."""

    kind: ClassVar[str]
    title: ClassVar[str]
    """Its name for people."""
    program: ClassVar[str]
    """The name of the program's file."""
    places: ClassVar[tuple[str, ...]]
    """Where a package manager puts it: patterns below the root of a file system."""
    wheels: ClassVar[tuple[str, ...]] = ()
    """Distributions on PyPI that carry it, for those who cannot or will not install it otherwise."""
    package: ClassVar[str]
    """Debian's package."""
    ports: ClassVar[tuple[str, ...]] = ("client",)
    """The ports that it listens on; the first is that of the URL."""
    ports_above: Mapping[str, int] = MappingProxyType({})
    """Ports that it listens on besides, each so far above the first: the server leaves no choice."""
    start_within: ClassVar[float] = 30.0
    """Seconds until it must answer."""
    stop_within: ClassVar[float] = 15.0
    """Seconds until it must have ended in order."""

    @abstractmethod
    def version(self, binary: Binary) -> str | None:
        """The version of a program that was found; None if it is not a program of this kind, or does not run here."""

    @abstractmethod
    def launch(self, binary: Binary, ports: Mapping[str, int], data: Path) -> Launch:
        """How to start it on these loopback ports and this folder."""

    @abstractmethod
    def image(self) -> Image:
        """How to start it as a container."""

    @abstractmethod
    def reach(self, host: str, client_port: int, admin_port: int | None) -> Reach:
        """Where a server that we started is asked."""

    @abstractmethod
    def greet(self, reach: Reach, timeout: float) -> str:
        """Its version, once it answers in its own protocol and is ready.

        Raises:
            OSError: It does not answer, or not yet.
            ServerFailed: What answers is something else, or refuses us.
        """

    @abstractmethod
    def residue(self, reach: Reach, timeout: float) -> set[str]:
        """See `Server.residue`.

        Raises:
            OSError: It does not answer.
            NotControllable: It cannot be asked without `Reach.admin`.
        """
