"""Finding, loading and refusing backends, with distributions made on the fly."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from crossdock import plugins
from crossdock.errors import BackendLoadError, ConfigurationError, InvalidName, UnknownBackend
from crossdock.plugins import create_broker, installed_backends, load_backend, load_command_plugins
from crossdock.spi import Broker

Install = Callable[..., str]

_numbers = itertools.count()

HEAD = """
from crossdock.spi import API_VERSION, BackendPlugin, Broker, hookimpl

seen = []

class Fake(Broker):
    def __init__(self, settings):
        self.settings = settings
    async def open(self): ...
    async def close(self): ...
    async def declare(self, queues): ...
    async def enqueue(self, messages): ...
    async def receive(self, lanes, limit, wait): ...
    async def extend(self, deliveries): ...
    async def settle(self, settlements): ...
    async def stats(self, queues=None): ...
    async def peek(self, queue, state, *, ids=(), after=None, limit=100): ...
    async def remove(self, queue, state, ids): ...
    async def replay(self, queue, replays): ...
    async def purge(self, queue, state): ...

def plugin(**changes):
    values = dict(name="Fake", api_version=API_VERSION, schemes=("fake", "fakes"), create=Fake, example_url="fake://host")
    return BackendPlugin(**{**values, **changes})
"""
GOOD = HEAD + "@hookimpl\ndef crossdock_backend():\n    seen.append(1)\n    return plugin()\n"


def hook(returned: str) -> str:
    """A plugin module whose hook returns this expression."""
    return f"{HEAD}@hookimpl\ndef crossdock_backend():\n    return {returned}\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make a distribution with one plugin module and put it on the path; returns the module's name, which is never used twice."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def make(
        source: str, schemes: tuple[str, ...] = ("fake",), *, distribution: str = "crossdock-fake", group: str = plugins.BACKENDS
    ) -> str:
        module = f"fake_plugin_{next(_numbers)}"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"[{group}]", *(f"{scheme} = {module}" for scheme in schemes)]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return module

    return make


def test_a_good_plugin_makes_a_broker(install: Install) -> None:
    """The Broker is built from the URL, its decoded query, the namespace and the system's clock, and is not opened."""
    install(GOOD)
    broker = create_broker("fake://u:p@host/1?durability=relaxed&x=a%20b&empty=", namespace="tenant")
    assert isinstance(broker, Broker)
    settings = broker.settings  # type: ignore[attr-defined]
    assert settings.url == "fake://u:p@host/1?durability=relaxed&x=a%20b&empty="
    assert settings.options == {"durability": "relaxed", "x": "a b", "empty": ""}
    assert settings.namespace == "tenant"
    assert settings.clock.time_ms() > 1_700_000_000_000


def test_the_scheme_may_be_in_capitals(install: Install) -> None:
    """URL schemes do not know capitals."""
    install(GOOD)
    assert isinstance(create_broker("FAKE://host"), Broker)


def test_a_module_with_two_schemes_is_described_once(install: Install) -> None:
    """Both schemes lead to the same plugin, and its hook is called once."""
    module = install(GOOD, ("fake", "fakes"))
    assert load_backend("fake") is load_backend("fakes")
    assert load_backend("fake").schemes == ("fake", "fakes")
    assert len(sys.modules[module].seen) == 1


def test_only_the_backend_that_is_used_is_imported(install: Install) -> None:
    """Loading one scheme imports no other plugin."""
    module = install(GOOD)
    other = install(GOOD, ("other",), distribution="crossdock-other")
    load_backend("fake")
    assert module in sys.modules
    assert other not in sys.modules


@pytest.mark.parametrize("url", ["", "shop.db", "localhost:6379", "//host", "user:secret@redis://host", "sqlite:shop.db"])
def test_a_url_without_scheme(url: str) -> None:
    """It is refused with an example, and its text, which may hold a secret, is not repeated."""
    with pytest.raises(ConfigurationError, match=r"has no scheme: write it like sqlite:///shop\.db") as caught:
        create_broker(url)
    assert "secret" not in str(caught.value)


def test_a_url_that_cannot_be_read() -> None:
    """A bad bracket is a sentence, without the URL's secrets."""
    with pytest.raises(ConfigurationError, match=r"sqlite://\.\.\. cannot be read") as caught:
        create_broker("sqlite://u:secret@[::1/db")
    assert "secret" not in str(caught.value)


