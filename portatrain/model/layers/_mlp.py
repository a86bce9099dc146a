"""Feed-forward blocks. Shape letters: B batch, S seq, E embed, M mlp."""

from __future__ import annotations

from typing import Any

from portatrain.errors import choice
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Ops

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def _activate(ops: Ops, name: str, x: Array) -> Array:
    if name == "silu":
        return ops.silu(x)
    if name == "relu":
        return ops.relu(x)
    return ops.gelu(x, approximate=name == "gelu_tanh")


def _check(owner: str, activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise choice(f"{owner}, activation", activation, ACTIVATIONS)
    return activation


class GatedMLP(Module):
    """A gated feed-forward part: down(silu(gate x) * up x) (Shazeer 2020, SwiGLU).

    Args:
        embed, mlp: sizes of the input and of the hidden axis.
        activation: 'silu', 'gelu', 'gelu_tanh' or 'relu'.
        bias: add biases after gate, up and down, which start at zero.
    """

    def __init__(self, *, embed: int, mlp: int, activation: str = "silu", bias: bool = False) -> None:
        self.gate = Param(embed=embed, mlp=mlp)
        self.up = Param(embed=embed, mlp=mlp)
        self.down = Param(mlp=mlp, embed=embed)
        self.gate_bias: Any = Param(mlp=mlp, fan_in_axes=0, init="zeros") if bias else None
        self.up_bias: Any = Param(mlp=mlp, fan_in_axes=0, init="zeros") if bias else None
        self.down_bias: Any = Param(embed=embed, fan_in_axes=0, init="zeros") if bias else None
        self.activation = _check("GatedMLP", activation)

    def __call__(self, ops: Ops, x_BSE: Array) -> Array:
        """Map x (B, S, E) to (B, S, E), in the compute dtype, sharded as the residual stream."""
        x_BSE = ops.name(ops.shard(x_BSE, "batch", "seq", None), "normed")
        gate_BSM = ops.einsum("bse,em->bsm", x_BSE, self.gate)
        gate_BSM = ops.name(gate_BSM if self.gate_bias is None else ops.bias(gate_BSM, self.gate_bias), "hidden")
        up_BSM = ops.einsum("bse,em->bsm", x_BSE, self.up)
        up_BSM = ops.name(up_BSM if self.up_bias is None else ops.bias(up_BSM, self.up_bias), "hidden")
        product_BSM = ops.name(_activate(ops, self.activation, gate_BSM) * up_BSM, "product")
        out_BSE = ops.shard(ops.einsum("bsm,me->bse", product_BSM, self.down), "batch", "res_seq", None)
        return out_BSE if self.down_bias is None else ops.bias(out_BSE, self.down_bias)


class MLP(Module):
    """The feed-forward part of a transformer block: down(gelu(up x)).

    Args:
        embed, mlp: sizes of the input and of the hidden axis.
        activation: 'silu', 'gelu', 'gelu_tanh' or 'relu'.
        bias: add biases after up and down, which start at zero.
    """

    def __init__(self, *, embed: int, mlp: int, activation: str = "gelu", bias: bool = True) -> None:
        self.up = Param(embed=embed, mlp=mlp)
        self.down = Param(mlp=mlp, embed=embed)
        self.up_bias: Any = Param(mlp=mlp, fan_in_axes=0, init="zeros") if bias else None
        self.down_bias: Any = Param(embed=embed, fan_in_axes=0, init="zeros") if bias else None
        self.activation = _check("MLP", activation)

    def __call__(self, ops: Ops, x_BSE: Array) -> Array:
        """Map x (B, S, E) to (B, S, E), in the compute dtype, sharded as the residual stream."""
        x_BSE = ops.name(ops.shard(x_BSE, "batch", "seq", None), "normed")
        up_BSM = ops.einsum("bse,em->bsm", x_BSE, self.up)
        up_BSM = ops.name(up_BSM if self.up_bias is None else ops.bias(up_BSM, self.up_bias), "hidden")
        product_BSM = ops.name(_activate(ops, self.activation, up_BSM), "product")
        out_BSE = ops.shard(ops.einsum("bsm,me->bse", product_BSM, self.down), "batch", "res_seq", None)
        return out_BSE if self.down_bias is None else ops.bias(out_BSE, self.down_bias)
