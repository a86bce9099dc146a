"""Overrides from the command line: ``path=value`` texts, parsed by the types of the fields that they name."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from portatrain.config import UNIONS, describe, fits, hints, is_config, is_mapping, required
from portatrain.errors import UserError, choice


def parse(text: str, hint: Any, current: object, modules: Iterable[str] = ()) -> Any:
    """Return ``text`` as a value for a field annotated ``hint`` whose value now is ``current``; for a field that holds
    a dataclass the class that ``text`` names, without values yet.

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
                return parse(text, arm, current, modules)
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
    if is_config(current) or (isinstance(hint, type) and any(map(dataclasses.is_dataclass, (hint, *_derived(hint))))):
        return _Chosen(_choose(text, hint, current, modules))
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
    return tuple(_complete(parse(word, arm, None), word) for word, arm in zip(words, arms, strict=True))


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


def _choose(text: str, hint: Any, current: object, modules: Iterable[str] = ()) -> type:
    """Return the class named `text` that can stand in the place of `current` (None: of nothing). MODULE:CLASS names one
    of another module, such as recipes.models.mixtral:MixtralConfig."""
    module, colon, name = text.rpartition(":")
    if colon and all(part.isidentifier() for part in module.split(".")):
        modules, text = (*modules, _imported(module, text)), name
    options = alternatives(hint, current, modules)
    if text not in options:
        more = " A class of your own is MODULE:CLASS, such as my_package.mine:Mine, or stands in the recipe's file."
        raise choice(f"class {text!r}", text, options, more)
    return options[text]


def _derived(hint: type) -> Iterable[type]:
    """Return the classes that are derived from `hint` itself: those of a field such as `Scaling | None`."""
    return () if hint is object or hint is type else hint.__subclasses__()


