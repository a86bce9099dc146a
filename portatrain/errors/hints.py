"""What to say of a mistake in a user's code, by the error and by the kind of code."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from portatrain.errors import einsum

WHICH_OPS = "docs/reference/which-ops.md"
"""The page that says which operation takes the place of a name of NumPy, flax or torch."""
TRACED = re.compile(r"^(Tracer|Concretization|NonConcreteBoolean|GuardOnDataDependent)|Can't call numpy\(\)")
KINDS = {
    "Module": "a model that runs",
    "Rule": "an optimizer rule that returns (update, new slots)",
    "Schedule": "a schedule that returns a number for every step",
    "Hook": "a hook that returns",
    "DataSpec": "a data source that returns samples",
    "Recipe": "a recipe that fits together",
}
"""The base classes of portatrain, and what their subclasses have to do."""
RETURNING = {"Rule": ("step", "update"), "Schedule": ("curve", "__call__")}
"""The methods that return what `KINDS` says, where other methods of that class return something else."""
LISTED = 40
"""The most attributes of an object that a message lists."""


@dataclass(frozen=True)
class Place:
    """The place of a mistake: `text` has file, line and method.

    owner: the object of the method. called: the innermost of portatrain's public methods that the line called. last:
    the line itself raised the error. numpy: NumPy raised it. takes: the arguments of the method, if those that
    portatrain gave it do not fit. class_itself: an attribute of `owner` is missing that portatrain asks for. computes:
    a model or a rule was running, whose values are arrays of a framework. mappings: those that the line names.
    classes: those that the line names.
    """

    text: str
    owner: Any
    called: FrameType | None = None
    last: bool = False
    numpy: bool = False
    takes: str = ""
    class_itself: bool = False
    computes: bool = False
    mappings: tuple[tuple[str, Mapping[Any, Any]], ...] = ()
    classes: tuple[type, ...] = ()


@dataclass(frozen=True)
class Hint:
    """The parts of the message after its subject."""

    expected: str
    got: str
    do: str


def hint(error: Exception, said: str, place: Place | None) -> Hint:
    """Return what to say of `error`; `said` is its own message on one line."""
    plain = Hint(_expected(place), said, "Correct that line, or what calls it.")
    if place is None:
        return Hint("a method that returns", said, "Correct it.")
    if place.takes:
        return _arguments(place, said)
    if isinstance(error, TypeError) and "UserError.__init__()" in said:
        form = "UserError(what, expected=..., got=..., do=...)"
        return Hint(form, said, "Give all four texts: what is wrong, what was expected, what came, and what to do.")
    for message, found in OF_CLASSES.items():
        if isinstance(error, (TypeError, ValueError, AttributeError)) and re.search(message, said):
            return Hint(found[0], said, found[1])
    if isinstance(error, AttributeError):
        return _attribute(error, said, place) or plain
    if isinstance(error, TypeError) and (without := _field(said, place)):
        return without
    if place.called is not None and (found_in := _einsum(place.called)):
        return found_in
    computes = place.computes and not isinstance(error, OSError)
    if computes and "NoneType" in said:
        return _none(said)
    if computes and "GuardedArray" in said:  # the oracle's, handed to a function of another framework
        got = said.replace("GuardedArray", "an array of the model")
        return Hint("operations of `ops` in a model", got, f"{WHICH_OPS} says which operation takes its place.")
    if computes and (TRACED.search(said) or place.numpy):
        return Hint(
            "operations of `ops` in a model, and of `xp` in an optimizer rule",
            said,
            f"NumPy and Python's `if`, `float()` and `bool()` cannot read an array that is being compiled or that has "
            f"a gradient; {WHICH_OPS} says which operation takes their place.",
        )
    if isinstance(error, KeyError) and kind_of(place.owner) == "Rule":
        return Hint(
            "a slot that slots(info) declares",
            said,
            "Declare it there, for example {'v': Slot(axes=info.axes, shape=info.shape)}.",
        )
    if isinstance(error, KeyError) and (without := _key(error, place)):
        return without
    if isinstance(error, ZeroDivisionError):
        when = "A schedule is called for the steps 1 to `steps`. " if kind_of(place.owner) == "Schedule" else ""
        return Hint("a divisor that is not 0", said, f"{when}Handle the case in which the divisor is 0.")
    if place.called is not None and not place.last:
        return _called(place.called, said)
    return plain


OF_CLASSES = {
    "cannot inherit non-frozen dataclass": ("a frozen dataclass", "Write @dataclass(frozen=True, kw_only=True)."),
    "cannot inherit frozen dataclass": ("a class whose base is frozen too", "Make both frozen, or neither."),
    "non-default argument .* follows default": (
        "fields without a default before those that have one",
        "Write @dataclass(frozen=True, kw_only=True): then their order does not matter.",
    ),
    "mutable default .* is not allowed": ("a default that cannot change", "Use a tuple or a frozen dataclass."),
    "^FrozenInstanceError": (
        "a class whose fields never change: a recipe is frozen, and so is all that it holds",
        "Make a changed copy by dataclasses.replace. What a hook has to remember within one attempt belongs into a "
        "dictionary at the top of its file.",
    ),
}
"""Mistakes in the dataclasses of a recipe, by what Python says of them: what was expected, and what to do."""


def _einsum(called: FrameType) -> Hint | None:
    """Return what is wrong with the letters of an einsum; None for another operation, or if they fit."""
    values = called.f_locals
    if called.f_code.co_name != "einsum" or "operands" not in values:
        return None
    found = einsum.fault(values.get("spec"), [_axes(one) for one in values["operands"]])
    return found and Hint(found[0], f"ops.einsum of {found[1]}", found[2])


def _axes(value: object) -> tuple[int, ...] | None:
    shape = getattr(value, "shape", None)
    return tuple(shape) if isinstance(shape, tuple) else None


def _field(said: str, place: Place) -> Hint | None:
    """Return what to say of a keyword that a class of the line does not take; None if it is not known."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", said)
    found = next((one for one in place.classes if match and one.__name__ == match[1]), None)
    if match is None or found is None:
        return None
    taken = [name for name in inspect.signature(found).parameters if name != "self"]
    near = _near(match[2], taken, "")
    return Hint(f"arguments of {found.__name__}: {', '.join(taken)}", match[2], f"{near}Correct that line.")


