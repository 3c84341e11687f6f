"""The registry of plugins: from a URL scheme to a Broker, loading only the one backend that is needed.

A backend is an entry point in the group `crossdock.backends`; its name is the URL scheme, its value a module (or object) with the
hook `crossdock_backend`. A plugin is judged when it is loaded, and a bad one is refused with its distribution's name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, cast
from urllib.parse import parse_qsl, urlsplit

import msgspec
import pluggy

from crossdock import names
from crossdock.clock import Clock, SystemClock
from crossdock.errors import BackendLoadError, ConfigurationError, CrossdockError, UnknownBackend
from crossdock.spi import API_VERSION, BackendPlugin, Broker, BrokerEvent, BrokerSettings, redact
from crossdock.spi.hooks import PROJECT, Hooks
from crossdock.spi.settings import ignore

BACKENDS: Final = "crossdock.backends"
"""Entry-point group of backends."""
PLUGINS: Final = "crossdock.plugins"
"""Entry-point group of everything else, such as commands."""

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_KNOWN_DISTRIBUTIONS: Final = {
    "redis": "crossdock-redis",
    "rediss": "crossdock-redis",
    "unix": "crossdock-redis",
    "valkey": "crossdock-redis",
    "valkeys": "crossdock-redis",
    "redis+sentinel": "crossdock-redis",
    "rediss+sentinel": "crossdock-redis",
    "redis+cluster": "crossdock-redis",
    "rediss+cluster": "crossdock-redis",
    "amqp": "crossdock-rabbitmq",
    "amqps": "crossdock-rabbitmq",
    "nats": "crossdock-nats",
    "tls": "crossdock-nats",
}
_HOOK_NAMES = tuple(name for name in vars(Hooks) if name.startswith("crossdock_"))

# A plugin module is described once, whatever the number of its schemes: pluggy refuses one module under two names.
_described: dict[str, BackendPlugin] = {}


class InstalledBackend(msgspec.Struct, frozen=True, kw_only=True):
    """One scheme that an installed distribution claims to serve."""

    scheme: str
    """The URL scheme: the entry point's name."""
    entry_point: str
    """Where the plugin is: `module` or `module:object`."""
    distribution: str
    """Name of the distribution that brings it; "" if it has none."""
    version: str
    """Version of that distribution; "" if unknown."""
    plugin: BackendPlugin | None = None
    """What the plugin says of itself; None if it could not be loaded."""
    error: str | None = None
    """Why it could not be loaded, in a sentence; None if it could."""


def create_broker(
    url: str,
    *,
    namespace: str = "default",
    clock: Clock | None = None,
    report: Callable[[BrokerEvent], None] = ignore,
) -> Broker:
    """Build the Broker for a URL. It is not opened; nothing is connected.

    Args:
        url: A broker URL such as `sqlite:///shop.db`. Its scheme chooses the backend, its query holds the backend's options.
        namespace: Isolates everything in the broker; the default is `default`.
        clock: Source of time; the default is the system's.
        report: Called with the Broker's events, in its loop.

    Raises:
        ConfigurationError: The URL has no scheme or cannot be read, or the backend refuses it.
        UnknownBackend: No installed backend serves the scheme; the text says what to install.
        BackendLoadError: The backend is installed and cannot be used.
    """
    scheme, options = _split(url)
    plugin = load_backend(scheme)
    settings = BrokerSettings(
        url=url,
        namespace=names.check_namespace(namespace),
        clock=clock or SystemClock(),
        report=report,
        options=options,
    )
    # A stranger's exception text may quote the URL, so none of it goes into ours unless it is known to be harmless.
    at = f"the {plugin.name} backend cannot make a broker for {redact(url)}"
    try:
        broker = plugin.create(settings)
    except CrossdockError:
        raise
    except ImportError as error:
        what = f"its driver {error.name!r}" if error.name else "its driver"
        raise BackendLoadError(f"{at}: it cannot import {what}; reinstall the backend's distribution") from error
    except Exception as error:
        raise BackendLoadError(f"{at}: {_why_not_created(error)}") from error
    if not isinstance(broker, Broker):
        raise BackendLoadError(f"{at}: its create() returned {_kind(broker)}, not a crossdock.spi.Broker")
    return broker


