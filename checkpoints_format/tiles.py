"""Tiles: the units in which tensors are checksummed and read.

The extents of a tile depend only on global shape and item size, and tiles begin at multiples of these extents in
global coordinates. The boxes of every mesh are therefore divided along the same lines, and a reader on another mesh
reads whole tiles if the sizes divide. A tile at the edge of a box may be smaller.

Tiles are numbered row-major in a box, and elements are row-major in a tile. Consecutive tiles therefore have
consecutive bytes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .boxes import Box

MAX_TILE_BYTES = 8 << 20
# Below these sizes a tile is not cut further. Measured by benchmarks/checkpoint_tiles.py: smaller ones
# cost more in calls than they save in bytes.
FLOOR_BYTES_8, FLOOR_BYTES_32 = 256, 1024


def _ways(size: int, ways: int) -> int:
    """Return the least common multiple of the numbers up to ``ways`` that divide ``size``."""
    return math.lcm(*(k for k in range(1, ways + 1) if size % k == 0))


def _smallest_prime(n: int) -> int:
    return next((p for p in range(2, math.isqrt(n) + 1) if n % p == 0), n)


@lru_cache(maxsize=4096)
def tile_shape(shape: tuple[int, ...], item_bytes: int, batch: int = 0) -> tuple[int, ...]:
    """Return the tile extents of a tensor, in elements.

    1. The leading ``batch`` dimensions (layers, experts) become 1.
    2. Each other dimension, outermost first, is divided until tiles fit every division into up to 8 equal parts,
       unless the tile would have less than 256 bytes.
    3. The same for up to 32 parts, unless the tile would have less than 1 KiB.
    4. While the tile has more than 8 MiB, its longest dimension is halved, which makes it nearly square.

    Example: a (4096, 14336) bf16 matrix has tiles of (128, 64), 16 KiB.
    """
    tile = [1] * batch + [max(n, 1) for n in shape[batch:]]
    nbytes = math.prod(tile) * item_bytes
    for ways, floor in ((8, FLOOR_BYTES_8), (32, FLOOR_BYTES_32)):
        for d in range(batch, len(shape)):
            while (left := tile[d] // math.gcd(tile[d], max(shape[d], 1) // _ways(max(shape[d], 1), ways))) > 1:
                prime = _smallest_prime(left)
                if nbytes // prime < floor:
                    break
                tile[d] //= prime
                nbytes //= prime
    while math.prod(tile) * item_bytes > MAX_TILE_BYTES:
        longest = max(range(len(tile)), key=lambda d: tile[d])
        tile[longest] = -(-tile[longest] // 2)
    return tuple(tile)


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of tiles with consecutive numbers and equal extents.

    ``first``, ``count``: first tile number in the box, and number of tiles. ``start``: first element, relative to the
    box. ``tiles``, ``extents``: for each dimension, the number of tiles and the elements of each.
    """

    first: int
    count: int
    start: tuple[int, ...]
    tiles: tuple[int, ...]
    extents: tuple[int, ...]

    @property
    def tile_elements(self) -> int:
        """The number of elements in one tile."""
        return math.prod(self.extents)

    @property
    def elements(self) -> int:
        """The number of elements in all its tiles."""
        return self.count * self.tile_elements

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the rectangle, in elements."""
        return tuple(m * e for m, e in zip(self.tiles, self.extents, strict=True))


class Grid:
    """The tiles of one box, with the position of each in elements and in tile order."""

    __slots__ = ("_starts", "box", "count", "counts", "strides", "uniform")

    def __init__(self, box: Box, tile: Sequence[int]) -> None:
        self.box = box
        self._starts: list[tuple[int, int, int]] = []  # per dimension: first cut line, tile, extent of the box
        counts = []
        for offset, extent, t in zip(box.offset, box.shape, tile, strict=True):
            self._starts.append((offset // t * t - offset, t, extent))
            counts.append((offset + extent - 1) // t - offset // t + 1 if extent else 0)
        self.counts = tuple(counts)
        self.count = math.prod(counts)
        self.strides = tuple(math.prod(counts[d + 1 :]) for d in range(len(counts)))
        self.uniform = tuple(
            n <= 1 or (line == 0 and extent % t == 0) for n, (line, t, extent) in zip(counts, self._starts, strict=True)
        )

    def start(self, d: int, i: int) -> int:
        """Return the first element of tile ``i`` along dimension d, relative to the box; ``i`` may be the count."""
        line, t, extent = self._starts[d]
        return min(max(line + i * t, 0), extent)

    def tile_at(self, d: int, element: int) -> int:
        """Return the number, along dimension d, of the tile with an element of the box."""
        line, t, _ = self._starts[d]
        return (element - line) // t

    def elements_before(self, k: int) -> int:
        """Return the number of elements in tiles 0 .. k-1, in O(dimensions); k may be the count."""
        if k >= self.count:
            return self.box.size if self.count else 0
        total, outer = 0, 1
        for d, stride in enumerate(self.strides):
            i, k = divmod(k, stride)
            begin = self.start(d, i)
            total += outer * begin * math.prod(self.box.shape[d + 1 :])
            outer *= self.start(d, i + 1) - begin
        return total

    def first_beyond(self, elements: int) -> int:
        """Return the largest k with ``elements_before(k) <= elements``."""
        if elements >= self.box.size:
            return self.count
        return bisect_right(range(self.count), elements, key=self.elements_before) - 1

    def blocks(self, crop: Sequence[tuple[int, int]], first: int, last: int, limit: int) -> Iterator[Block]:
        """Yield blocks, in ascending order, with every tile of [first, last) that overlaps ``crop``.

        Args:
            crop: wanted range of elements of each dimension, relative to the box, not empty.
            first, last: range of tile numbers.
            limit: elements of a block, at most (or one tile).

        A tile that ``crop`` cuts in a dimension is alone in its block along that dimension.
        """
        if self.count == 0 or first >= last:
            return
        low = [self.tile_at(d, begin) for d, (begin, _) in enumerate(crop)]
        high = [self.tile_at(d, end - 1) + 1 for d, (_, end) in enumerate(crop)]
        dims = len(self.counts)
        whole = [True] * (dims + 1)  # whole[d]: dimensions d and after are wanted entirely, in equal tiles
        for d in reversed(range(dims)):
            whole[d] = whole[d + 1] and self.uniform[d] and crop[d] == (0, self.box.shape[d])
        yield from self._walk(0, (), 0, low, high, crop, whole, first, last, limit)

    def _walk(
        self,
        d: int,
        prefix: tuple[int, ...],
        base: int,
        low: list[int],
        high: list[int],
        crop: Sequence[tuple[int, int]],
        whole: list[bool],
        first: int,
        last: int,
        limit: int,
    ) -> Iterator[Block]:
        if d == len(self.counts):
            if first <= base < last:
                yield self._block(prefix, prefix, base)
            return
        stride = self.strides[d]
        i = max(low[d], (first - base) // stride)
        stop = min(high[d], -(-(last - base) // stride))
        # Elements of one tile of this dimension, of the outer ones fixed by ``prefix`` and all that follow.
        outer = math.prod(self.start(e, p + 1) - self.start(e, p) for e, p in enumerate(prefix))
        each = outer * math.prod(self.box.shape[d + 1 :])
        while i < stop:
            begin = base + i * stride
            extent = self.start(d, i + 1) - self.start(d, i)
            inside = whole[d + 1] and begin >= first and begin + stride <= last
            if not inside or (stride > 1 and extent * each > limit):
                yield from self._walk(d + 1, (*prefix, i), begin, low, high, crop, whole, first, last, limit)
                i += 1
                continue
            room = min((last - begin) // stride, limit // (extent * each))
            n = max(1, min(self._equal_until(d, i, crop) - i, stop - i, room))
            tail = tuple(c - 1 for c in self.counts[d + 1 :])
            yield self._block((*prefix, i, *(0,) * len(tail)), (*prefix, i + n - 1, *tail), begin)
            i += n

    def _equal_until(self, d: int, i: int, crop: Sequence[tuple[int, int]]) -> int:
        """Return the end of the run of full, uncropped tiles that begins with tile i; i + 1 if tile i is not full."""

        line, t, extent = self._starts[d]
        if line + i * t < crop[d][0]:
            return i + 1
        return max(i + 1, (min(extent, crop[d][1]) - line) // t)

    def _block(self, lo: tuple[int, ...], hi: tuple[int, ...], first: int) -> Block:
        start = tuple(self.start(d, i) for d, i in enumerate(lo))
        tiles = tuple(j - i + 1 for i, j in zip(lo, hi, strict=True))
        extents = tuple(
            (self.start(d, j + 1) - s) // m for d, (j, s, m) in enumerate(zip(hi, start, tiles, strict=True))
        )
        return Block(first, math.prod(tiles), start, tiles, extents)
