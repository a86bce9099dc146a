"""The oracle with arrays that refuse what frameworks do not have in common.

Arrays that a model handles are the framework's own. Methods of them differ (`std` is biased in NumPy and jax, not in
torch; `max` of torch gives a pair) or exist in one framework only. `GuardedOps` hands out arrays that do what the top
of `portatrain.model.ops` allows and end anything else in a UserError that names the operation to use. It runs in the
oracle alone: nothing of it is on the path of a run.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

import numpy as np

from portatrain.backends.reference.ops import ReferenceOps
from portatrain.backends.reference.trees import tree_map
from portatrain.errors import UserError
from portatrain.model.lora import Factored, adapts, factored
from portatrain.model.module import Module
from portatrain.model.ops import Ops
from portatrain.model.scaled import looks_up, scores

RENAMED = {
    "T": "ops.transpose(x, axes)",
    "mT": "ops.transpose(x, axes)",
    "permute": "ops.transpose(x, axes)",
    "swapaxes": "ops.transpose(x, axes)",
    "moveaxis": "ops.transpose(x, axes)",
    "astype": "ops.cast(x, dtype)",
    "to": "ops.cast(x, dtype)",
    "type": "ops.cast(x, dtype)",
    "float": "ops.cast(x, 'float32')",
    "int": "ops.cast(x, 'int32')",
    "bool": "ops.cast(x, 'bool')",
    "bfloat16": "ops.cast(x, 'bfloat16')",
    "clamp": "ops.clip(x, low, high)",
    "amax": "ops.max(x, axis=...)",
    "amin": "ops.min(x, axis=...)",
    "gather": "ops.take_along(x, index, axis=...)",
    "take": "ops.take_along(x, index, axis=...)",
    "index_select": "ops.take_along(x, index, axis=...)",
    "scatter": "ops.scatter_add(x, index, value, axis=...)",
    "at": "ops.scatter_add(x, index, value, axis=...)",
    "view": "x.reshape(...)",
    "flatten": "x.reshape(...)",
    "ravel": "x.reshape(...)",
    "squeeze": "x.reshape(...), or an index of 0",
    "unsqueeze": "x[..., None]",
    "detach": "ops.stop_gradient(x)",
    "chunk": "ops.split(x, parts, axis=...)",
    "topk": "ops.top_k(x, k)",
    "dot": "ops.einsum(spec, x, y)",
    "matmul": "ops.einsum(spec, x, y)",
    "mm": "ops.einsum(spec, x, y)",
    "bmm": "ops.einsum(spec, x, y)",
    "repeat": "ops.concat or x[:, None] and arithmetic, which broadcasts",
    "expand": "arithmetic, which broadcasts",
    "masked_fill": "ops.where(condition, x, y)",
    "item": "arithmetic and ops.where: a model never reads a value",
    "numpy": "arithmetic and ops.where: a model never reads a value",
    "tolist": "arithmetic and ops.where: a model never reads a value",
    "size": "x.shape",
}
"""What takes the place of names of NumPy, jax and torch that are no operation's."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "torch", "scipy", "einops", "tensorflow", "keras")
_BOTH = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift")
_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
_ONE = ("neg", "pos", "invert")


def refused(what: str, instead: str) -> UserError:
    return UserError(
        what,
        expected="arithmetic, comparisons, indexing, .reshape, .shape, .ndim, .dtype or an operation of ops",
        got="what frameworks do differently, or not at all",
        do=f"Use {instead}.",
    )


