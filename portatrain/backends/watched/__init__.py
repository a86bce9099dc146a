"""Record every operation of a step: what goes in, what comes out, and the gradients of both. Imports no framework.

A backend has an optional method `watch(state, batch, step=...)`, which runs the forward and backward pass of a step
with operations of a class that `watching` makes, and returns a `Watched` for each microbatch. The oracle's own is
`backends/reference/watched.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np

from portatrain.errors.users_code import is_ours, shown
from portatrain.model.lora import factored
from portatrain.model.module import Module
from portatrain.model.ops import Loss, Ops

STRUCTURE = ("stack", "scan", "associative_scan", "across_samples", "aux", "tally", "update", "name")
"""Operations that run functions of the model or return nothing. Those within the functions of `stack` are recorded."""
BODIES = ("experts",)
"""Operations whose first argument is a function that gets all of its arrays: they are recorded as one call."""
WATCHED = tuple(
    name
    for name, _ in inspect.getmembers(Ops, inspect.isfunction)
    if not name.startswith("_") and name not in STRUCTURE
)
OPAQUE = ("scan", "associative_scan", "across_samples")
"""Operations within which nothing is recorded: a framework runs their functions in traces of its own."""


@dataclass(frozen=True)
class Slot:
    """The place of array `i` in the arguments of a call."""

    i: int


@dataclass(frozen=True)
class Body:
    """A function of the model in the arguments of a call, by its name; `run` is that of the framework that ran it."""

    name: str
    run: Callable[..., Any] = field(compare=False, repr=False)


@dataclass(kw_only=True)
class Call:
    """One call of an operation by the model.

    Attributes:
        name: of the operation.
        path: of the module that calls it, such as 'blocks/attn'.
        place: file and line of the call.
        layer: the index in its Stack; None outside of one.
        template: (args, options) with a `Slot` in place of every array. Calls with equal templates differ in nothing
            but the values of arrays.
        args, results: the arrays, in order; floating ones in float64 or in the dtype of the framework.
        arg_grads, result_grads: the gradients of the summed loss with respect to them; None for whole numbers and, in
            torch, for constants. That of an argument is the part that flows through this call alone.
        tags: of each argument, the parameter or State that it is, with its layers; only the oracle knows them.
    """

    name: str
    path: str
    place: str
    layer: int | None
    template: Any
    args: list[np.ndarray] = field(default_factory=list)
    results: list[np.ndarray] = field(default_factory=list)
    arg_grads: list[np.ndarray | None] = field(default_factory=list)
    result_grads: list[np.ndarray | None] = field(default_factory=list)
    tags: list[tuple[str, tuple[int, ...]] | None] = field(default_factory=list)

    def __str__(self) -> str:
        layer = "" if self.layer is None else f", layer {self.layer}"
        spec = next((a for a in self.template[0] if isinstance(a, str)), "")
        return f"ops.{self.name}{f'({spec!r})' if spec else ''} in {self.path or 'the model'}{layer} ({self.place})"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A microbatch: its calls, the summed loss with the auxiliary losses, its weight, and the gradients of that sum by
    the names of the parameters, before they are divided by the weight of the batch."""

    calls: Sequence[Call]
    loss: float
    weight: float
    grads: Mapping[str, np.ndarray]


def taken_apart(tree: Any, is_array: Callable[[Any], bool], arrays: list[Any]) -> Any:
    """Append the arrays of `tree` to `arrays` and return it with a `Slot` in place of each.

    Raises:
        TypeError: it holds a module or a function.
    """
    if is_array(tree):
        arrays.append(tree)
        return Slot(len(arrays) - 1)
    if isinstance(tree, Loss):
        return ("Loss", *(taken_apart(getattr(tree, f), is_array, arrays) for f in ("sum", "weight_B", "loss_B")))
    if isinstance(tree, (list, tuple)):
        return tuple(taken_apart(item, is_array, arrays) for item in tree)
    if isinstance(tree, Mapping):
        return {key: taken_apart(item, is_array, arrays) for key, item in tree.items()}
    if isinstance(tree, Module) or callable(tree):
        raise TypeError("no plain argument")
    return tree


def put_together(template: Any, arrays: Sequence[Any]) -> Any:
    """Return the tree that `taken_apart` took apart, with other arrays."""
    if isinstance(template, Slot):
        return arrays[template.i]
    if isinstance(template, tuple):
        if template[:1] == ("Loss",):
            return Loss(*(put_together(item, arrays) for item in template[1:]))
        return tuple(put_together(item, arrays) for item in template)
    if isinstance(template, Mapping):
        return {key: put_together(item, arrays) for key, item in template.items()}
    return template


def call_with(method: Callable[..., Any], template: Any, arrays: Sequence[Any]) -> Any:
    """Return what `method` gives for the arguments of a call, with these arrays."""
    args, options = put_together(template, arrays)
    return method(*(a.run if isinstance(a, Body) else a for a in args), **options)


Watcher = Callable[[Any, Callable[..., Any], Call, list[Any]], Any]
"""(operations, call of the method with arrays in place of the recorded ones, the call, its arrays) -> its result."""


def watching(base: type, is_array: Callable[[Any], bool], watcher: Watcher, layer_of: Callable[[Any], Any]) -> type:
    """Return operations as those of the class `base`; the model's calls go through `watcher`.

    `layer_of(ops)` returns the layer's index, or None outside of a Stack.
    """
    inside = False

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        otherwise = closed(method) if name in BODIES else method
        declared = inspect.signature(getattr(Ops, name, method)).parameters.values()  # an override may take **options
        defaults = {p.name: p.default for p in declared if p.default is not p.empty}

        def call(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal inside
            arrays: list[Any] = []
            try:
                if inside:
                    raise TypeError
                given = _with_body(args) if name in BODIES else args
                said = {
                    key: value for key, value in options.items() if key not in defaults or value is not defaults[key]
                }
                template = taken_apart((given, said), is_array, arrays)
            except TypeError:  # an operation within another, or an einsum of an adapted weight: its parts are recorded
                return otherwise(self, *args, **options)
            path, place = _caller(sys._getframe(1))
            about = Call(name=name, path=path, place=place, layer=layer_of(self), template=template)
            inside = True

            def run(given: Sequence[Any]) -> Any:
                return call_with(method.__get__(self), template, given)

            try:
                return watcher(self, run, about, arrays)
            finally:
                inside = False

        return call

    def closed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            nonlocal inside
            before, inside = inside, True
            try:
                return method(self, *args, **options)
            finally:
                inside = before

        return call

    methods = {name: noting(name, getattr(base, name)) for name in WATCHED}
    methods |= {name: closed(getattr(base, name)) for name in OPAQUE}
    return type(f"Watching{base.__name__}", (base,), methods)


def _with_body(args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of `experts` with its body as a `Body`, and each adapted weight as the weight and its
    factors."""
    body, params = factored(args[0], tuple(args[4:]))
    return (Body(str(getattr(args[0], "__name__", type(args[0]).__name__)), body), *args[1:4], *params)


def _caller(frame: FrameType | None) -> tuple[str, str]:
    """Return the path of the nearest module that runs, and the place of its call."""
    here = frame
    while here is not None:
        owner = here.f_locals.get("self")
        if isinstance(owner, Module):
            return owner.path, _place(here)
        here = here.f_back
    return "", "?" if frame is None else _place(frame)


def _place(frame: FrameType) -> str:
    """Return file and line; of portatrain's own files the module and the line."""
    file = frame.f_code.co_filename
    return f"{frame.f_globals['__name__'] if is_ours(file) else shown(file)}, line {frame.f_lineno}"
