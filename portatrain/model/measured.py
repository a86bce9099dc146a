"""Measure the activations of a step, for `statistics_every`. A model needs no change.

While a step measures, a backend's operations record three kinds of numbers, one for each layer of a Stack:

- `rms/PATH`: the root of the mean square of what the module at PATH returns, all its floating arrays together.
- `dead/PATH`: the share of the units of an activation function (relu, gelu, silu) that was called in PATH whose input
  was not positive for any token of the step. The units are the last axis.
- `logit/PATH`: the largest product of a query and a key that it sees, times the scale, in PATH's attention: the logit
  before softcap, ALiBi, sinks and softmax.

The second call of a kind in one module and layer is `PATH.2`; '.' is the model itself. What the numbers are made of is
recorded as `ops.aux` records its values: sums, counts and maxima, which are added up or compared over microbatches and
processes before a root or a share is taken. So they do not depend on the mesh. Nothing is recorded in the functions
that `experts`, `scan`, `associative_scan` and `across_samples` run, whose values cannot leave them one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from portatrain.model.module import Stack
from portatrain.model.ops_results import Aux

KINDS = ("rms", "dead", "logit")
_ALONE, _STACKED = "statistic: ", "statistic of layers: "


class Measures:
    """The part of a backend's operations that measures. The backend gives `_measured`, `_squares`, `_peaks`."""

    path: str
    """Of the module that runs."""
    hushed: bool
    """Whether a function runs whose values cannot leave it."""
    auxes: dict[str, Aux]
    across: Any
    rows: Any
    _record: Callable[[str, Aux], None]

    @property
    def measures(self) -> bool:
        """Return whether to measure what runs now."""
        return self._measured and not self.hushed and self.rows is None

    @property
    def _measured(self) -> bool:
        """Return whether the step measures."""
        raise NotImplementedError

    def _squares(self, arrays: list[Any]) -> Any:
        """Return (1, 1, 2) float32: the sum of squares of `arrays`, and the number of their elements, over all parts
        of a sample that processes hold."""
        raise NotImplementedError

    def _peaks(self, x: Any) -> Any:
        """Return (1, 1, F) float32, the maximum of x (..., F) over all axes but the last."""
        raise NotImplementedError

    @staticmethod
    def _floats(x: Any) -> bool:
        """Return whether x is a floating array of this backend."""
        raise NotImplementedError

    def called(self, module: Any, call: Callable[..., Any], args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Return what `module` returns, and measure it. A module that returns what it was given, such as a dropout of
        rate 0, is not measured."""
        before, self.path = self.path, module.path
        result = call(module, self, *args, **options)
        self.path = before
        if isinstance(module, Stack) or any([result is given for given in args]):  # dynamo has no generators
            return result
        arrays = [x for x in _leaves(result, []) if self._floats(x)]
        if arrays:
            self._measure("rms", module.path, self._squares(arrays), "layers")
        return result

    def units(self, x: Any) -> None:
        """Measure the input of an activation function."""
        if self.measures and x.ndim:
            self._measure("dead", self.path, self._peaks(x), "peaks")

    def _measure(self, kind: str, path: str, value: Any, reduce: str) -> None:
        mark = _STACKED if self.across is None else _ALONE
        key = name = f"{mark}{kind}/{path or '.'}"
        n = 1
        while key in self.auxes:
            n += 1
            key = f"{name}.{n}"
        self._record(key, Aux(value, 1, reduce, 0.0))


def measuring(portable: type) -> Callable[..., Any]:
    """Return the call of a portable class, which is measured while the operations that it is given measure."""
    call: Callable[..., Any] = portable.__call__

    @functools.wraps(call)
    def run(self: Any, ops: Any, *args: Any, **options: Any) -> Any:
        if getattr(ops, "measures", False):
            return ops.called(self, call, args, options)
        return call(self, ops, *args, **options)

    return run


def hushing(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Return an operation that runs functions of the model, within which nothing is measured."""

    @functools.wraps(operation)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        before, self.hushed = self.hushed, True
        found = operation(self, *args, **options)
        self.hushed = before
        return found

    return run


def _leaves(tree: Any, found: list[Any]) -> list[Any]:
    """Append what `tree` holds to `found`, and return it."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            _leaves(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            _leaves(item, found)
    else:
        found.append(tree)
    return found


def split(parts: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (statistics by name, the other auxes) of accumulated parts. A statistic is (layers,), and () outside of a
    Stack."""
    found = {}
    for key, part in parts.items():
        for mark in (_ALONE, _STACKED):
            if key.startswith(mark):
                value = _value(key[len(mark) :], part)
                found[key[len(mark) :]] = value[0] if mark == _ALONE and len(value) == 1 else value
    others = {k: v for k, v in parts.items() if not k.startswith((_ALONE, _STACKED))}
    return found, others


def _value(name: str, part: Mapping[str, Any]) -> Any:
    """Return (calls,) numbers of sums (calls, 2) or of peaks (calls, F)."""
    kind = name.partition("/")[0]
    if kind == "rms":
        return (part["layers"][:, 0] / part["layers"][:, 1]) ** 0.5
    peaks = part["max"]
    return peaks[:, 0] if kind == "logit" else (peaks <= 0).sum(-1) / peaks.shape[-1]