def load_backend(scheme: str) -> BackendPlugin:
    """Load the backend that serves a URL scheme, and no other.

    Raises:
        UnknownBackend: None is installed.
        BackendLoadError: It is installed and cannot be used.
    """
    installed = entry_points(group=BACKENDS)
    found = [entry_point for entry_point in installed if entry_point.name == scheme]
    if not found:
        raise UnknownBackend(_unknown_scheme(scheme, {entry_point.name for entry_point in installed}))
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(entry_point)[0] or "?" for entry_point in found))
        raise BackendLoadError(f"both {owners} serve {scheme}:// URLs: uninstall all but one of them")
    return _load(found[0])


def installed_backends() -> Sequence[InstalledBackend]:
    """Load every installed backend and say how that went, by scheme. Never raises for a bad plugin."""
    result: list[InstalledBackend] = []
    for entry_point in sorted(entry_points(group=BACKENDS), key=lambda entry_point: entry_point.name):
        distribution, version = _owner(entry_point)
        plugin, error = None, None
        try:
            plugin = load_backend(entry_point.name)
        except CrossdockError as failure:
            error = str(failure)
        result.append(
            InstalledBackend(
                scheme=entry_point.name,
                entry_point=entry_point.value,
                distribution=distribution,
                version=version,
                plugin=plugin,
                error=error,
            )
        )
    return result


def load_command_plugins(cli: Any) -> Sequence[str]:
    """Let every plugin in the group `crossdock.plugins` add its commands.

    Args:
        cli: The command line's Typer application.

    Returns:
        One sentence for each plugin that could not be used. A bad plugin never breaks the command line.
    """
    problems: list[str] = []
    for entry_point in sorted(entry_points(group=PLUGINS), key=lambda entry_point: entry_point.name):
        try:
            hook = _import_plugin(entry_point).hook
            hook.crossdock_register_commands(cli=cli)
        except CrossdockError as failure:
            problems.append(str(failure))
        except Exception as error:
            problems.append(f"{_title(entry_point)} is left out: its commands cannot be added: {_one_line(error)}")
    return problems


# --- one plugin -----------------------------------------------------------------------------------


def _load(entry_point: EntryPoint) -> BackendPlugin:
    plugin = _described.get(entry_point.value)
    if plugin is None:
        plugin = _describe(entry_point)
        _described[entry_point.value] = plugin
    if entry_point.name not in plugin.schemes:
        raise BackendLoadError(
            f"{_title(entry_point)} is registered for {entry_point.name}:// URLs but says that it serves "
            f"{', '.join(plugin.schemes)} only: report it to its authors"
        )
    return plugin


def _describe(entry_point: EntryPoint) -> BackendPlugin:
    title = _title(entry_point)
    manager = _import_plugin(entry_point)
    if not manager.hook.crossdock_backend.get_hookimpls():
        raise BackendLoadError(f"{title} has no hook crossdock_backend: define it and mark it with crossdock.spi.hookimpl")
    try:
        plugin = manager.hook.crossdock_backend()
    except Exception as error:
        raise BackendLoadError(f"{title} cannot be used: its hook crossdock_backend raised {_one_line(error)}") from error
    if not isinstance(plugin, BackendPlugin):
        raise BackendLoadError(f"{title} cannot be used: its hook crossdock_backend returned {_kind(plugin)}, not a BackendPlugin")
    if plugin.api_version != API_VERSION:
        raise BackendLoadError(
            f"{title} was written for version {plugin.api_version!r} of crossdock.spi, this crossdock has version {API_VERSION}: "
            "install releases that fit together"
        )
    wrong = _wrong_field(plugin)
    if wrong:
        raise BackendLoadError(f"{title} cannot be used: its BackendPlugin has a bad {wrong}")
    return plugin


