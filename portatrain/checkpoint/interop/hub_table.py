"""Map a model of ours to another library: names and axes of its tensors, from its sizes (`huggingface()`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from checkpoints_format import Box


@dataclass(frozen=True, kw_only=True)
class Row:
    """Map one tensor of the other library, or a part of one, to a tensor of ours.

    ours: our name, without its role.
    layer: the index into our leading axes, such as `layers`, or one index for each; None if there is no such axis. What
        is left after it is our slice.
    rows: the number of axes of our slice that merged are the input of a matrix; its other axes merged are the output.
        None: as it is. 0: a vector of all elements, such as a bias over (heads, head_dim).
    transposed: their matrices are (output, input), as in torch.nn.Linear; False: (input, output), as GPT-2's Conv1D.
    part: (start, stop) or (start, stop, step) in their output axis, if several rows share their tensor.
    """

    theirs: str
    ours: str
    layer: int | tuple[int, ...] | None = None
    rows: int | None = None
    transposed: bool = True
    part: tuple[int, int] | tuple[int, int, int] | None = None

    @property
    def leading(self) -> tuple[int, ...]:
        """The index into our leading axes."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer or ()

    @property
    def axis(self) -> int:
        """Their output axis, along which parts are cut."""
        return 1 if self.rows and not self.transposed else 0

    def inner(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of our slice, for our whole tensor of `shape`."""
        return shape[len(self.leading) :]

    def out(self, array: np.ndarray) -> np.ndarray:
        """Return our slice in their form, C-contiguous: the part alone, if the row is a part of their tensor."""
        if self.rows is None:
            return array
        if not self.rows:
            return array.reshape(-1)
        matrix = array.reshape(math.prod(array.shape[: self.rows]), -1)
        return matrix.T.copy() if self.transposed else matrix

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of `out` for our slice of `shape`."""
        if self.rows is None:
            return shape
        if not self.rows:
            return (math.prod(shape),)
        inputs, outputs = math.prod(shape[: self.rows]), math.prod(shape[self.rows :])
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the smallest shape of their whole tensor that holds this row, given that of `out`."""
        if self.part is None:
            return shape
        return (*shape[: self.axis], self.part[1], *shape[self.axis + 1 :])

    def cut(self) -> tuple[slice, ...]:
        """Return the index of this row in their whole tensor."""
        return () if self.part is None else (slice(None),) * self.axis + (slice(*self.part),)

    def taken(self, their: Any, box: Box, shape: tuple[int, ...]) -> np.ndarray:
        """Return the elements of `box`, a box of our slice of `shape`, and read little more than these.

        their: their whole tensor, or anything that gives arrays for indexes of slices.
        """
        import numpy as np

        def merged(first: int, last: int) -> np.ndarray:  # the merged indexes of our axes first .. last-1
            sizes = shape[first:last]
            places = [np.arange(o, o + n) for o, n in zip(box.offset[first:last], box.shape[first:last], strict=True)]
            found = np.zeros(1, np.int64)
            for size, place in zip(sizes, places, strict=True):
                found = (found[:, None] * size + place[None, :]).reshape(-1)
            return found

        if self.rows is None:
            slices = list(box.slices())
            if self.part is not None:
                start, step = self.part[0], (*self.part, 1)[2]
                slices[0] = slice(start + step * slices[0].start, start + step * (slices[0].stop - 1) + 1, step)
            return np.asarray(their[tuple(slices)])
        groups = [merged(self.rows, len(shape))]
        if self.part is not None:
            groups[0] = self.part[0] + (*self.part, 1)[2] * groups[0]
        if self.rows:
            inputs = merged(0, self.rows)
            groups = [*groups, inputs] if self.transposed else [inputs, *groups]
        if not all(len(g) for g in groups):
            return np.zeros(box.shape, np.float32)
        held = np.asarray(their[tuple(slice(int(g[0]), int(g[-1]) + 1) for g in groups)])
        for axis, group in enumerate(groups):
            if len(group) != held.shape[axis]:
                held = held.take(group - group[0], axis=axis)
        return (held.T if self.rows and self.transposed else held).reshape(box.shape)


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A model in transformers: the contents of config.json, and a row for each tensor or part of one."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)
    """A name in config.json -> the recipe's field for it, for messages."""
