"""Phi-3 and Phi-4-mini (Abdin et al. 2024, arXiv:2404.14219): a Llama with LongRoPE, of which a part of each head may
be rotated, and a sliding window in some sizes. Files hold queries, keys and values in one tensor, and gate and up in
another.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row, rope_fields
from portatrain.model.layers import Attention, GatedMLP, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from portatrain.model.rope import LongScaling
from recipes.models.causal import MLP, PRE_NORMS, CausalConfig, CausalLM, Kind, Names, hub, read_sizes, rms_norm

# What has a tensor of its own; the others are parts of two.
NAMES: Names = (*PRE_NORMS, ("self_attn.o_proj.weight", "attn/wo", 2), MLP[-1])


@dataclass(frozen=True, kw_only=True)
class Phi3Config(CausalConfig):
    """The sizes of a `Phi3`. A scaling of the rotary frequencies must be a `LongScaling`."""

    window: int | None = None
    """Tokens that a token attends to, itself included. None: all before it."""
    rotary: float = 1.0
    """The part of a head's features that is rotated, the first ones."""

    def build(self) -> Phi3:
        """Return the model."""
        return Phi3(self)

    def small(self) -> Phi3Config:
        """Return the same kind of model with small sizes."""
        made: Phi3Config = super().small()
        scaling = made.rope_scaling
        if isinstance(scaling, LongScaling):
            n = made.rotary_dim // 2
            scaling = replace(scaling, short=scaling.short[:n], long=scaling.long[:n])
        return replace(made, window=self.window and min(self.window, 8), rope_scaling=scaling)

    @property
    def rotary_dim(self) -> int:
        """Features of a head that are rotated."""
        return int(self.head_size * self.rotary)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return (Kind(window=self.window),) * self.layers

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        config = rope_fields(self.rope_theta, self.rope_scaling, part=self.rotary)
        if isinstance(self.rope_scaling, LongScaling):
            config["original_max_position_embeddings"] = self.rope_scaling.original
        made = hub(self, "phi3", "Phi3ForCausalLM", NAMES, sliding_window=self.window, **config)
        q, kv, m = self.heads * self.head_size, self.kv * self.head_size, self.mlp_size
        parts = (
            ("self_attn.qkv_proj.weight", "attn/wq", (0, q)),
            ("self_attn.qkv_proj.weight", "attn/wk", (q, q + kv)),
            ("self_attn.qkv_proj.weight", "attn/wv", (q + kv, q + 2 * kv)),
            ("mlp.gate_up_proj.weight", "mlp/gate", (0, m)),
            ("mlp.gate_up_proj.weight", "mlp/up", (m, 2 * m)),
        )
        fused = tuple(
            Row(theirs=f"model.layers.{i}.{theirs}", ours=f"blocks/{ours}", layer=i, rows=1, part=part)
            for i in range(self.layers)
            for theirs, ours, part in parts
        )
        return replace(made, rows=(*made.rows, *fused))


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Phi3Config) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=c.window,
            rotary_dim=None if c.rotary_dim == c.head_size else c.rotary_dim,
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Phi3(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: Phi3Config) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c)), rms_norm(c))

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the rotary table of the part of a head that is rotated, and the segment ids."""
        c = self.config
        return (ops.rope_table(positions, c.rotary_dim, theta=c.rope_theta, scaling=c.rope_scaling),), segment_ids


def from_hub(fields: Fields) -> Phi3Config:
    """Return the sizes of a Phi-3 or Phi-4-mini. Defaults are those of Phi3Config in transformers."""
    fields.only("hidden_act", "silu")
    for name in ("resid_pdrop", "embd_pdrop"):  # dropout while training, which a recipe decides
        fields.get(name)
    # transformers reads this field before the one in the rotary parameters, and has a default for it.
    fields.config = {"original_max_position_embeddings": 4096, **fields.config}
    _, scaling, part = fields.rope(partial=True)
    if scaling is not None and not isinstance(scaling, LongScaling):
        fields.problem("rope_scaling", "none or longrope, the only one that a Phi-3 has")
    if int(fields.size("hidden_size") // fields.size("num_attention_heads") * part) % 2:
        fields.problem("partial_rotary_factor", "an even number of rotated features", part)
    sizes = read_sizes(fields, eps=1e-5, partial=True)
    return Phi3Config(**sizes, window=fields.optional("sliding_window"), rotary=part)
