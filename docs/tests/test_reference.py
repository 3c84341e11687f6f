"""The reference pages list what there is: each table is compared with the code that it describes."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import typer
from pages import ROOT, code, read_page, tables

import crossdock
from crossdock import App, Options, Queue, RetryPolicy, codec, config, errors
from crossdock.retry import Backoff
from crossdock.spi import Broker, Message
from crossdock_cli.main import cli
from crossdock_conformance import all_scenarios
from crossdock_conformance.sentences import as_page

WIRE = read_page("docs/reference/wire-format.md")
ERRORS = read_page("docs/reference/errors.md")
CONFIGURATION = read_page("docs/reference/configuration.md")
COMMANDS = read_page("docs/reference/command-line.md")
BACKEND = read_page("docs/how-to/write-a-backend.md")
GLOSSARY = read_page("docs/glossary.md")


# --- wire format ----------------------------------------------------------------------------------

KINDS: dict[type[msgspec.inspect.Type], str] = {
    msgspec.inspect.StrType: "text",
    msgspec.inspect.LiteralType: "text",
    msgspec.inspect.IntType: "integer",
    msgspec.inspect.EnumType: "integer",
    msgspec.inspect.FloatType: "number",
    msgspec.inspect.BytesType: "bytes",
    msgspec.inspect.StructType: "map",
    msgspec.inspect.RawType: "map",
    msgspec.inspect.DictType: "map of texts",
    msgspec.inspect.ListType: "array of maps",
}
"""What the page calls the types that fields have today."""


def kind_of(annotation: Any) -> str:
    """How the page calls a field's type."""
    inspected = msgspec.inspect.type_info(annotation)
    nullable = False
    if isinstance(inspected, msgspec.inspect.UnionType):
        nullable = inspected.includes_none
        (inspected,) = [each for each in inspected.types if not isinstance(each, msgspec.inspect.NoneType)]
    name = KINDS[type(inspected)]
    return f"{name} or null" if nullable else name


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """How the page writes a field's default."""
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{json.dumps(msgspec.msgpack.decode(value) if isinstance(value, msgspec.Raw) else value)}`"


@pytest.mark.parametrize(
    ("heading", "struct"),
    [
        ("Message fields", Message),
        ("Envelope fields", codec.Envelope),
        ("Retry policy", Backoff),
        ("Failed attempts", codec.Failure),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_fields_of_the_wire_format(heading: str, struct: type[msgspec.Struct]) -> None:
    """Every field with its name on the wire, its type and its default, in order, and no other."""
    described = [tuple(row[:3]) for row in tables(WIRE.section(heading))[0]]
    actual = [(f"`{field.encode_name}`", kind_of(field.type), default_of(field)) for field in msgspec.structs.fields(struct)]

    assert described == actual


def test_limits_of_the_wire_format() -> None:
    """The limits are those that the codec checks, and the version is the one it writes."""
    limits = [row[1] for row in tables(WIRE.section("Limits"))[0]]

    assert limits == [f"{limit:,}" for limit in (codec.MAX_BODY, codec.MAX_DEPTH, codec.MAX_ELEMENTS)]
    assert f"{codec.HISTORY_BYTES:,} bytes and {codec.HISTORY_ELEMENTS:,} values more" in WIRE.text
    assert f"It is\nversion {codec.WIRE_VERSION}." in WIRE.text


# --- errors ---------------------------------------------------------------------------------------


def class_tree(root: type[Exception], depth: int = 0) -> Iterator[tuple[int, str]]:
    """Each class below `root` and how deep it is, in order of definition."""
    yield depth, root.__name__
    for child in root.__subclasses__():
        if child.__module__ == "crossdock.errors":
            yield from class_tree(child, depth + 1)


def test_tree_of_errors() -> None:
    """The drawing is the class hierarchy."""
    drawing = ERRORS.fences[0].text.splitlines()
    drawn = [(len(re.split(r"[A-Z]", line, maxsplit=1)[0]) // 4, re.sub(r"\W", "", line)) for line in drawing]

    assert drawn == list(class_tree(errors.CrossdockError))


def test_every_error_is_explained_and_public() -> None:
    """Each class of the tree has a row, and can be imported as the page says."""
    explained = [name for table in tables(ERRORS.text) for row in table for name in code(row[0])]
    every = [name for _, name in class_tree(errors.CrossdockError) if name != "CrossdockError"]

    assert sorted(explained) == sorted(every)
    assert all(getattr(crossdock, name) is getattr(errors, name) for name in every)


# --- configuration --------------------------------------------------------------------------------


def test_fields_of_a_queue() -> None:
    """Every setting of a queue with its default, in order."""
    described = [(code(row[0])[0], row[1]) for row in tables(CONFIGURATION.section("Queues"))[0]]
    actual = [
        (field.name, "required" if field.required else f"`{json.dumps(field.default) if field.default is not None else None}`")
        for field in msgspec.structs.fields(Queue)
    ]

    assert described == actual


def test_retry_tables() -> None:
    """Each kind with the arguments of the constructor of its name, and their defaults."""
    rows = tables(CONFIGURATION.section("Queues"))[1]

    assert [code(row[0])[0] for row in rows] == ["fixed", "linear", "exponential"]
    for kind, arguments, _ in rows:
        parameters = inspect.signature(getattr(RetryPolicy, code(kind)[0])).parameters.values()
        plain = [parameter for parameter in parameters if not parameter.name.endswith("retry_on")]
        assert code(arguments) == [p.name if p.default is None else f"{p.name} = {p.default}" for p in plain]


def test_arguments_of_the_app() -> None:
    """Every argument of `App`, in order."""
    described = [name for row in tables(CONFIGURATION.section("The App"))[0] for name in code(row[0])]

    assert described == [*inspect.signature(App).parameters]


def test_settings_of_tasks_and_calls() -> None:
    """Every setting, and whether it belongs to a task, a call or both."""
    rows = tables(CONFIGURATION.section("Tasks and calls"))[0]
    of_task = {code(row[0])[0] for row in rows if row[1] == "yes"}
    of_call = {code(row[0])[0] for row in rows if row[2] == "yes"}

    assert of_task == {*inspect.signature(App.task).parameters} - {"self", "function"}
    assert of_call == Options.__optional_keys__


def test_keys_of_the_file_and_the_environment() -> None:
    """The keys that the file may have are those that load, and the variables those that are read."""
    keys = [code(row[0])[0] for row in tables(CONFIGURATION.section("The file"))[0]]
    variables = [code(row[0])[0] for row in tables(CONFIGURATION.section("The environment"))[0]]

    assert keys == [*config.Settings.__struct_fields__]
    assert variables == [config.URL_VARIABLE, config.NAMESPACE_VARIABLE]


# --- the command line -----------------------------------------------------------------------------

ROOT_COMMAND: Any = typer.main.get_command(cli)
SHARED = {
    code(row[0])[-1 if "," in row[0] else 0].split()[0]: row for row in tables(COMMANDS.section("Options and their variables"))[0]
}


def commands() -> dict[str, Any]:
    """Every command that is not hidden, by its two words."""
    found: dict[str, Any] = {}
    for noun, group in ROOT_COMMAND.commands.items():
        found |= {f"{noun} {verb}": command for verb, command in group.commands.items() if not command.hidden}
    return found


def options_of(command: Any) -> list[Any]:
    """The options of a command, without help and version."""
    return [each for each in command.params if each.param_type_name == "option" and not {"--help", "--version"} & {*each.opts}]


def flags(text: str) -> set[str]:
    """The options named in a text."""
    return {flag for span in code(text) for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", span)}


def test_every_command_has_a_section() -> None:
    """All commands, in the order of `--help`, and no other."""
    described = [heading.removeprefix("crossdock ") for heading in COMMANDS.headings if heading.startswith("crossdock ")]

    assert described == [*commands()]


@pytest.mark.parametrize("name", commands())
def test_every_option_is_described(name: str) -> None:
    """A command's section names each of its options and arguments, and its defaults are the real ones."""
    section = re.sub(r"```.*?```", "", COMMANDS.section(f"crossdock {name}"), flags=re.DOTALL)
    rows = [row for table in tables(section) for row in table]
    also = re.search(r"^Also: (.+?)(?:\. |\.$)", section.replace("\n", " ").replace("Also:", "\nAlso:"), re.MULTILINE)
    described = {flag for row in rows for flag in flags(row[0])} | flags(also[1] if also else "")
    options = options_of(commands()[name])

    assert described == {flag for option in options for flag in option.opts}
    for option in options:
        default = option.show_default if isinstance(option.show_default, str) else option.default
        row = next((row for row in rows if option.opts[0] in flags(row[0])), None)
        if row is not None and isinstance(default, str | int) and not isinstance(default, bool):
            assert row[1] == str(default)
    for argument in commands()[name].params:
        if argument.param_type_name == "argument":
            shown = re.sub(r"\W", "", argument.metavar or argument.name).upper()
            assert re.search(rf"`crossdock {name} [^`]*\b{shown}\b", section), f"its argument {shown} is not shown"


def test_every_option_has_the_variable_that_the_page_says() -> None:
    """Options of one command follow the rule, shared ones the table."""
    for name, command in [*commands().items(), ("", ROOT_COMMAND)]:
        for option in options_of(command):
            long = next(flag for flag in option.opts if flag.startswith("--"))
            by_rule = f"CROSSDOCK_{name.replace(' ', '_')}_{long.removeprefix('--')}".replace("-", "_").upper()
            shared = next((code(row[1])[0] for row in SHARED.values() if long in flags(row[0])), None)
            assert (option.envvar or by_rule) == (shared or by_rule), f"{name} {long}"


# --- backends and words ---------------------------------------------------------------------------


def test_the_twelve_verbs() -> None:
    """The table has every abstract method of `Broker`, in order."""
    described = [code(row[0])[0] for row in tables(BACKEND.section("The twelve verbs"))[0]]

    assert described == [name for name in vars(Broker) if name in Broker.__abstractmethods__]
    assert len(described) == 12


def test_the_glossary_is_in_order() -> None:
    """A reader finds a word where the alphabet has it, once."""
    words = [row[0].strip("*").lower() for row in tables(GLOSSARY.text)[0]]

    assert words == sorted(set(words))


# --- what a backend promises --------------------------------------------------------------------------


def test_page_of_promises_is_what_the_suite_proves() -> None:
    """The page is the one that `python -m crossdock_conformance.sentences` prints now."""
    assert (ROOT / "docs/reference/what-a-backend-promises.md").read_text(encoding="utf-8") == as_page(all_scenarios())
