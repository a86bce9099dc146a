"""gpt-oss (OpenAI 2025, arXiv:2508.10925): windows in every other layer, sinks of attention, biases everywhere, and
experts with a clamped gate.

Shape letters: B batch, S seq, E embed, M mlp, X experts, N rows of a token and an expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.model.layers import Attention, Experts, layers_of, places_of
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Ops
from recipes.models.causal import ATTENTION, ATTENTION_BIASES, PRE_NORMS, CausalLM, read_sizes, rms_norm, sliding_of
from recipes.models.routed import (
    OVERRIDES,
    LayerKind,
    MixtureConfig,
    chosen_of,
    feed_forward,
    mixture_hub,
    pass_over_losses,
)

FIELDS = {**OVERRIDES, "swiglu_limit": "model.limit", "swiglu_alpha": "model.alpha", "layer_types": "model.sliding"}

# The rotary parameters of a config.json that states none.
STRETCH = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(MixtureConfig):
    """The sizes of a `GptOss`. `mlp` is not used."""

    window: int | None = None
    """Tokens that a token attends to in the layers of ``sliding``, itself included."""
    sliding: tuple[bool, ...] = ()
    """Whether each layer has the window. Empty: the first, and every other one after it."""
    attention_bias: bool = True
    """Add biases to queries, keys, values and the output of attention."""
    limit: float = 7.0
    """The largest gate of an expert, and the largest magnitude of what it multiplies."""
    alpha: float = 1.702
    """The gate is g sigmoid(alpha g)."""

    def build(self) -> GptOss:
        """Return the model."""
        return GptOss(self)

    def small(self) -> GptOssConfig:
        """Return the same kind of model with small sizes."""
        made: GptOssConfig = super().small()
        return replace(made, window=self.window and min(self.window, 8), sliding=self.sliding[-made.layers :])

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        sliding = self.sliding or tuple(i % 2 == 0 for i in range(self.layers))
        return tuple(LayerKind(window=self.window if s else None) for s in sliding)

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        biases = ATTENTION_BIASES if self.attention_bias else ()
        sinks = (("self_attn.sinks", "attn/sink_bias", None),)
        made = mixture_hub(
            self,
            "gpt_oss",
            "GptOssForCausalLM",
            [*PRE_NORMS, *ATTENTION, *biases, *sinks],
            expert=(),
            intermediate_size=self.expert_mlp,
            num_local_experts=self.experts,
            num_experts_per_tok=self.chosen,
            attention_bias=self.attention_bias,
            sliding_window=self.window,
            layer_types=["sliding_attention" if k.window else "full_attention" for k in self.kinds],
            swiglu_limit=self.limit,
            swiglu_alpha=self.alpha,
        )
        rows = [row for i, place in enumerate(places_of(self.kinds, "blocks")) for row in self._rows(i, *place)]
        return replace(made, rows=(*made.rows, *rows), overrides=FIELDS)

    def _rows(self, i: int, path: str, index: int) -> list[Row]:
        """Return the rows of the experts of layer `i`: gate and up lie interleaved in one tensor of all experts."""
        m, layer, experts = self.expert_mlp, f"model.layers.{i}.mlp", f"{path}/mlp/experts"
        gate, up = (0, 2 * m, 2), (1, 2 * m, 2)

        def row(theirs: str, ours: str, **more: Any) -> Row:
            return Row(theirs=f"{layer}.{theirs}", ours=ours, layer=index, **more)

        matrix: dict[str, Any] = {"stacked": 1, "rows": 1, "transposed": False}
        return [
            row("router.weight", f"{path}/mlp/router/weight", rows=1),
            row("router.bias", f"{path}/mlp/router/bias"),
            row("experts.gate_up_proj", f"{experts}/gate", part=gate, **matrix),
            row("experts.gate_up_proj", f"{experts}/up", part=up, **matrix),
            row("experts.gate_up_proj_bias", f"{experts}/gate_bias", part=gate, stacked=1),
            row("experts.gate_up_proj_bias", f"{experts}/up_bias", part=up, stacked=1),
            row("experts.down_proj", f"{experts}/down", **matrix),
            row("experts.down_proj_bias", f"{experts}/down_bias"),
        ]


class ClampedExperts(Experts):
    """Experts with biases: down((up x + 1) * g sigmoid(alpha g)), with g = gate x, both clamped by `limit`."""

    def __init__(self, c: GptOssConfig) -> None:
        super().__init__(embed=c.embed, mlp=c.expert_mlp, experts=c.experts)
        self.gate_bias = Param(experts=c.experts, mlp=c.expert_mlp, fan_in_axes=0, init="zeros")
        self.up_bias = Param(experts=c.experts, mlp=c.expert_mlp, fan_in_axes=0, init="zeros")
        self.down_bias = Param(experts=c.experts, embed=c.embed, fan_in_axes=0, init="zeros")
        self.limit, self.alpha = c.limit, c.alpha

    def params(self) -> tuple[Any, ...]:
        """Return the parameters that `expert` gets."""
        return *super().params(), self.gate_bias, self.up_bias, self.down_bias

    def expert(self, ops: Ops, x_NE: Array, *params: Array) -> Array:
        """Map rows (N, E) to (N, E), each by its own expert."""
        gate_XEM, up_XEM, down_XME, gate_bias_XM, up_bias_XM, down_bias_XE = params
        gate_NM = ops.name(ops.grouped_bias(ops.grouped_matmul(x_NE, gate_XEM), gate_bias_XM), "hidden")
        up_NM = ops.name(ops.grouped_bias(ops.grouped_matmul(x_NE, up_XEM), up_bias_XM), "hidden")
        gate_NM = ops.minimum(gate_NM, self.limit)
        up_NM = ops.clip(up_NM, -self.limit, self.limit)
        product_NM = ops.name((up_NM + 1.0) * gate_NM * ops.sigmoid(self.alpha * gate_NM), "product")
        return ops.grouped_bias(ops.grouped_matmul(product_NM, down_XME), down_bias_XE)


class Block(Module):
    """x + attention(norm(x)), then x + mixture(norm(x))."""

    def __init__(self, c: GptOssConfig, kind: LayerKind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv,
            head_dim=c.head_size,
            window=kind.window,
            bias="qkvo" if c.attention_bias else False,
            sinks=True,
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = feed_forward(c, kind, experts=ClampedExperts(c), bias=True)

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class GptOss(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: GptOssConfig) -> None:
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c))


def from_hub(fields: Fields) -> GptOssConfig:
    """Return the sizes of a gpt-oss. Defaults are those of GptOssConfig in transformers."""
    fields.only("hidden_act", "silu")
    pass_over_losses(fields)
    fields.get("experts_per_token")  # the older name of num_experts_per_tok, with the same value
    fields.get("initial_context_length")  # rope_scaling has it
    stated = any(fields.config.get(name) for name in ("rope_scaling", "rope_parameters"))
    given = None if stated else STRETCH
    sizes = read_sizes(fields, eps=1e-5, theta=150_000.0, head_dim=64, kv_heads=8, given=given)
    window = fields.optional("sliding_window", 128)
    sliding: tuple[bool, ...] = ()
    if fields.get("layer_types") is not None:
        sliding = tuple(sliding_of(fields, sizes["layers"]))
    experts = fields.size("num_local_experts", 128)
    return GptOssConfig(
        **{**sizes, "mlp": None},
        expert_mlp=sizes["mlp"],
        experts=experts,
        chosen=chosen_of(fields, experts, 4),
        attention_bias=fields.flag("attention_bias", True),
        window=window,
        sliding=sliding,
        limit=fields.number("swiglu_limit", 7.0),
        alpha=fields.number("swiglu_alpha", 1.702),
    )
