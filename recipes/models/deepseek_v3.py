"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437): latent attention, first layers dense, then experts that a sigmoid
router chooses within groups, balanced without a loss, beside shared ones. Multi-token prediction is in `ahead.py`.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.model.layers import LatentAttention, layers_of, places_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from portatrain.model.rope import YarnScaling
from portatrain.recipe import added_later
from recipes.models.ahead import AheadLM, rows_of
from recipes.models.causal import PRE_NORMS, read_sizes, rms_norm
from recipes.models.routed import (
    OVERRIDES,
    LayerKind,
    MixtureConfig,
    chosen_of,
    count,
    experts_of,
    feed_forward,
    feed_forward_rows,
    mixture_hub,
    pass_over_losses,
)

FIELDS = {
    **OVERRIDES,
    "q_lora_rank": "model.q_rank",
    "kv_lora_rank": "model.kv_rank",
    "qk_nope_head_dim": "model.nope_dim",
    "qk_rope_head_dim": "model.rope_dim",
    "v_head_dim": "model.value_dim",
    "n_shared_experts": "model.shared_experts",
    "routed_scaling_factor": "model.weight_scale",
    "n_group": "model.groups",
    "topk_group": "model.chosen_groups",
    "first_k_dense_replace": "model.dense_layers",
    "rope_interleave": "model.interleaved",
}

