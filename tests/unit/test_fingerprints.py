"""The fingerprint of a tensor: the same for every cut into boxes, and changed by every change of a bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.base import LocalBox
from portatrain.checkpoint import fingerprints
from portatrain.checkpoint.fingerprints import box_sum
from portatrain.checkpoint.saver import Checkpoints
from tests.support.held_arrays import Holding

SHAPES = [(), (1,), (7,), (300_001,), (3, 5), (2, 3, 4, 5), (1, 9, 1), (40, 5000), (3, 70_000), (0, 4), (2, 2, 70_001)]
MASK = 2**64 - 1


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits, NaNs and denormals too, as an array of `dtype`."""
    kind = NUMPY[dtype]
    raw = np.random.default_rng(seed).integers(0, 256, (math.prod(shape), kind.itemsize), np.uint8)
    return (raw & 1 if dtype == "bool" else raw).reshape(-1).view(kind).reshape(shape)


def hashed(dim: int, i: int) -> int:
    """Output i + (dim + 1) 2^48 of splitmix64, as its authors write it, in Python's whole numbers."""
    z = (i + (dim + 1 << 48) + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31 | 1


def slowly(array: np.ndarray, offset: tuple[int, ...]) -> int:
    if array.dtype.itemsize > 4:
        array = np.ascontiguousarray(array).view(np.uint32).reshape(*array.shape, -1)
        offset = (*offset, 0)
    words = array.view(f"u{array.dtype.itemsize}")
    total = 0
    for index in np.ndindex(*words.shape):
        weights = [hashed(d, o + i) for d, (o, i) in enumerate(zip(offset, index, strict=True))]
        total += int(words[index]) * math.prod(weights)
    return total & MASK


@pytest.mark.parametrize("dtype", NUMPY)
def test_the_sum_is_what_the_definition_says(dtype: str) -> None:
    for shape, offset in (((5,), (3,)), ((2, 3, 4), (7, 0, 10**6)), ((1, 1), (2**31, 5))):
        array = bits(dtype, shape)
        assert box_sum(array, offset) == slowly(array, offset)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sums_of_boxes_add_up(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    array = bits("float32", shape)
    whole = box_sum(array, (0,) * len(shape))
    for _ in range(3):
        cuts = [sorted({0, n, *rng.integers(0, n + 1, 2).tolist()}) for n in shape]
        total = 0
        lows, highs = (itertools.product(*(c[which] for c in cuts)) for which in (slice(None, -1), slice(1, None)))
        for low, high in zip(lows, highs, strict=True):
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            total += box_sum(array[box] if box else array, low)
        assert total % 2**64 == whole


@pytest.mark.parametrize("dtype", NUMPY)
def test_every_bit_of_every_dtype_changes_the_sum(dtype: str) -> None:
    array = bits(dtype, (3, 4))
    was = box_sum(array, (0, 0))
    raw = array.reshape(-1).view(np.uint8)
    for bit in range(8 * raw.size) if dtype != "bool" else range(0, 8 * raw.size, 8):
        raw[bit // 8] ^= 1 << bit % 8
        assert box_sum(array, (0, 0)) != was, bit
        raw[bit // 8] ^= 1 << bit % 8
    assert box_sum(array, (0, 0)) == was


def swapped(array: np.ndarray, axis: int) -> np.ndarray:
    found = array.copy()
    np.moveaxis(found, axis, 0)[[0, 1]] = np.moveaxis(array, axis, 0)[[1, 0]]
    return found


CHANGES = {
    "a sign": lambda a: np.concatenate([-a[:1], a[1:]]),
    "all signs": lambda a: -a,
    "signs of a row": lambda a: np.concatenate([-a[:1], a[1:]]),
    "rows exchanged": lambda a: swapped(a, 0),
    "heads exchanged": lambda a: swapped(a, 1),
    "last axis exchanged": lambda a: swapped(a, 2),
    "permuted": lambda a: np.random.default_rng(1).permutation(a.reshape(-1)).reshape(a.shape),
    "reversed": lambda a: a[::-1],
    "transposed": lambda a: np.ascontiguousarray(a.swapaxes(0, 1)).reshape(a.shape),
    "zero and minus zero": lambda a: np.where(a == 0, np.float32(-0.0), a),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_keeps_every_norm_changes_the_sum(change: str) -> None:
    array = np.random.default_rng(0).standard_normal((6, 4, 8)).astype(np.float32)
    array[2, 1, 3] = 0.0
    assert box_sum(CHANGES[change](array), (0, 0, 0)) != box_sum(array, (0, 0, 0))


def test_a_view_without_contiguous_rows_has_the_same_sum() -> None:
    array = bits("bfloat16", (700, 300))
    assert box_sum(array[::2, 5:200:3], (1, 2)) == box_sum(np.ascontiguousarray(array[::2, 5:200:3]), (1, 2))


def test_a_commit_has_the_fingerprint_of_every_tensor(tmp_path: Any) -> None:
    backend = Holding()
    checkpoints = Checkpoints(tmp_path, budget_bytes=30_000)
    checkpoints.save(3, backend, backend.state(3), {"step": 3})
    checkpoints.wait()
    with LocalStore(tmp_path / "step-00000003") as store:
        reader = Reader(store)
        found = fingerprints.saved_in(reader.meta)
        held = {n: reader.read(n) for n in reader.names}
        assert found == {n: f"{box_sum(a, (0,) * a.ndim):016x}" for n, a in held.items()}
        assert len(set(found.values())) == len(found)


def test_a_change_of_a_state_is_named() -> None:
    backend = Holding()
    backend.process, backend.processes = 0, 1  # type: ignore[attr-defined]
    state = backend.state(3)
    saved = {n: f"{box_sum(a, (0,) * a.ndim):016x}" for n, a in state.items()}
    assert fingerprints.compare(backend, state, saved) == []
    state["opt/m/w"].reshape(-1).view(np.uint32)[17] ^= 1
    state["opt/count"] += 1
    assert fingerprints.compare(backend, state, saved) == ["opt/m/w", "opt/count"]
    assert fingerprints.compare(backend, state, {**saved, "opt/u/w": "0" * 16})[-1] == "opt/u/w"


class Twice(Holding):
    """A backend with two devices, each of which has a copy of all arrays: those of both states."""

    process, processes = 0, 1

    def local_boxes(self, state: Any) -> Iterator[LocalBox]:
        for copy in state:
            yield from super().local_boxes(copy)

    def irregular_shards(self, state: Any) -> dict[tuple[str, str], Any]:
        return {}


def test_a_copy_that_differs_is_named() -> None:
    backend: Any = Twice()
    first, second = backend.state(3), backend.state(3)
    saved = {n: f"{box_sum(a, (0,) * a.ndim):016x}" for n, a in first.items()}
    second["params/w"] = np.asfortranarray(second["params/w"])  # the same elements in another order in memory
    assert fingerprints.compare(backend, (first, second), saved) == []
    second["opt/v/b"].reshape(-1).view(np.uint32)[5] ^= 1
    second["opt/count"] += 1
    assert fingerprints.compare(backend, (first, second), saved) == ["opt/v/b", "opt/count"]


def test_unknown_fingerprints_are_not_compared() -> None:
    assert fingerprints.saved_in({}) is None
    assert fingerprints.saved_in({"fingerprints": {"algorithm": "another", "tensors": {}}}) is None