def _imported(module: str, text: str) -> str:
    """Import a module and return its name."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"class {text!r}",
            expected="MODULE:CLASS, with a module that can be imported here",
            got=str(error),
            do="Correct the name, or run the command where the module is.",
        ) from error
    return module


def alternatives(hint: Any, current: object, modules: Iterable[str] = ()) -> dict[str, type]:
    """Return the classes that can stand where `current` stands, by name.

    They are the public dataclasses that the package of its class exports, or that of the class or protocol `hint`; and
    every one that a module of `modules` (the recipe's file) defines or imports. Each is a subclass of `hint`, or has
    the members of a protocol `hint`.
    """
    cls = type(current) if is_config(current) else hint
    is_base = isinstance(hint, type) and (dataclasses.is_dataclass(hint) or getattr(hint, "_is_protocol", False))
    base = hint if is_base else cls
    wanted = _members(base)
    found: dict[str, type] = {}
    for module, exports_only in (
        *((name, True) for one in dict.fromkeys((cls, base)) for name in _room_of(one)),
        *((name, False) for name in modules),
    ):
        for name, other in vars(sys.modules.get(module, types)).items():
            if not isinstance(other, type) or not dataclasses.is_dataclass(other) or name.startswith("_"):
                continue
            if other is base or (exports_only and not other.__module__.startswith(module)):
                continue
            if dataclasses.is_dataclass(base) and not issubclass(other, base):
                continue
            if wanted <= _members(other) | set(hints(other)):
                found[name] = other
    if is_config(current) and base is not cls:
        found.setdefault(cls.__name__, cls)
    if not found and isinstance(hint, type) and dataclasses.is_dataclass(hint):
        found[hint.__name__] = hint  # nothing is derived from it
    return found


def _room_of(cls: type) -> tuple[str, str]:
    """Return the module that defines `cls`, and the package of that module."""
    return cls.__module__, cls.__module__.rpartition(".")[0]


def _members(cls: type) -> set[str]:
    """Return the names of the public methods and properties of ``cls``, and ``__call__`` if it has one."""
    names = {name for base in cls.__mro__[:-1] for name in vars(base) if name in dir(cls)}
    data = set(hints(cls)) if dataclasses.is_dataclass(cls) else set()
    return {name for name in names if name == "__call__" or not name.startswith("_")} - data


Pending = Sequence[tuple[list[str], str, str]]
"""(path below the dataclass, value, the whole assignment) of every assignment."""


def override(config: Any, assignments: Iterable[str], *, modules: Iterable[str] = ()) -> Any:
    """Return `config` with every `path=value` of `assignments` applied.

    A path walks fields by dots (`model.layers=8`, `optimizer.lr=1e-3`) and keys of mappings (`params.embed=fsdp`). The
    values are read by the types of the fields. For a field that holds a dataclass the value is the name of another
    class (`data=TextFiles`), from the package that the field's classes come from or from one of `modules`; fields that
    both classes have with the same default, and fields that have none, keep their values. Assignments to fields of that
    class (`data.paths=corpus`) may stand before or after its name.

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
    return _replaced(config, pending, tuple(modules))


def _replaced(config: Any, pending: Pending, modules: tuple[str, ...]) -> Any:
    """Return `config` with `pending` applied at once, so that two fields that only fit together can change together."""
    now = {name: getattr(config, name) for name in hints(type(config))}
    changes = _changes(type(config), now, pending, modules)
    return dataclasses.replace(config, **changes) if changes else config


def _changes(cls: type, now: Mapping[str, Any], pending: Pending, modules: tuple[str, ...]) -> dict[str, Any]:
    """Return new values of fields of `cls`, whose values are `now` (where they have one), by name."""
    known = hints(cls)
    changes: dict[str, Any] = {}
    chosen: dict[str, tuple[type, str]] = {}
    nested: dict[str, list[tuple[list[str], str, str]]] = {}
    for path, text, assignment in sorted(pending, key=lambda one: len(one[0]) > 1):  # a class before its fields
        name = path[0]
        if name not in known:
            raise _no_field(cls, name, path, assignment, modules)
        current = changes.get(name, now.get(name))
        if len(path) == 1:
            chosen.pop(name, None)
            value = _parse_or_raise(known[name], current, text, assignment, modules)
            if isinstance(value, _Chosen):
                chosen[name] = value.cls, assignment
            else:
                changes[name] = value
        elif name in chosen or is_config(current):
            nested.setdefault(name, []).append((path[1:], text, assignment))
        else:
            changes[name] = _value(known[name], current, path, text, assignment)
    for name in {**chosen, **nested}:
        mine = nested.get(name, [])
        if name in chosen:
            changes[name] = _made(*chosen[name], now.get(name), mine, modules)
        else:
            changes[name] = _replaced(changes.get(name, now.get(name)), mine, modules)
    return changes


def _no_field(cls: type, name: str, path: list[str], assignment: str, modules: tuple[str, ...]) -> UserError:
    """Return the error for a field that `cls` does not have; it names the classes in its place that do."""
    error = choice(f"override {assignment!r}: field {name!r} of {cls.__name__}", name, hints(cls))
    base = next((b for b in cls.__mro__[1:] if dataclasses.is_dataclass(b)), None)
    others = alternatives(base, None, modules) if base is not None else {}
    having = [other for other, there in others.items() if name in hints(there)]
    place = assignment.partition("=")[0].strip().removesuffix("." + ".".join(path))
    if not having or place == assignment.partition("=")[0].strip():
        return error
    do = f"{error.do} {', '.join(having)} {'has' if len(having) == 1 else 'have'} it: add --set {place}={having[0]}."
    return UserError(error.what, expected=error.expected, got=error.got, do=do)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The class that a text names, still without values."""

    cls: type


def _complete(value: object, assignment: str) -> object:
    """Return `value`; of a class that was chosen an object with its defaults."""
    return _made(value.cls, assignment, None, [], ()) if isinstance(value, _Chosen) else value


def _made(cls: type, assignment: str, current: object, pending: Pending, modules: tuple[str, ...]) -> Any:
    """Return a `cls` in the place of `current`: `pending`, then what `current` has of the same, then the defaults."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
        if field.init
    }
    defaults = {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}
    kept = {name: getattr(current, name) for name in defaults if _means_the_same(name, cls, current)}
    kept |= {name: getattr(current, name) for name in required(cls) if hasattr(current, name)}
    values = kept | _changes(cls, defaults | kept, pending, modules)
    missing = [name for name in required(cls) if name not in values]
    if missing:
        path = assignment.partition("=")[0].strip()
        raise UserError(
            f"override {assignment!r}",
            expected=f"a value for every field of {cls.__name__} that has no default",
            got=f"none for {', '.join(missing)}",
            do=f"Add {' '.join(f'--set {path}.{name}=VALUE' for name in missing)}.",
        )
    return cls(**values)


def _means_the_same(name: str, cls: type, current: object) -> bool:
    """Whether `current` and `cls` have a field `name` with the same default (b2 of AdamW is not b2 of Lion)."""
    if not is_config(current):
        return False
    theirs, ours = (one.__dataclass_fields__.get(name) for one in (type(current), cls))  # type: ignore[attr-defined]
    return theirs is not None and ours is not None and theirs.default == ours.default is not dataclasses.MISSING


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
        inner[key] = _complete(_parse_or_raise(item, inner.get(key), text, assignment), assignment)
        return inner
    return _parse_or_raise(hint, current, text, assignment)


def _parse_or_raise(hint: Any, current: object, text: str, assignment: str, modules: Iterable[str] = ()) -> Any:
    try:
        return parse(text, hint, current, modules)
    except (ValueError, OverflowError):
        wanted, do = describe(hint), "Write a value of that type."
        if get_origin(hint) is tuple and Any in get_args(hint):  # of objects, such as hooks
            name = assignment.partition("=")[0]
            wanted = f"() to leave out all {name}"
            do = f"Write others into the recipe file, for example {name}=({text.strip(' ,()') or '...'}(),)."
        raise UserError(f"override {assignment!r}", expected=wanted, got=repr(text), do=do) from None
