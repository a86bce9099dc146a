"""Regular boxes by rule: a mesh of positions, and the arithmetic from position to box and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from .boxes import Box


@dataclass(frozen=True, kw_only=True)
class SaveMesh:
    """A grid of positions (devices), and which writer (process) holds each.

    Positions are numbered row-major over ``axes``, the first axis slowest. ``writers[p]`` is the writer
    at position p; None means equal consecutive runs: position p belongs to ``p * W // P``.
    """

    axes: tuple[tuple[str, int], ...]
    writers: tuple[int, ...] | None = None

    @property
    def positions(self) -> int:
        """Number of positions, the product of the axis sizes."""
        return math.prod(size for _, size in self.axes)

    def strides(self) -> dict[str, tuple[int, int]]:
        """Axis name to (size, distance between neighbours along it)."""
        out, stride = {}, self.positions
        for name, size in self.axes:
            stride //= size
            out[name] = (size, stride)
        return out

    @cached_property
    def _by_writer(self) -> dict[int, list[int]]:
        held: dict[int, list[int]] = {}
        for position, writer in enumerate(self.writers or ()):
            held.setdefault(writer, []).append(position)
        return held

    def writer_of(self, position: int, writers: int) -> int:
        """The writer that holds a position."""
        if self.writers is not None:
            return self.writers[position]
        return position * writers // self.positions

    def positions_of(self, writer: int, writers: int) -> Sequence[int]:
        """The positions that a writer holds, ascending."""
        if self.writers is not None:
            return self._by_writer.get(writer, ())
        each = self.positions // writers
        return range(writer * each, (writer + 1) * each)

    def most_positions(self, writers: int) -> int:
        """Positions of the writer that holds most."""
        if self.writers is not None:
            return max(map(len, self._by_writer.values()), default=0)
        return self.positions // writers


class ShardRule:
    """The assignment rule of a regular tensor, as arithmetic: position to part, part to box and replicas.

    A *part* is a tuple of part numbers, one a dimension. All is O(dimensions + mesh axes) or O(result).
    """

    def __init__(self, shape: Sequence[int], spec: Sequence[Sequence[str]], mesh: SaveMesh) -> None:
        strides = mesh.strides()
        self._dims = [[strides[axis] for axis in axes] for axes in spec]
        self.parts = tuple(math.prod(size for size, _ in dim) for dim in self._dims)
        self.extents = tuple(n // p for n, p in zip(shape, self.parts, strict=True))
        used = {axis for axes in spec for axis in axes}
        self._free = [strides[axis] for axis, _ in mesh.axes if axis not in used]
        self.replicas = math.prod(size for size, _ in self._free)

    def part_at(self, position: int) -> tuple[int, ...]:
        """The part that a position holds."""
        return tuple(_mixed(position, dim) for dim in self._dims)

    def replica_at(self, position: int) -> int:
        """Which of the replicas of its part a position is."""
        return _mixed(position, self._free)

    def position_of(self, part: Sequence[int], replica: int) -> int:
        """The position that holds a replica of a part."""
        position = _place(replica, self._free)
        for number, dim in zip(part, self._dims, strict=True):
            position += _place(number, dim)
        return position

    def box(self, part: Sequence[int]) -> Box:
        """The box of a part."""
        return Box(tuple(i * e for i, e in zip(part, self.extents, strict=True)), self.extents)

    def parts_meeting(self, box: Box) -> Iterator[tuple[int, ...]]:
        """The parts whose boxes meet a (non-empty) box."""
        ranges = [
            range(o // e, (o + n - 1) // e + 1) for o, n, e in zip(box.offset, box.shape, self.extents, strict=True)
        ]
        return itertools.product(*ranges)


def _mixed(position: int, dim: Sequence[tuple[int, int]]) -> int:
    number = 0
    for size, stride in dim:
        number = number * size + position // stride % size
    return number


def _place(number: int, dim: Sequence[tuple[int, int]]) -> int:
    position = 0
    for size, stride in reversed(dim):
        number, coordinate = divmod(number, size)
        position += coordinate * stride
    return position
