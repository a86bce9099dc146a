"""What backends share of `ops.across_samples`, the one operation that compares samples with each other.

A backend holds one part of a step's samples at a time: the rows of one device in one microbatch. The comparison needs
all parts. So a backend first runs the model on every microbatch without gradients and keeps the arrays that the model
hands over (Gao et al. 2021, arXiv:2101.06983). Then it runs each microbatch with gradients: its own rows are live,
those of all other parts are what was kept, and each of the P parts computes the whole comparison. The loss of a part is
the sum of all losses divided by P, and the gradient of its own rows is multiplied by P. The gradients of all parts
therefore add up to the gradient of the whole: that of the rows, because each row is live in one part, and that of
parameters that the comparison itself uses, because each of P parts adds a P-th.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portatrain.errors import UserError

Array = Any


@dataclass
class Across:
    """What the operations of one microbatch know of the other samples of its step.

    microbatches, index: the number of microbatches of the step, and which of them this is. rows: the number of samples
    in an evaluation, without the rows that fill up a mesh; None: all rows are samples. held: for each call, in order,
    its arrays for all samples of the step. collecting: a call only appends its arrays to `found`. wanted: a call needs
    `held` and has none; its result is not valid. calls: the number of calls so far.
    """

    microbatches: int = 1
    index: Any = 0
    rows: int | None = None
    held: list[Any] | None = None
    collecting: bool = False
    wanted: bool = False
    calls: int = 0
    found: list[Any] = field(default_factory=list)


def outside_stacks(across: Across | None) -> Across:
    """Return `across`, or raise UserError if it is None, as it is in the block of a Stack."""
    if across is None:
        raise UserError(
            "ops.across_samples",
            expected="a call from the model itself",
            got="a call from a block of a Stack",
            do="Return the arrays from the Stack and compare samples after it.",
        )
    return across


def check_arrays(xs: tuple[Array, ...], group: int | None) -> int:
    """Return the number of rows that all arrays have; raise UserError if they differ or if `group` is below 1."""
    rows = {x.shape[0] if x.ndim else 0 for x in xs}
    if len(rows) != 1:
        raise UserError(
            "ops.across_samples",
            expected="one or more arrays (B, ...) with a row for each sample",
            got=", ".join(str(tuple(x.shape)) for x in xs) or "no arrays",
            do="Give arrays that have the batch axis first.",
        )
    if group is not None and group < 1:
        raise _no_groups(group)
    return rows.pop()


def fits(rows: int, group: int | None, across: Across) -> bool:
    """Return whether groups of `group` samples lie whole in `rows` rows of one part."""
    return group is not None and across.rows is None and rows % group == 0


def grouped(samples: int, group: int | None) -> tuple[int, int]:
    """Return (the number of groups, the samples in each) of `samples` samples.

    Raises:
        UserError: `group` does not divide them.
    """
    size = samples if group is None else group
    if size < 1 or samples % size:
        raise _no_groups(group, f" with {samples} samples")
    return samples // size, size


def _no_groups(group: int | None, samples: str = "") -> UserError:
    return UserError(
        f"ops.across_samples(group={group}){samples}",
        expected="a number that divides the samples of a step, and those of a batch of evaluation",
        got=str(group),
        do="Choose another group or batch, or leave group out to compare all samples of the batch.",
    )


def results(found: Any, shape: tuple[int, int]) -> tuple[Array, Array, Mapping[str, Array]]:
    """Return (losses, weights, metrics) as the function of a model returned them; raise UserError for other results."""
    parts = tuple(found) if isinstance(found, (tuple, list)) else ()
    metrics = parts[2] if len(parts) == 3 else {}
    arrays = (*parts[:2], *(metrics.values() if isinstance(metrics, Mapping) else ()))
    if (
        len(parts) not in (2, 3)
        or not isinstance(metrics, Mapping)
        or any(tuple(getattr(x, "shape", ())) != shape for x in arrays)
    ):
        got = [str(tuple(x.shape)) if hasattr(x, "shape") else type(x).__name__ for x in (arrays or (found,))]
        raise UserError(
            "the function of ops.across_samples",
            expected=f"(loss, weight) or (loss, weight, {{name: metric}}), every array of shape {shape}",
            got=", ".join(got),
            do="Return one value for each sample of each group.",
        )
    return parts[0], parts[1], metrics
