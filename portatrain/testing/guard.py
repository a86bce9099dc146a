"""Check a model's definition before a run, in the oracle and at small size: it must use arrays only as `Ops` allows,
and its samples must not influence each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.guard import GuardedOps, guarded, unwrapped
from portatrain.backends.reference.run import Forward, forward, initial
from portatrain.errors import UserError
from portatrain.model.module import Definition

CLOSE = 1e-9
"""float64 sums in another order differ by 1e-15; what crosses samples differs by about its own size."""


def check_rows_independent(
    definition: Definition,
    batch: Mapping[str, np.ndarray],
    *,
    params: Mapping[str, np.ndarray] | None = None,
    training: bool = True,
    rows: int = 2,
) -> None:
    """Raise UserError unless the first `rows` samples of `batch` have the same losses together and alone.

    A loss that crosses samples (an einsum of two letters for the batch, `h.sum(0)`) is one of the whole batch on one
    device, of a device's own samples on a mesh, and of a microbatch under accumulation. What goes through
    `ops.across_samples`, or `ops.sum` or `ops.mean` with `over=('batch', ...)`, is whole everywhere; alone, a sample is
    given what all had together. Runs the model `rows` + 1 times in the oracle: for models of small size. Raises
    UserError, too, for methods of arrays that frameworks do not have in common (reference/guard.py).
    """
    params = initial(definition) if params is None else params
    first = {name: array[:rows] for name, array in batch.items()}
    if any(len(array) < 2 for array in first.values()):
        raise UserError(
            "the batch", expected="at least two samples", got="fewer", do="Give a batch of two samples or more."
        )
    context = Context(training=training)
    kept: list[Any] = []
    together = _run(definition, params, first, context, recording(kept))
    alone = [
        _run(definition, params, {k: v[[i]] for k, v in first.items()}, context, replaying(iter(kept), i))
        for i in range(len(next(iter(first.values()))))
    ]
    model = type(definition.model).__name__
    for what, field in (("the loss of a sample", "loss_B"), ("the weight of a sample", "weight_B")):
        _equal(model, what, getattr(together.value, field), [getattr(a.value, field) for a in alone])
    total = np.array([sum(float(a.value.sum) for a in alone)])
    _equal(model, "the sum of the loss", np.array([together.value.sum]), [total])
    for name, aux in together.auxes.items():
        _equal(model, f"ops.aux({name!r})", aux.value_B, [a.auxes[name].value_B for a in alone])


def _run(
    definition: Definition,
    params: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    context: Context,
    operations: type[GuardedOps],
) -> Forward:
    return forward(definition, params, batch, context, operations=operations)


def recording(kept: list[Any]) -> type[GuardedOps]:
    """Return operations that append what compares or reduces samples to `kept`."""

    class Recording(GuardedOps):
        """Keep the results of reductions over the batch."""

        def sum(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
            return _kept(kept, super().sum(x, axes, over=over), over)

        def mean(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
            return _kept(kept, super().mean(x, axes, over=over), over)

        def _compared(self, fn: Any, xs: Any, group: int | None) -> Any:
            alike = None if group is None or xs[0].shape[0] % group else group  # both samples are of one group
            found = super()._compared(fn, xs, alike)
            kept.append(found)
            return found

    return Recording


def _kept(kept: list[Any], found: Any, over: Sequence[str]) -> Any:
    if "batch" in over:
        kept.append(np.asarray(unwrapped(found)))
    return found


def replaying(kept: Iterator[Any], i: int) -> type[GuardedOps]:
    """Return operations for sample `i` alone, which take from `kept` what all samples had together."""

    class Replaying(GuardedOps):
        """Return the kept results in place of reductions over the batch; in place of comparisons of samples, return
        the kept values of sample i."""

        def _compared(self, fn: Any, xs: Any, group: int | None) -> Any:
            loss_B, weight_B, metrics = next(kept)
            mine = slice(i, i + 1)
            return loss_B[mine], weight_B[mine], {name: value[mine] for name, value in metrics.items()}

        def sum(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
            return guarded(next(kept)) if "batch" in over else super().sum(x, axes, over=over)

        def mean(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
            return guarded(next(kept)) if "batch" in over else super().mean(x, axes, over=over)

    return Replaying


def _equal(model: str, what: str, together: np.ndarray, alone: Sequence[np.ndarray]) -> None:
    apart = np.concatenate(alone)
    size = float(np.abs(together).max(initial=0.0))
    if together.shape != apart.shape or not np.abs(together - apart).max(initial=0.0) <= CLOSE * max(size, 1.0):
        raise UserError(
            f"{model}, {what}",
            expected="the same values for a sample alone and together with other samples",
            got=f"{np.array2string(together, precision=6)} together and {np.array2string(apart, precision=6)} alone",
            do="Compare samples in ops.across_samples, reduce over them with ops.sum or ops.mean and over=('batch',), "
            "and use one letter for the batch in an einsum.",
        )
