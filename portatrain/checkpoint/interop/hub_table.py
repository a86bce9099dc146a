"""How a model of ours is called elsewhere: a table of names and axes, which its sizes give (`huggingface()`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tensor there, and the one of ours that it is.

    ours: our name, without its role. layer: which slice of our leading `layers` axis; None where there is none.
    rows: our first axes after that one, merged, are the input of a matrix, which frameworks with (out, in) weights
    hold transposed; None: as it is.
    """

    theirs: str
    ours: str
    layer: int | None = None
    rows: int | None = None

    def out(self, array: np.ndarray) -> np.ndarray:
        """Our slice as theirs, C-contiguous."""
        if self.rows is None:
            return array
        matrix = array.reshape(math.prod(array.shape[: self.rows]), -1)
        return matrix.T.copy()

    def back(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Theirs as our slice of `shape`."""
        return array if self.rows is None else array.T.reshape(shape)

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape there of our slice of `shape`."""
        if self.rows is None:
            return shape
        return (math.prod(shape[self.rows :]), math.prod(shape[: self.rows]))


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A model as transformers has it: the contents of config.json, and a row a tensor."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)
    """A name in config.json -> the recipe's field that decides it, for messages."""
