"""The pluggy hooks a crossdock plugin may implement. None of them is called per message."""

from __future__ import annotations

from typing import Any

import pluggy

from crossdock.spi.settings import BackendPlugin

PROJECT = "crossdock"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin module as the implementation of the hook of the same name."""


class Hooks:
    """The hook specifications."""

    @hookspec(firstresult=True)
    def crossdock_backend(self) -> BackendPlugin:
        """Describe the backend. Called once, when one of its URL schemes is first used; must not import the driver."""
        raise NotImplementedError

    @hookspec
    def crossdock_register_commands(self, cli: Any) -> None:
        """Add commands to the command line. `cli` is its Typer application. Called once, at start of the command line."""