MOST = 8
"""Layers of a folder that predict further tokens, at most; DeepSeek-V3 has one."""


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(MixtureConfig):
    """The sizes of a `DeepseekV3`. `kv_heads` and `head_dim` are not used."""

    q_rank: int | None
    """Size of the latent of queries. None: queries are made from the input."""
    kv_rank: int
    """Size of the latent of keys and values."""
    nope_dim: int
    """Features per head of queries and keys without positions."""
    rope_dim: int
    """Features per head of queries and keys with rotary positions."""
    value_dim: int
    """Features per head of the values."""
    dense_layers: int = 0
    """Number of first layers without experts."""
    shared_experts: int = 1
    """Experts that every token takes."""
    groups: int = 1
    """Groups of neighbouring experts."""
    chosen_groups: int = 1
    """Groups from which a token's experts are chosen."""
    normalise: bool = True
    """Divide the weights of a token's experts by their sum."""
    weight_scale: float = 1.0
    """A factor of the weights of a token's experts."""
    balance_rate: float = 0.001
    """How much the balance of an expert moves after a step."""
    mscale: float = 0.0
    """If yarn stretches the positions, the scale of attention scores grows by (0.1 mscale log(factor) + 1)^2
    (`mscale_all_dim` of config.json)."""
    interleaved: bool = True
    """The files of transformers hold rotary features in pairs; ours are in halves. It changes no model of ours."""
    predict_depth: int = added_later(0)
    """Number of modules that predict further tokens, one more each; see `ahead.AheadLM`."""
    predict_weight: float = added_later(0.3)
    """Weight of the mean of their losses."""

    def build(self) -> DeepseekV3:
        """Return the model."""
        return DeepseekV3(self)

    def small(self) -> DeepseekV3Config:
        """Return the same kind of model with small sizes."""
        made: DeepseekV3Config = super().small()
        return replace(
            made,
            q_rank=self.q_rank and 12,
            kv_rank=8,
            nope_dim=8,
            rope_dim=4,
            value_dim=8,
            dense_layers=min(self.dense_layers, 1),
            predict_depth=min(self.predict_depth, 2),
            groups=2 if self.groups > 1 and made.experts == 4 else 1,
            chosen_groups=min(self.chosen_groups, 2) if self.groups > 1 and made.experts == 4 else 1,
        )

    @property
    def head_size(self) -> int:
        """Features per head of queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def attention_scale(self) -> float:
        """The scale of attention scores (Peng et al. 2023, arXiv:2309.00071, eq. 22, for the stretched ones)."""
        yarn = self.rope_scaling if isinstance(self.rope_scaling, YarnScaling) else None
        factor = 1.0 if yarn is None or yarn.factor <= 1 else 0.1 * self.mscale * math.log(yarn.factor) + 1.0
        return float(factor**2 * self.head_size**-0.5)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.all_kinds[: self.layers]

    @property
    def all_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer, and of the layer of each module that predicts a further token."""
        return tuple(LayerKind(routed=i >= self.dense_layers) for i in range(self.layers + self.predict_depth))

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens: 6 per token
        for each weight of a matrix that the token meets, and 6 per pair of a query and a key that it sees for each
        feature of the two contractions of attention. Nothing is recomputed. A module that predicts a further token has
        a layer, a projection and the output table."""
        e, h = self.embed, self.heads
        queries = h * self.head_size * (e if self.q_rank is None else self.q_rank) + e * (self.q_rank or 0)
        keys = e * (self.kv_rank + self.rope_dim) + self.kv_rank * h * (self.nope_dim + self.value_dim)
        attention = queries + keys + h * self.value_dim * e
        routed = self.active_mlp + 3 * e * self.expert_mlp * self.shared_experts
        weights = sum(attention + (routed if k.routed else 3 * e * self.mlp_size) for k in self.all_kinds)
        weights += self.vocab * e + self.predict_depth * (2 * e * e + self.vocab * e)
        pairs = len(self.all_kinds) * seq_len * seq_len / 2
        return 6.0 * weights * seq_len + 6.0 * h * (self.head_size + self.value_dim) * pairs

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        made = mixture_hub(
            self,
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            PRE_NORMS,
            head_dim=self.rope_dim,
            num_key_value_heads=self.heads,
            n_routed_experts=self.experts,
            num_experts_per_tok=self.chosen,
            moe_intermediate_size=self.expert_mlp,
            n_shared_experts=self.shared_experts,
            first_k_dense_replace=self.dense_layers,
            moe_layer_freq=1,
            n_group=self.groups,
            topk_group=self.chosen_groups,
            norm_topk_prob=self.normalise,
            routed_scaling_factor=self.weight_scale,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            q_lora_rank=self.q_rank,
            kv_lora_rank=self.kv_rank,
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.value_dim,
            attention_bias=False,
            rope_interleave=self.interleaved,
            num_nextn_predict_layers=self.predict_depth,
        )
        config = dict(made.config)
        if isinstance(self.rope_scaling, YarnScaling) and self.mscale:
            for name in ("rope_scaling", "rope_parameters"):
                config[name] = {**config[name], "mscale_all_dim": self.mscale}
        rows = [row for i, place in enumerate(places_of(self.kinds, "blocks")) for row in self._rows(i, *place)]
        for depth in range(self.predict_depth):
            i, path = self.layers + depth, f"ahead/{depth}/layer"
            theirs = f"model.layers.{i}"
            rows += rows_of(depth, theirs, tied=self.tied)
            rows += (Row(theirs=f"{theirs}.{name}", ours=f"{path}/{ours}", layer=0) for name, ours, _ in PRE_NORMS)
            rows += feed_forward_rows(self, i, self.all_kinds[i], path, 0)
            rows += self._rows(i, path, 0)
        first = self.layers + self.predict_depth
        return Hub(
            config=config,
            rows=(*made.rows, *rows),
            overrides=FIELDS,
            passed_over=tuple(f"model.layers.{i}." for i in range(first, first + MOST)),
            takes_them="model.predict_depth",
        )

    def _rows(self, i: int, path: str, index: int) -> list[Row]:
        """Return the rows of latent attention, of the shared experts and of the balance of layer `i`."""
        n, r, v, rank = self.nope_dim, self.rope_dim, self.value_dim, self.kv_rank
        pairs = (*range(0, r, 2), *range(1, r, 2)) if self.interleaved else tuple(range(r))
        query, latent = (*range(n), *(n + p for p in pairs)), tuple(rank + p for p in pairs)
        layer = f"model.layers.{i}."

        def row(theirs: str, ours: str, **more: Any) -> Row:
            return Row(theirs=layer + theirs, ours=f"{path}/{ours}", layer=index, **more)

        down = "self_attn.kv_a_proj_with_mqa.weight"
        found = [
            row(down, "attn/wkv_down", rows=1, grouped=(rank + r, tuple(range(rank)))),
            row(down, "attn/wk_rope", rows=1, grouped=(rank + r, latent)),
            row("self_attn.kv_a_layernorm.weight", "attn/kv_norm/scale"),
            row("self_attn.kv_b_proj.weight", "attn/wk", rows=1, grouped=(n + v, tuple(range(n)))),
            row("self_attn.kv_b_proj.weight", "attn/wv", rows=1, grouped=(n + v, tuple(range(n, n + v)))),
            row("self_attn.o_proj.weight", "attn/wo", rows=2),
        ]
        if self.q_rank is None:
            found.append(row("self_attn.q_proj.weight", "attn/wq", rows=1, grouped=(n + r, query)))
        else:
            found += [
                row("self_attn.q_a_proj.weight", "attn/wq_down", rows=1),
                row("self_attn.q_a_layernorm.weight", "attn/q_norm/scale"),
                row("self_attn.q_b_proj.weight", "attn/wq", rows=1, grouped=(n + r, query)),
            ]
        if self.all_kinds[i].routed:
            found.append(row("mlp.gate.e_score_correction_bias", "mlp/router/balance", state=True))
            if self.shared_experts:
                found += [
                    row(f"mlp.shared_experts.{name}_proj.weight", f"mlp/shared/{name}", rows=1)
                    for name in ("gate", "up", "down")
                ]
        return found


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), dense or routed."""

    def __init__(self, c: DeepseekV3Config, kind: LayerKind) -> None:
        self.attn_norm = rms_norm(c)
        self.attn = LatentAttention(
            embed=c.embed,
            heads=c.heads,
            nope_dim=c.nope_dim,
            rope_dim=c.rope_dim,
            value_dim=c.value_dim,
            kv_rank=c.kv_rank,
            q_rank=c.q_rank,
            scale=c.attention_scale,
        )
        self.mlp_norm = rms_norm(c)
        self.mlp = feed_forward(
            c,
            kind,
            shared=c.shared_experts * c.expert_mlp,
            scores="sigmoid",
            normalise=c.normalise,
            scale=c.weight_scale,
            groups=c.groups,
            chosen_groups=c.chosen_groups,
            group_best=min(2, c.experts // c.groups),
            balance_rate=c.balance_rate,
        )

    def __call__(self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), ropes[0], segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class DeepseekV3(AheadLM):
    """A language model that predicts the next token, and in training those after it (`predict_depth`); `CausalLM` says
    what a batch has."""

    def __init__(self, c: DeepseekV3Config) -> None:
        ahead = [Block(c, kind) for kind in c.all_kinds[c.layers :]]
        super().__init__(c, layers_of(c.kinds, lambda kind: Block(c, kind)), rms_norm(c), ahead=ahead)

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return what every layer takes beside the features: the rotary table, and the segment ids."""
        c = self.config
        table = ops.rope_table(positions, c.rope_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        return (table,), segment_ids


def from_hub(fields: Fields) -> DeepseekV3Config:
    """Return the sizes of a DeepSeek-V3. Defaults are those of DeepseekV3Config in transformers."""
    for name, value in (("hidden_act", "silu"), ("attention_bias", False), ("scoring_func", "sigmoid")):
        fields.only(name, value)
    fields.only("topk_method", "noaux_tc")
    fields.only("moe_layer_freq", 1)
    pass_over_losses(fields)
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "qk_head_dim"):
        fields.get(name)  # they decide no logits; `predict_depth` says which further layers are read
    sizes = read_sizes(fields, kv_heads=128)
    if sizes.pop("kv_heads") != sizes["heads"]:
        fields.problem("num_key_value_heads", str(sizes["heads"]))
    sizes.pop("head_dim")
    held = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    experts = experts_of(fields, "n_routed_experts", 256)
    return DeepseekV3Config(
        **sizes,
        mscale=float(held.get("mscale_all_dim") or 0.0),
        experts=experts,
        chosen=chosen_of(fields, experts, 8),
        expert_mlp=fields.size("moe_intermediate_size", 2048),
        dense_layers=count(fields, "first_k_dense_replace", 3),
        shared_experts=count(fields, "n_shared_experts", 1),
        groups=fields.size("n_group", 8),
        chosen_groups=fields.size("topk_group", 4),
        normalise=fields.flag("norm_topk_prob", True),
        weight_scale=fields.number("routed_scaling_factor", 2.5),
        q_rank=fields.optional("q_lora_rank", 1536),
        kv_rank=fields.size("kv_lora_rank", 512),
        nope_dim=fields.size("qk_nope_head_dim", 128),
        rope_dim=fields.size("qk_rope_head_dim", 64),
        value_dim=fields.size("v_head_dim", 128),
        interleaved=fields.flag("rope_interleave", True),
    )