def _key(error: KeyError, place: Place) -> Hint | None:
    """Return what to say of a key that a mapping of the line does not have; None if the mapping is not known."""
    key = error.args[0] if error.args else None
    without = [(name, one) for name, one in place.mappings if key not in one]
    if len(without) != 1 or not all(isinstance(k, str) for k in without[0][1]):
        return None
    name, one = without[0]
    near = _near(str(key), list(one), "")
    listed = ", ".join(sorted(one)) or "(none)"
    return Hint(f"a key of `{name}`: {listed}", f"KeyError: no key {key!r}", f"{near}Correct that line.")


def _expected(place: Place | None) -> str:
    kind = kind_of(place.owner) if place else ""
    method = _METHOD.search(place.text) if place else None
    if method and method[1] not in RETURNING.get(kind, (method[1],)):
        return f"`{method[1]}` to return" + (", or to raise UserError" if method[1] == "check" else "")
    return KINDS.get(kind, "code that runs")


_METHOD = re.compile(r", in (?:\w+\.)+(\w+)$")


def kind_of(owner: object) -> str:
    """Return the name of the base class of portatrain that an object derives from; '' if it derives from none."""
    for one in type(owner).__mro__:
        if one.__module__.startswith("portatrain.") and one.__name__ in KINDS:
            return one.__name__
    return ""


def _none(said: str) -> Hint:
    return Hint(
        "an array", f"None ({said})", "A layer or function without a `return` gives None: let it return its result."
    )