def test_an_option_given_twice(install: Install) -> None:
    """It is refused rather than one of the two ignored, and option values stay hidden."""
    install(GOOD)
    with pytest.raises(ConfigurationError, match="has the option 'token' twice") as caught:
        create_broker("fake://host?token=secret&token=secret2")
    assert "secret" not in str(caught.value)


def test_a_bad_namespace(install: Install) -> None:
    """The rule is stated before the backend is asked."""
    install(GOOD)
    with pytest.raises(InvalidName, match="is not a valid namespace"):
        create_broker("fake://host", namespace="a.b")


REDIS = ("redis", "rediss", "unix", "valkey", "valkeys", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def without_server_backends(group: str) -> list[EntryPoint]:
    """What is installed, but for the backends of this repository that are distributions of their own."""
    owners = {"crossdock-core", "crossdock-fake"}
    return [each for each in entry_points(group=group) if each.dist is not None and each.dist.name in owners]


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("amqps", r"^no installed backend serves amqps:// URLs: install crossdock-rabbitmq$"),
        ("nats", "install crossdock-nats"),
        *((scheme, rf"^no installed backend serves {re.escape(scheme)}:// URLs: install crossdock-redis$") for scheme in REDIS),
        ("fakex", r"did you mean fakes?://\?"),
        ("reddis", r"did you mean redis:// \(install crossdock-redis\)\?"),
        ("valky", r"did you mean valkey:// \(install crossdock-redis\)\?"),
        ("redis+clusters", r"did you mean redis\+cluster:// \(install crossdock-redis\)\?"),
        ("zzz", "installed are .*fake"),
    ],
)
def test_an_unknown_scheme_says_what_to_do(install: Install, monkeypatch: pytest.MonkeyPatch, scheme: str, said: str) -> None:
    """What to install for known schemes, the nearest one for misspellings, what there is otherwise."""
    install(GOOD, ("fake", "fakes"))
    monkeypatch.setattr(plugins, "entry_points", without_server_backends)
    with pytest.raises(UnknownBackend, match=said):
        create_broker(f"{scheme}://host")


BAD = {
    "does not import": ("import there_is_no_such_driver", "cannot be imported: ModuleNotFoundError: .*there_is_no_such_driver"),
    "syntax error": ("def", "cannot be imported: SyntaxError"),
    "no hook": ("x = 1", "has no hook crossdock_backend: define it and mark it"),
    "unmarked hook": (
        "def crossdock_backend(): ...",
        "has no hook crossdock_backend: define it and mark it with crossdock.spi.hookimpl",
    ),
    "misspelt hook": (
        f"{HEAD}@hookimpl\ndef crossdock_bakend(): ...",
        r"implements a hook that does not exist, crossdock_bakend: did you mean crossdock_backend\?",
    ),
    "wrong signature": (f"{HEAD}@hookimpl\ndef crossdock_backend(url): ...", "has a hook with a wrong signature: .*url"),
    "hook raises": (hook("1 / 0"), "its hook crossdock_backend raised ZeroDivisionError: division by zero"),
    "returns nothing": (hook("None"), "its hook crossdock_backend returned None, not a BackendPlugin"),
    "returns a class": (hook("Fake"), "returned an ABCMeta, not a BackendPlugin"),
    "other version": (hook("plugin(api_version=2)"), "written for version 2 of crossdock.spi, this crossdock has version 1"),
    "version no number": (hook("plugin(api_version='1')"), "written for version '1'"),
    "other schemes": (hook("plugin(schemes=('other',))"), "registered for fake:// URLs but says that it serves other only"),
    "schemes no tuple": (hook("plugin(schemes=('fake'))"), "bad `schemes`: a str, not a tuple of str"),
    "no name": (hook("plugin(name=None)"), "bad `name`: None, not a str"),
    "create no function": (hook("plugin(create=None)"), "bad `create`: None, not a function"),
}