class GuardedArray:
    """An array of a model in the oracle. See the top of this file."""

    __slots__ = ("_array",)
    __hash__: ClassVar[None] = None  # type: ignore[assignment]

    def __init__(self, array: np.ndarray | np.generic) -> None:
        self._array = np.asarray(array)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._array.shape

    @property
    def ndim(self) -> int:
        return self._array.ndim

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def reshape(self, *shape: Any) -> GuardedArray:
        return GuardedArray(self._array.reshape(*shape))

    def sum(self, *axis: Any, **options: Any) -> GuardedArray:
        return self._reduced("sum", axis, options)

    def mean(self, *axis: Any, **options: Any) -> GuardedArray:
        return self._reduced("mean", axis, options)

    def _reduced(self, name: str, axis: tuple[Any, ...], options: dict[str, Any]) -> GuardedArray:
        """Frameworks agree on x.sum(axis) and x.mean(axis). Over all axes, or the first one, it would be of the samples
        that a device happens to have."""
        axes = axis[0] if len(axis) == 1 and isinstance(axis[0], tuple) else axis
        inside = all(isinstance(a, int) and 0 < a + self.ndim * (a < 0) < self.ndim for a in axes)
        if options or not axes or len(axis) > 1 or not inside:
            raise refused(
                f"x.{name}({', '.join([*map(repr, axis), *(f'{k}={v}' for k, v in options.items())])}) of an array",
                f"ops.{name}(x, axes, over=('batch', ...)), which covers the whole batch, or x.{name}(axis) with an "
                "axis but the first",
            )
        return GuardedArray(getattr(self._array, name)(axes))

    def __getitem__(self, key: Any) -> GuardedArray:
        for part in key if isinstance(key, tuple) else (key,):
            held = unwrapped(part)
            if isinstance(part, slice) and isinstance(part.step, int) and part.step < 0:
                raise refused("an index with a negative step", "ops.flip(x, axis=...)")
            if isinstance(held, np.ndarray) and held.dtype == bool:
                raise refused("an index of booleans", "ops.where(condition, x, y)")
        return GuardedArray(self._array[tuple(map(unwrapped, key)) if isinstance(key, tuple) else unwrapped(key)])

    def __getattr__(self, name: str) -> Any:
        instead = RENAMED.get(name) or (f"ops.{name}(x, ...)" if hasattr(Ops, name) else "an operation of ops")
        if name.startswith("__"):
            raise AttributeError(name)
        raise refused(f"x.{name} of an array", instead)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise refused("an assignment to part of an array", "ops.where, ops.scatter_add or ops.write")

    def __matmul__(self, other: Any) -> Any:
        raise refused("x @ y of arrays", "ops.einsum(spec, x, y), which states its precision")

    __rmatmul__ = __matmul__

    def __abs__(self) -> Any:
        raise refused("abs(x) of an array", "ops.abs(x)")

    def __bool__(self) -> bool:
        raise refused("an array as a condition", "ops.where(condition, x, y)")

    def __float__(self) -> float:
        raise refused("an array as a Python number", "arithmetic and ops.where: a model never reads a value")

    __int__ = __index__ = __float__

    def __len__(self) -> int:
        raise refused("len(x) of an array", "x.shape")

    def __iter__(self) -> Any:
        raise refused("a loop over an array", "an index, ops.split or ops.scan")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise refused(f"an array handed to {_library() or 'NumPy'}", "operations of ops")

    def __array_function__(self, func: Any, *_: Any) -> Any:
        name = getattr(func, "__name__", "?")
        if library := _library():
            raise refused(f"an array handed to {library}", "an operation of ops, which is the same on every framework")
        raise refused(
            f"numpy.{name} of an array",
            RENAMED.get(name) or (f"ops.{name}(x, ...)" if hasattr(Ops, name) else "an operation of ops"),
        )

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        known = ("add", "subtract", "multiply", "divide", "power", "less", "less_equal", "greater", "greater_equal")
        if method != "__call__" or options or ufunc.__name__ not in (*known, "equal", "not_equal"):
            return self.__array_function__(ufunc)
        return _arithmetic(ufunc, *inputs)  # a NumPy number on the left


