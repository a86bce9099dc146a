"""Compare the tensors of two checkpoints box by box, so that no tensor need fit into memory twice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from checkpoints_format import Box, Reader

SLAB_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How one tensor differs. elements: the number of elements with other bits; largest: the maximum of |a -
    b|; scale: the maximum of |a|. 'why' says why no comparison is possible: another shape or dtype, or one checkpoint
    lacks it.
    """

    name: str
    why: str = ""
    elements: int = 0
    size: int = 0
    largest: float = 0.0
    scale: float = 0.0


def differences(a: Reader, b: Reader) -> Iterator[Difference]:
    """Yield every tensor that differs, in the order of `a`, then the tensors that only `b` has."""
    ours, theirs = ({t.name: t for t in r.layout.tensors} for r in (a, b))
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other is None:
            yield Difference(name=name, why="only in the first")
        elif (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
            yield Difference(
                name=name, why=f"{tensor.dtype} {list(tensor.shape)} against {other.dtype} {list(other.shape)}"
            )
        else:
            found = _of(a, b, name, tensor.shape, tensor.item_bytes)
            if found.elements:
                yield found
    yield from (Difference(name=n, why="only in the second") for n in theirs if n not in ours)


def _of(a: Reader, b: Reader, name: str, shape: tuple[int, ...], item: int) -> Difference:
    elements, largest, scale = 0, 0.0, 0.0
    for box in slabs(shape, item):
        x, y = a.read(name, box), b.read(name, box)
        bits = x.reshape(-1).view(np.uint8).reshape(-1, item) != y.reshape(-1).view(np.uint8).reshape(-1, item)
        elements += int(bits.any(axis=1).sum())
        wide: Any = np.complex128 if x.dtype.kind == "c" else np.float64
        x, y = x.astype(wide), y.astype(wide)
        with np.errstate(invalid="ignore"):
            apart = np.abs(x - y)
        largest = max(largest, float(np.max(np.where(np.isnan(apart), np.inf, apart), initial=0.0)))
        scale = max(scale, float(np.nanmax(np.abs(x), initial=0.0)))
    return Difference(name=name, elements=elements, size=math.prod(shape), largest=largest, scale=scale)


def slabs(shape: tuple[int, ...], item: int) -> Iterator[Box]:
    """Yield boxes that make up a tensor, each of at most `SLAB_BYTES`, or one row of the first axis that is cut."""
    if 0 in shape:
        return
    dim, rest = 0, math.prod(shape) * item
    while dim < len(shape) and rest // shape[dim] > SLAB_BYTES:
        rest //= shape[dim]
        dim += 1
    if dim == len(shape):
        dim = max(0, len(shape) - 1)
    if not shape:
        yield Box((), ())
        return
    row = math.prod(shape[dim + 1 :]) * item
    rows = max(1, SLAB_BYTES // row)
    for lead in np.ndindex(*shape[:dim]):
        for start in range(0, shape[dim], rows):
            n = min(rows, shape[dim] - start)
            yield Box((*map(int, lead), start, *(0,) * (len(shape) - dim - 1)), (*(1,) * dim, n, *shape[dim + 1 :]))


def meta_differences(a: Mapping[str, Any], b: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields in which two metas differ."""
    for key in sorted({*a, *b}):
        x, y = a.get(key), b.get(key)
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            yield from meta_differences(x, y, f"{path}{key}.")
        elif x != y:
            yield path + key
