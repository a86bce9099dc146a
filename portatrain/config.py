"""Frozen dataclasses as configuration: checked types, conversion to and from JSON, and a hash.

A config is a frozen keyword-only dataclass: a recipe, the sizes of a model, an optimizer rule.
``portatrain.recipe.overrides`` parses command-line texts by the same types.
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
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

from portatrain.errors import UserError, choice

UNIONS = (Union, types.UnionType)
_ADDED = "added later"


def is_config(value: object) -> bool:
    """Return True if ``value`` is an instance of a frozen dataclass."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return parameters is not None and bool(parameters.frozen)


def added_later(default: Any) -> Any:
    """Declare a field that earlier releases of the class did not have: ``name: int = added_later(0)``.

    The JSON omits the field while it has its default, so the hashes of existing recipes do not change. The default must
    therefore give the behaviour that the class had without the field, and must never change.
    """
    return dataclasses.field(default=default, metadata={_ADDED: True})


def left_out(config: Any, name: str) -> bool:
    """Return True for a field of `added_later` that has its default."""
    field = config.__dataclass_fields__[name]
    return _ADDED in field.metadata and getattr(config, name) == field.default


def hints(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of every field that ``cls`` takes, by name, in order.

    An annotation that cannot be resolved (a name imported for the type checker only) is Any.
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
    """Return the names of the fields of ``cls`` that have no default."""
    return [
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def describe(hint: Any) -> str:
    """Return an annotation in words, for an error message: ``an integer or none``."""
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
    """Return True if an annotation is a mapping type."""
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def fits(value: object, hint: Any) -> bool:
    """Return True if ``value`` is valid for a field with annotation ``hint``.

    A bool is not a valid integer, an integer is a valid float, and a number must be finite. An annotation that is a
    class is checked with isinstance; protocols, callables and other annotations accept any value.
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


def _of_objects(hint: Any) -> bool:
    """Return True if an annotation wants objects with methods, of which `fits` knows no class: hooks, a protocol."""
    if get_origin(hint) is tuple:
        return Any in get_args(hint)
    return isinstance(hint, type) and hint is not Any and hint not in (type, object) and not is_mapping(hint)


def require(config: object, field: str, good: bool, expected: str) -> None:
    """Raise UserError for ``config.field`` unless ``good`` is true; ``expected`` describes the valid values."""
    if not good:
        owner = type(config).__name__
        raise UserError(
            f"{owner}.{field}", expected=expected, got=repr(getattr(config, field)), do=f"Change {field} of {owner}."
        )


def check_types(config: object) -> None:
    """Raise UserError for the first field of ``config`` whose value does not fit its annotation."""
    for name, hint in hints(type(config)).items():
        value = getattr(config, name)
        held = value if get_origin(hint) is tuple and isinstance(value, tuple) else (value,)
        made = [one for one in held if isinstance(one, type)] if _of_objects(hint) else []
        if made:
            raise UserError(
                f"field {name} of {type(config).__name__}",
                expected="an object",
                got=f"the class {made[0].__name__}",
                do=f"Write parentheses behind it: {made[0].__name__}(...), or {made[0].__name__}() if it needs no "
                "arguments.",
            )
        if not fits(value, hint):
            wanted, do = describe(hint), "Set it to a value of that type."
            if get_origin(hint) is tuple and Any in get_args(hint):  # of objects, such as hooks
                first = value[0] if isinstance(value, list) and value else value
                wanted = f"a tuple, such as {name}=({type(first).__name__}(...),), or () for none"
                do = "Put a comma after the only element."
                if isinstance(value, list):
                    do = "Write parentheses in place of the brackets, and a comma after the only element."
                if value == []:
                    wanted, do = "a tuple, () for none", "Write () for []."
            raise UserError(
                f"field {name} of {type(config).__name__}",
                expected=wanted,
                got=f"{value!r} ({type(value).__name__})",
                do=do,
            )


# --- JSON --------------------------------------------------------------------------------------

_CLASS, _NAMED = "class", "named"


def to_json(value: object) -> Any:
    """Return ``value`` as plain JSON data.

    A config becomes an object with its fields and ``class``, "module:qualname"; fields of `added_later` are omitted
    while they have their defaults. Tuples become lists. Functions and classes become ``{"named": "module:qualname"}``.
    A number in a float field becomes a float, so that 1 and 1.0 have the same hash.

    Raises:
        UserError: ``value`` contains something else: an open file, a lambda, an array, a list, a set.
    """
    if is_config(value):
        known = {name: hint for name, hint in hints(type(value)).items() if not left_out(value, name)}
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
        do="Put it into a frozen dataclass, or use a tuple instead of a list.",
    )


def from_json(data: Any, *, trusted: Callable[[str], bool] = lambda module: True) -> Any:
    """Return the value that ``to_json`` converted, the inverse of ``to_json``.

    Classes and functions are imported by name, and no class but a frozen dataclass is called. ``trusted(module)``
    decides whether a module may be imported, or used if it has been imported already: give it for data of others, such
    as the recipe in a checkpoint.

    Raises:
        UserError: a name that is not trusted or cannot be imported, a field that the class does not have, or a missing
            field.
    """
    if isinstance(data, list):
        return tuple(from_json(item, trusted=trusted) for item in data)
    if not isinstance(data, dict):
        return data
    if _NAMED in data:
        return _find(data[_NAMED], trusted)
    fields = {key: from_json(item, trusted=trusted) for key, item in data.items() if key != _CLASS}
    if _CLASS not in data:
        return fields
    cls = _find(data[_CLASS], trusted)
    parameters = getattr(cls, "__dataclass_params__", None) if isinstance(cls, type) else None
    if parameters is None or not parameters.frozen:
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
    """Return the SHA-256, in hex, of the canonical JSON of ``value``: sorted keys, no spaces, shortest floats."""
    return sha256_of_json(to_json(value))


def sha256_of_json(data: object) -> str:
    """Return the SHA-256, in hex, of plain data in that form. Raises ValueError or TypeError if JSON cannot hold it."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_float(value: object, hint: Any) -> object:
    """Return an int as a float if ``hint`` is a float annotation. It is exact: larger ints than 2**53 stay ints."""
    arms = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
    if type(value) is int and float in arms and int not in arms and abs(value) <= 2**53:
        return float(value)
    return value


def _name_of(thing: Any) -> str:
    """Return ``module:qualname``, with the outermost package that exports the thing under that name as module.

    The JSON and the hash of a run therefore do not change when a class moves to another file of its package.
    """
    module = thing.__module__
    parts = module.split(".")
    for depth in range(1, len(parts)):
        package = ".".join(parts[:depth])
        if package in sys.modules and getattr(sys.modules[package], thing.__qualname__, None) is thing:
            module = package
            break
    return f"{module}:{thing.__qualname__}"


# Modules named in the JSON of older runs -> the module that has their classes now.
_MOVED = {
    "portatrain.schedules": "portatrain.optim",
    "portatrain.hooks": "portatrain",
    "portatrain.rope": "portatrain",
    "portatrain.lora": "portatrain",
    "portatrain.retention": "portatrain",
}


def _untrusted(name: str, module: str) -> UserError:
    return UserError(
        f"recipe class {name}",
        expected="a class of portatrain, of its recipes, of a registered plug-in, or of a recipe file that you name",
        got=f"the module {module}",
        do="If you trust it, name the recipe's file, or one that imports that module: --recipe FILE.",
    )


def _find(name: object, trusted: Callable[[str], bool]) -> Any:
    if not isinstance(name, str):
        raise UserError(
            "recipe class", expected="'module:name'", got=f"{name!r:.60}", do="Restore the recipe from a copy."
        )
    module_name, _, qualname = name.partition(":")
    module_name = _MOVED.get(module_name, module_name)
    if not trusted(module_name):
        raise _untrusted(name, module_name)
    try:
        thing: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
        for part in qualname.split("."):
            thing = getattr(thing, part)
        defined = getattr(thing, "__module__", None)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"recipe class {name}",
            expected="a name that can be imported here",
            got=str(error),
            do="First load the recipe file that defines it, or install its package.",
        ) from error
    if not trusted(str(defined)):  # what a trusted module has imported is reached through it
        raise _untrusted(name, str(defined))
    return thing
