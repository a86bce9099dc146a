"""The base class of optimizer rules, and the types it uses: tensor facts, slots, array functions, weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from portatrain.config import check_types, require
from portatrain.errors import UserError
from portatrain.errors.users_code import line_of, line_of_method

Array = Any
"""A numpy.ndarray, jax.Array, torch.Tensor or DTensor: the array type of the namespace ``xp``."""
Slots = Mapping[str, Array]
"""The optimizer state of one tensor, by slot name."""
Step = tuple[Array, dict[str, Array]]
"""The change of a parameter, in its shape, and the new slots."""


class ArrayNamespace(Protocol):
    """The array functions that rules call, besides the operators ``+ - * / **`` and unary minus.

    Each works as its namesake in ``numpy`` and returns a new array. ``numpy`` and ``jax.numpy`` fit, provided that
    ``matmul`` is a full float32 product (JAX: ``precision="highest"``; torch: no TF32). torch needs a wrapper for
    ``maximum``, because the second argument is a Python float here.
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
    """The facts about a logical tensor that a rule may use. Shapes are those of the whole tensor, never of a shard.

    `portatrain.model.module.TensorInfo` has these attributes.
    """

    @property
    def name(self) -> str:
        """Path in the model, such as 'blocks/attn/wq'."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, with its leading batch axes."""

    @property
    def axes(self) -> tuple[str, ...]:
        """One logical axis per dimension."""

    @property
    def batch_dims(self) -> int:
        """The number of leading batch axes (layers, experts); a rule treats each of their slices as one tensor."""

    @property
    def fan_in_axes(self) -> int:
        """The number of axes, after the batch axes, that the forward pass contracts; 0 for embeddings and biases."""


