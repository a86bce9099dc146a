"""Flat ranges as boxes: every element once, in order, in few boxes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("deepspeed")

from portatrain.backends.deepspeed.ranges import boxes_of_range

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_range_of_small_shapes(shape: tuple[int, ...]) -> None:
    flat = np.arange(int(np.prod(shape)))
    whole = flat.reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(flat.size + 1), 2):
        boxes = list(boxes_of_range(shape, start, stop))
        parts = [whole[tuple(slice(o, o + n) for o, n in zip(at, size, strict=True))].ravel() for at, size in boxes]
        np.testing.assert_array_equal(np.concatenate([*parts, flat[:0]]), flat[start:stop])
        assert len(boxes) <= max(1, 2 * len(shape) - 1) and all(np.prod(size) for _, size in boxes)