def _attribute(error: AttributeError, said: str, place: Place) -> Hint | None:
    owner, name = error.obj, error.name
    if "'NoneType' object" in said and place.computes:
        return _none(said)
    if name is None and (match := _MISSING.search(said)) and type(place.owner).__name__ == match[1]:
        owner, name = place.owner, match[2]  # torch raises the error itself
    if owner is None or name is None:
        return None
    kind = type(owner).__name__
    if isinstance(owner, Mapping):
        near = f'["{name}"]' if name in owner else f'["KEY"], where KEY is one of {", ".join(map(str, owner))}'
        return Hint("a key in brackets", said, f"Write {near} in the place of .{name}.")
    if place.class_itself:
        return Hint(f"a class with `{name}`", said, f"Define `{name}` in {kind}.")
    if _is_ops(owner):
        near = _near(name, [n for n in dir(owner) if not n.startswith("_")], "ops.")
        return Hint(
            "an operation of `ops`",
            f"ops.{name}",
            f"{near}{WHICH_OPS} says which operation takes the place of a name of NumPy, flax or torch.",
        )
    if kind_of(owner) == "Module":
        near = _near(name, _held(owner), "self.")
        return Hint(
            f"an attribute that {kind}.__init__ sets",
            f"no attribute `{name}`",
            f"{near}Set it in __init__, for example self.{name} = Param(embed=64).",
        )
    names = [n for n in dir(owner) if not n.startswith("_")]
    near = _near(name, names, "")
    if kind_of(owner) and not type(owner).__module__.startswith("portatrain."):
        return Hint(f"an attribute of {kind}", said, f"{near}Correct that line, or define `{name}` in {kind}.")
    there = f": {', '.join(names)}" if len(names) <= LISTED else ""
    return Hint(f"an attribute of {kind}{there}", said, f"{near}Correct that line.")


def _is_ops(owner: object) -> bool:
    mro = type(owner).__mro__
    return any(one.__module__.startswith("portatrain.") and one.__name__.endswith("Ops") for one in mro)


_MISSING = re.compile(r"'(\w+)' object has no attribute '(\w+)'")


def _held(module: object) -> list[str]:
    """Return the names of what a module holds, which torch keeps in dictionaries of its own."""
    values = vars(module)
    names = {*values, *(n for part in ("_parameters", "_modules", "_buffers") for n in values.get(part) or ())}
    return [name for name in names if not name.startswith("_")]


def _near(name: str, names: list[str], prefix: str) -> str:
    plain = {one.replace("_", "").lower(): one for one in names}
    found = [plain[n] for n in difflib.get_close_matches(name.replace("_", "").lower(), plain, n=2, cutoff=0.6)]
    return f"Did you mean {' or '.join(f'{prefix}{one}' for one in found)}? " if found else ""


def _arguments(place: Place, said: str) -> Hint:
    """A method of a user does not take the arguments that portatrain gives it."""
    name = place.text.rpartition(".")[2]
    called = {
        "__call__": "a model is called as model(ops, batch), and a schedule as schedule(step, steps)",
        "predict": "it is called as predict(ops, batch)",
        "build": "it is called as build()",
    }.get(name, f"the page of its kind in docs/start/ has the arguments of `{name}`")
    return Hint(f"the arguments that portatrain gives, where it has {place.takes}", said, f"Change them: {called}.")


def _called(frame: FrameType, said: str) -> Hint:
    """An operation of portatrain refused what it was given: name it, with the shapes of its arrays."""
    code, values = frame.f_code, frame.f_locals
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
    shapes = [text for name in names if name != "self" and (text := _shape(values.get(name)))]
    owner = "ops" if _is_ops(values["self"]) else type(values["self"]).__name__
    got = f" of {', '.join(shapes)}" if shapes else ""
    return Hint(
        f"arguments that {owner}.{code.co_name} takes",
        f"{owner}.{code.co_name}{got}: {said}",
        "Correct its arguments; docs/reference/ops.md has the shapes of every operation."
        if owner == "ops"
        else "Correct its arguments.",
    )


def _shape(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(text for one in value if (text := _shape(one)))
    if isinstance(value, str):
        return repr(value) if len(value) < 80 else ""
    shape = getattr(value, "shape", None)
    return str(tuple(shape)) if isinstance(shape, tuple) else ""