def lr_factor(info: Info) -> float:
    """Return the factor of the learning rate of a tensor: its attribute ``lr``; 1 if it has none."""
    return getattr(info, "lr", 1.0)


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One tensor of optimizer state. It starts at zero."""

    axes: tuple[str, ...]
    """One logical axis per dimension; the layout shards the slot by them."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    dtype: str = "float32"
    """The dtype in which it is kept between steps. Under 'bf16-state' it is kept in bfloat16 instead."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The base class of optimizer rules: frozen settings and a pure update of one tensor.

    Subclass it with ``slots`` and ``step`` to write your own. This class applies decoupled weight decay
    (Loshchilov & Hutter 2019, arXiv:1711.05101), the same for all rules::

        lr     = rule.lr * schedule(step, steps)
        param' = param - step(g, p, slots, lr * info.lr, t) - lr * weight_decay * param

    ``info.lr`` is 1, except with a parametrization (``portatrain.model.widths``).

    Raises:
        UserError: ``lr`` is not above 0, ``weight_decay`` is below 0, or a field has the wrong type.
    """

    lr: float
    """Learning rate; the schedule multiplies it at every step."""
    weight_decay: float = 0.0
    """Weight decay per unit of learning rate; 0 switches it off."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self, "lr", self.lr > 0, "a number above 0")
        require(self, "weight_decay", self.weight_decay >= 0, "0 or more")

    def rule_for(self, info: Info) -> Rule:
        """Return the rule that updates this tensor: this one, or another that it delegates the tensor to."""
        return self

    def slots(self, info: Info) -> dict[str, Slot]:
        """Return the optimizer state of this tensor, by slot name."""
        raise TypeError(f"{type(self).__name__} does not define slots(self, info)")

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        """Return the factor of ``lr`` with which a step changes what this tensor gives as much as at the base width.

        Args:
            info: the tensor.
            fan_in, fan_out: the growth of its contracted and of its other axes; fan_in is 1 if it contracts none.
            multiplier: the factor of what it gives.

        Raises:
            UserError: the rule does not say.
        """
        kind = type(self)
        raise UserError(
            f"optimizer {kind.__qualname__}{line_of(kind)}",
            expected="a method width_factor, with parametrization=MuP",
            got="a rule that does not say how its learning rate depends on the width",
            do="Define it. If the size of a step does not depend on that of the gradient, as in Adam, return "
            "1 / (fan_in * multiplier); if it is proportional to the gradient, fan_out / (fan_in * multiplier**2).",
        )

    def meaning(self, slot: str) -> tuple[str, float] | None:
        """Return what a slot holds, in words, and the factor that makes it that; None if no other rule has its like.

        If a run changes to another rule, its slots are mapped by this: a slot of the new rule gets the values of the
        slot of the same name, if both mean the same.
        """
        return None

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        """Return (what to subtract before weight decay, new slots). ``lr`` is () float32, already scheduled.

        The other arguments are those of ``update``.
        """
        raise TypeError(f"{type(self).__name__} does not define step(self, xp, ...)")

    def update(
        self,
        xp: ArrayNamespace,
        *,
        info: Info,
        grad: Array,
        param: Array,
        slots: Slots,
        scale: Array,
        count: Array,
        decay: bool,
    ) -> Step:
        """Return ``(delta, new slots)`` of one step; the new parameter is ``param + delta``.

        Args:
            xp: the array namespace.
            info: the tensor.
            grad, param: gradient and parameter, ``info.shape``, float32 (float64 in tests against the oracle).
            slots: the state that ``slots(info)`` declares, by name, in the dtype of ``grad``.
            scale: (), the schedule's multiplier of ``lr``.
            count: (), the number of applied steps with this one: 1 at the first.
            decay: True if weight decay applies to this tensor.

        Results have the dtype of ``grad``, since Python numbers do not promote in NumPy 2, JAX or torch.
        """
        lr, factor = self.lr * scale, lr_factor(info)
        mine = lr if factor == 1 else lr * factor
        found = self.step(xp, info=info, grad=grad, param=param, slots=slots, lr=mine, count=count)
        step, new_slots = self._checked(found, info=info, grad=grad, slots=slots)
        if decay and self.weight_decay:
            step = step + (lr * self.weight_decay) * param
        return -step, new_slots

    def _checked(self, found: object, *, info: Info, grad: Array, slots: Slots) -> Step:
        """Return what `step` returned; UserError unless it is (an update, one new value for each slot)."""
        if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping):
            step, new = found
            wanted = {"the update": grad.shape} | {f"slot {name!r}": slots[name].shape for name in slots}
            shapes: dict[str, Any] = {"the update": getattr(step, "shape", None)}
            shapes |= {f"slot {name!r}": getattr(value, "shape", None) for name, value in new.items()}
            if shapes == wanted:
                return step, dict(new)
            wrong = next(name for name in {**wanted, **shapes} if wanted.get(name) != shapes.get(name))
            expected = f"{wrong} of shape {tuple(wanted[wrong])}" if wrong in wanted else "the declared slots alone"
            there = shapes.get(wrong)
            missing = f"{wrong} that is no array" if wrong in shapes else f"no {wrong}"
            got = missing if there is None else f"shape {tuple(there)}"
        else:
            expected, got = "(update, {slot name: new value})", f"a {type(found).__name__}"
        kind = type(self)
        raise UserError(
            f"{kind.__qualname__}.step{line_of_method(self, 'step')} for {info.name}",
            expected=expected,
            got=got,
            do="Return the update and every slot that slots(info) declares, each in its shape.",
        )


def full_slot(info: Info) -> Slot:
    """Return a slot with the axes and shape of the tensor itself."""
    return Slot(axes=info.axes, shape=info.shape)


def matrix_rows(info: Info) -> int | None:
    """Return the number of axes, after the batch axes, that are the rows of the tensor's matrix; None for a vector.

    The rows are the contracted axes and the columns are the others: y = x W with W (in, out). An embedding contracts
    no axis; its first axis is the rows (entries x features). None means that one side would be empty.
    """
    rows = info.fan_in_axes or 1
    return rows if rows < len(info.shape) - info.batch_dims else None


def decays_by_default(info: Info) -> bool:
    """Return True if weight decay applies by default: to matrices and embeddings.

    It does not apply to vectors and norm scales, nor to biases of several axes. Only the name distinguishes such a bias
    from an embedding: its last part is ``bias`` or ends in ``_bias``.
    """
    last = info.name.rsplit("/", 1)[-1]
    return matrix_rows(info) is not None and not (last == "bias" or last.endswith("_bias"))


def bias_correction(xp: ArrayNamespace, b: float, count: Array) -> Array:
    """Return ``1 - b**count``, (), as -expm1(count * log b), which does not cancel if the power is near 1.

    Python computes log b once in float64. The condition number of expm1 is at most 1 for a negative argument, so the
    relative error is a few ulp at every count. Counts are exact in float32 up to 2**24; for b <= 0.99999 the correction
    is 1 to the last bit long before that.
    """
    log_b = math.log(b) if b > 0 else -1.0e4  # for b = 0 any number with an exponential of 0 in float64

    return -xp.expm1(count * log_b)
