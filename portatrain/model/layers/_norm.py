"""Normalisation over the last axis."""

from __future__ import annotations

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


class RMSNorm(Module):
    """`RMSNorm(embed=512)`: x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, *, eps: float = 1e-6, **axis: int) -> None:
        self.scale = Param(**_one_axis("RMSNorm", axis), fan_in_axes=0, init="ones")
        self.eps = eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return x, (..., N), normalised, in the shape and dtype of x; computed in float32."""
        return ops.rms_norm(x, self.scale, eps=self.eps)


class LayerNorm(Module):
    """`LayerNorm(embed=512)`: (x - mean) / sqrt(var + eps) * scale + bias over the last axis (Ba, Kiros and Hinton
    2016, eq. 4). With `bias=False` there is no bias."""

    def __init__(self, *, eps: float = 1e-6, bias: bool = True, **axis: int) -> None:
        self.scale = Param(**_one_axis("LayerNorm", axis), fan_in_axes=0, init="ones")
        self.bias: Any = Param(**axis, fan_in_axes=0, init="zeros") if bias else None
        self.eps = eps

    def __call__(self, ops: Ops, x: Array) -> Array:
        """Return x, (..., N), normalised, in the shape and dtype of x; computed in float32."""
        return ops.layer_norm(x, self.scale, self.bias, eps=self.eps)
