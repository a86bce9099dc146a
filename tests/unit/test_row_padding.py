"""Rows that a mesh divides."""

from __future__ import annotations

import numpy as np

from portatrain.backends.row_padding import pad_rows


def test_the_last_row_is_repeated_until_the_rows_divide() -> None:
    batch = {"x": np.arange(10).reshape(5, 2), "sample": np.arange(5)}
    padded = pad_rows(batch, 4)
    np.testing.assert_array_equal(padded["sample"], [0, 1, 2, 3, 4, 4, 4, 4])
    np.testing.assert_array_equal(padded["x"][4:], [[8, 9]] * 4)
    assert pad_rows(batch, 5) is batch
