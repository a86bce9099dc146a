"""Map a model of ours to another library: names and axes of its tensors, from its sizes (`huggingface()`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Row:
    """Map one tensor of the other library to a tensor of ours.

    ours: our name, without its role. layer: the index into our leading `layers` axis; None if there is no such axis.
    rows: the number of our first axes, after `layers`, that merged are the input of a matrix, which frameworks with
    (out, in) weights hold transposed; None: as it is.
    """

    theirs: str
    ours: str
    layer: int | None = None
    rows: int | None = None

    def out(self, array: np.ndarray) -> np.ndarray:
        """Return our slice in their form, C-contiguous."""
        if self.rows is None:
            return array
        matrix = array.reshape(math.prod(array.shape[: self.rows]), -1)
        return matrix.T.copy()

    def back(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return their tensor as our slice of `shape`."""
        return array if self.rows is None else array.T.reshape(shape)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of their tensor for our slice of `shape`."""
        if self.rows is None:
            return shape
        return (math.prod(shape[self.rows :]), math.prod(shape[: self.rows]))


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A model in transformers: the contents of config.json, and one row for each tensor."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)
    """A name in config.json -> the recipe's field for it, for messages."""
