"""What every rule shares: what it may know of a tensor, its slots, the array vocabulary, the decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from portatrain.config import check_types
from portatrain.errors import UserError

Array = Any  # numpy.ndarray, jax.Array or torch.Tensor (DTensor too): whatever ``xp`` works on
Slots = Mapping[str, Array]
Step = tuple[Array, dict[str, Array]]  # what to add or subtract, and the new slots


class Xp(Protocol):
    """The functions that rules use, beside the operators ``+ - * / **`` and unary minus.

    ``numpy`` and ``jax.numpy`` are such namespaces as they are, but that ``matmul`` must be a full
    float32 product (JAX: ``precision="highest"``; torch: no TF32). torch needs a shim for
    ``maximum`` alone, whose second argument is a Python float here. Every function is out of place.
    """

    def sqrt(self, x: Array, /) -> Array: ...
    def sign(self, x: Array, /) -> Array: ...
    def expm1(self, x: Array, /) -> Array: ...
    def maximum(self, x: Array, floor: float, /) -> Array: ...
    def sum(self, x: Array, /, *, axis: tuple[int, ...] | None = None, keepdims: bool = False) -> Array: ...
    def mean(self, x: Array, /, *, axis: tuple[int, ...], keepdims: bool = False) -> Array: ...
    def matmul(self, x: Array, y: Array, /) -> Array: ...
    def swapaxes(self, x: Array, axis1: int, axis2: int, /) -> Array: ...
    def reshape(self, x: Array, shape: tuple[int, ...], /) -> Array: ...


class Info(Protocol):
    """What a rule may know of a logical tensor. Shapes are whole, whatever the sharding."""

    @property
    def name(self) -> str:
        """Path in the model: 'blocks/attn/wq'."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, leading batch axes included."""

    @property
    def axes(self) -> tuple[str, ...]:
        """One logical axis a dimension."""

    @property
    def batch_dims(self) -> int:
        """How many leading axes (layers, experts) every rule, norm and factor takes slice by slice."""

    @property
    def inputs(self) -> int:
        """How many axes after those the forward pass contracts; 0 for embeddings and biases."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of optimizer state, with logical axes of its own. It starts at zero."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An optimizer: frozen data, and a pure function of one tensor.

    A rule of your own subclasses this with ``slots`` and ``step``; the decoupled weight decay is
    applied here, the same for all::

        param' = param - step - lr * scale * weight_decay * param
    """

    lr: float
    """The learning rate, which the schedule multiplies."""
    weight_decay: float = 0.0
    """Decoupled weight decay, multiplied by the scheduled learning rate."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "lr", self.lr > 0, "a number above 0")
        require(self, "weight_decay", self.weight_decay >= 0, "0 or more")

    def rule_for(self, info: Info) -> Rule:
        """The rule that takes this tensor: itself, or the one that it leaves the tensor to."""
        return self

    def slots(self, info: Info) -> dict[str, Slot]:
        """The state that is kept for this tensor, by slot name."""
        raise TypeError(f"{type(self).__name__} does not define slots(self, info)")

    def step(self, xp: Xp, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array) -> Step:
        """What to subtract, decay apart, and the new slots. ``lr`` is 0-d; the rest as in ``update``."""
        raise TypeError(f"{type(self).__name__} does not define step(self, xp, ...)")

    def update(
        self, xp: Xp, *, info: Info, grad: Array, param: Array, slots: Slots, scale: Array, count: Array, decay: bool
    ) -> Step:
        """One step: ``(delta, new slots)``; the new parameter is ``param + delta``.

        ``grad`` and ``param`` have ``info.shape``. ``scale`` (the schedule's multiplier of ``lr``)
        and ``count`` (1 at the first applied step) are 0-d. All are float32 (float64 in tests
        against the oracle) and so is what comes back, for Python numbers do not promote in NumPy 2,
        JAX or torch. ``decay`` says whether weight decay applies to this tensor.
        """
        lr = self.lr * scale
        step, new_slots = self.step(xp, info=info, grad=grad, param=param, slots=slots, lr=lr, count=count)
        if decay and self.weight_decay:
            step = step + (lr * self.weight_decay) * param
        return -step, new_slots


def require(config: object, field: str, good: bool, expected: str) -> None:
    """Raise UserError for ``config.field`` unless ``good``."""
    if not good:
        owner = type(config).__name__
        raise UserError(
            f"{owner}.{field}",
            expected=expected,
            got=repr(getattr(config, field)),
            do=f"Set {field} of {owner} to such a value.",
        )


def full_slot(info: Info) -> Slot:
    """A slot of the tensor's own axes and shape."""
    return Slot(axes=info.axes, shape=info.shape)


def matrix_rows(info: Info) -> int | None:
    """How many axes after the batch axes are the rows of the tensor's matrix; None for a vector.

    The rows are the contracted axes, the columns are the others: y = x W with W (in, out). An
    embedding contracts nothing; its table is split after the first axis (entries x features).
    None where that leaves one side empty.
    """
    rows = info.inputs or 1
    return rows if rows < len(info.shape) - info.batch_dims else None


def decays_by_default(info: Info) -> bool:
    """Whether weight decay applies unless the recipe says otherwise: to matrices and embeddings.

    Not to vectors and norm scales, nor to a bias of several axes, which only its name tells from an
    embedding: the last part of the name is ``bias`` or ends in ``_bias``.
    """
    last = info.name.rsplit("/", 1)[-1]
    return matrix_rows(info) is not None and not (last == "bias" or last.endswith("_bias"))


def bias_correction(xp: Xp, b: float, count: Array) -> Array:
    """``1 - b**count``, 0-d, without the cancellation of a power near 1.

    The logarithm is taken once, by Python in float64; the condition number of expm1 is at most 1 for
    a negative argument, so the relative error is a few ulp at every count. Counts are exact in
    float32 up to 2**24, where the correction has long been 1 to the last bit for b <= 0.99999.
    """
    log_b = math.log(b) if b > 0 else -1.0e4  # for b = 0 any logarithm whose exponential is 0 in float64
    return -xp.expm1(count * log_b)
