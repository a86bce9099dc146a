"""Qwen 3, the dense sizes (Yang et al. 2025, arXiv:2505.09388): a Llama with RMSNorm of queries and keys in each head.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, GatedMLP, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    MLP,
    PRE_NORMS,
    QK_NORM,
    CausalConfig,
    CausalLM,
    Kind,
    hub,
    layer_types,
    read_layer_types,
    read_sizes,
    rms_norm,
)


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(CausalConfig):
    """The sizes of a `Qwen3`."""

    attention_bias: bool = False
    """Add biases to queries, keys, values and the output of attention."""
    window: int | None = None
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: none has."""

    def build(self) -> Qwen3:
        """Return the model."""
        return Qwen3(self)

    def small(self) -> Qwen3Config:
        """Return the same kind of model with small sizes."""
        made: Qwen3Config = super().small()
        return replace(made, window=self.window and min(self.window, 8), sliding=self.sliding[-made.layers :])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return tuple(Kind(window=self.window if s else None) for s in self.sliding or (False,) * self.layers)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        biases = ATTENTION_BIASES if self.attention_bias else ()
        names = [*PRE_NORMS, *ATTENTION, *biases, *QK_NORM, *MLP]
        more = {"attention_bias": self.attention_bias, **layer_types(self.kinds, self.window)}
        return hub(self, "qwen3", "Qwen3ForCausalLM", names, **more)


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Qwen3Config, kind: Kind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=kind.window,
            bias="qkvo" if c.attention_bias else False,
            qk_norm="head",
            norm_eps=c.norm_eps,
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Qwen3(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: Qwen3Config) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> Qwen3Config:
    """Return the sizes of a Qwen 3. Defaults are those of Qwen3Config in transformers."""
    fields.only("hidden_act", "silu")
    sizes = read_sizes(fields, head_dim=128, kv_heads=32)
    return Qwen3Config(
        **sizes,
        attention_bias=fields.flag("attention_bias", False),
        **read_layer_types(fields, sizes["layers"], default=4096),
    )
