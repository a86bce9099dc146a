"""Precision: the dtypes of computation and of stored state, and stochastic rounding.

    fp32        everything is float32
    bf16        computation in bfloat16; parameters, optimizer state, averages and reductions in float32
    fp8         as bf16, with chosen matmuls computed from 8-bit operands (`portatrain.model.fp8`)
    bf16-state  as bf16, with parameters and optimizer state kept in bfloat16, rounded stochastically

Under bf16-state, an update is computed in float32 from the kept values. It is rounded away from zero with a probability
equal to the fraction that is cut off (Zamirai et al. 2020, arXiv:2010.06192). Rounding to nearest would lose every
update below 1/512 of a value, so a second moment with b2 = 0.999 would never change. The random words are a hash of
seed, tensor, number of steps and logical index (`portatrain.model.dropout_hash`), the same on every framework, mesh and
device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from portatrain.model import dropout_hash
from portatrain.model.module import Definition, TensorInfo, site_of

PRECISIONS = ("fp32", "bf16", "bf16-state", "fp8")

Array = Any


def stored(definition: Definition, precision: str) -> Definition:
    """Return `definition` with the dtype in which `precision` keeps parameters; slots have the same dtype."""
    if precision != "bf16-state":
        return definition
    params = {n: dataclasses.replace(t, dtype="bfloat16") for n, t in definition.params.items()}
    return dataclasses.replace(definition, params=params)


def averaged(info: TensorInfo) -> TensorInfo:
    """Return the tensor that holds the moving average of the parameter `info`: the same one in float32."""
    return dataclasses.replace(info, dtype="float32")


def rounded_bits(bits: Array, noise: Array) -> Array:
    """Round float32 numbers, given as int32 words, to a neighbouring bfloat16 number: towards or away from zero.

    Args:
        bits: int32, any shape: the bits of the float32 numbers.
        noise: int32, the same shape; its low 16 bits decide the direction.

    Returns:
        int32, the bits of float32 numbers that bfloat16 represents exactly. Infinities do not change.
    """
    return (bits + (noise & 0xFFFF)) & -0x10000


def noise(
    seed_2: Array,
    count: Array,
    role: str,
    name: str,
    offset: Sequence[int],
    shape: Sequence[int],
    arange: Callable[[int], Array],
) -> Array:
    """Return random words for the box at `offset` of a logical tensor, int32 of shape `shape`.

    Args:
        seed_2: (2,) int32, the two words of the seed.
        count: () int32, the number of applied steps.
        role, name: the tensor.
        offset, shape: the box, in elements.
        arange: a function from n to 0 .. n-1, int32, on the device.
    """

    h = dropout_hash.tensor_key(seed_2, count, site_of(f"{role}/{name}"))
    if not shape:
        return dropout_hash.random_bits(h, arange(1))[0]
    last = len(shape) - 1
    for dim, (start, n) in enumerate(zip(offset, shape, strict=True)):
        index = (arange(n) + start).reshape((1,) * dim + (n,) + (1,) * (last - dim))
        h = dropout_hash.random_bits(h, index) if dim == last else dropout_hash.mix(h ^ index)
    return h
