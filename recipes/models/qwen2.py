"""Qwen 2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): a Llama with biases of queries, keys and values, and a sliding
window in the upper layers where it is switched on.

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
class Qwen2Config(CausalConfig):
    """The sizes of a `Qwen2`."""

    window: int | None = None
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: none has."""

    def build(self) -> Qwen2:
        """Return the model."""
        return Qwen2(self)

    def small(self) -> Qwen2Config:
        """Return the same kind of model with small sizes."""
        made: Qwen2Config = super().small()
        return replace(made, window=self.window and min(self.window, 8), sliding=self.sliding[-made.layers :])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return tuple(Kind(window=self.window if s else None) for s in self.sliding or (False,) * self.layers)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        names = [*PRE_NORMS, *ATTENTION, *ATTENTION_BIASES[:3], *MLP]
        return hub(self, "qwen2", "Qwen2ForCausalLM", names, **layer_types(self.kinds, self.window))


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Qwen2Config, kind: Kind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(
            embed=c.embed, heads=c.heads, kv_heads=c.kv, head_dim=c.head_size, window=kind.window, bias="qkv"
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Qwen2(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: Qwen2Config) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> Qwen2Config:
    """Return the sizes of a Qwen 2 or 2.5. Defaults are those of Qwen2Config."""
    fields.only("hidden_act", "silu")
    sizes = read_sizes(fields, kv_heads=32)
    return Qwen2Config(**sizes, **read_layer_types(fields, sizes["layers"], default=4096))
