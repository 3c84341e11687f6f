"""A task's signature is its payload: binding, conversion, and what is refused where."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import functools
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import msgspec
import pytest

from crossdock.errors import InvalidArguments, InvalidTask
from crossdock.signature import Payload, check_function


def payload_of(function: Callable[..., Any]) -> Payload:
    """The payload of a function, as a task named `t`."""
    return Payload(function, check_function(function, "t"), "t")


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What a worker would pass to the function for this call."""
    payload = payload_of(function)
    return payload.decode(msgspec.Raw(payload.encode(args, kwargs)), json=False)


# --- binding --------------------------------------------------------------------------------------


def send(to: str, subject: str = "hello", copies: int = 1) -> None: ...


def keyword(to: str, *, subject: str = "hello", copies: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "arguments"),
    [
        (send, ("a",), {}, {"to": "a"}),
        (send, ("a", "b", 2), {}, {"to": "a", "subject": "b", "copies": 2}),
        (send, (), {"copies": 2, "to": "a"}, {"to": "a", "copies": 2}),
        (send, ("a",), {"subject": "hello"}, {"to": "a", "subject": "hello"}),
        (keyword, ("a",), {"copies": 2}, {"to": "a", "copies": 2}),
        (keyword, (), {"to": "a", "copies": 2, "subject": "b"}, {"to": "a", "copies": 2, "subject": "b"}),
    ],
)
def test_calls_are_bound_by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Positions become names; what was left to its default is left out, so that the worker's default counts."""
    assert call(function, *args, **kwargs) == arguments
    assert msgspec.msgpack.decode(payload_of(function).encode(args, kwargs)) == arguments


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "said"),
    [
        (send, (), {}, "'to'"),
        (send, ("a", "b", 1, 2), {}, "positional"),
        (send, ("a",), {"to": "b"}, "'to'"),
        (send, ("a",), {"sbject": "b"}, "'sbject'"),
        (keyword, ("a",), {}, "'copies'"),
        (keyword, ("a", "b"), {"copies": 1}, "positional"),
        (keyword, ("a",), {"copies": 1, "sbject": "b"}, "'sbject'"),
    ],
)
def test_a_call_that_does_not_fit_is_refused(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], said: str
) -> None:
    """The text names the task, the parameter and the signature, as a plain Python call would."""
    with pytest.raises(InvalidArguments, match=said) as caught:
        call(function, *args, **kwargs)
    assert str(caught.value).startswith("task 't': ")
    assert "its signature is (to: " in str(caught.value)


# --- types ----------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


class Address(TypedDict):
    street: str


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Customer:
    name: str
    address: Address


class Tree(msgspec.Struct):
    value: int
    children: list[Tree] = []


NOW = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


def check_types(
    when: datetime.datetime,
    day: datetime.date,
    length: datetime.timedelta,
    id: uuid.UUID,
    price: decimal.Decimal,
    data: bytes,
    colour: Colour,
    size: Size,
    address: Address,
    point: Point,
    customer: Customer,
    tree: Tree,
    tags: set[str],
    pair: tuple[int, str],
    kind: Literal["a", "b"],
    amount: Annotated[int, msgspec.Meta(ge=1)],
    maybe: int | None,
    anything: Any,
    object_: object,
    mapping: dict[str, object],
    counts: dict[int, float],
    many: Iterable[int],
    unannotated,
) -> None: ...


def test_types_arrive_as_annotated() -> None:
    """Whatever msgspec can carry arrives as the annotation says."""
    given = {
        "when": NOW,
        "day": NOW.date(),
        "length": datetime.timedelta(days=1, milliseconds=5),
        "id": uuid.UUID(int=5),
        "price": decimal.Decimal("0.10"),
        "data": b"\x00\xff",
        "colour": Colour.RED,
        "size": Size.BIG,
        "address": {"street": "x"},
        "point": Point(1, 2),
        "customer": Customer("Ada", {"street": "x"}),
        "tree": Tree(1, [Tree(2)]),
        "tags": {"a", "b"},
        "pair": (1, "b"),
        "kind": "a",
        "amount": 2**64 - 1,
        "maybe": None,
        "anything": {"a": [1, 2.5, None]},
        "object_": [1],
        "mapping": {"a": 1},
        "counts": {1: 2.0},
        "many": [1, 2],
        "unannotated": True,
    }
    arrived = call(check_types, **given)
    assert arrived == given
    assert {name: type(value) for name, value in arrived.items()} == {name: type(value) for name, value in given.items()}


