"""Overrides from the command line: ``path=value`` texts, parsed by the types of the fields that they name."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from portatrain.config import UNIONS, describe, fits, hints, is_config, is_mapping, required
from portatrain.errors import UserError, choice


def parse(text: str, hint: Any, current: object) -> Any:
    """Return ``text`` as a value for a field with annotation ``hint`` and present value ``current``.

    Raises:
        ValueError: ``text`` cannot be read as any type that ``hint`` allows.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in UNIONS:
        # None first, so that `none` in an optional field means None; text last, as every value reads as text.
        for arm in sorted(args, key=lambda arm: (arm is str, arm is not type(None))):
            if str in args and get_origin(arm) is tuple and text and not set(text) & set(",(["):
                continue  # prefer text to a list of one word
            try:
                return parse(text, arm, current)
            except ValueError:
                continue
        raise ValueError(text)
    if hint is type(None):
        return _parse_none(text)
    if hint is bool:
        return _parse_bool(text)
    if hint is int:
        return _parse_int(text)
    if hint is float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(text)
        return number
    if hint is str:
        return text
    if origin is Literal:
        for arm in args:
            if text == str(arm):
                return arm
        raise ValueError(text)
    if origin is tuple:
        return _parse_tuple(text, args)
    if is_mapping(hint):
        value = _plain(_literal(text))
        if not fits(value, hint):
            raise ValueError(text)
        return value
    if is_config(current) or (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return _choose(text, hint, current)
    if isinstance(current, (bool, int, float, str)):
        return parse(text, type(current), None)
    raise ValueError(text)


def _parse_none(text: str) -> None:
    if text.lower() in ("none", "null"):
        return None
    raise ValueError(text)


def _parse_bool(text: str) -> bool:
    known = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
    if text.lower() not in known:
        raise ValueError(text)
    return known[text.lower()]


def _parse_int(text: str) -> int:
    """Return an integer from texts such as ``20000``, ``20_000`` and ``1e4``."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not math.isfinite(number) or number != int(number):
            raise ValueError(text) from None
        return int(number)


def _parse_tuple(text: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    inner = text.strip()
    if inner[:1] in ("(", "[") and inner[-1:] in (")", "]"):
        inner = inner[1:-1]
    words = [word.strip().strip("'\"") for word in inner.split(",")]
    if words and not words[-1]:
        words.pop()  # "" is the empty list, and a list may end in a comma
    arms = [args[0]] * len(words) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(arms) != len(words):
        raise ValueError(text)
    return tuple(parse(word, arm, None) for word, arm in zip(words, arms, strict=True))


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
        raise ValueError(text) from error


def _plain(value: object) -> object:
    """Return ``value`` with every list, at any depth, converted to a tuple."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item) for item in value)
    return value


def _choose(text: str, hint: Any, current: object) -> object:
    """Return an instance of the class named ``text`` to replace ``current``, as in ``optimizer=Lion``.

    Fields without a default take the value of ``current`` for the same name; all others take their defaults.

    Raises:
        UserError: no such class, or a field without a default that ``current`` does not have.
    """
    options = alternatives(hint, current)
    if text not in options:
        raise choice(f"class {text!r}", text, options)
    chosen = options[text]
    needed = required(chosen)
    missing = [name for name in needed if not hasattr(current, name)]
    if missing:
        raise UserError(
            f"class {text!r}",
            expected="a class whose fields have defaults",
            got=f"{text}, which needs {', '.join(missing)}",
            do="Set the field in the recipe file instead.",
        )
    return chosen(**{name: getattr(current, name) for name in needed})


def alternatives(hint: Any, current: object) -> dict[str, type]:
    """Return the classes that can replace ``current``, by name.

    These are the public dataclasses in the module and the package of its class that have the members of ``hint``, if
    that is a protocol, or else the methods of the class.
    """
    cls = type(current) if is_config(current) else hint
    wanted = _members(hint if getattr(hint, "_is_protocol", False) else cls)
    found: dict[str, type] = {}
    for module in (cls.__module__, cls.__module__.rpartition(".")[0]):
        for name, other in vars(sys.modules.get(module, types)).items():
            if not isinstance(other, type) or not dataclasses.is_dataclass(other) or name.startswith("_"):
                continue
            if other is hint:  # the base class
                continue
            if isinstance(hint, type) and dataclasses.is_dataclass(hint) and not issubclass(other, hint):
                continue
            if other.__module__.startswith(module) and wanted <= _members(other) | set(hints(other)):
                found[name] = other
    if not found and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        found[hint.__name__] = hint  # a class without subclasses
    return found


def _members(cls: type) -> set[str]:
    """Return the names of the public methods and properties of ``cls``, and ``__call__`` if it has one."""
    names = {name for base in cls.__mro__[:-1] for name in vars(base) if name in dir(cls)}
    data = set(hints(cls)) if dataclasses.is_dataclass(cls) else set()
    return {name for name in names if name == "__call__" or not name.startswith("_")} - data


def override(config: Any, assignments: Iterable[str]) -> Any:
    """Return ``config`` with every ``path=value`` of ``assignments`` applied, in order.

    Dots in a path separate fields (``model.layers=8``, ``optimizer.lr=1e-3``) and keys of mappings
    (``params.embed=fsdp``). Values are parsed by the types of the fields.

    Raises:
        UserError: a missing "=", an unknown field (the message lists the nearest names and all valid ones), a value
            that does not fit the field, or a value that the dataclass rejects.
    """
    pending: list[tuple[list[str], str, str]] = []
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise UserError(
                f"override {assignment!r}",
                expected="field=value",
                got="no '='" if not equals else "no field name",
                do="Write it as in --set model.layers=8.",
            )
        pending.append((path.strip().split("."), text.strip(), assignment))
    return _replace_all(config, pending)


def _replace_all(config: Any, pending: Sequence[tuple[list[str], str, str]]) -> Any:
    """Apply all overrides of one dataclass at once, since two fields may be valid only together."""
    known = hints(type(config))
    changes: dict[str, Any] = {}
    nested: dict[str, list[tuple[list[str], str, str]]] = {}
    for path, text, assignment in pending:
        name = path[0]
        if name not in known:
            raise choice(f"override {assignment!r}: field {name!r} of {type(config).__name__}", name, known)
        if len(path) > 1 and is_config(changes.get(name, getattr(config, name))):
            nested.setdefault(name, []).append((path[1:], text, assignment))
            continue
        if nested.get(name):  # model.layers=8 before model=Other: keep the given order
            changes[name] = _replace_all(changes.get(name, getattr(config, name)), nested.pop(name))
        changes[name] = _value(known[name], changes.get(name, getattr(config, name)), path, text, assignment)
    for name, inner in nested.items():
        changes[name] = _replace_all(changes.get(name, getattr(config, name)), inner)
    return dataclasses.replace(config, **changes) if changes else config


def _value(hint: Any, current: object, path: list[str], text: str, assignment: str) -> Any:
    if len(path) > 1:
        arms = get_args(hint) if get_origin(hint) in UNIONS else (hint,)
        mapping = next((arm for arm in arms if is_mapping(arm)), None)
        if mapping is None:
            raise UserError(
                f"override {assignment!r}",
                expected=f"{path[0]} alone, {describe(hint)}",
                got=f"a field {'.'.join(path[1:])} inside it",
                do=f"Write --set {path[0]}=VALUE.",
            )
        item = (get_args(mapping) or (str, Any))[1]
        inner = dict(typing.cast("Mapping[str, object]", current or {}))
        key = ".".join(path[1:])
        inner[key] = _parse_or_raise(item, inner.get(key), text, assignment)
        return inner
    return _parse_or_raise(hint, current, text, assignment)


def _parse_or_raise(hint: Any, current: object, text: str, assignment: str) -> Any:
    try:
        return parse(text, hint, current)
    except (ValueError, OverflowError):
        wanted = describe(hint)
        raise UserError(
            f"override {assignment!r}", expected=wanted, got=repr(text), do="Write a value of that type."
        ) from None
