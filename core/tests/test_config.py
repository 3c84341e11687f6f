"""Which setting wins, and what is said of a bad file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from crossdock.config import Settings, load_settings, require_url
from crossdock.errors import ConfigurationError, InvalidName
from crossdock.queues import Queue

NOTHING: dict[str, str] = {}


def write(folder: Path, text: str, name: str = "crossdock.toml") -> Path:
    """Put a settings file into a folder, which is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder


def test_nothing_given(tmp_path: Path) -> None:
    """Without arguments, variables and file there are defaults, and no URL."""
    assert load_settings(directory=tmp_path, environ=NOTHING) == Settings(url=None, namespace="default", queues=())


def test_arguments_win_over_environment_over_file(tmp_path: Path) -> None:
    """Each source is taken for what the stronger ones leave open."""
    folder = write(tmp_path, 'url = "memory://file"\nnamespace = "file"')
    environ = {"CROSSDOCK_URL": "memory://environ", "CROSSDOCK_NAMESPACE": "environ"}
    from_file = load_settings(directory=folder, environ=NOTHING)
    from_environment = load_settings(directory=folder, environ=environ)
    from_arguments = load_settings(url="memory://argument", namespace="argument", directory=folder, environ=environ)
    assert (from_file.url, from_file.namespace) == ("memory://file", "file")
    assert (from_environment.url, from_environment.namespace) == ("memory://environ", "environ")
    assert (from_arguments.url, from_arguments.namespace) == ("memory://argument", "argument")


def test_an_empty_variable_counts_as_not_set(tmp_path: Path) -> None:
    """`CROSSDOCK_URL=` is how shells unset a variable for one command."""
    folder = write(tmp_path, 'url = "memory://file"')
    assert load_settings(directory=folder, environ={"CROSSDOCK_URL": ""}).url == "memory://file"


def test_queues_of_the_file(tmp_path: Path) -> None:
    """A table per queue takes the fields of Queue, and its retry table the arguments of a policy."""
    folder = write(
        tmp_path,
        """
        [queues.emails]
        weight = 2
        lease = 45
        on_expired = "drop"

        [queues.emails.retry]
        kind = "linear"
        max_attempts = 7
        step = 1.5

        [queues.low]
        """,
    )
    emails, low = load_settings(directory=folder, environ=NOTHING).queues
    assert (emails.name, emails.weight, emails.lease, emails.on_expired) == ("emails", 2, 45.0, "drop")
    assert emails.retry is not None
    assert (emails.retry.backoff.kind, emails.retry.backoff.max_attempts, emails.retry.backoff.base) == ("linear", 7, 1.5)
    assert low == Queue("low")


def test_a_queue_of_the_program_wins_over_its_table(tmp_path: Path) -> None:
    """The program's Queue replaces the file's table of that name; the other tables stay."""
    folder = write(tmp_path, "[queues.a]\nweight = 2\n[queues.b]\nweight = 3")
    queues = load_settings(queues=[Queue("a", weight=9), Queue("c")], directory=folder, environ=NOTHING).queues
    assert {queue.name: queue.weight for queue in queues} == {"a": 9, "b": 3, "c": 1}


def test_a_queue_described_twice_is_refused(tmp_path: Path) -> None:
    """Two descriptions of one queue are a slip of the program."""
    with pytest.raises(ConfigurationError, match="'a' is described twice"):
        load_settings(queues=[Queue("a"), Queue("a")], directory=tmp_path, environ=NOTHING)


def test_the_nearest_file_is_taken(tmp_path: Path) -> None:
    """Folders are searched upwards; `crossdock.toml` comes before `pyproject.toml` of the same folder, and nothing is mixed."""
    write(tmp_path, 'url = "memory://above"')
    middle = write(tmp_path / "middle", '[tool.crossdock]\nurl = "memory://middle"', "pyproject.toml")
    below = middle / "below"
    below.mkdir()
    assert load_settings(directory=below, environ=NOTHING).url == "memory://middle"
    write(middle, 'namespace = "own"')
    assert load_settings(directory=below, environ=NOTHING) == Settings(namespace="own")


