"""A server that somebody else runs, given by its URL."""

from __future__ import annotations

from typing import NoReturn

from crossdock.spi import redact
from crossdock_conformance.servers.errors import NotControllable, ServerFailed
from crossdock_conformance.servers.recipe import Reach, Recipe
from crossdock_conformance.servers.server import Server

_ASK_WITHIN = 10.0


class GivenServer(Server):
    """Made by `start_server` where the environment names a URL. It can be asked, and nothing else."""

    controllable = False

    def __init__(self, recipe: Recipe, reach: Reach) -> None:
        self.kind = recipe.kind
        self.url = reach.url
        self._recipe = recipe
        self._reach = reach
        try:
            self.version = recipe.greet(reach, _ASK_WITHIN)
        except OSError as error:
            raise ServerFailed(f"the {recipe.title} server at {redact(reach.url)} does not answer: {error}") from error

    @property
    def running(self) -> bool:
        return self.ping()

    def start(self) -> NoReturn:
        self._refuse("started")

    def stop(self) -> NoReturn:
        self._refuse("stopped")

    def kill(self) -> NoReturn:
        self._refuse("killed")

    def pause(self) -> NoReturn:
        self._refuse("paused")

    def resume(self) -> NoReturn:
        self._refuse("resumed")

    def restart(self, *, kill: bool = False) -> NoReturn:
        self._refuse("killed" if kill else "restarted")

    def wipe(self) -> NoReturn:
        self._refuse("wiped")

    def close(self) -> None:
        pass

    def ping(self, timeout: float = 1.0) -> bool:
        try:
            self._recipe.greet(self._reach, timeout)
        except OSError:
            return False
        return True

    def residue(self) -> set[str]:
        try:
            return self._recipe.residue(self._reach, _ASK_WITHIN)
        except OSError as error:
            raise ServerFailed(f"{self!r} at {redact(self.url)} does not tell what it holds: {error}") from error

    def _refuse(self, done: str) -> NoReturn:
        raise NotControllable(
            f"the {self.kind} server at {redact(self.url)} cannot be {done}: it was given by its URL and is not ours; "
            f"unset CROSSDOCK_TEST_{self.kind.upper()}_URL to have one that is"
        )
