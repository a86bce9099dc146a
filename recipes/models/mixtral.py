"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): a Mistral in which every feed-forward part is a mixture; a token goes
to the two experts with the largest logits, weighted by the softmax over these two.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.model.layers import Attention, layers_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models.causal import ATTENTION, PRE_NORMS, CausalLM, read_sizes, rms_norm
from recipes.models.routed import LayerKind, MixtureConfig, chosen_of, feed_forward, mixture_hub, pass_over_losses

EXPERT = (("w1.weight", "gate"), ("w3.weight", "up"), ("w2.weight", "down"))


@dataclass(frozen=True, kw_only=True)
class MixtralConfig(MixtureConfig):
    """The sizes of a `Mixtral`. `mlp` is not used."""

    window: int | None = None
    """Tokens that a token attends to, itself included. None: all before it."""

    def build(self) -> Mixtral:
        """Return the model."""
        return Mixtral(self)

    def small(self) -> MixtralConfig:
        """Return the same kind of model with small sizes."""
        return replace(super().small(), window=self.window and min(self.window, 8))

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return (LayerKind(window=self.window),) * self.layers

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        return mixture_hub(
            self,
            "mixtral",
            "MixtralForCausalLM",
            [*PRE_NORMS, *ATTENTION],
            part="block_sparse_moe",
            expert=EXPERT,
            intermediate_size=self.expert_mlp,
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            sliding_window=self.window,
        )


class Block(Module):
    """x + attention(norm(x)), then x + mixture(norm(x))."""

    def __init__(self, c: MixtralConfig, kind: LayerKind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(embed=c.embed, heads=c.heads, kv_heads=c.kv, head_dim=c.head_size, window=kind.window)
        self.mlp_norm = rms_norm(c)
        self.mlp = feed_forward(c, kind)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class Mixtral(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: MixtralConfig) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> MixtralConfig:
    """Return the sizes of a Mixtral. Defaults are those of MixtralConfig in transformers."""
    fields.only("hidden_act", "silu")
    fields.only("router_jitter_noise", 0.0)
    pass_over_losses(fields)
    sizes = read_sizes(fields, theta=1e6, eps=1e-5, kv_heads=8)
    experts = fields.size("num_local_experts", 8)
    return MixtralConfig(
        **{**sizes, "mlp": None},
        expert_mlp=sizes["mlp"],
        experts=experts,
        chosen=chosen_of(fields, experts, 2),
        window=fields.optional("sliding_window"),
    )
