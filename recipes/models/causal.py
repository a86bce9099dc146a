"""What the decoders of recipes/models share: sizes, the frame around the layers, and names in transformers.

Shape letters: B batch, S seq, E embed, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row, rope_fields, rope_type
from portatrain.errors import UserError
from portatrain.model.layers import Dropout, Embedding, RMSNorm, places_of
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Batch, Loss, Ops
from portatrain.model.rope import Scaling

# A tensor of a layer: its name in transformers, ours, and the number of contracted axes; None: a vector or table as it
# is, 0: a vector of all elements, such as a bias over (heads, head_dim).
Names = Sequence[tuple[str, str, int | None]]
ATTENTION: Names = (
    ("self_attn.q_proj.weight", "attn/wq", 1),
    ("self_attn.k_proj.weight", "attn/wk", 1),
    ("self_attn.v_proj.weight", "attn/wv", 1),
    ("self_attn.o_proj.weight", "attn/wo", 2),
)
ATTENTION_BIASES: Names = (
    ("self_attn.q_proj.bias", "attn/q_bias", 0),
    ("self_attn.k_proj.bias", "attn/k_bias", 0),
    ("self_attn.v_proj.bias", "attn/v_bias", 0),
    ("self_attn.o_proj.bias", "attn/o_bias", 0),
)
QK_NORM: Names = (
    ("self_attn.q_norm.weight", "attn/q_norm/scale", None),
    ("self_attn.k_norm.weight", "attn/k_norm/scale", None),
)
MLP: Names = (
    ("mlp.gate_proj.weight", "mlp/gate", 1),
    ("mlp.up_proj.weight", "mlp/up", 1),
    ("mlp.down_proj.weight", "mlp/down", 1),
)
MLP_BIASES: Names = (
    ("mlp.gate_proj.bias", "mlp/gate_bias", 0),
    ("mlp.up_proj.bias", "mlp/up_bias", 0),
    ("mlp.down_proj.bias", "mlp/down_bias", 0),
)
PRE_NORMS: Names = (
    ("input_layernorm.weight", "attn_norm/scale", None),
    ("post_attention_layernorm.weight", "mlp_norm/scale", None),
)
# A field of config.json -> the recipe's field that decides it.
HUB_FIELDS = {
    "vocab_size": "model.vocab",
    "hidden_size": "model.embed",
    "intermediate_size": "model.mlp",
    "num_hidden_layers": "model.layers",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "head_dim": "model.head_dim",
    "rms_norm_eps": "model.norm_eps",
    "rope_theta": "model.rope_theta",
    "rope_scaling": "model.rope_scaling",
    "sliding_window": "model.window",
    "tie_word_embeddings": "model.tied",
    "attention_bias": "model.attention_bias",
    "mlp_bias": "model.mlp_bias",
}


@dataclass(frozen=True)
class Kind:
    """What distinguishes the layers of a model from each other."""

    window: int | None = None
    """Tokens that a token attends to, itself included. None: all before it."""
    rope: int | None = 0
    """Which of the model's rotary tables turns queries and keys. None: no rotary positions."""


MAY_BE_0 = ("shared_experts", "dense_layers", "predict_depth", "rotary")
"""Whole numbers of a config that are not sizes."""
ABOVE_0 = ("limit", "_scale", "softcap", "theta")
"""How the names of numbers end that something is divided, multiplied or bounded by."""