@pytest.mark.parametrize(("source", "said"), BAD.values(), ids=BAD.keys())
def test_a_bad_plugin_is_refused_at_load_by_name(install: Install, source: str, said: str) -> None:
    """One sentence that names plugin, distribution and fault, for each way a plugin can be bad."""
    module = install(source)
    with pytest.raises(BackendLoadError, match=said) as caught:
        load_backend("fake")
    assert str(caught.value).startswith(f"the plugin {module} of crossdock-fake 1.2 ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("create", "said"),
    [
        ("lambda settings: object()", r"its create\(\) returned an object, not a crossdock.spi.Broker"),
        ("lambda settings: None", r"its create\(\) returned None"),
        ("lambda settings: type('Half', (Broker,), {})()", "it is incomplete: Can't instantiate abstract class Half"),
        ("lambda settings: __import__('no_such_driver')", "it cannot import its driver 'no_such_driver'"),
        ("lambda settings: int(settings.url)", r"its create\(\) raised ValueError; report it"),
    ],
)
def test_a_backend_that_cannot_make_a_broker(install: Install, create: str, said: str) -> None:
    """The fault is named, the cause kept, the URL's secrets are not shown even if the plugin's own exception quotes them."""
    install(hook(f"plugin(create={create})"))
    with pytest.raises(BackendLoadError, match=said) as caught:
        create_broker("fake://user:secret@host")
    assert str(caught.value).startswith("the Fake backend cannot make a broker for fake://user:***@host: ")
    assert "secret" not in str(caught.value)


def test_a_backends_own_refusal_passes_through(install: Install) -> None:
    """A ConfigurationError about the URL reaches the user as the backend wrote it."""
    install(
        f"from crossdock.errors import ConfigurationError\n{HEAD}"
        "def create(settings):\n    raise ConfigurationError('no such option')\n"
        "@hookimpl\ndef crossdock_backend():\n    return plugin(create=create)\n"
    )
    with pytest.raises(ConfigurationError, match=r"^no such option$"):
        create_broker("fake://host")


def test_two_distributions_for_one_scheme(install: Install) -> None:
    """Neither wins by chance; both are named."""
    install(GOOD)
    install(GOOD, distribution="crossdock-twin")
    with pytest.raises(BackendLoadError, match="both crossdock-fake and crossdock-twin serve fake:// URLs"):
        load_backend("fake")


def test_installed_backends_are_listed_good_and_bad(install: Install) -> None:
    """A list for people: what is there, from which distribution, and why something cannot be used."""
    module = install(GOOD, ("fake", "fakes"))
    install("import there_is_no_such_driver", ("broken",), distribution="crossdock-broken")
    listed = {backend.scheme: backend for backend in installed_backends()}
    good, bad = listed["fakes"], listed["broken"]
    assert (good.entry_point, good.distribution, good.version, good.error) == (module, "crossdock-fake", "1.2", None)
    assert good.plugin is not None
    assert good.plugin.name == "Fake"
    assert bad.plugin is None
    assert bad.error is not None
    assert "there_is_no_such_driver" in bad.error
    assert list(listed) == sorted(listed)


def test_the_built_in_backends_are_plugins_like_others() -> None:
    """Memory and SQLite are found through core's own entry points."""
    listed = {backend.scheme: backend.distribution for backend in installed_backends()}
    assert listed["memory"] == "crossdock-core"
    assert listed["sqlite"] == "crossdock-core"


def test_a_distribution_without_metadata(install: Install, tmp_path: Path) -> None:
    """A damaged installation is still told by its module's name."""
    module = install("x = 1")
    (tmp_path / "crossdock_fake-1.2.dist-info" / "METADATA").unlink()
    with pytest.raises(BackendLoadError, match=f"the plugin {module} .*has no hook"):
        load_backend("fake")


@pytest.fixture
def no_other_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are really installed are in another group."""
    monkeypatch.setattr(plugins, "PLUGINS", "crossdock.plugins-of-a-test")


@pytest.mark.usefixtures("no_other_plugins")
def test_command_plugins_add_commands(install: Install) -> None:
    """The hook is called with the command line's application."""
    install(f"{HEAD}@hookimpl\ndef crossdock_register_commands(cli):\n    cli.append('mine')\n", ("x",), group=plugins.PLUGINS)
    cli: list[str] = []
    assert load_command_plugins(cli) == []
    assert cli == ["mine"]


@pytest.mark.usefixtures("no_other_plugins")
def test_bad_command_plugins_are_left_out_by_name(install: Install) -> None:
    """They never break the command line; each gives one sentence."""
    install("import no_such_thing", ("a",), distribution="one", group=plugins.PLUGINS)
    install(
        f"{HEAD}@hookimpl\ndef crossdock_register_commands(cli):\n    1 / 0\n", ("b",), distribution="two", group=plugins.PLUGINS
    )
    first, second = load_command_plugins([])
    assert "of one 1.2 cannot be imported" in first
    assert "of two 1.2 is left out: its commands cannot be added: ZeroDivisionError" in second
