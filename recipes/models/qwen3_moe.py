"""Qwen 3, the mixtures of experts (Yang et al. 2025, arXiv:2505.09388): a Qwen 3 with routed feed-forward parts, all or
every n-th one.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import ATTENTION, ATTENTION_BIASES, PRE_NORMS, QK_NORM, CausalLM, read_sizes, rms_norm
from recipes.models.routed import (
    LayerKind,
    MixtureConfig,
    chosen_of,
    experts_of,
    feed_forward,
    mixture_hub,
    pass_over_losses,
)


@dataclass(frozen=True, kw_only=True)
class Qwen3MoeConfig(MixtureConfig):
    """The sizes of a `Qwen3Moe`."""

    normalise: bool = True
    """Divide the weights of a token's experts by their sum."""
    routed: tuple[bool, ...] = ()
    """Whether each layer is routed. Empty: all are."""
    attention_bias: bool = False
    """Add biases to queries, keys, values and the output of attention."""
    window: int | None = None
    """Tokens that a token attends to, itself included. None: all before it."""

    def build(self) -> Qwen3Moe:
        """Return the model."""
        return Qwen3Moe(self)

    def small(self) -> Qwen3MoeConfig:
        """Return the same kind of model with small sizes."""
        made: Qwen3MoeConfig = super().small()
        return replace(made, window=self.window and min(self.window, 8), routed=self.routed[-made.layers :])

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return tuple(LayerKind(window=self.window, routed=r) for r in self.routed or (True,) * self.layers)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        biases = ATTENTION_BIASES if self.attention_bias else ()
        return mixture_hub(
            self,
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            [*PRE_NORMS, *ATTENTION, *biases, *QK_NORM],
            attention_bias=self.attention_bias,
            use_sliding_window=self.window is not None,
            sliding_window=self.window,
            num_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.expert_mlp,
            norm_topk_prob=self.normalise,
            decoder_sparse_step=1,
            mlp_only_layers=[i for i, kind in enumerate(self.kinds) if not kind.routed],
        )


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), dense or routed."""

    def __init__(self, c: Qwen3MoeConfig, kind: LayerKind) -> None:
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
        self.mlp = feed_forward(c, kind, normalise=c.normalise)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Qwen3Moe(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: Qwen3MoeConfig) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> Qwen3MoeConfig:
    """Return the sizes of a Qwen 3 mixture. Defaults are those of Qwen3MoeConfig in transformers."""
    fields.only("hidden_act", "silu")
    pass_over_losses(fields)
    sizes = read_sizes(fields, kv_heads=4)
    window = fields.optional("sliding_window", 4096)
    fields.get("max_window_layers")  # of the dense sizes; transformers does not read it here
    step, dense = fields.size("decoder_sparse_step", 1), fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        fields.problem("mlp_only_layers", "a list of numbers of layers")
        dense = []
    experts = experts_of(fields, "num_experts", 128)
    return Qwen3MoeConfig(
        **sizes,
        expert_mlp=fields.size("moe_intermediate_size", 768),
        experts=experts,
        chosen=chosen_of(fields, experts, 8),
        normalise=fields.flag("norm_topk_prob", False),
        attention_bias=fields.flag("attention_bias", False),
        window=window if fields.flag("use_sliding_window", False) else None,
        routed=tuple(i not in dense and (i + 1) % step == 0 for i in range(sizes["layers"])),
    )