def _library() -> str:
    """Return the package that calls NumPy for a model, such as jax; '' if the model calls it itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("numpy", "portatrain"):
            return package if package in LIBRARIES else ""
        frame = frame.f_back
    return ""


def _arithmetic(function: Callable[..., Any], *operands: Any) -> GuardedArray:
    for other in operands:
        if isinstance(other, np.ndarray) and other.ndim:
            raise refused("arithmetic with a NumPy array", "ops.arange and ops.cast, a Param or a State")
    return GuardedArray(function(*(unwrapped(x) for x in operands)))


def _operators() -> None:
    for name in (*_BOTH, *_COMPARE):
        function, plain = getattr(operator, name), name.strip("_")
        setattr(GuardedArray, f"__{plain}__", lambda self, other, f=function: _arithmetic(f, self, other))
        if name in _BOTH:
            setattr(GuardedArray, f"__r{plain}__", lambda self, other, f=function: _arithmetic(f, other, self))
    for name in _ONE:
        function = getattr(operator, name)
        setattr(GuardedArray, f"__{name}__", lambda self, f=function: GuardedArray(f(self._array)))


_operators()


def unwrapped(tree: Any) -> Any:
    return tree_map(lambda x: x._array if isinstance(x, GuardedArray) else x, tree)


def guarded(tree: Any) -> Any:
    return tree_map(lambda x: GuardedArray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x, tree)


class GuardedOps(ReferenceOps):
    """`ReferenceOps` that takes and gives guarded arrays, also within Stacks and scans."""

    _inside = False
    """Whether an operation is running, which calls others with plain arrays."""

    def value(self, p: Any) -> Any:
        return guarded(super().value(p))

    def _layer(self, block: Module, *args: Any) -> Any:
        return self._of_model(super()._layer)(block, *args)

    def _of_model(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """fn, a part of the model that an operation runs, with guarded arrays."""

        def call(*args: Any) -> Any:
            self._inside = False
            try:
                return unwrapped(fn(*guarded(args)))
            finally:
                self._inside = True

        return call


def _method(method: Callable[..., Any]) -> Callable[..., Any]:
    runs = method.__name__ in ("scan", "associative_scan", "across_samples", "experts")

    @functools.wraps(method)
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self._inside:
            return method(self, *args, **options)
        held = {name: unwrapped(value) for name, value in options.items()}
        plain = [unwrapped(a) for a in args]
        if runs:
            plain[0] = self._of_model(plain[0])
        self._inside = True
        try:
            return guarded(method(self, *plain, **held))
        finally:
            self._inside = False

    return call


def _experts(experts: Callable[..., Any]) -> Callable[..., Any]:
    """`experts`, whose adapted weights are taken apart before arrays are unwrapped."""

    @functools.wraps(experts)
    def call(self: Any, body: Callable[..., Any], x: Any, chosen: Any, weights: Any, *params: Any) -> Any:
        body, params = factored(body, params)
        return experts(self, body, x, chosen, weights, *params)

    return call


def _grouped(grouped_matmul: Callable[..., Any]) -> Callable[..., Any]:
    """`grouped_matmul`, which multiplies by the parts of an adapted weight one after another."""

    @functools.wraps(grouped_matmul)
    def call(self: Any, x: Any, w: Any) -> Any:
        if isinstance(w, Factored):
            return w.multiplied(self.grouped_matmul, x)
        return grouped_matmul(self, x, w)

    return call


_ADAPTS = {"experts": _experts, "grouped_matmul": _grouped}
_PARTS = {"einsum": adapts, "embed": looks_up, "cross_entropy": scores}
"""What takes a module in place of a parameter apart, by operation: it goes around the guard, so that the guard sees the
parameter alone."""

for _name, _ in inspect.getmembers(Ops, inspect.isfunction):
    if not _name.startswith("_"):
        if _name in _PARTS:
            setattr(GuardedOps, _name, _PARTS[_name](_method(inspect.unwrap(getattr(ReferenceOps, _name)))))
        else:
            _made = _method(getattr(ReferenceOps, _name))
            setattr(GuardedOps, _name, _ADAPTS[_name](_made) if _name in _ADAPTS else _made)
GuardedOps.einsum_fp8 = _method(ReferenceOps.einsum_fp8)  # type: ignore[method-assign]
