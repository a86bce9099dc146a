"""Frozen dataclasses as data: checked types, JSON and back, a hash.

A recipe, a model's sizes, an optimizer rule are all frozen keyword-only dataclasses. What a text on the
command line becomes is decided in ``overrides.py``, with the same types.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from portatrain.errors import UserError, choice

UNIONS = (Union, types.UnionType)
_ADDED = "added later"


def is_config(value: object) -> bool:
    """Whether ``value`` is an instance of a frozen dataclass."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def added_later(default: Any) -> Any:
    """Declare a field that a class did not have in an earlier release: `name: int = added_later(0)`.

    It is left out of the JSON while it has its default, so that the hashes of existing recipes stay as they are. The
    default must therefore mean what the class did before it had the field, and never change.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def _left_out(config: Any, name: str) -> bool:
    field = config.__dataclass_fields__[name]
    return _ADDED in field.metadata and getattr(config, name) == field.default


def hints(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field that ``cls`` takes, by name, in order.

    An annotation that cannot be resolved here (a name imported for the type checker only) counts as Any.
    """
    return _hints(cls)


@cache
def _hints(cls: type) -> dict[str, Any]:
    try:
        resolved = typing.get_type_hints(cls)
    except (NameError, AttributeError, TypeError):
        resolved = {}
    return {field.name: resolved.get(field.name, Any) for field in dataclasses.fields(cls) if field.init}


def required(cls: type) -> list[str]:
    """The fields of ``cls`` that have no default."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def describe(hint: Any) -> str:
    """``hint`` in words for an error: ``an integer or none``."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    if hint in words:
        return words[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return " or ".join(describe(arm) for arm in args)
    if origin is Literal:
        return "one of " + ", ".join(str(arm) for arm in args)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return f"a comma-separated list, each {describe(args[0])}"
    if origin is tuple:
        return f"{len(args)} comma-separated values ({', '.join(describe(arm) for arm in args)})"
    if is_mapping(hint):
        return "a mapping such as {'name': 'value'}"
    return getattr(hint, "__name__", str(hint))


def is_mapping(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def fits(value: object, hint: Any) -> bool:
    """Whether ``value`` is a legal value of a field annotated ``hint``.

    A bool is no integer here, an integer is a legal float, and a number must be finite. Hints other
    than those of plain data (classes, protocols, callables) are checked for classes only.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        return any(fits(value, arm) for arm in args)
    if origin is Literal:
        return any(value == arm and type(value) is type(arm) for arm in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        arms = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        return len(arms) == len(value) and all(fits(v, arm) for v, arm in zip(value, arms, strict=True))
    if is_mapping(hint):
        key, item = args if len(args) == 2 else (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True


def check_types(config: object) -> None:
    """Raise UserError for the first field of ``config`` whose value does not fit its annotation."""
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        if not fits(value, hint):
            raise UserError(
                f"field {name} of {type(config).__name__}",
                expected=describe(hint),
                got=f"{value!r} ({type(value).__name__})",
                do="Set it to a value of that kind.",
            )


# --- JSON --------------------------------------------------------------------------------------

_CLASS, _NAMED = "class", "named"


def to_json(value: object) -> Any:
    """``value`` as plain JSON data: a config is an object whose ``class`` is ``module:qualname``.

    A field that `added_later` declares is left out while it has its default. Tuples become lists; functions
    and classes become ``{"named": "module:qualname"}``; a number in a
    float field is written as a float, so that 1 and 1.0 hash alike.

    Raises:
        UserError: something in it is no data (an open file, a lambda, an array, a list, a set).
    """
    if is_config(value):
        known = {name: hint for name, hint in hints(type(value)).items() if not _left_out(value, name)}
        fields = {name: to_json(_as_float(getattr(value, name), hint)) for name, hint in known.items()}
        return {_CLASS: _name_of(type(value)), **fields}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(k, str) and k not in (_CLASS, _NAMED) for k in value):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (type, types.FunctionType)) and "<" not in value.__qualname__:
        return {_NAMED: _name_of(value)}
    raise UserError(
        "recipe value",
        expected="plain data: numbers, text, tuples, mappings, frozen dataclasses, module-level functions",
        got=f"{value!r} ({type(value).__name__})",
        do="Put it into a frozen dataclass, or a tuple in place of a list.",
    )


def from_json(data: Any) -> Any:
    """The inverse of ``to_json``: equal to what went in.

    Classes are looked up by name, and only frozen dataclasses are ever called.

    Raises:
        UserError: a class that cannot be found, or a field that it does not have.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict):
        return data
    if _NAMED in data:
        return _find(data[_NAMED])
    fields = {key: from_json(item) for key, item in data.items() if key != _CLASS}
    if _CLASS not in data:
        return fields
    cls = _find(data[_CLASS])
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(
            f"recipe class {data[_CLASS]}",
            expected="a frozen dataclass",
            got=repr(cls),
            do="Load the run with the code that wrote it.",
        )
    for name in fields:
        if name not in hints(cls):
            raise choice(f"field {name!r} of {cls.__name__}", name, hints(cls))
    if missing := [name for name in required(cls) if name not in fields]:
        raise UserError(
            f"recipe class {data[_CLASS]}",
            expected=f"a value for each of {', '.join(required(cls))}",
            got=f"none for {', '.join(missing)}",
            do="Load the run with the code that wrote it.",
        )
    return cls(**fields)


def sha256(value: object) -> str:
    """SHA-256, in hex, of the canonical JSON of ``value``: sorted keys, no spaces, shortest floats."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_float(value: object, hint: Any) -> object:
    """``value`` as a float if ``hint`` wants one; exact, since only integers below 2**53 are converted."""
    arms = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if type(value) is int and float in arms and int not in arms and abs(value) <= 2**53:
        return float(value)
    return value


def _name_of(thing: Any) -> str:
    """``module:qualname``, the module being the outermost package that exports it under that name.

    So a run's JSON, and its hash, stay the same when a class moves to another file of its package.
    """
    module = thing.__module__
    parts = module.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package in sys.modules and getattr(sys.modules[package], thing.__qualname__, None) is thing:
            module = package
            break
    return f"{module}:{thing.__qualname__}"


# Where classes were that older runs name: module -> where it is now.
_MOVED = {
    "portatrain.schedules": "portatrain.optim",
    "portatrain.hooks": "portatrain",
    "portatrain.rope": "portatrain",
    "portatrain.lora": "portatrain",
    "portatrain.retention": "portatrain",
}


def _find(name: str) -> Any:
    module_name, _, qualname = name.partition(":")
    module_name = _MOVED.get(module_name, module_name)
    try:
        thing: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
        for part in qualname.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"recipe class {name}",
            expected="a name that can be imported here",
            got=str(error),
            do="Load the recipe file that defines it first, or install the package it comes from.",
        ) from error
    return thing
