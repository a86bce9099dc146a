"""Boxes: rectangles of a logical tensor, and the proof that a list of boxes covers a tensor exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .errors import FormatError


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of a logical tensor: ``offset`` and ``shape``, one number per dimension, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """One past the last index of each dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """Return the box of the common elements, or None if there are none."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(a, b) - s for a, b, s in zip(self.stop, other.stop, start, strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def slices(self, origin: Sequence[int] | None = None) -> tuple[slice, ...]:
        """Return the slices of this box in an array that begins at ``origin`` in global coordinates (default: 0)."""
        base = origin if origin is not None else (0,) * len(self.offset)
        return tuple(slice(o - b, o - b + n) for o, b, n in zip(self.offset, base, self.shape, strict=True))

    @staticmethod
    def whole(shape: Sequence[int]) -> Box:
        """Return the box of a whole tensor of that shape."""
        return Box((0,) * len(shape), tuple(shape))


def flat_range_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield boxes that together have the elements [start, stop) of the flattened tensor, in order.

    There are at most 2 n - 1 boxes for n dimensions. ZeRO's flat partitions are converted to boxes with it.
    """
    if not shape:
        if start < stop:
            yield Box((), ())
        return
    inner = math.prod(shape[1:])
    while start < stop:
        row, within = divmod(start, inner)
        if within == 0 and stop - start >= inner:
            rows = (stop - start) // inner
            yield Box((row, *(0,) * (len(shape) - 1)), (rows, *shape[1:]))
            start += rows * inner
            continue
        end = min(stop, (row + 1) * inner)
        for box in flat_range_boxes(shape[1:], within, end - row * inner):
            yield Box((row, *box.offset), (1, *box.shape))
        start = end


def prove_cover(shape: Sequence[int], boxes: Sequence[Box], what: str) -> None:
    """Prove that ``boxes`` cover a tensor of that shape exactly: all inside, without overlap and without holes.

    The proof is that the sizes add up to that of the tensor and that no two boxes overlap.

    Raises:
        FormatError: the boxes do not cover it, or the proof would take more than a few seconds, which no partition of
            real training state does. The error names ``what`` and a box.
    """
    do = "Correct the list of boxes: each element belongs to exactly one writer."
    for box in boxes:
        if (
            len(box.offset) != len(shape)
            or len(box.shape) != len(shape)
            or any(o < 0 or n < 1 or o + n > size for o, n, size in zip(box.offset, box.shape, shape, strict=True))
        ):
            raise FormatError(what, expected=f"non-empty boxes inside {list(shape)}", got=f"{box}"[:160], do=do)
    total, covered = math.prod(shape), sum(box.size for box in boxes)
    if covered != total:
        raise FormatError(what, expected=f"boxes of {total} elements in all", got=f"{covered}", do=do)
    budget = [_COVER_STEPS]
    clash = _overlap([(box.offset, box.stop) for box in boxes], 0, budget)
    if budget[0] < 0:
        raise FormatError(what, expected=f"boxes whose cover is proved in {_COVER_STEPS} steps", got="more", do=do)
    if clash is not None:
        raise FormatError(
            what, expected="boxes that do not overlap", got=f"an overlap at {clash[0]} to {clash[1]}", do=do
        )


_COVER_STEPS = 4_000_000
_Corners = tuple[tuple[int, ...], tuple[int, ...]]  # first index, one past the last


def _overlap(boxes: list[_Corners], d: int, budget: list[int]) -> _Corners | None:
    """Return a box that overlaps another one in dimensions d and after, or None. Sweeps along dimension d."""

    if len(boxes) < 2:
        return None
    if d == len(boxes[0][0]):
        return boxes[0]
    boxes = sorted(boxes, key=lambda box: box[0][d])
    active: list[_Corners] = []
    for i, box in enumerate(boxes):
        begin = box[0][d]
        budget[0] -= len(active) + 1
        if budget[0] < 0:
            return None
        active = [other for other in active if other[1][d] > begin]
        active.append(box)
        last_of_its_start = i + 1 == len(boxes) or boxes[i + 1][0][d] != begin
        if last_of_its_start and (clash := _overlap(active, d + 1, budget)) is not None:
            return clash
    return None