def check_sizes(config: Any) -> None:
    """Raise UserError for a size of a model that is below 1, or another number that is negative.

    A field that is None stands for a default, and 0 does not.
    """
    for field in fields(config):
        number, name = getattr(config, field.name), f"model.{field.name}"
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if field.name.endswith(ABOVE_0):
            good, expected = 0 < number < math.inf, "a finite number above 0"
        elif "float" in str(field.type):  # an integer is one, too
            good, expected = 0 <= number < math.inf, "a finite number of at least 0"
        else:
            least = 0 if field.name in MAY_BE_0 else 1
            good, expected = number >= least, f"an integer of at least {least}"
        if not good:
            raise UserError(name, expected=expected, got=repr(number), do="Enlarge it.")


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """The sizes that every family has."""

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int | None = None
    """Number of key-value heads. None: ``heads``."""
    head_dim: int | None = None
    """Features per head. None: embed / heads."""
    mlp: int | None = None
    """Hidden features of the feed-forward block. None: 8/3 embed, rounded up to a multiple of 32."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Scaling | None = None
    """Scaling of the rotary frequencies. None: no scaling."""
    tied: bool = True
    """Use the embedding table as the output table."""
    norm_eps: float = 1e-6
    """The eps of all norms."""
    z_loss: float = 0.0
    """Weight of the z-loss; 0 switches it off."""

    def __post_init__(self) -> None:
        check_sizes(self)

    def small(self) -> Any:
        """Return the same kind of model with small sizes, for `portatrain check`."""
        heads = min(self.heads, 4)
        return replace(
            self,
            vocab=min(self.vocab, 64),
            embed=8 * heads,
            layers=min(self.layers, 2),
            heads=heads,
            kv_heads=self.kv_heads and (heads if self.kv_heads == self.heads else max(1, heads // 2)),
            head_dim=self.head_dim and 8,
            mlp=self.mlp and 48,
        )

    @property
    def kv(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.head_dim or self.embed // self.heads

    @property
    def mlp_size(self) -> int:
        """Hidden features of the feed-forward block."""
        return self.mlp or -(-8 * self.embed // 96) * 32

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return (Kind(),) * self.layers

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens.

        They are, without recomputation: 6 per token for each weight of a matrix multiplication (including the head but
        not the embedding), and 12 * heads * head_dim * seq_len per token and layer for attention, halved for the causal
        mask (Chowdhery et al. 2022, appendix B) and reduced further by a window.
        """
        return flops(self, seq_len, self.kinds, mlp=3 * self.embed * self.mlp_size)


def flops(c: Any, seq_len: int, kinds: Iterable[Kind], *, mlp: float) -> float:
    """Return the floating-point operations of a sample, given the weights of a layer's feed-forward part."""
    found = 6.0 * c.vocab * c.embed * seq_len
    for kind in kinds:
        window = min(kind.window or seq_len, seq_len)
        seen = window * (seq_len - window / 2)  # pairs of query and key: S^2 / 2 without a window
        found += 6.0 * (2 * c.embed * c.head_size * (c.heads + c.kv) + mlp) * seq_len
        found += 12.0 * c.heads * c.head_size * seen
    return found


