"""Give the legal shapes of TPU slices, the axes that wrap, and the legal shapes nearest to an illegal one.

Rules, from Google's documentation of each generation:

- 3D kinds (v4, v5p, 7x): 2x2x1, 2x2x2, 2x2x4 and 2x4x4 without wraparound; everything larger is made of
  cubes of 4x4x4, so that every dimension is a multiple of 4 and every axis wraps. v5p and 7x want the
  dimensions in rising order.
- 2D kinds (v5e, v6e): eight shapes up to 16x16; an axis wraps only if it is 16 long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

Dims = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SliceRule:
    """The legal shapes of one generation. ``per_name``: what the number in a name counts per chip."""

    small: tuple[Dims, ...]
    max_cubes: int = 0
    rising: bool = True
    per_name: int = 1
    wrap_at: int = 0

    @property
    def rank(self) -> int:
        return len(self.small[0])

    @property
    def max_chips(self) -> int:
        return max(64 * self.max_cubes, max(math.prod(dims) for dims in self.small))


_SMALL_3D: tuple[Dims, ...] = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_ALL_2D: tuple[Dims, ...] = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))

RULES: dict[str, SliceRule] = {
    "tpu-v4": SliceRule(small=_SMALL_3D, max_cubes=64, rising=False, per_name=2),
    # The pod has 140 cubes, one slice at most 96 (16x16x24).
    "tpu-v5p": SliceRule(small=_SMALL_3D, max_cubes=96, per_name=2),
    "tpu-7x": SliceRule(small=_SMALL_3D, max_cubes=144, per_name=2),
    # Not published yet: the rule of the older 3D kinds, over its domain of 9,600 chips.
    "tpu-8t": SliceRule(small=_SMALL_3D, max_cubes=150),
    "tpu-v5e": SliceRule(small=_ALL_2D, wrap_at=16),
    "tpu-v6e": SliceRule(small=_ALL_2D, wrap_at=16),
}


def is_legal(kind: str, dims: Dims) -> bool:
    """Return whether a slice of ``kind`` may have the shape ``dims``."""
    rule = RULES[kind]
    if dims in rule.small:
        return True
    if not rule.max_cubes or len(dims) != 3 or any(n < 4 or n % 4 for n in dims):
        return False
    return math.prod(dims) <= 64 * rule.max_cubes and not (rule.rising and list(dims) != sorted(dims))


def wraps(kind: str, dims: Dims) -> tuple[bool, ...]:
    """Return, for every axis of a legal slice, whether its ends are joined."""
    rule = RULES[kind]
    if dims in rule.small:
        return tuple(bool(rule.wrap_at) and n == rule.wrap_at for n in dims)
    return (True,) * len(dims)


@cache
def shapes_of(kind: str, chips: int) -> tuple[Dims, ...]:
    """Return the legal shapes with that many chips, dimensions in increasing order, the most cubic first."""
    rule = RULES[kind]
    small = [dims for dims in rule.small if math.prod(dims) == chips]
    if not rule.max_cubes or chips % 64 or chips > 64 * rule.max_cubes:
        return tuple(small)
    cubes = chips // 64
    found = [
        (4 * a, 4 * b, 4 * (cubes // a // b))
        for a in _divisors(cubes)
        for b in _divisors(cubes // a)
        if a <= b <= cubes // a // b
    ]
    return tuple(small + sorted(found, key=lambda dims: (sum(dims), dims)))


def default_shape(kind: str, chips: int) -> Dims | None:
    """Return the default shape of a slice of that many chips; None if there is no such slice."""
    return next(iter(shapes_of(kind, chips)), None)


def legal_counts(kind: str) -> Iterator[int]:
    """Return the numbers of chips that a slice may have, in increasing order."""
    rule = RULES[kind]
    yield from sorted({math.prod(dims) for dims in rule.small})
    yield from (64 * cubes for cubes in range(1, rule.max_cubes + 1) if shapes_of(kind, 64 * cubes))


def nearest_counts(kind: str, chips: int) -> tuple[int, ...]:
    """Return the legal numbers of chips just below and just above ``chips``."""
    counts = list(legal_counts(kind))
    below = [n for n in counts if n <= chips][-1:]
    above = [n for n in counts if n > chips][:1]
    return tuple(below + above)


def nearest_shapes(kind: str, dims: Dims, n: int = 3) -> tuple[Dims, ...]:
    """Return the legal shapes nearest to ``dims``, ordered by the difference of sorted dimensions, then by chips."""
    rank = RULES[kind].rank
    wanted = sorted((*dims, *(1,) * rank)[: max(rank, len(dims))])[-rank:]
    chips = math.prod(dims)
    found: set[Dims] = set()
    for count in _neighbours(kind, chips):
        found.update(shapes_of(kind, count))

    def distance(shape: Dims) -> tuple[float, int, Dims]:
        apart = sum(abs(a - b) for a, b in zip(sorted(shape), wanted, strict=True))
        return apart, abs(math.prod(shape) - chips), shape

    return tuple(sorted(found, key=distance)[:n])


def _neighbours(kind: str, chips: int) -> list[int]:
    counts = sorted(legal_counts(kind), key=lambda n: abs(n - chips))
    return counts[:12]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def text(dims: Dims) -> str:
    """Return the shape as text: ``(4, 4, 8)`` -> ``4x4x8``."""
    return "x".join(map(str, dims))
