"""The values that operations give to the backend: the loss of a model and the statistics that it records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portatrain.errors import UserError
from portatrain.errors.users_code import line_of_method

Array = Any
"""A jax.Array, a torch.Tensor or a numpy.ndarray, depending on the backend."""

REDUCTIONS = ("mean", "sum", "max", "layers")
OF_LAYERS = ("layers", "peaks")
"""Reductions that keep the values of the calls apart; `model/measured.py` alone records 'peaks'."""


@dataclass(frozen=True)
class Loss:
    """The loss that a model returns.

    sum: () float32, differentiable: the loss summed over all targets. The trainer divides it by the summed weight of
    the global batch, so neither data parallelism nor accumulation changes the result.
    weight_B: (B,) float32, the weight of each sample (usually its number of targets).
    loss_B: (B,) float32, each sample's part of `sum`, without gradient.
    """

    sum: Array
    weight_B: Array
    loss_B: Array


@dataclass(frozen=True)
class Aux:
    """A value that `ops.aux` recorded.

    value_B: (B,) float32, combined over `count` calls (layers, modules) by `reduce`: 'mean' and 'sum' add, 'max' takes
    the maximum; with 'layers' it is (B, count, ...), the values of the calls in the order of the model, to be averaged
    over samples; 'peaks' is the same, of which the maximum is taken. loss: the factor with which it enters the training
    loss; 0 for a metric only.
    """

    value_B: Array
    count: int
    reduce: str
    loss: float

    def join(self, name: str, other: Aux, maximum: Any, concatenate: Any) -> Aux:
        """Return this value combined with `other`, recorded under the same `name`; `maximum` is elementwise, and
        `concatenate` takes arrays and an axis.

        Raises:
            UserError: the two calls gave different `reduce` or `loss`.
        """
        if (self.reduce, self.loss) != (other.reduce, other.loss):
            raise UserError(
                f"ops.aux({name!r})",
                expected=f"the same reduce and loss in every call: {self.reduce!r}, {self.loss}",
                got=f"{other.reduce!r}, {other.loss}",
                do="Use another name.",
            )
        if self.reduce in OF_LAYERS:
            if self.value_B.shape[2:] != other.value_B.shape[2:]:
                raise UserError(
                    f"ops.aux({name!r}, reduce={self.reduce!r})",
                    expected=f"values of one shape in every call, (B, {_shape(self.value_B)})",
                    got=f"(B, {_shape(other.value_B)})",
                    do="Use another name for other layers.",
                )
            both = concatenate((self.value_B, other.value_B), 1)
            return Aux(both, self.count + other.count, self.reduce, self.loss)
        both = maximum if self.reduce == "max" else (lambda a, b: a + b)
        return Aux(both(self.value_B, other.value_B), self.count + other.count, self.reduce, self.loss)


def _shape(value: Array) -> str:
    return ", ".join(map(str, value.shape[2:]))


def check_aux(name: str, value_B: Array, reduce: str, loss: float = 0.0) -> None:
    """Check the arguments of an `ops.aux` call.

    Raises:
        UserError: `reduce` is not in REDUCTIONS, value_B does not have one value per sample, or a value of layers is
            a loss.
    """
    if reduce not in REDUCTIONS:
        raise UserError(
            f"ops.aux({name!r})", expected=f"reduce in {REDUCTIONS}", got=repr(reduce), do="Use one of those."
        )
    if reduce == "layers" and loss:
        raise UserError(
            f"ops.aux({name!r}, reduce='layers')",
            expected="a metric only, loss=0.0",
            got=f"loss={loss}",
            do="Add it to the loss in a call under another name, with reduce='mean'.",
        )
    if reduce == "layers" and getattr(value_B, "ndim", 0) >= 1:
        return
    if getattr(value_B, "ndim", 0) != 1:
        raise UserError(
            f"ops.aux({name!r})",
            expected="one value per sample, shape (B,)",
            got=f"shape {tuple(getattr(value_B, 'shape', ()))}",
            do="Reduce all axes except the batch: x.mean(-1) on unsharded axes, ops.mean(..., over=('seq',)) on rest.",
        )


def check_samples(loss_B: Array, weight_B: Array) -> None:
    """Raise UserError unless both arguments of an `ops.loss` call have one value per sample."""
    shapes = [tuple(getattr(x, "shape", ())) for x in (loss_B, weight_B)]
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise UserError(
            "ops.loss(loss_B, weight_B)",
            expected="two arrays with one value per sample, shape (B,)",
            got=" and ".join(
                f"shape {shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"
                for x, shape in zip((loss_B, weight_B), shapes, strict=True)
            ),
            do="Reduce all axes but the batch, for example with x.sum((1, 2)); the usual weight is batch['mask'].",
        )


def check_layer(block: Any, result: Any) -> tuple[Any, Any]:
    """Return (carry, out), the result of a layer of a `Stack`; UserError if the layer returned anything else."""
    if not (isinstance(result, tuple) and len(result) == 2):
        raise UserError(
            f"{type(block).__name__}.__call__{line_of_method(block, '__call__')}",
            expected="a layer of a Stack to return (carry, out)",
            got="None" if result is None else f"a {type(result).__name__}",
            do="End it with `return x, None` if the layer has no output beside the carry.",
        )
    return result