class CausalLM(Module):
    """A language model that predicts the next token: an embedding, layers, a norm and an output table.

    A batch has tokens and targets, (B, S) integers. For packed documents it also has segment_ids and positions, (B, S)
    integers, and mask, (B, S) float, the weight of each target. A subclass says what its layers take (`shared`).

    Args:
        c: the sizes; vocab, embed, tied and z_loss of them are read here.
        blocks: the layers, a Stack or what `layers_of` returns.
        final_norm: the norm before the output table.
        dropout: the rate after the embedding.
        embed_scale: a factor of the embedded tokens.
        logit_softcap: softcap of the logits.
    """

    def __init__(
        self,
        c: Any,
        blocks: Module,
        final_norm: Module,
        *,
        dropout: float = 0.0,
        embed_scale: float | None = None,
        logit_softcap: float | None = None,
    ) -> None:
        self.embed = Embedding(vocab=c.vocab, embed=c.embed)
        self.embed_dropout = Dropout(dropout)
        self.blocks = blocks
        self.final_norm = final_norm
        self.head = None if c.tied else Param(vocab=c.vocab, embed=c.embed, fan_in_axes=0, init=c.embed**-0.5)
        self.config: Any = c
        self.embed_scale, self.logit_softcap = embed_scale, logit_softcap

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed cross-entropy, in nats."""
        return self.loss_of(ops, self.hidden(ops, batch), batch["targets"], batch.get("mask"))

    def loss_of(self, ops: Ops, x_BSE: Array, targets: Array, mask: Array | None) -> Loss:
        """Return the summed cross-entropy of normalised features, in nats."""
        z_loss, cap = self.config.z_loss, self.logit_softcap
        return ops.cross_entropy(x_BSE, self.output_table, targets, mask=mask, z_loss=z_loss, softcap=cap)

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits, (B, S, V) float32. The batch needs no targets."""
        cap = self.logit_softcap
        logits = ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.output_table, dtype="float32")
        return logits if cap is None else cap * ops.tanh(logits / cap)

    @property
    def output_table(self) -> Array:
        """The output table, (V, E): the embedding's table if tied."""
        return self.embed.table if self.head is None else self.head

    def hidden(self, ops: Ops, batch: Batch) -> Array:
        """Return the normalised features before the output table, (B, S, E)."""
        return self.features(ops, batch)[0]

    def features(self, ops: Ops, batch: Batch) -> tuple[Array, tuple[Any, ...]]:
        """Return (the normalised features before the output table (B, S, E), what every layer took beside them)."""
        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = ops.arange(tokens.shape[1])
        shared = self.shared(ops, positions, batch.get("segment_ids"))
        x_BSE = ops.shard(self.embedded(ops, tokens, positions), "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, self.embed_dropout(ops, x_BSE), *shared)
        return ops.shard(self.final_norm(ops, x_BSE), "batch", "seq", None), shared

    def embedded(self, ops: Ops, tokens: Array, positions: Array) -> Array:
        """Return the features of the tokens before the first layer, (B, S, E)."""
        x_BSE = self.embed(ops, tokens)
        return x_BSE if self.embed_scale is None else x_BSE * self.embed_scale

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return what every layer takes beside the features: the rotary tables, and the segment ids."""
        c = self.config
        table = ops.rope_table(positions, c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        return (table,), segment_ids


def rms_norm(c: CausalConfig) -> RMSNorm:
    """Return the norm over the features of a token."""
    return RMSNorm(embed=c.embed, eps=c.norm_eps)


def rows(
    names: Names, places: Sequence[tuple[str, int]], *, tied: bool, prefix: str = "model", lm_head: str = "lm_head"
) -> tuple[Row, ...]:
    """Return the rows of a decoder: embedding, final norm, output table unless `tied`, and `names` for each layer."""
    found = [
        Row(theirs=f"{prefix}.embed_tokens.weight", ours="embed/table"),
        Row(theirs=f"{prefix}.norm.weight", ours="final_norm/scale"),
    ]
    if not tied:
        found.append(Row(theirs=f"{lm_head}.weight", ours="head"))
    for i, (path, index) in enumerate(places):
        found += [
            Row(theirs=f"{prefix}.layers.{i}.{theirs}", ours=f"{path}/{ours}", layer=index, rows=inputs)
            for theirs, ours, inputs in names
        ]
    return tuple(found)


def hub(c: Any, model_type: str, architecture: str, names: Names, **more: Any) -> Hub:
    """Return the table of a decoder in transformers. `more`: fields of config.json that its family adds or changes."""
    config: Mapping[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab,
        "hidden_size": c.embed,
        "intermediate_size": c.mlp_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv,
        "head_dim": c.head_size,
        "rms_norm_eps": c.norm_eps,
        **rope_fields(c.rope_theta, c.rope_scaling),
        "tie_word_embeddings": c.tied,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "pad_token_id": None,  # the default of some types is an id beyond a smaller table
        **more,
    }
    return Hub(config=config, rows=rows(names, places_of(c.kinds, "blocks"), tied=c.tied), overrides=HUB_FIELDS)


def read_sizes(
    fields: Fields,
    *,
    theta: float = 10_000.0,
    eps: float = 1e-6,
    tied: bool = False,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    partial: bool = False,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the sizes that every family has, from a config.json.

    given: the rotary parameters, if they are not those of the whole config. partial: a part of a head may be rotated,
    which the family reads itself. The others are the type's defaults; None
    for embed / heads and for the number of heads.
    """
    heads = fields.size("num_attention_heads")
    embed = fields.size("hidden_size")
    base, scaling, _ = fields.rope(theta=theta, given=given, partial=partial)
    return {
        "vocab": fields.size("vocab_size"),
        "embed": embed,
        "layers": fields.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": fields.kv_heads(heads, kv_heads),
        "head_dim": fields.size("head_dim", head_dim or max(1, embed // heads)),
        "mlp": fields.size("intermediate_size"),
        "rope_theta": base,
        "rope_scaling": scaling,
        "tied": fields.flag("tie_word_embeddings", tied),
        "norm_eps": fields.number("rms_norm_eps", eps),
    }


def types_of(kinds: Sequence[Kind]) -> list[str]:
    """Return config.json's `layer_types`."""
    return ["full_attention" if kind.window is None else "sliding_attention" for kind in kinds]


def two_ropes(c: CausalConfig, local_theta: float) -> dict[str, Any]:
    """Return the field of config.json for plain rotary positions of another theta in the layers with a window."""
    full = {"rope_theta": c.rope_theta, **(rope_type(c.rope_scaling) or {"rope_type": "default"})}
    local = {"rope_theta": local_theta, "rope_type": "default"}
    return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}


def read_two_ropes(fields: Fields, *, theta: float, local: float) -> tuple[dict[str, Any], float]:
    """Return the rotary parameters of the layers without a window, and the theta of those with one.

    theta, local: where neither `rope_parameters` nor `rope_theta` says another one.
    """
    nested = fields.get("rope_parameters", {})
    full, sliding = (
        dict(nested.get(name) or {}) if isinstance(nested, Mapping) else {}
        for name in ("full_attention", "sliding_attention")
    )
    full |= fields.get("rope_scaling") or {}
    if sliding.get("rope_type", "default") != "default":
        fields.problem("rope_parameters", "plain rotary positions in the layers with a window", sliding)
    return {"rope_theta": fields.get("rope_theta", theta), **full}, float(sliding.get("rope_theta", local))


def layer_types(kinds: Sequence[Kind], window: int | None) -> dict[str, Any]:
    """Return the fields of config.json for windows in some layers, as Qwen has them."""
    sliding = [kind.window is not None for kind in kinds]
    return {
        "use_sliding_window": any(sliding),
        "sliding_window": window if any(sliding) else None,
        "layer_types": types_of(kinds),
        # transformers before 4.50 has no layer_types, and gives a window to all layers from this one on.
        "max_window_layers": sliding.index(True) if any(sliding) else len(sliding),
    }


def read_layer_types(fields: Fields, layers: int, *, default: int | None) -> dict[str, Any]:
    """Return `window` and `sliding` as Qwen's config.json gives them; `default` is the type's default window."""
    window, first = fields.optional("sliding_window", default), fields.get("max_window_layers", 28)
    if not fields.flag("use_sliding_window", False):
        window = None
    named = fields.get("layer_types")
    sliding = (
        [window is not None and i >= first for i in range(layers)] if named is None else sliding_of(fields, layers)
    )
    if any(sliding) and window is None:
        fields.problem("layer_types", "full_attention in all layers, since no window is switched on")
    return {"window": window, "sliding": tuple(sliding)} if window and any(sliding) else {}


def sliding_of(fields: Fields, layers: int) -> list[bool]:
    """Return whether each layer has a window, from the field `layer_types`."""
    named = fields.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(named, list) or len(named) != layers or any(n not in kinds for n in named):
        fields.problem("layer_types", f"{layers} times full_attention or sliding_attention")
        return [False] * layers
    return [n == "sliding_attention" for n in named]