def test_anything_may_have_a_default() -> None:
    """`object`, how careful people write "anything", too."""

    def f(x: object = 5, *, y: dict[str, object] | None = None, z: Any = None) -> None: ...

    assert call(f) == {}
    assert call(f, [1], y={"a": None}, z="z") == {"x": [1], "y": {"a": None}, "z": "z"}


def test_plain_values_are_converted() -> None:
    """A call may pass the plain form of a type; the handler gets the type."""

    def f(when: datetime.datetime, customer: Customer, colour: Colour, ratio: float, tags: set[str]) -> None: ...

    arrived = call(f, "2026-01-01T12:00:00Z", {"name": "Ada", "address": {"street": "x"}}, "red", 1, ["a", "a"])
    assert arrived == {
        "when": NOW,
        "customer": Customer("Ada", {"street": "x"}),
        "colour": Colour.RED,
        "ratio": 1.0,
        "tags": {"a"},
    }


@pytest.mark.parametrize(
    ("annotation", "value", "place"),
    [
        (int, "1", "'x'"),
        (int, 1.5, "'x'"),
        (str, 1, "'x'"),
        (str, None, "'x'"),
        (bool, 1, "'x'"),
        (list[int], [1, 2, "3"], r"'x\[2\]'"),
        (dict[str, int], {"a": "b"}, r"'x\[...\]'"),
        (Customer, {"name": "Ada", "address": {"street": 5}}, r"'x.address.street'"),
        (Customer, {"name": "Ada"}, "'x': Object missing required field `address`"),
        (Literal["a", "b"], "c", "'x'"),
        (Annotated[int, msgspec.Meta(ge=1)], 0, "'x'"),
        (datetime.datetime, "yesterday", "'x'"),
        (Colour, "blue", "'x'"),
    ],
)
def test_a_wrong_type_names_the_parameter(annotation: Any, value: object, place: str) -> None:
    """The producer is told which parameter, down to the place within it, before anything is sent."""

    def f(a: int, x: Any) -> None: ...

    f.__annotations__["x"] = annotation
    with pytest.raises(InvalidArguments, match=f"parameter {place}"):
        call(f, 1, value)