@pytest.mark.parametrize("text", ['[project]\nname = "x"', "[project\nbroken", '[project]\ndependencies = ["crossdock"]'])
def test_a_pyproject_without_our_table_is_passed_by(tmp_path: Path, text: str) -> None:
    """Somebody else's pyproject.toml, even a broken one, neither stops the search nor an App."""
    write(tmp_path, 'url = "memory://above"')
    inner = write(tmp_path / "inner", text, "pyproject.toml")
    assert load_settings(directory=inner, environ=NOTHING).url == "memory://above"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('ulr = "memory://"', "has an unknown key 'ulr': did you mean `url`?"),
        ("concurrency = 5", "has an unknown key 'concurrency': it knows url, namespace, queues"),
        ("url = 5", "`url` must be a string, not a int"),
        ('namespace = "a b"', "'a b' is not a valid namespace"),
        ("queues = 5", "`queues` must be a table, not a int"),
        ('queues = ["a"]', "`queues` must be a table, not a list"),
        ("[queues]\na = 5", r"\[queues.a\] must be a table"),
        ("[queues.a]\nwieght = 5", r"\[queues.a\] has an unknown key 'wieght': did you mean `weight`?"),
        ('[queues.a]\nname = "b"', "unknown key 'name'"),
        ('[queues.a]\nweight = "5"', r"\[queues.a\]: `weight` Expected `int`, got `str`"),
        ("[queues.a]\nweight = 0", r"\[queues.a\]: queue 'a': weight must be from 1"),
        ('[queues."a b"]', "'a b' is not a valid queue name"),
        ('[queues.a]\non_expired = "bin"', r"\[queues.a\]: `on_expired` Invalid enum value 'bin'"),
        ('[queues.a.retry]\nkind = "random"', r"\[queues.a.retry\]: `kind` is one of fixed, linear, exponential, not 'random'"),
        ("[queues.a.retry]\nkind = []", r"\[queues.a.retry\]: `kind` is one of"),
        ("[queues.a.retry]\nstep = 1.0", r"\[queues.a.retry\] has an unknown key 'step'"),
        ('[queues.a.retry]\nmax_attempts = "5"', r"\[queues.a.retry\]: `max_attempts`: Expected `int`"),
        ("[queues.a.retry]\nmax_attempts = 0", r"\[queues.a.retry\]: .*max_attempts must be at least 1"),
        ("url = [\n]]", "is not valid TOML: .*line 2"),
    ],
)
def test_a_bad_file_is_refused_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    """The text names the file, the key and, for a misspelling, the nearest key."""
    folder = write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=said) as caught:
        load_settings(directory=folder, environ=NOTHING)
    assert str(caught.value).startswith(str(folder / "crossdock.toml"))
    assert "\n" not in str(caught.value)


def test_a_bad_table_in_pyproject(tmp_path: Path) -> None:
    """There the text names the table too."""
    folder = write(tmp_path, '[tool.crossdock]\nulr = "x"', "pyproject.toml")
    with pytest.raises(ConfigurationError, match=r"pyproject\.toml \[tool\.crossdock\] has an unknown key 'ulr'"):
        load_settings(directory=folder, environ=NOTHING)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 are refused by name."""
    (tmp_path / "crossdock.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"crossdock\.toml is not UTF-8 text"):
        load_settings(directory=tmp_path, environ=NOTHING)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file we may not read is refused by name, not passed by. (Refused by hand, since root may read everything.)"""
    write(tmp_path, 'url = "memory://"')

    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigurationError, match=r"crossdock\.toml cannot be read: Permission denied"):
        load_settings(directory=tmp_path, environ=NOTHING)


def test_a_deleted_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It means that there is no file, not a crash."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert load_settings(environ=NOTHING) == Settings()


def test_a_bad_namespace_is_refused_with_the_rule(tmp_path: Path) -> None:
    """Also when it comes from the environment."""
    with pytest.raises(InvalidName, match="is not a valid namespace: use 1 to 63 characters"):
        load_settings(directory=tmp_path, environ={"CROSSDOCK_NAMESPACE": "a/b"})


def test_a_missing_url_says_how_to_give_one() -> None:
    """The text names all ways."""
    with pytest.raises(ConfigurationError, match=r"App\(\.\.\.\) or --url, in \$CROSSDOCK_URL, or as `url` in crossdock\.toml"):
        require_url(Settings())
    assert require_url(Settings(url="memory://")) == "memory://"
