"""Say how far rounding alone may move the results of a model, from what the model is: lengths, depth and precision.

u = 2^-24 is the unit roundoff of float32, 2^-8 that of bfloat16. One rounding has a relative error of u / sqrt(6) in
the root mean square, because the last digit and the leading digits of the number are both random. A sum of n terms
rounds n / LANES times, because frameworks add in at least LANES partial sums; BESIDE more roundings are of what is
between two sums. Results in bfloat16 are rounded once more. So an operation on sums of up to n terms has the error

    e = sqrt((u_compute^2 + (BESIDE + n / LANES) 2^-48) / 6)

Under fp8 the operands of a matmul are rounded too, each term of the sum by itself: relative to a sum of terms with
random signs, the error is that of one term, and adding does not make it smaller. So u^2 is the sum of the squares of
the unit roundoffs of both operands and of the result; the gradients' pair, e5m2 with e4m3, is the coarser one.

And k such operations one after another, whose errors are independent, have sqrt(k) e. docs/understand/rounding.md has
the derivation and what was measured beside it. Imports no framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from portatrain.model.module import Definition, TensorInfo
from portatrain.model.rng import truncated_normal

UNIT_ROUNDOFF = {
    "fp32": 2.0**-24,
    "bf16": 2.0**-8,
    "bf16-state": 2.0**-8,
    # One operand in e5m2 (2^-3), one in e4m3 (2^-4), the result in bfloat16.
    "fp8": math.sqrt(2.0**-6 + 2.0**-8 + 2.0**-16),
}
LANES = 8
"""The smallest number of partial sums in which a framework adds: the float32 lanes of AVX2, the narrowest vector unit
that we run on."""
BESIDE = 8
"""Roundings in float32 beside the sum: of norms, activations, rotations and softmax between two sums."""


def longest_sum(definition: Definition, positions: int) -> int:
    """Return the number of terms of the longest sum in a step: over the inputs of a weight in the forward pass, over
    its outputs in the backward pass, or over the `positions` (tokens, or samples) of the batch in its gradient."""
    longest = positions
    for info in definition.params.values():
        sizes = info.shape[info.batch_dims :]
        inputs = math.prod(sizes[: info.fan_in_axes]) if info.fan_in_axes else sizes[-1] if sizes else 1
        longest = max(longest, inputs, math.prod(sizes) // max(inputs, 1))
    return longest


def positions_in(definition: Definition, batch: Mapping[str, np.ndarray], *, microbatches: bool = False) -> int:
    """Return the number of positions in a batch, over which the gradient of a weight sums: tokens if the samples are
    sequences, patches if they are images, else samples.

    An array of more axes than (samples, positions) enters through a weight, in patches of as many elements as that
    weight has inputs; the smallest number of inputs decides. `microbatches`: the arrays have one axis more, in front.
    """
    inputs = [math.prod(i.shape[i.batch_dims :][: i.fan_in_axes]) for i in definition.params.values() if i.fan_in_axes]
    least = min(inputs, default=1)
    return max(a.size // (least if a.ndim > 2 + microbatches else 1) for a in batch.values())


def operations(definition: Definition) -> int:
    """Return the number of operations with a parameter, one after another, in the forward pass: one for each parameter
    in each layer."""
    return sum(math.prod(info.shape[: info.stack_dims]) for info in definition.params.values())


def error(precision: str, length: int) -> float:
    """Return e: the relative error, in the root mean square, of an operation on sums of up to `length` terms."""
    own, wide = UNIT_ROUNDOFF[precision], UNIT_ROUNDOFF["fp32"]
    return math.sqrt((own**2 + (BESIDE + length / LANES) * wide**2) / 6)


def step_error(definition: Definition, positions: int, precision: str = "fp32") -> float:
    """Return e for the operations of a step with `positions` in its batch."""
    return error(precision, longest_sum(definition, positions))


def bound(definition: Definition, positions: int, precision: str = "fp32", *, runs: int = 2) -> float:
    """Return the bound for the difference of a gradient, over its largest value: between two runs, or with `runs` 1
    between a run and float64.

    A gradient passes `operations` once forward and once backward, in each run. docs/understand/rounding.md has what was
    measured.
    """
    return step_error(definition, positions, precision) * math.sqrt(2 * operations(definition) * runs)


def moving(
    infos: Mapping[str, TensorInfo], size: float, seed: int
) -> Callable[[str, str, tuple[int, ...], np.ndarray], np.ndarray]:
    """Return a change of the boxes of a state: every element of a parameter by the relative amount `size` times a
    random number, a pure function of `seed` and the logical index. Everything else stays as it is."""

    def change(role: str, name: str, offset: tuple[int, ...], array: np.ndarray) -> np.ndarray:
        if role != "params":
            return array
        noise = truncated_normal(seed, f"rounding/{name}", infos[name].shape, std=1.0, offset=offset, box=array.shape)
        return (array.astype(np.float32) * (1 + np.float32(size) * noise)).astype(array.dtype)

    return change
