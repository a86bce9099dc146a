"""Watch a forward pass for what a model must not do in it: draw random numbers of its own, or set its attributes.

A generator's state tells whether numbers were drawn, also if they had no effect this time. The states are compared at
every line of the model's own files, so that the line that drew is known.
"""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from portatrain.errors.users_code import is_ours, shown
from portatrain.model.module import Definition, Module
from portatrain.testing.recipe_check.blame import place_of

T = TypeVar("T")
RANDOM, GENERATOR, RANDOM_STATE = random.Random, np.random.Generator, np.random.RandomState


@dataclass(kw_only=True)
class Watch:
    """What was seen, in order: (what drew, place) of random numbers; (class, attribute, place) of attributes set.

    imported: modules were imported, which may draw numbers themselves.
    """

    drawn: list[tuple[str, str]] = field(default_factory=list)
    assigned: list[tuple[type, str, str]] = field(default_factory=list)
    imported: bool = False


def files_of(definition: Definition, *others: object) -> set[str]:
    """Return the files that define the classes of the model and of `others`, without those of portatrain."""
    found = set()
    for held in (*definition.modules.values(), *others):
        for cls in type(held).__mro__:
            file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            if file and not is_ours(str(file)) and cls is not object:
                found.add(str(file))
    return found


@contextmanager
def watching(definition: Definition, *others: object) -> Iterator[Watch]:
    """Watch this thread until the end of the block, in the files of the model's classes and those of `others`."""
    found, files, modules = Watch(), files_of(definition, *others), len(sys.modules)
    try:
        with _setting(found), _making(found, files), _drawing(found, files):
            yield found
    finally:
        found.imported = len(sys.modules) > modules


def watched(call: Callable[[], T], definition: Definition, *others: object) -> tuple[Watch, T]:
    """Return what was seen while `call` ran, and its result. It runs again if it imported modules."""
    with watching(definition, *others) as watch:
        result = call()
    if not watch.imported:
        return watch, result
    assigned = watch.assigned
    with watching(definition, *others) as watch:
        result = call()
    watch.assigned[:0] = assigned
    return watch, result


@contextmanager
def _setting(found: Watch) -> Iterator[None]:
    def assigned(self: Module, name: str, value: Any = None) -> None:
        found.assigned.append((type(self), name, place_of(sys._getframe(1))))
        object.__setattr__(self, name, value)

    Module.__setattr__ = assigned  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del Module.__setattr__


@contextmanager
def _making(found: Watch, files: set[str]) -> Iterator[None]:
    """Record generators that are made, since their states are seen nowhere once they are gone."""
    makers: tuple[Any, ...] = (np.random.default_rng, GENERATOR, RANDOM_STATE)
    held: list[tuple[Any, str, Any]] = [(np.random, make.__name__, make) for make in makers]
    held.append((random, "Random", RANDOM))
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) in files:
            held += [(module, key, v) for key, v in vars(module).items() if any(v is m for m in (*makers, RANDOM))]

    def note(make: Any) -> None:
        frame = sys._getframe(2)
        if not is_ours(frame.f_code.co_filename):
            found.drawn.append((f"{make.__module__}.{make.__name__}", place_of(frame)))

    def noting(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            note(make)
            return make(*args, **options)

        def init(self: Any, *args: Any, **options: Any) -> None:
            note(make)
            make.__init__(self, *args, **options)

        return _Same(make.__name__, (make,), {"__init__": init}) if isinstance(make, type) else made

    for owner, name, make in held:
        setattr(owner, name, noting(make))
    try:
        yield
    finally:
        for owner, name, make in held:
            setattr(owner, name, make)


class _Same(type):
    """The type of a class that stands for its base for a while."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.__mro__[1])


@contextmanager
def _drawing(found: Watch, files: set[str]) -> Iterator[None]:
    generators = _generators()
    states = [read() for _, read in generators]

    def compare(at: tuple[str, int] | None) -> None:
        for i, (name, read) in enumerate(generators):
            if (now := read()) != states[i]:
                states[i] = now
                found.drawn.append((name, f"{shown(at[0])}, line {at[1]}" if at else "the model's forward pass"))

    def lines(frame: FrameType, event: str, _: Any) -> Any:
        if event in ("line", "return", "exception"):
            here = (frame.f_code.co_filename, frame.f_lineno)
            compare(last.get(id(frame), here))
            last[id(frame)] = here
        return lines

    def calls(frame: FrameType, event: str, _: Any) -> Any:
        last.pop(id(frame), None)
        if frame.f_code.co_filename not in files:
            return None
        caller = frame.f_back  # it may have drawn in the line of this call, such as in an argument
        while caller is not None and caller.f_code.co_filename not in files:
            caller = caller.f_back
        if caller is not None:
            compare((caller.f_code.co_filename, caller.f_lineno))
        return lines

    last: dict[int, tuple[str, int]] = {}
    before = sys.gettrace()
    if before is None:  # a debugger or a coverage tool goes first; then the place is not known
        sys.settrace(calls)
    try:
        yield
    finally:
        if before is None:
            sys.settrace(None)
        compare(None)


def _generators() -> list[tuple[str, Callable[[], Any]]]:
    """Return every generator of random numbers that is known, with a function that reads its state."""
    found: list[tuple[str, Callable[[], Any]]] = [("random", random.getstate), ("numpy.random", _numpy_state)]
    hidden = {id(random._inst), id(np.random.mtrand._rand)}
    for held in gc.get_objects():
        kind = type(held)
        if id(held) in hidden:
            continue
        if issubclass(kind, RANDOM) and not issubclass(kind, random.SystemRandom):
            found.append((f"{kind.__module__}.{kind.__name__}", held.getstate))
        elif kind in (GENERATOR, RANDOM_STATE):
            found.append((f"numpy.random.{kind.__name__}", partial(_state_of, held)))
    torch: Any = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_rng_state"):
        found.append(("torch", lambda: torch.get_rng_state().numpy().tobytes()))
    return found


def _numpy_state() -> Any:
    _, keys, *rest = np.random.get_state(legacy=True)
    return keys.tobytes(), *rest  # type: ignore[union-attr]


def _state_of(held: Any) -> str:
    bits = held.bit_generator if isinstance(held, GENERATOR) else held._bit_generator
    return repr(bits.state)
