"""Tensors in the files of a folder of transformers, under the names of a table, read range by range."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from portatrain.checkpoint.interop.hub_table import Hub


@dataclass(frozen=True)
class Range:
    """Rows [first, last) of the tensor `name` of a file."""

    file: Path
    name: str
    first: int
    last: int

    def read(self, at: Sequence[slice]) -> np.ndarray:
        """Return the elements of the file's tensor at `at`."""
        from safetensors import safe_open

        with safe_open(self.file, framework="numpy") as opened:
            found: np.ndarray = opened.get_slice(self.name)[tuple(at)]
            return found


@dataclass(frozen=True)
class Stored:
    """A tensor of a folder: one of a file, or rows of several in a row. It gives arrays for indexes of slices."""

    ranges: tuple[Range, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, file: Path, name: str) -> Stored:
        """Return the tensor `name` of a file."""
        from safetensors import safe_open

        with safe_open(file, framework="numpy") as opened:
            shape = tuple(opened.get_slice(name).get_shape())
        return cls((Range(file, name, 0, shape[0] if shape else 1),), shape)

    def __getitem__(self, at: tuple[slice, ...]) -> np.ndarray:
        if len(self.ranges) == 1 and not self.ranges[0].first:
            return self.ranges[0].read(at)
        start, stop, _ = at[0].indices(self.shape[0])
        found, begin = [], 0
        for part in self.ranges:
            first, last = max(start, begin), min(stop, begin + part.last - part.first)
            if first < last:
                move = part.first - begin
                found.append(part.read((slice(first + move, last + move), *at[1:])))
            begin += part.last - part.first
        return np.concatenate(found)

    def rows(self, first: int, last: int) -> tuple[Range, ...]:
        """Return rows [first, last), as ranges of the files."""
        found, begin = [], 0
        for part in self.ranges:
            a, b = max(first, begin), min(last, begin + part.last - part.first)
            if a < b:
                found.append(Range(part.file, part.name, part.first + a - begin, part.first + b - begin))
            begin += part.last - part.first
        return tuple(found)


def under_our_names(hub: Hub, there: Mapping[str, Path]) -> dict[str, tuple[Path, str]]:
    """Return the file and the name in it of every tensor, by the table's name of it."""
    found: dict[str, tuple[Path, str]] = {}
    for name, file in there.items():
        known = name
        for other, ours in hub.other_names.items():
            known = known.replace(other, ours)
        found[name if known in there else known] = (file, name)
    return found


def cut_anew(hub: Hub, held: dict[str, Stored], sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Cut the tensors of each group of `hub.pieces`, joined along their first axis, at the rows of `sizes`, if their
    rows are as many and their other axes are the same."""
    for names in hub.pieces:
        if not all(name in held for name in names):
            continue
        rows, others = [sizes[name][0] for name in names], {held[name].shape[1:] for name in names}
        joined = sum(held[name].shape[0] for name in names)
        if joined != sum(rows) or len(others) > 1:
            continue
        whole = Stored(tuple(part for name in names for part in held[name].ranges), (joined, *others.pop()))
        ends = [0, *itertools.accumulate(rows)]
        for name, first, last in zip(names, ends, ends[1:], strict=False):
            held[name] = Stored(whole.rows(first, last), (last - first, *whole.shape[1:]))
