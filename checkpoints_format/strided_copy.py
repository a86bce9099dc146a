"""Copies between an array and the bytes of tiles: one strided copy for many tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def tiles_first(region: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
    """Return a view, (tiles..., extents...), of a rectangle with ``tiles[d]`` equal tiles in dimension d.

    It never copies. In C order, its elements have the order of the file: tile after tile.
    """
    dims = len(tiles)
    split = tuple(n for size, m in zip(region.shape, tiles, strict=True) for n in (m, size // m))
    order = (*range(0, 2 * dims, 2), *range(1, 2 * dims, 2))
    return region.reshape(split, copy=False).transpose(order)


def part_of(array: np.ndarray, where: Sequence[slice]) -> np.ndarray:
    """Return a rectangle of an array as a view, also if the array is a scalar."""
    index: tuple[Any, ...] = (*where, ...)
    return array[index]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return the memory of a C-contiguous array as a one-dimensional uint8 view."""
    return array.reshape(-1, copy=False).view(np.uint8)


def copy_tiles(target: np.ndarray, source: np.ndarray) -> None:
    """Copy between two arrays of equal shape and dtype, with each row along the last axis as a single element.

    This makes NumPy's strided copy of rows of 16 to 256 bytes up to 2.5 times faster.
    """

    width = target.shape[-1] * target.itemsize if target.ndim else 0
    if width > target.itemsize and target.strides[-1] == source.strides[-1] == target.itemsize:
        target, source = target.view(f"V{width}"), source.view(f"V{width}")
    np.copyto(target, source)