@pytest.mark.parametrize(
    "value",
    [object(), lambda: None, 2**64, -(2**63) - 1, "\ud800", {"a": {1: object()}}, Path("x"), 1j],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_cannot_travel_names_the_parameter(value: object) -> None:
    """So is a value that no annotation forbids and no message can carry."""

    def f(a: int, x: Any = None) -> None: ...

    with pytest.raises(InvalidArguments, match="task 't': parameter 'x' cannot be sent: "):
        call(f, 1, value)


def test_a_value_that_contains_itself_is_refused() -> None:
    """Endless nesting ends in a sentence."""

    def f(x: list[Any]) -> None: ...

    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(InvalidArguments, match="parameter 'x' cannot be sent: "):
        call(f, endless)


@dataclasses.dataclass
class Particular:
    value: int

    def __post_init__(self) -> None:
        if self.value == 1:
            raise ValueError("not one")
        if self.value == 2:
            raise KeyError("not two")


@pytest.mark.parametrize("value", [1, 2])
def test_a_class_that_refuses_a_value_is_a_misfit(value: int) -> None:
    """Whatever a user's class raises when it is built, at the producer, in a tool and at the worker."""

    def f(x: Particular) -> None: ...

    payload = payload_of(f)
    for attempt in (
        lambda: payload.encode(({"value": value},), {}),
        lambda: payload.encode_plain({"x": {"value": value}}),
        lambda: payload.decode(msgspec.Raw(msgspec.msgpack.encode({"x": {"value": value}})), json=False),
        lambda: payload.decode(msgspec.Raw(b'{"x": {"value": %d}}' % value), json=True),
    ):
        with pytest.raises(InvalidArguments, match=r"task 't': .*not (one|two)"):
            attempt()


# --- plain values, as tools have them -------------------------------------------------------------


def test_plain_arguments_by_name() -> None:
    """What comes from JSON is converted strictly to the annotations."""

    def f(when: datetime.datetime, copies: int = 1) -> None: ...

    payload = payload_of(f)
    encoded = payload.encode_plain({"when": "2026-01-01T12:00:00Z"})
    assert payload.decode(msgspec.Raw(encoded), json=False) == {"when": NOW}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "the call missing required parameter `to`"),
        ({"to": "a", "sbject": "b"}, "the call contains unknown parameter `sbject`"),
        ({"to": 1}, "parameter 'to': Expected `str`, got `int`"),
        ({"to": "a", "copies": "2"}, "parameter 'copies': Expected `int`, got `str`"),
        ({"to": "a", "copies": 2**70}, "parameter 'copies' cannot be sent"),
        ({"to": "\ud800"}, "parameter 'to' cannot be sent"),
        (["a"], "Expected `object`, got `array`"),
        (None, "Expected `object`, got `null`"),
    ],
)
def test_plain_arguments_that_do_not_fit(arguments: Any, said: str) -> None:
    """Missing, unknown and wrong ones, and what no message can carry, are told by parameter."""
    with pytest.raises(InvalidArguments) as caught:
        payload_of(send).encode_plain(arguments)
    assert said in str(caught.value)


def test_a_parameter_called_field_is_called_by_its_name() -> None:
    """The texts speak of parameters without changing anybody's names."""

    def f(field: int, Object: int) -> None: ...

    with pytest.raises(InvalidArguments, match="parameter `Object`"):
        payload_of(f).encode_plain({"field": 1})
    with pytest.raises(InvalidArguments, match="parameter 'field'"):
        payload_of(f).encode_plain({"field": "x", "Object": 1})


# --- at the worker --------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [b"", b"\xc1", b"null", b"[]", b"3", b'{"to": 1}', b'{"to": "a", "x": 1}', b'{"to": "\xff"}', b"{"])
def test_bytes_that_do_not_fit_are_invalid_arguments(raw: bytes) -> None:
    """Whatever is in the message, the worker gets InvalidArguments."""
    with pytest.raises(InvalidArguments, match="task 't': "):
        payload_of(send).decode(msgspec.Raw(raw), json=True)
    with pytest.raises(InvalidArguments, match="task 't': "):
        payload_of(send).decode(msgspec.Raw(raw), json=False)


def test_a_deploy_that_adds_a_default_parameter_takes_what_is_queued() -> None:
    """Messages of the old signature run with the new one, and the new default."""

    def old(to: str) -> None: ...

    def new(to: str, urgent: bool = False, *, tag: str | None = None) -> None: ...

    queued = payload_of(old).encode(("a",), {})
    assert payload_of(new).decode(msgspec.Raw(queued), json=False) == {"to": "a"}


def test_a_deploy_that_removes_a_parameter_refuses_what_used_it() -> None:
    """Dropping an argument silently would lose something; the text names it."""

    def old(to: str, urgent: bool = False) -> None: ...

    def new(to: str) -> None: ...

    with pytest.raises(InvalidArguments, match="unknown parameter `urgent`"):
        payload_of(new).decode(msgspec.Raw(payload_of(old).encode(("a", True), {})), json=False)
    assert payload_of(new).decode(msgspec.Raw(payload_of(old).encode(("a",), {})), json=False) == {"to": "a"}


def test_a_deploy_that_adds_a_required_parameter_refuses_what_is_queued() -> None:
    """The text names what is missing."""

    def new(to: str, subject: str) -> None: ...

    with pytest.raises(InvalidArguments, match="missing required parameter `subject`"):
        payload_of(new).decode(msgspec.Raw(payload_of(send).encode(("a",), {})), json=False)


