"""What numbers are computed in and what they are kept in; stochastic rounding.

    fp32        everything in float32
    bf16        computation in bfloat16; parameters, optimizer state, averages and reductions in float32
    bf16-state  parameters and optimizer state in bfloat16 too, rounded stochastically; averages in float32

An update is computed in float32 from what is kept, and rounded up with the probability of the part that is cut off
(Zamirai et al. 2020, arXiv:2010.06192): rounding to nearest would lose every step below 1/512 of a value, and a second
moment with b2 = 0.999 would stand still. The random words are a hash of seed, tensor, count of steps and logical index,
in the arithmetic of `portatrain.model.dropout_hash`: the same on every framework, mesh and device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from portatrain.model import dropout_hash
from portatrain.model.module import Definition, TensorInfo, site_of

PRECISIONS = ("fp32", "bf16", "bf16-state")

Array = Any


def stored(definition: Definition, precision: str) -> Definition:
    """`definition` with its parameters in the dtype that `precision` keeps them in; slots follow."""
    if precision != "bf16-state":
        return definition
    params = {n: dataclasses.replace(t, dtype="bfloat16") for n, t in definition.params.items()}
    return dataclasses.replace(definition, params=params)


def averaged(info: TensorInfo) -> TensorInfo:
    """The moving average of the parameter `info`."""
    return dataclasses.replace(info, dtype="float32")


def rounded_bits(bits: Array, noise: Array) -> Array:
    """float32 as int32 words -> those of its neighbour in bfloat16 towards or away from zero, as `noise` has it.

    noise: int32, of which 16 random bits count. Infinities stay what they are.
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
    """Random words for the box at `offset` of a logical tensor, int32 of `shape`.

    seed_2: (2,) int32; count: () int32, the steps applied; arange(n): int32, on the device.
    """
    h = dropout_hash.tensor_key(seed_2, count, site_of(f"{role}/{name}"))
    if not shape:
        return dropout_hash.random_bits(h, arange(1))[0]
    last = len(shape) - 1
    for dim, (start, n) in enumerate(zip(offset, shape, strict=True)):
        index = (arange(n) + start).reshape((1,) * dim + (n,) + (1,) * (last - dim))
        h = dropout_hash.random_bits(h, index) if dim == last else dropout_hash.mix(h ^ index)
    return h