def _import_plugin(entry_point: EntryPoint) -> pluggy.PluginManager:
    """Import one plugin into a manager of its own, so that what pluggy finds wrong is certainly this plugin's fault."""
    title = _title(entry_point)
    try:
        plugin = entry_point.load()
    except Exception as error:
        raise BackendLoadError(f"{title} cannot be imported: {_one_line(error)}") from error
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(plugin)
    except pluggy.PluginValidationError as error:
        raise BackendLoadError(f"{title} has a hook with a wrong signature: {_one_line(error, with_type=False)}") from error
    except ValueError as error:
        raise BackendLoadError(f"{title} cannot be registered: {_one_line(error)}") from error
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            near = difflib.get_close_matches(caller.name, _HOOK_NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the hooks are {', '.join(_HOOK_NAMES)}"
            raise BackendLoadError(f"{title} implements a hook that does not exist, {caller.name}: {hint}")
    return manager


def _wrong_field(plugin: BackendPlugin) -> str | None:
    # Struct fields are not checked when a plugin builds one, and `schemes=("redis")` is a common slip.
    fields: dict[str, object] = msgspec.structs.asdict(plugin)
    schemes = fields["schemes"]
    if not isinstance(schemes, tuple) or {type(scheme) for scheme in cast("tuple[object, ...]", schemes)} != {str}:
        return f"`schemes`: {_kind(fields['schemes'])}, not a tuple of str"
    for name in ("name", "example_url"):
        if not isinstance(fields[name], str):
            return f"`{name}`: {_kind(fields[name])}, not a str"
    if not callable(fields["create"]):
        return f"`create`: {_kind(fields['create'])}, not a function"
    return None


def _why_not_created(error: Exception) -> str:
    text = str(error)
    if isinstance(error, TypeError) and "abstract" in text:
        return f"it is incomplete: {text}"
    return f"its create() raised {type(error).__name__}; report it to its authors"


# --- texts ----------------------------------------------------------------------------------------


def _split(url: str) -> tuple[str, dict[str, str]]:
    # "localhost:6379" has a scheme to urlsplit, hence the test for "://".
    scheme, separator, _ = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ConfigurationError("the broker URL has no scheme: write it like sqlite:///shop.db or redis://localhost:6379/0")
    try:
        pairs = parse_qsl(urlsplit(url).query, keep_blank_values=True)
    except ValueError as error:
        raise ConfigurationError(f"the broker URL {scheme}://... cannot be read: check its host, port and brackets") from error
    options: dict[str, str] = {}
    for name, value in pairs:
        if name in options:
            raise ConfigurationError(f"the broker URL {redact(url)} has the option {name!r} twice: keep one")
        options[name] = value
    return scheme.lower(), options


def _unknown_scheme(scheme: str, installed: set[str]) -> str:
    text = f"no installed backend serves {scheme}:// URLs"
    if scheme in _KNOWN_DISTRIBUTIONS:
        return f"{text}: install {_KNOWN_DISTRIBUTIONS[scheme]}"
    known = sorted(installed | set(_KNOWN_DISTRIBUTIONS))
    near = difflib.get_close_matches(scheme, known, n=1)
    if not near:
        return f"{text}: installed are {', '.join(sorted(installed)) or 'none'}"
    install = "" if near[0] in installed else f" (install {_KNOWN_DISTRIBUTIONS[near[0]]})"
    return f"{text}: did you mean {near[0]}://{install}?"


def _owner(entry_point: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution; damaged metadata gives empty texts."""
    distribution = entry_point.dist
    if distribution is None:
        return "", ""
    try:
        return str(distribution.metadata["Name"] or ""), str(distribution.metadata["Version"] or "")
    except Exception:
        return "", ""


def _title(entry_point: EntryPoint) -> str:
    distribution, version = _owner(entry_point)
    owner = f" of {distribution} {version}".rstrip() if distribution else ""
    return f"the plugin {entry_point.value}{owner}"


def _one_line(error: BaseException, *, with_type: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if with_type and text else text or type(error).__name__


def _kind(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
