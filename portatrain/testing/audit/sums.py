"""Sum up an array so that two arrays can be compared, and their difference named, when only the sums are at hand.

Every element x at the flat logical index i has the word m = mix(bits of x as float64) and the odd weight
w = mix(i) | 1, where mix is the finalizer of splitmix64. The sum of m w modulo 2^64 depends on the order of the
elements, and one changed element always changes it, because an odd number has an inverse modulo 2^64. The sum of m does
not depend on the order. Both are taken of the values and of their magnitudes, and the first also of the transposed
matrix and of the values rounded to other dtypes. A sum over a box of a tensor uses indices of the whole tensor, so the
sums of boxes add up.

`signs` are sums with random signs: the mean square of their difference is an estimate of the squared distance of two
arrays without either array (Achlioptas, Database-friendly random projections, 2003).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

CHUNK = 1 << 18
"""Elements that are summed at once."""
BLOCKS = 8
"""Equal parts of the first axis, each with a sum of its own, which say where a tensor changed."""
SIGNS = 4
"""Sums with random signs."""
WORDS = ("ordered", "bag", "size_ordered", "size_bag")
"""Sums that every tensor has: of values and of magnitudes, dependent on the order and independent of it."""
VARIANTS = ("transposed", "bfloat16", "float16", "float32")
"""Sums that only the earlier of two records needs: of what a faulty conversion would have made."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(words: np.ndarray) -> np.ndarray:
    """Return splitmix64's finalizer of each word, a permutation of the numbers below 2^64."""
    x = words + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def bits(values: np.ndarray) -> np.ndarray:
    """Return the bits of float64 values as uint64; both zeros have those of +0, every NaN the same."""
    clean = values + 0.0
    return np.where(np.isnan(clean), np.nan, clean).view(np.uint64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float64 values rounded to nearest in `dtype`, one of the last three `VARIANTS`."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
        if dtype == "float32":
            return single.astype(np.float64)
        if dtype == "float16":
            return values.astype(np.float16).astype(np.float64)
    words = single.view(np.uint32)
    up = words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))
    kept = np.where(np.isfinite(single), up & np.uint32(0xFFFF0000), words)
    return kept.view(np.float32).astype(np.float64)


@dataclass
class Sums:
    """The sums over a box of a tensor, or over all of it."""

    words: dict[str, int] = field(default_factory=dict)
    """Sums modulo 2^64 by name."""
    blocks: list[int] = field(default_factory=lambda: [0] * BLOCKS)
    signs: list[float] = field(default_factory=lambda: [0.0] * SIGNS)
    count: int = 0
    zeros: int = 0
    bad: int = 0
    """Elements that are not finite."""
    square: float = 0.0
    """The sum of the squares of the finite elements."""
    low: float = math.inf
    high: float = -math.inf

    def add(self, other: Self) -> None:
        """Add the sums over another box of the same tensor."""
        for name, word in other.words.items():
            self.words[name] = (self.words.get(name, 0) + word) % 2**64
        self.blocks = [(a + b) % 2**64 for a, b in zip(self.blocks, other.blocks, strict=True)]
        self.signs = [a + b for a, b in zip(self.signs, other.signs, strict=True)]
        self.count, self.zeros, self.bad = self.count + other.count, self.zeros + other.zeros, self.bad + other.bad
        self.square += other.square
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def as_json(self) -> dict[str, Any]:
        """Return the sums as JSON; words as hexadecimal text, since JSON's numbers hold 53 bits in most readers."""
        return {
            "words": {name: f"{word:016x}" for name, word in self.words.items()},
            "blocks": [f"{word:016x}" for word in self.blocks],
            "signs": self.signs,
            "count": self.count,
            "zeros": self.zeros,
            "bad": self.bad,
            "norm": math.sqrt(self.square),
            "low": self.low if self.count > self.bad else 0.0,
            "high": self.high if self.count > self.bad else 0.0,
        }


def sums_of(array: np.ndarray, shape: tuple[int, ...], offset: tuple[int, ...], *, variants: bool = True) -> Sums:
    """Return the sums over a box of a tensor.

    Args:
        array: the box's elements, of any real dtype.
        shape: the shape of the whole tensor, in elements.
        offset: where the box begins in it, in elements.
        variants: whether the sums of `VARIANTS` are taken too; they double the time.
    """
    if not array.ndim:
        array, shape, offset = array.reshape(1), (1,), (0,)
    total = Sums(words=dict.fromkeys(WORDS + (VARIANTS if variants else ()), 0))
    if not array.size:
        return total
    rows = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    with np.errstate(over="ignore", invalid="ignore"):  # signalling NaN, and values beyond a narrower dtype
        for at in range(0, array.shape[0], rows):
            part = np.ascontiguousarray(array[at : at + rows], dtype=np.float64)
            _add_chunk(total, part, shape, (offset[0] + at, *offset[1:]), variants)
    return total


def _index(shape: tuple[int, ...], offset: tuple[int, ...], box: tuple[int, ...], *, swap: bool = False) -> np.ndarray:
    """Return the flat logical index of every element of a box; if `swap`, its index in the transposed matrix."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    if swap:
        strides = [1, shape[0]]
    index = np.zeros((), np.uint64)
    for size, start, stride in zip(box, offset, strides, strict=True):
        step = np.arange(start, start + size, dtype=np.uint64) * np.uint64(stride)
        index = index[..., None] + step
    return index


def _add_chunk(
    total: Sums, values: np.ndarray, shape: tuple[int, ...], offset: tuple[int, ...], variants: bool
) -> None:
    weights = mixed(_index(shape, offset, values.shape)) | np.uint64(1)
    words = mixed(bits(values))
    sizes = mixed(bits(np.abs(values)))
    found = {
        "ordered": int((words * weights).sum()),
        "bag": int(words.sum()),
        "size_ordered": int((sizes * weights).sum()),
        "size_bag": int(sizes.sum()),
    }
    if variants:
        swapped = weights
        if len(shape) == 2:
            swapped = mixed(_index(shape, offset, values.shape, swap=True)) | np.uint64(1)
        found["transposed"] = int((words * swapped).sum())
        for name in VARIANTS[1:]:
            found[name] = int((mixed(bits(rounded(values, name))) * weights).sum())
    part = Sums(words=found)
    row_sums = (words * weights).reshape(values.shape[0], -1).sum(axis=1)
    places = (offset[0] + np.arange(values.shape[0])) * BLOCKS // shape[0]
    part.blocks = [int(row_sums[places == block].sum()) for block in range(BLOCKS)]
    finite = np.isfinite(values)
    clean = np.where(finite, values, 0.0)
    for k in range(SIGNS):
        odd = ((weights >> np.uint64(8 + k)) & np.uint64(1)).astype(bool)
        part.signs[k] = float(clean.sum() - 2.0 * clean[odd].sum())
    part.count, part.zeros, part.bad = values.size, int((values == 0).sum()), int((~finite).sum())
    part.square = float((clean * clean).sum())
    if finite.any():
        part.low, part.high = float(values[finite].min()), float(values[finite].max())
    total.add(part)
