"""The sums of the audit: boxes add up, one changed element is seen, and each variant is what it says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.testing.audit import sums

ml_dtypes = pytest.importorskip("ml_dtypes")
SHAPES = [(), (1,), (7,), (3, 5), (4, 4), (2, 3, 4), (600, 700)]


def array(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(a: np.ndarray) -> sums.Sums:
    return sums.sums_of(a, a.shape, (0,) * a.ndim)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sums_of_boxes_add_up(shape: tuple[int, ...]) -> None:
    a = array(shape)
    expected = whole(a)
    found = sums.Sums()
    cuts = [sorted({0, n // 2, n}) for n in shape]
    grids = [list(itertools.pairwise(c)) for c in cuts]
    for at in np.ndindex(*(len(g) for g in grids)):
        box = [grids[d][i] for d, i in enumerate(at)]
        part = a[tuple(slice(*b) for b in box)] if box else a
        found.add(sums.sums_of(part, shape, tuple(b[0] for b in box)))
    assert found.words == expected.words and found.blocks == expected.blocks
    assert (found.count, found.zeros, found.low, found.high) == (expected.count, 0, expected.low, expected.high)
    # Both add a.size terms in some order: (n - 1) roundoffs of the sum of magnitudes (Higham 2002, 4.2).
    room = max(1, a.size) * 2.0**-53 * float(np.abs(a, dtype=np.float64).sum())
    assert np.abs(np.subtract(found.signs, expected.signs)).max() <= 2 * room


@given(st.integers(0, 34), st.integers(0, 31))
def test_one_changed_bit_changes_the_sum(at: int, bit: int) -> None:
    a = array((5, 7))
    b = a.copy()
    b.view(np.uint32).reshape(-1)[at] ^= np.uint32(1 << bit)
    if np.array_equal(a, b, equal_nan=True):
        return
    assert whole(a).words["ordered"] != whole(b).words["ordered"]
    assert whole(a).words["bag"] != whole(b).words["bag"]


def test_the_order_counts_and_a_bag_has_none() -> None:
    a = array((6, 6))
    b = a.reshape(-1)[np.random.default_rng(1).permutation(36)].reshape(6, 6)
    one, two = whole(a).words, whole(b).words
    assert one["ordered"] != two["ordered"] and one["bag"] == two["bag"]
    assert whole(-a).words["size_ordered"] == one["size_ordered"] and whole(-a).words["ordered"] != one["ordered"]
    assert whole(np.ascontiguousarray(a.T)).words["ordered"] == one["transposed"]
    assert whole(a.reshape(4, 9)).words["ordered"] == one["ordered"]  # the flat logical order is the same


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rounding_is_that_of_the_libraries(dtype: str) -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [rng.standard_normal(2000), 10.0 ** rng.uniform(-46, 38, 2000), [0.0, -0.0, np.inf, 65519.9]]
    )
    values = values if dtype == "float32" else values.astype(np.float32).astype(np.float64)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore"):
        expected = values.astype(kind).astype(np.float64)
    np.testing.assert_array_equal(sums.rounded(values, dtype), expected)


def test_the_distance_is_estimated_without_bias() -> None:
    """The mean of many estimates of |a - b|^2 is within 4 standard errors of it; the variance is below 2 |a - b|^4."""
    from portatrain.testing.audit.tensors import distance

    found = []
    for seed in range(200):
        a, b = array((40, 30), seed), array((40, 30), seed + 1000)
        found.append(distance(whole(a).as_json(), whole(b).as_json()) ** 2 / float(((a - b).astype(float) ** 2).sum()))
    assert abs(np.mean(found) - 1) <= 4 * np.sqrt(2 / sums.SIGNS / len(found))


def test_zeros_are_one_value_and_so_are_all_nan() -> None:
    a = np.array([0.0, np.nan], np.float32)
    b = np.array([-0.0, 0.0], np.float32)
    b.view(np.uint32)[1] = 0x7FC00001  # another NaN
    assert whole(a).words["ordered"] == whole(b).words["ordered"] and whole(b).bad == 1
