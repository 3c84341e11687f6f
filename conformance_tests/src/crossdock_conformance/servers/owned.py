"""What servers that we start ourselves have in common, whether they are processes or containers."""

from __future__ import annotations

import atexit
import os
import threading
import time
from abc import abstractmethod

from crossdock_conformance.servers.errors import ServerFailed
from crossdock_conformance.servers.ports import Ports
from crossdock_conformance.servers.recipe import HOST, Reach, Recipe
from crossdock_conformance.servers.server import Server

_STARTS = 3
"""Tries of the first start, each on other ports: where a port cannot be kept for us, another process may take it meanwhile."""

_PORT_TAKEN = ("already in use", "eaddrinuse", "already allocated")

_POLL_FIRST, _POLL_LAST = 0.01, 0.1
_ASK_WITHIN = 10.0


class OwnedServer(Server):
    """A server of our own. Subclasses know how it is started, ended and frozen; here is when, in which order, and what is waited for.

    It is closed at the latest when this process ends. A fork of this process must leave it alone; `close()` does nothing there.
    """

    def __init__(self, recipe: Recipe, version: str) -> None:
        self.kind = recipe.kind
        self.version = version
        self._recipe = recipe
        self._lock = threading.RLock()
        self._paused = False
        self._closed = False
        self._answered = False
        self._owner = os.getpid()
        self._take_ports()
        atexit.register(self.close)

    def start(self) -> None:
        with self._lock:
            self._check_open()
            if self.running:
                return
            self._paused = False
            for tries_left in reversed(range(_STARTS)):
                try:
                    self._begin()
                    self._wait_until_ready("start")
                except ServerFailed as error:
                    if self._answered or not tries_left or not any(words in str(error).lower() for words in _PORT_TAKEN):
                        raise
                    self.kill()
                    self._empty()
                    self._ports.close()
                    self._take_ports()
                else:
                    self._answered = True
                    return

    def stop(self) -> None:
        with self._lock:
            self._check_open()
            if self.running:
                if self._paused:
                    self._thaw()
                self._paused = False
                self._end()

    def kill(self) -> None:
        with self._lock:
            self._check_open()
            self._paused = False
            if self.running:
                self._kill()

    def pause(self) -> None:
        with self._lock:
            self._check_running("paused")
            if not self._paused:
                self._paused = True
                self._freeze()

    def resume(self) -> None:
        with self._lock:
            self._check_running("resumed")
            if self._paused:
                self._thaw()
                self._paused = False
            self._wait_until_ready("resumption")

    def restart(self, *, kill: bool = False) -> None:
        with self._lock:
            super().restart(kill=kill)

    def wipe(self) -> None:
        with self._lock:
            self.kill()  # what it would still write at its end is not wanted
            self._empty()
            self.start()

    def close(self) -> None:
        if os.getpid() != self._owner:
            return
        with self._lock:
            if not self._closed:
                self._closed = True
                atexit.unregister(self.close)
                self._ports.close()
                self._dispose()

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
            raise self._failed(f"does not tell what it holds: {error}") from error

    # What subclasses know. All are called under the lock, and raise ServerFailed.

    @abstractmethod
    def _begin(self) -> None:
        """Start it on `_ports`; it need not answer yet."""

    @abstractmethod
    def _end(self) -> None:
        """End it in order, within `_recipe.stop_within` seconds."""

    @abstractmethod
    def _kill(self) -> None:
        """End it at once."""

    @abstractmethod
    def _freeze(self) -> None:
        """Stop all its processes from running."""

    @abstractmethod
    def _thaw(self) -> None:
        """Let them run again."""

    @abstractmethod
    def _empty(self) -> None:
        """Remove its data. It does not run."""

    @abstractmethod
    def _dispose(self) -> None:
        """End it in whatever state it is, and remove all that it has."""

    @abstractmethod
    def _exit_status(self) -> int | None:
        """How it ended: its exit code, or minus the number of the signal that killed it; None if unknown."""

    def _take_ports(self) -> None:
        """Take free ports, and be reached there."""
        self._ports = Ports(self._recipe.ports, self._recipe.ports_above)
        self._reached_at(self._recipe.reach(HOST, self._ports.numbers["client"], self._ports.numbers.get("admin")))

    def _reached_at(self, reach: Reach) -> None:
        self._reach = reach
        self.url = reach.url

    def _wait_until_ready(self, doing: str) -> None:
        """Wait until it answers, but not longer than it lives."""
        limit = time.monotonic() + self._recipe.start_within
        pause = _POLL_FIRST
        while True:
            try:
                # One that recovers much data may accept connections long before it answers: ask again, rather than wait long.
                self.version = self._recipe.greet(self._reach, timeout=1.0)
                return
            except OSError as error:
                if not self.running:
                    raise self._failed(f"ended at its {doing} with status {self._exit_status()}") from error
                if time.monotonic() > limit:
                    raise self._failed(f"does not answer within {self._recipe.start_within:g} s of its {doing}: {error}") from error
            time.sleep(pause)
            pause = min(pause * 1.5, _POLL_LAST)

    def _failed(self, what: str) -> ServerFailed:
        log = self.log_tail()
        text = f"the server for tests, {self._recipe.title} {self.version}, {what}".replace(" ,", ",")
        return ServerFailed(f"{text}\nThe end of its log:\n{log}" if log else text)

    def _check_open(self) -> None:
        if self._closed:
            raise ServerFailed(f"this {self._recipe.title} server was closed; start another")

    def _check_running(self, done: str) -> None:
        self._check_open()
        if not self.running:
            raise self._failed(f"cannot be {done}: it does not run")