# --- annotations ----------------------------------------------------------------------------------


def names_a_later_class(order: Later, after: list[Later] | None = None) -> None: ...


class Later(msgspec.Struct):
    id: str


def test_annotations_may_name_later_classes() -> None:
    """They are resolved at first use, not where the task stands."""
    assert call(names_a_later_class, Later("o-1")) == {"order": Later("o-1")}


class Plain:
    """A class that nothing can be turned into."""


@pytest.mark.parametrize(
    "annotation", [Plain, list[Plain], Path, complex, 5, "int(", int | list[int] | set[int], Callable[[], int]]
)
@pytest.mark.parametrize("default", [False, True])
def test_annotations_that_cannot_travel(annotation: Any, default: bool) -> None:
    """They are refused at first use, whether or not the parameter has a default."""

    def required(x: Any) -> None: ...

    def optional(x: Any = 1) -> None: ...

    function = optional if default else required
    function.__annotations__["x"] = annotation
    with pytest.raises(InvalidTask, match=r"task 't': (an annotation is of a type that cannot travel|its annotations cannot be)"):
        payload_of(function)


def test_an_annotation_that_does_not_exist() -> None:
    """The text says which name."""

    def f(x: Nowhere) -> None: ...  # noqa: F821

    with pytest.raises(InvalidTask, match="its annotations cannot be resolved: name 'Nowhere' is not defined"):
        payload_of(f)


# --- decoration -----------------------------------------------------------------------------------


class Service:
    def method(self, x: int) -> None: ...

    @classmethod
    def of_class(cls, x: int) -> None: ...

    @staticmethod
    def static(x: int) -> None: ...

    def __call__(self, x: int) -> None: ...


def generator(x: int) -> Iterator[int]:
    yield x


async def async_generator(x: int) -> AsyncIterator[int]:
    yield x


def positional_only(x: int, /) -> None: ...


def old_positional_only(__x: int) -> None: ...


def many(*xs: int) -> None: ...


def named(**xs: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (Service.method, "it is a method"),
        (Service().method, "it is not a plain function"),
        (Service.of_class, "it is not a plain function"),
        (Service(), "it is not a plain function"),
        (Service, "it is not a plain function"),
        (functools.partial(send, "a"), "it is not a plain function"),
        (print, "it is not a plain function"),
        ("shop.send", "it is not a plain function"),
        (None, "it is not a plain function"),
        (lambda x: x, "a lambda has no name of its own; use def"),
        (generator, "a generator gives no single result"),
        (async_generator, "a generator gives no single result"),
        (positional_only, "parameter 'x' is positional-only; arguments travel by name"),
        (old_positional_only, "parameter '__x' is positional-only; arguments travel by name"),
        (many, "*xs has no fixed names; list the parameters"),
        (named, "*xs has no fixed names; list the parameters"),
    ],
    ids=lambda part: getattr(part, "__name__", type(part).__name__),
)
def test_functions_that_cannot_be_tasks(function: Any, said: str) -> None:
    """Each is refused where it is decorated, with the reason."""
    with pytest.raises(InvalidTask) as caught:
        check_function(function, "shop.t")
    assert str(caught.value).startswith("'shop.t' cannot be a task: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("function", [send, keyword, Service.static, check_types])
def test_functions_that_can(function: Callable[..., Any]) -> None:
    """Plain functions, static ones too, with any parameters that have names."""
    assert check_function(function, "t").parameters


def test_a_nested_function_can_be_a_task() -> None:
    """Also async ones, and decorated ones keep the signature they wrap."""

    async def inner(a: int, b: str = "x") -> None: ...

    @functools.wraps(inner)
    async def wrapper(*args: Any, **kwargs: Any) -> None: ...

    assert call(wrapper, 1) == {"a": 1}
    assert call(inner, 1, "b") == {"a": 1, "b": "b"}
