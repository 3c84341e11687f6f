"""A task's signature is its payload: arguments are bound by name and checked against the function's own annotations."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import asdict

from crossdock.errors import InvalidArguments, InvalidTask

_AT = re.compile(r"^(?P<what>.*?)(?: - at `\$\.?(?P<where>.*)`)?$", re.DOTALL)
_WHOLE_CALL = re.compile(r"^Object (missing required|contains unknown) field")
_encode = msgspec.msgpack.Encoder().encode


def check_function(function: Callable[..., Any], name: str) -> inspect.Signature:
    """Refuse, at decoration, a function that cannot be a task; else return its signature.

    Raises:
        InvalidTask: A method, a lambda, a generator, or parameters that cannot be passed by name.
    """
    refused = None
    if not inspect.isfunction(function):
        refused = "it is not a plain function"
    elif function.__name__ == "<lambda>":
        refused = "a lambda has no name of its own; use def"
    elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        refused = "a generator gives no single result; use a plain or async function"
    if refused:
        raise InvalidTask(f"{name!r} cannot be a task: {refused}")
    signature = inspect.signature(function)
    for number, parameter in enumerate(signature.parameters.values()):
        if number == 0 and parameter.name in ("self", "cls") and "." in function.__qualname__:
            refused = "it is a method; use a function and pass what it needs as arguments"
        elif parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            refused = f"*{parameter.name} has no fixed names; list the parameters"
        elif parameter.kind is parameter.POSITIONAL_ONLY or parameter.name.startswith("__"):  # the older spelling of the same
            refused = f"parameter {parameter.name!r} is positional-only; arguments travel by name"
        if refused:
            raise InvalidTask(f"{name!r} cannot be a task: {refused}")
    return signature


def _schema_of_class(kind: Any) -> dict[str, Any]:
    """Refuse a class that msgspec does not know, unless plain values are instances of it: a decoder would only find out with a value."""
    if any(issubclass(plain, typing.get_origin(kind) or kind) for plain in (dict, list, str, int, float, bytes)):
        return {"title": "anything"}
    raise TypeError(f"{kind!r} is neither a plain type nor a dataclass, TypedDict, NamedTuple, Enum or msgspec.Struct")


class Payload:
    """Turns calls of one function into bytes and back. Annotations are resolved here, at first use, so they may name later classes.

    Raises:
        InvalidTask: An annotation cannot be resolved or is of a type that cannot travel.
    """

    def __init__(self, function: Callable[..., Any], signature: inspect.Signature, name: str) -> None:
        self._task = name
        self._signature = signature
        try:
            hints = typing.get_type_hints(function, include_extras=True)
        except Exception as error:
            raise InvalidTask(f"task {name!r}: its annotations cannot be resolved: {error}") from error
        parameters = signature.parameters.values()
        self._optional = any(parameter.default is not parameter.empty for parameter in parameters)
        self._keyword_only = any(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
        fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
        try:
            for parameter in parameters:
                hint = hints.get(parameter.name, Any)
                if parameter.default is parameter.empty:
                    fields.append((parameter.name, hint))
                else:
                    fields.append((parameter.name, hint | UnsetType if hint is not Any else Any, UNSET))
            # Required and optional fields may be mixed only when keyword-only; binding then goes through inspect.
            self._type: type[msgspec.Struct] = msgspec.defstruct(
                "Arguments", fields, forbid_unknown_fields=True, omit_defaults=True, kw_only=self._keyword_only, gc=False
            )
            self._decode_msgpack = msgspec.msgpack.Decoder(self._type).decode
            self._decode_json = msgspec.json.Decoder(self._type).decode
            msgspec.json.schema(self._type, schema_hook=_schema_of_class)  # a look at every type in every annotation
        except Exception as error:
            raise InvalidTask(f"task {name!r}: an annotation is of a type that cannot travel: {error}") from error

    def encode(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        """Bind and validate a call, and return its MessagePack form; omitted defaults are left to the worker.

        Raises:
            InvalidArguments: The call does not fit; the text names the parameter.
        """
        try:
            if self._keyword_only:
                bound = self._signature.bind(*args, **kwargs)
                call = self._type(**bound.arguments)
            else:
                call = self._type(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"task {self._task!r}: {error}; its signature is {self._signature}") from error
        encoded = self._encode(call)
        try:
            self._decode_msgpack(encoded)  # what the worker will do, done where a mistake can still be told to its author
        except Exception as error:
            raise self._unreadable(error) from error
        return encoded

    def encode_plain(self, arguments: Mapping[str, Any]) -> bytes:
        """Validate arguments that came as plain JSON-like values, and return their MessagePack form.

        Raises:
            InvalidArguments: They do not fit; the text names the parameter.
        """
        try:
            call = msgspec.convert(arguments, self._type, strict=True)
        except Exception as error:
            raise self._unreadable(error) from error
        return self._encode(call)

    def decode(self, raw: msgspec.Raw, *, json: bool) -> dict[str, Any]:
        """Read arguments at the worker.

        Raises:
            InvalidArguments: They do not fit the function as it is here; the text names the parameter.
        """
        try:
            arguments = asdict(self._decode_json(raw) if json else self._decode_msgpack(raw))
        except Exception as error:
            raise self._unreadable(error) from error
        if self._optional:
            return {name: value for name, value in arguments.items() if value is not UNSET}
        return arguments

    def _encode(self, call: msgspec.Struct) -> bytes:
        try:
            return _encode(call)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidArguments(f"task {self._task!r}: {self._unencodable(call)}: {error}") from error

    def _unreadable(self, error: Exception) -> InvalidArguments:
        """What a decoder raised, in our words. It may be anything: a user's class can have a `__post_init__`."""
        if not isinstance(error, msgspec.ValidationError):
            return InvalidArguments(f"task {self._task!r}: the arguments cannot be read: {error}")
        match = _AT.match(str(error))
        what, where = (match["what"], match["where"]) if match else (str(error), None)
        what = what if where else _WHOLE_CALL.sub(r"the call \1 parameter", what)
        place = f"parameter {where!r}: " if where else ""
        return InvalidArguments(f"task {self._task!r}: {place}{what}; its signature is {self._signature}")

    def _unencodable(self, call: msgspec.Struct) -> str:
        for name, value in asdict(call).items():
            try:
                _encode(None if value is UNSET else value)
            except (TypeError, ValueError, OverflowError, RecursionError):
                return f"parameter {name!r} cannot be sent"
        return "the arguments cannot be sent"
