"""Normalisation over the last axis."""

from __future__ import annotations

import math
from typing import Any

from portatrain.errors import UserError
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Ops


def _one_axis(owner: str, axis: dict[str, int]) -> dict[str, int]:
    if len(axis) != 1:
        raise UserError(
            owner,
            expected="one logical axis with its size, the last axis of x",
            got=", ".join(f"{name}={size}" for name, size in axis.items()) or "none",
            do=f"Write {owner}(embed=512).",
        )
    return axis


def _at_least_0(owner: str, eps: float) -> float:
    if not 0 <= eps < math.inf:  # also not a number
        raise UserError(
            f"eps of {owner}", expected="a finite number of at least 0", got=repr(eps), do="A usual eps is 1e-6."
        )
    return eps


class RMSNorm(Module):
    """`RMSNorm(embed=512)`: x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, *, eps: float = 1e-6, **axis: int) -> None:
        self.scale = Param(**_one_axis("RMSNorm", axis), fan_in_axes=0, init="ones")
        self.eps = _at_least_0(type(self).__name__, eps)

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return x, (..., N), normalised, in the shape and dtype of x; computed in float32."""
        return ops.rms_norm(x, self.scale, eps=self.eps)


class LayerNorm(Module):
    """`LayerNorm(embed=512)`: (x - mean) / sqrt(var + eps) * scale + bias over the last axis (Ba, Kiros and Hinton
    2016, eq. 4). With `bias=False` there is no bias."""

    def __init__(self, *, eps: float = 1e-6, bias: bool = True, **axis: int) -> None:
        self.scale = Param(**_one_axis("LayerNorm", axis), fan_in_axes=0, init="ones")
        self.bias: Any = Param(**axis, fan_in_axes=0, init="zeros") if bias else None
        self.eps = _at_least_0(type(self).__name__, eps)

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return x, (..., N), normalised, in the shape and dtype of x; computed in float32."""
        return ops.layer_norm(x, self.scale, self.bias, eps=self.eps)


class OneRMSNorm(Module):
    """`OneRMSNorm(embed=512)`: RMSNorm times 1 + scale, where scale starts at 0 and decays towards 0 (Gemma Team 2024,
    arXiv:2403.08295). Its weights are those of the files: 1 + scale would not come back to the same bits."""

    def __init__(self, *, eps: float = 1e-6, **axis: int) -> None:
        self.scale = Param(**_one_axis("OneRMSNorm", axis), fan_in_axes=0, init="zeros")
        self.eps = _at_least_0(type(self).__name__, eps)

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return x, (..., N), normalised, in the shape of x and the compute dtype; computed in float32."""
        y = ops.rms_norm(ops.cast(x, "float32"), eps=self.eps)
        return ops.cast(y * (ops.cast(ops.weight(self.scale), "float32") + 1.0), "compute")


class HeadsRMSNorm(Module):
    """`HeadsRMSNorm(heads=8, head_dim=64)`: RMSNorm of queries or keys over all features of all heads together, with a
    scale for each (OLMo Team 2025, arXiv:2501.00656, section 2)."""

    def __init__(self, *, eps: float = 1e-6, **axes: int) -> None:
        self.scale = Param(**axes, fan_in_axes=0, init="ones")
        self.axes, self.eps = tuple(axes), _at_least_0(type(self).__name__, eps)

    def __call__(self, ops: Ops, x_BSHD: Array) -> Array:
        """Return x, (B, S, H, D), normalised, in its shape and the compute dtype; computed in float32."""
        x = ops.cast(x_BSHD, "float32")
        mean_BS = ops.mean(x * x, ("batch", "seq", *self.axes), over=self.axes)
        y = x * ((mean_BS + self.eps) ** -0.5)[..., None, None]
        return ops.cast(y * ops.cast(ops.weight(self.scale), "float32"), "compute")
