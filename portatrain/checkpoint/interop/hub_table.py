"""Map a model of ours to another library: names and axes of its tensors, from its sizes (`huggingface()`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    grouped: (size, order), if their output axis is a row of groups of `size`, such as heads, and the outputs of one of
        our groups lie at the places `order` of one of theirs.
    depthwise: their matrix has an axis of size 1 between output and input, as the kernel of a depthwise Conv1d.
    stacked: the number of first axes of our slice that their tensor has, too, such as experts.
    state: ours is a State, and not a parameter.
    axes: of a row without `rows`, the order of their axes, each by the number of ours; None is an axis of size 1 of
        theirs, such as the batch of a table of positions, or the only one where ours has none.
    copy: their tensor is a second one of ours that another row has, such as a table that is shared: it is written, and
        passed over when a folder is read.
    """

    theirs: str
    ours: str
    layer: int | tuple[int, ...] | None = None
    rows: int | None = None
    transposed: bool = True
    part: tuple[int, int] | tuple[int, int, int] | None = None
    grouped: tuple[int, tuple[int, ...]] | None = None
    depthwise: bool = False
    stacked: int = 0
    state: bool = False
    copy: bool = False
    axes: tuple[int | None, ...] | None = None

    @property
    def full(self) -> str:
        """Our name, with its role."""
        return f"{'state' if self.state else 'params'}/{self.ours}"

    @property
    def shares(self) -> bool:
        """True if the row is not the whole of their tensor, or in another order."""
        return self.part is not None or self.grouped is not None

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

    @property
    def _ours(self) -> tuple[int, ...]:
        """Our axes in the order of theirs, of a row with `axes`."""
        return tuple(axis for axis in self.axes or () if axis is not None)

    @property
    def _each(self) -> Row:
        """The row of one element of the first axis that both tensors have."""
        return replace(self, stacked=self.stacked - 1)

    def out(self, array: np.ndarray) -> np.ndarray:
        """Return our slice in their form, C-contiguous: the part alone, if the row is a part of their tensor."""
        import numpy as np

        if self.stacked:
            return np.stack([self._each.out(each) for each in array])
        if self.axes is not None:
            return np.ascontiguousarray(array.transpose(self._ours)).reshape(self.their_shape(array.shape))
        if self.rows is None:
            return array
        if not self.rows:
            return array.reshape(-1)
        matrix = array.reshape(math.prod(array.shape[: self.rows]), -1)
        matrix = matrix.T.copy() if self.transposed else matrix
        return matrix[:, None] if self.depthwise else matrix

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of `out` for our slice of `shape`."""
        if self.stacked:
            return (shape[0], *self._each.their_shape(shape[1:]))
        if self.axes is not None:
            return tuple(1 if axis is None else shape[axis] for axis in self.axes)
        if self.rows is None:
            return shape
        if not self.rows:
            return (math.prod(shape),)
        inputs, outputs = math.prod(shape[: self.rows]), math.prod(shape[self.rows :])
        found = (outputs, inputs) if self.transposed else (inputs, outputs)
        return (found[0], 1, found[1]) if self.depthwise else found

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the smallest shape of their whole tensor that holds this row, given that of `out`."""
        at = self.stacked + self.axis
        if self.part is not None:
            size = self.part[1]
        elif self.grouped is not None:
            size = shape[at] // len(self.grouped[1]) * self.grouped[0]
        else:
            return shape
        return (*shape[:at], size, *shape[at + 1 :])

    def cut(self, shape: tuple[int, ...]) -> tuple[Any, ...]:
        """Return the index of this row in their whole tensor, given the shape of `out`."""
        import numpy as np

        at = self.stacked + self.axis
        return (slice(None),) * at + (self._places(np.arange(shape[at])),) if self.shares else ()

    def _places(self, outputs: np.ndarray) -> np.ndarray:
        """Return where our outputs lie in their output axis."""
        import numpy as np

        if self.part is not None:
            return self.part[0] + (*self.part, 1)[2] * outputs
        if self.grouped is not None:
            size, order = self.grouped
            return outputs // len(order) * size + np.array(order)[outputs % len(order)]
        return outputs

    def taken(self, their: Any, box: Box, shape: tuple[int, ...]) -> np.ndarray:
        """Return the elements of `box`, a box of our slice of `shape`, and read little more than these.

        their: their whole tensor, or anything that gives arrays for indexes of slices.
        """
        import numpy as np

        if self.stacked:
            inner = type(box)(box.offset[1:], box.shape[1:])
            first, n = box.offset[0], box.shape[0]
            found = [self._each.taken(_At(their, i), inner, shape[1:]) for i in range(first, first + n)]
            return np.stack(found) if found else np.zeros(box.shape, np.float32)
        if self.axes is not None:
            if 0 in box.shape:
                return np.zeros(box.shape, np.float32)
            whole = [slice(0, 1) if axis is None else box.slices()[axis] for axis in self.axes]
            held = np.asarray(their[tuple(whole)]).reshape([box.shape[axis] for axis in self._ours])
            return held.transpose(np.argsort(self._ours))

        def merged(first: int, last: int) -> np.ndarray:  # the merged indexes of our axes first .. last-1
            sizes = shape[first:last]
            places = [np.arange(o, o + n) for o, n in zip(box.offset[first:last], box.shape[first:last], strict=True)]
            found = np.zeros(1, np.int64)
            for size, place in zip(sizes, places, strict=True):
                found = (found[:, None] * size + place[None, :]).reshape(-1)
            return found

        if self.rows is None:
            axes = [merged(i, i + 1) for i in range(len(shape))]
            if axes:
                axes[0] = self._places(axes[0])
        else:
            axes = [self._places(merged(self.rows, len(shape)))]
        if self.rows:
            inputs = merged(0, self.rows)
            axes = [*axes, inputs] if self.transposed else [inputs, *axes]
            axes = [axes[0], np.zeros(1, np.int64), axes[1]] if self.depthwise else axes
        if not all(len(a) for a in axes):
            return np.zeros(box.shape, np.float32)
        held = np.asarray(their[tuple(slice(int(a.min()), int(a.max()) + 1) for a in axes)])
        for axis, places in enumerate(axes):
            if not np.array_equal(places - places.min(), np.arange(held.shape[axis])):
                held = held.take(places - places.min(), axis=axis)
        held = held[:, 0] if self.depthwise else held
        return (held.T if self.rows and self.transposed else held).reshape(box.shape)


@dataclass(frozen=True)
class _At:
    """One element of the first axis of a tensor that is read by slices."""

    their: Any
    index: int

    def __getitem__(self, at: tuple[slice, ...]) -> Any:
        return self.their[(slice(self.index, self.index + 1), *at)][0]


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A model in transformers: the contents of config.json, and a row for each tensor or part of one."""

    config: Mapping[str, Any]
    rows: tuple[Row, ...]
    overrides: Mapping[str, str] = field(default_factory=dict)
    """A name in config.json -> the recipe's field for it, for messages."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """A part of a name that some folders have -> what the rows have in its place."""
    pieces: tuple[tuple[str, ...], ...] = ()
    """Tensors that count joined along their first axis, because some folders cut what is joined at other places."""
    passed_over: tuple[str, ...] = ()
    """How the names of tensors begin that a folder may hold, and that neither the model nor transformers reads."""
    takes_them: str = ""
    """The recipe's field that says how many of the layers that are passed over the model has; '' if there is none."""

    @property
    def read(self) -> tuple[Row, ...]:
        """The rows whose tensors are read from a folder."""
        return tuple(row for row in self.rows if not row.copy)
