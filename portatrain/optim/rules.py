"""The optimizer rules: AdamW, Lion, SGD, Adafactor, Muon. They share a module so that ``--set optimizer=Lion`` works.

In the equations, g is the gradient, p the parameter, and t the number of applied steps (1 at the first). A prime marks
a new value. The rule's direction d enters the update of ``Rule``: p' = p - lr d - lr weight_decay p.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from portatrain.config import require
from portatrain.optim.base import (
    Array,
    ArrayNamespace,
    Info,
    Rule,
    Slot,
    Slots,
    Step,
    bias_correction,
    full_slot,
    matrix_rows,
)

MEAN, SQUARE = "a moving mean of the gradient", "a moving mean of the squared gradient"
"""What slots mean (`Rule.meaning`)."""


@dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
    """Adam with decoupled weight decay::

        m' = b1 m + (1 - b1) g
        v' = b2 v + (1 - b2) g^2
        d  = m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps)

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019 (arXiv:1711.05101), algorithm 2, with the
    decay multiplied by lr. It equals torch.optim.AdamW and optax.adamw up to rounding.

    Slots: ``m`` and ``v``, in the tensor's shape.
    """

    b1: float = 0.9
    """Decay rate of the first moment m, in [0, 1)."""
    b2: float = 0.999
    """Decay rate of the second moment v, in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment; above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "b1", 0 <= self.b1 < 1, "at least 0 and below 1")
        require(self, "b2", 0 <= self.b2 < 1, "at least 0 and below 1")
        require(self, "eps", self.eps > 0, "a number above 0")

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": full_slot(info), "v": full_slot(info)}

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        return 1 / (fan_in * multiplier)  # elements of a step have a size of their own

    def meaning(self, slot: str) -> tuple[str, float] | None:
        return {"m": (MEAN, 1.0), "v": (SQUARE, 1.0)}.get(slot)

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        m = self.b1 * slots["m"] + (1.0 - self.b1) * grad
        v = self.b2 * slots["v"] + (1.0 - self.b2) * (grad * grad)
        v_hat = v * (1.0 / bias_correction(xp, self.b2, count))
        step_size = lr / bias_correction(xp, self.b1, count)
        return step_size * (m / (xp.sqrt(v_hat) + self.eps)), {"m": m, "v": v}


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """The sign of a momentum that is interpolated with the gradient::

        d  = sign(b1 m + (1 - b1) g)        (sign(0) = 0)
        m' = b2 m + (1 - b2) g

    Source: Chen et al., Symbolic Discovery of Optimization Algorithms, 2023 (arXiv:2302.06675), algorithm 2. It equals
    optax.lion. Use a learning rate 3 to 10 times smaller than for AdamW and a weight decay 3 to 10 times larger
    (section 5).

    Slots: ``m``, in the tensor's shape.
    """

    b1: float = 0.9
    """Weight of the momentum in the direction, in [0, 1)."""
    b2: float = 0.99
    """Decay rate of the momentum m, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "b1", 0 <= self.b1 < 1, "at least 0 and below 1")
        require(self, "b2", 0 <= self.b2 < 1, "at least 0 and below 1")

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": full_slot(info)}

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        return 1 / (fan_in * multiplier)  # elements of a step have a size of their own

    def meaning(self, slot: str) -> tuple[str, float] | None:
        return {"m": (MEAN, 1.0)}.get(slot)

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        m = slots["m"]
        return lr * xp.sign(self.b1 * m + (1.0 - self.b1) * grad), {"m": self.b2 * m + (1.0 - self.b2) * grad}


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """Gradient descent, with or without momentum::

        m' = momentum m + g
        d  = g + momentum m'  if nesterov, else m'        (if momentum is 0: d = g)

    Source: Sutskever et al., On the importance of initialization and momentum in deep learning, 2013, in the form of
    torch.optim.SGD and optax.sgd. Unlike there, weight decay is decoupled (torch adds it to the gradient, and so to the
    momentum).

    Slots: ``m``, in the tensor's shape; none if momentum is 0.
    """

    momentum: float = 0.0
    """Decay rate of the momentum m, in [0, 1); 0 switches it off."""
    nesterov: bool = False
    """Use Nesterov's momentum; needs momentum above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        require(self, "nesterov", self.momentum > 0 or not self.nesterov, "False if momentum is 0")

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": full_slot(info)} if self.momentum else {}

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        return fan_out / (fan_in * multiplier**2)  # a step is proportional to the gradient, which has the multiplier

    def meaning(self, slot: str) -> tuple[str, float] | None:
        return {"m": (MEAN, 1.0 - self.momentum)}.get(slot)  # it adds gradients up

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        if not self.momentum:
            return lr * grad, {}
        m = self.momentum * slots["m"] + grad
        return lr * (grad + self.momentum * m if self.nesterov else m), {"m": m}


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adam's second moment, factored into row and column means, with an update clipped by its RMS::

        c  = t^-decay_rate                                  (the paper's beta2 is 1 - c: 0 at the first step)
        r' = (1 - c) r + c mean_out(g^2 + eps1)
        k' = (1 - c) k + c mean_in(g^2 + eps1)
        u  = g / sqrt(r' k' / mean_in(r'))
        d  = u / max(1, rms(u) / clip)                      (times max(eps2, rms(p)) if relative)

    A tensor that is not factored has v' = (1 - c) v + c (g^2 + eps1) and u = g / sqrt(v').

    mean_out runs over the output axes, mean_in over the input axes (the first ``fan_in_axes`` after the batch axes) and
    rms over the whole tensor, each within one slice of the batch axes. An embedding is factored as entries x features.
    Vectors, and tensors with a side of length 1, are not factored.

    Source: Shazeer & Stern, Adafactor, 2018 (arXiv:1804.04235), algorithms 4 and 5, without first moment. Means replace
    the paper's sums, which gives the same u. For the paper's rate min(1e-2, t^-0.5), use a schedule. With relative=True
    this equals torch.optim.Adafactor (while t <= lr^-2) and, without weight decay, optax.adafactor on a single matrix;
    on stacked layers those two do not act layer by layer.

    Slots: ``v_row`` (batch and input axes) and ``v_col`` (batch and output axes), or ``v`` in the tensor's shape.
    """

    decay_rate: float = 0.8
    """Exponent of c, in (0, 1]."""
    clip: float = 1.0
    """Root mean square above which the update is scaled down; above 0."""
    eps1: float = 1e-30
    """Added to the squared gradient; between 1e-32 and 1."""
    eps2: float = 1e-3
    """Lower bound of rms(p) if relative; above 0."""
    relative: bool = False
    """Multiply the step by the root mean square of the parameter. False: the learning rate is absolute."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "decay_rate", 0 < self.decay_rate <= 1, "above 0 and at most 1 (the paper's is 0.8)")
        require(self, "clip", self.clip > 0, "a number above 0")
        require(self, "eps1", 1e-32 <= self.eps1 <= 1, "between 1e-32 and 1, within the range of float32")
        require(self, "eps2", self.eps2 > 0, "a number above 0")

    def slots(self, info: Info) -> dict[str, Slot]:
        split, batch = _factored_at(info), info.batch_dims
        if split is None:
            return {"v": full_slot(info)}
        out_axes, out_shape = info.axes[split:], info.shape[split:]
        return {
            "v_row": Slot(axes=info.axes[:split], shape=info.shape[:split]),
            "v_col": Slot(axes=info.axes[:batch] + out_axes, shape=info.shape[:batch] + out_shape),
        }

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        factor = 1 / (fan_in * multiplier)
        return math.sqrt(factor) if self.relative else factor  # relative: the rms of a hidden matrix is fan_in^-1/2

    def meaning(self, slot: str) -> tuple[str, float] | None:
        return {"v": (SQUARE, 1.0)}.get(slot)

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        new = count ** (-self.decay_rate)
        old = 1.0 - new
        square = grad * grad + self.eps1
        split, batch, shape = _factored_at(info), info.batch_dims, info.shape
        new_slots: dict[str, Array]
        if split is None:
            v = old * slots["v"] + new * square
            u, new_slots = grad / xp.sqrt(v), {"v": v}
        else:
            ins, outs = tuple(range(batch, split)), tuple(range(split, len(shape)))
            row = old * slots["v_row"] + new * xp.mean(square, axis=outs)
            col = old * slots["v_col"] + new * xp.mean(square, axis=ins)
            # Take each root alone: the product row * col may be 1e-60, below the range of float32.
            row_factor = xp.sqrt(xp.mean(row, axis=ins, keepdims=True)) / xp.sqrt(row)
            row_factor = xp.reshape(row_factor, (*shape[:split], *(1 for _ in outs)))
            col_factor = xp.reshape(1.0 / xp.sqrt(col), (*shape[:batch], *(1 for _ in ins), *shape[split:]))
            u, new_slots = grad * row_factor * col_factor, {"v_row": row, "v_col": col}
        step_size = lr / xp.maximum(_rms(xp, u, batch) / self.clip, 1.0)
        if self.relative:
            step_size = step_size * xp.maximum(_rms(xp, param, batch), self.eps2)
        return step_size * u, new_slots


def _factored_at(info: Info) -> int | None:
    """Return the index of the first output axis, or None if the tensor is not factored."""
    rows = matrix_rows(info)
    if rows is None:
        return None
    split = info.batch_dims + rows
    sides = math.prod(info.shape[info.batch_dims : split]), math.prod(info.shape[split:])
    return split if min(sides) > 1 else None


def _rms(xp: ArrayNamespace, x: Array, batch_dims: int) -> Array:
    """Return the root mean square of each slice of the batch axes; the other axes stay, with length 1."""
    axes = tuple(range(batch_dims, len(x.shape)))
    square = x * x
    return xp.sqrt(xp.mean(square, axis=axes, keepdims=True) if axes else square)


Quintic = tuple[float, float, float]
"""The coefficients (a, b, c) of the polynomial a x + b x^3 + c x^5."""

JORDAN: Quintic = (3.4445, -4.7750, 2.0315)
"""The coefficients of Jordan et al. (2024), which maximise the slope at zero."""


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Momentum, with each matrix orthogonalised by a Newton-Schulz iteration::

        m' = momentum m + (1 - momentum) g
        n  = (1 - momentum) g + momentum m'  if nesterov, else m'
        X  = n / max(||n||_F, eps)                          (n reshaped to the matrix in x out)
        X  = a X + b (X X^T) X + c (X X^T)^2 X              for each (a, b, c) of coefficients
        d  = sqrt(max(1, out / in)) X

    in is the product of the input axes (the first ``fan_in_axes`` after the batch axes) and out that of the others,
    within one slice of the batch axes. The iteration keeps the singular vectors and moves the singular values to
    between 0.7 and 1.2, except for the smallest ones.

    Muon updates tensors that have input and output axes, none of them ``vocab``. Embeddings, output heads and vectors
    are updated by ``adamw``, with its own lr and weight_decay and the same schedule.

    Source: Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024
    (kellerjordan.github.io/posts/muon), with the moving average and the shape factor of the authors' code and of
    torch.optim.Muon (its "original" adjustment). Those iterate in bfloat16 and do not act layer by layer.

    Slots: ``m``, in the tensor's shape; for tensors that ``adamw`` updates, the slots of AdamW.
    """

    momentum: float = 0.95
    """Decay rate of the momentum m, in [0, 1)."""
    nesterov: bool = True
    """Use Nesterov's momentum."""
    coefficients: tuple[Quintic, ...] = (JORDAN,) * 5
    """One (a, b, c) per Newton-Schulz iteration."""
    eps: float = 1e-7
    """Lower bound of the norm that n is divided by; above 0."""
    adamw: AdamW = AdamW(lr=3e-4)
    """The rule for the tensors that Muon does not update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        require(
            self, "coefficients", len(self.coefficients) > 0, f"one (a, b, c) per iteration, such as ({JORDAN},) * 5"
        )
        require(self, "eps", self.eps > 0, "a number above 0")

    def rule_for(self, info: Info) -> Rule:
        hidden = 1 <= info.fan_in_axes < len(info.shape) - info.batch_dims and "vocab" not in info.axes
        return self if hidden else self.adamw

    def slots(self, info: Info) -> dict[str, Slot]:
        return {"m": full_slot(info)} if self.rule_for(info) is self else self.adamw.slots(info)

    def update(self, xp: ArrayNamespace, *, info: Info, **arguments: Any) -> Step:
        rule = self.rule_for(info)
        update = super().update if rule is self else rule.update
        return update(xp, info=info, **arguments)

    def width_factor(self, info: Info, *, fan_in: float, fan_out: float, multiplier: float) -> float:
        # The largest singular value of a step is to grow as sqrt(out / in) (Yang, Simon & Bernstein 2023,
        # arXiv:2310.17813, condition 1); the factor max(1, out / in) does so only where out is the larger one.
        batch, split = info.batch_dims, info.batch_dims + info.fan_in_axes
        ratio = math.prod(info.shape[split:]) / math.prod(info.shape[batch:split])
        grown = fan_out / fan_in
        return math.sqrt(grown * max(1.0, ratio / grown) / max(1.0, ratio)) / multiplier

    def meaning(self, slot: str) -> tuple[str, float] | None:
        return {"m": (MEAN, 1.0)}.get(slot)

    def step(
        self, xp: ArrayNamespace, *, info: Info, grad: Array, param: Array, slots: Slots, lr: Array, count: Array
    ) -> Step:
        new = (1.0 - self.momentum) * grad
        m = self.momentum * slots["m"] + new
        n = new + self.momentum * m if self.nesterov else m
        batch, split = info.batch_dims, info.batch_dims + info.fan_in_axes
        rows, cols = math.prod(info.shape[batch:split]), math.prod(info.shape[split:])
        x = xp.reshape(n, (*info.shape[:batch], rows, cols))
        x = orthogonalise(xp, x, coefficients=self.coefficients, eps=self.eps)
        return (lr * math.sqrt(max(1.0, cols / rows))) * xp.reshape(x, info.shape), {"m": m}


def orthogonalise(xp: ArrayNamespace, x: Array, *, coefficients: tuple[Quintic, ...], eps: float) -> Array:
    """Return the result of `Muon`'s Newton-Schulz iteration on every matrix of x, (..., rows, cols); zero stays zero.

    Args:
        coefficients: one (a, b, c) per iteration.
        eps: the lower bound of the Frobenius norm that x is divided by first.
    """
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # so that X X^T has the shorter side
        x = xp.swapaxes(x, -1, -2)
    x = x / xp.maximum(xp.sqrt(xp.sum(x * x, axis=(-2, -1), keepdims=True)), eps)
    for a, b, c in coefficients:
        gram = xp.matmul(x, xp.swapaxes(x, -1, -2))
        x = a * x + xp.matmul(b * gram + c * xp.matmul(gram, gram), x)
    return xp.swapaxes(x, -1, -2) if tall else x
