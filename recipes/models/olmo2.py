"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): a Llama with norms after attention and feed-forward instead of before
them, and one norm over the queries, and over the keys, of all heads together.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, GatedMLP, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    MLP,
    CausalConfig,
    CausalLM,
    Kind,
    Names,
    hub,
    read_sizes,
    rms_norm,
)

NORMS: Names = (
    ("post_attention_layernorm.weight", "attn_post_norm/scale", None),
    ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", None),
    ("self_attn.q_norm.weight", "attn/q_norm/scale", 0),
    ("self_attn.k_norm.weight", "attn/k_norm/scale", 0),
)


@dataclass(frozen=True, kw_only=True)
class Olmo2Config(CausalConfig):
    """The sizes of an `Olmo2`."""

    attention_bias: bool = False
    """Add biases to queries, keys, values and the output of attention."""

    def build(self) -> Olmo2:
        """Return the model."""
        return Olmo2(self)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        names = [*NORMS, *ATTENTION, *(ATTENTION_BIASES if self.attention_bias else ()), *MLP]
        return hub(self, "olmo2", "Olmo2ForCausalLM", names, attention_bias=self.attention_bias)


class Block(Module):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __init__(self, c: Olmo2Config, kind: Kind) -> None:
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=kind.window,
            bias="qkvo" if c.attention_bias else False,
            qk_norm="heads",
            norm_eps=c.norm_eps,
        )
        self.attn_post_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)
        self.mlp_post_norm = rms_norm(c)
        self.rope = kind.rope or 0

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn_post_norm(ops, self.attn(ops, x_BSE, ropes[self.rope], segment_ids))
        return x_BSE + self.mlp_post_norm(ops, self.mlp(ops, x_BSE)), None


class Olmo2(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: Olmo2Config) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> Olmo2Config:
    """Return the sizes of an OLMo 2. Defaults are those of Olmo2Config in transformers."""
    fields.only("hidden_act", "silu")
    return Olmo2Config(**read_sizes(fields, eps=1e-5), attention_bias=fields.flag("attention_bias", False))
