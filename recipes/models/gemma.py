"""Gemma 2 and 3, the text models (Gemma Team 2024, arXiv:2408.00118; 2025, arXiv:2503.19786).

They differ from a Llama in alternating layers with and without a sliding window, a norm after attention and
feed-forward as well as before them, norms that multiply by 1 + scale, embeddings times sqrt(embed), and GELU. Gemma 2
caps scores and logits softly; Gemma 3 has norms of queries and keys, and another theta in the layers with a window.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, GatedMLP, OneRMSNorm, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    HUB_FIELDS,
    MLP,
    QK_NORM,
    CausalConfig,
    CausalLM,
    Kind,
    Names,
    hub,
    read_sizes,
    read_two_ropes,
    sliding_of,
    two_ropes,
    types_of,
)

NORMS: Names = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("post_attention_layernorm.weight", "attn_post_norm/scale", None),
    ("pre_feedforward_layernorm.weight", "mlp_norm/scale", None),
    ("post_feedforward_layernorm.weight", "mlp_post_norm/scale", None),
)
OVERRIDES = {
    **HUB_FIELDS,
    "query_pre_attn_scalar": "model.query_scale",
    "attn_logit_softcapping": "model.softcap",
    "final_logit_softcapping": "model.logit_softcap",
    "layer_types": "model.sliding",
}


@dataclass(frozen=True, kw_only=True)
class GemmaConfig(CausalConfig):
    """The sizes of a `Gemma` of generation 2 or 3."""

    generation: int = 3
    """2 or 3. A 3 has norms of queries and keys, and ``local_theta``."""
    window: int | None = 1024
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: five in six have it in a 3, every other one in a 2."""
    local_theta: float = 10_000.0
    """Base of the rotary frequencies in the layers with a window, in a 3."""
    query_scale: int = 256
    """Scores are multiplied by query_scale^-0.5."""
    attention_bias: bool = False
    """Add biases to queries, keys, values and the output of attention."""
    softcap: float | None = None
    """Softcap of attention scores, in a 2. None: no cap."""
    logit_softcap: float | None = None
    """Softcap of logits. None: no cap."""

    def build(self) -> Gemma:
        """Return the model."""
        return Gemma(self)

    def small(self) -> GemmaConfig:
        """Return the same kind of model with small sizes."""
        made: GemmaConfig = super().small()
        return replace(made, window=self.window and min(self.window, 8), sliding=self.sliding[-made.layers :])

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer. Rotary table 0 is that of the layers without a window."""
        period = 6 if self.generation == 3 else 2
        sliding = self.sliding or tuple(bool((i + 1) % period) for i in range(self.layers))
        local = Kind(window=self.window, rope=1 if self.generation == 3 else 0)
        return tuple(local if s else Kind() for s in sliding)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        names = [*NORMS, *ATTENTION, *(ATTENTION_BIASES if self.attention_bias else ()), *MLP]
        config: dict[str, Any] = {
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_act": "gelu_pytorch_tanh",
            "sliding_window": self.window,
            "layer_types": types_of(self.kinds),
            "query_pre_attn_scalar": self.query_scale,
            "attention_bias": self.attention_bias,
            "final_logit_softcapping": self.logit_softcap,
            "attn_logit_softcapping": self.softcap,
        }
        if self.generation == 2:
            return replace(hub(self, "gemma2", "Gemma2ForCausalLM", names, **config), overrides=OVERRIDES)
        config |= {"rope_local_base_freq": self.local_theta, **two_ropes(self, self.local_theta)}
        names += QK_NORM
        return replace(hub(self, "gemma3_text", "Gemma3ForCausalLM", names, **config), overrides=OVERRIDES)


class Block(Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, c: GemmaConfig, kind: Kind) -> None:
        self.attn_norm = OneRMSNorm(embed=c.embed, eps=c.norm_eps)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=kind.window,
            softcap=c.softcap,
            scale=c.query_scale**-0.5,
            bias="qkvo" if c.attention_bias else False,
            qk_norm="one" if c.generation == 3 else False,
            norm_eps=c.norm_eps,
        )
        self.attn_post_norm = OneRMSNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp_norm = OneRMSNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size, activation="gelu_tanh")
        self.mlp_post_norm = OneRMSNorm(embed=c.embed, eps=c.norm_eps)
        self.rope = kind.rope or 0

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        attended = self.attn(ops, self.attn_norm(ops, x_BSE), ropes[self.rope], segment_ids)
        x_BSE = x_BSE + self.attn_post_norm(ops, attended)
        return x_BSE + self.mlp_post_norm(ops, self.mlp(ops, self.mlp_norm(ops, x_BSE))), None


class Gemma(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: GemmaConfig) -> None:
        super().__init__(
            c,
            layers_of(c.kinds, lambda kind: Block(c, kind)),
            OneRMSNorm(embed=c.embed, eps=c.norm_eps),
            embed_scale=c.embed**0.5,
            logit_softcap=c.logit_softcap,
        )

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the rotary tables of the layers without and with a window, and the segment ids."""
        ropes, segments = super().shared(ops, positions, segment_ids)
        if self.config.generation == 3:
            local = ops.rope_table(positions, self.config.head_size, theta=self.config.local_theta)
            ropes = (*ropes, local)
        return ropes, segments


def from_hub(fields: Fields) -> GemmaConfig:
    """Return the sizes of a Gemma 2 or 3. Defaults are those of Gemma2Config and Gemma3TextConfig."""
    three = fields.kind == "gemma3_text"
    fields.only("hidden_activation", "gelu_pytorch_tanh")
    for name in ("hidden_act", "_sliding_window_pattern"):  # transformers does not read them
        fields.get(name)
    fields.only("use_bidirectional_attention", False)
    local: dict[str, Any] = {}
    theta = 1e6 if three else 10_000.0
    given: Mapping[str, Any] | None = None
    if three:
        given, local["local_theta"] = read_two_ropes(fields, theta=theta, local=fields.get("rope_local_base_freq", 1e4))
    sizes = read_sizes(fields, theta=theta, tied=True, head_dim=256, kv_heads=4, given=given)
    period = int(fields.get("sliding_window_pattern", 6)) if three else 2
    layers = range(sizes["layers"])
    sliding = (
        [bool((i + 1) % period) for i in layers]
        if fields.get("layer_types") is None
        else sliding_of(fields, sizes["layers"])
    )
    window = fields.optional("sliding_window", 4096)
    if window is None and any(sliding):
        fields.problem("sliding_window", "a number, since layers slide")
    return GemmaConfig(
        **sizes,
        **local,
        generation=3 if three else 2,
        window=window,
        sliding=tuple(sliding),
        query_scale=fields.size("query_pre_attn_scalar", 256),
        attention_bias=fields.flag("attention_bias", False),
        # transformers holds the cap of scores for a 3, but does not apply it.
        softcap=_cap(fields, "attn_logit_softcapping", 50.0)
        if not three
        else fields.only("attn_logit_softcapping", None),
        logit_softcap=_cap(fields, "final_logit_softcapping", None if three else 30.0),
    )


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    found = fields.get(name) if name in fields.config else default
    return None if found is None else fields.number(name, default)
