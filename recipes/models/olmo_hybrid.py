"""OLMo Hybrid (huggingface.co/allenai/Olmo-Hybrid-7B): three layers of four are gated delta nets with norms before
their parts; the others are layers of an OLMo 2, in the released model without rotary positions.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.errors import UserError
from portatrain.model.layers import GatedDeltaNet, GatedMLP, documents_of, layers_of, places_of
from portatrain.model.module import Module
from portatrain.model.ops import Array, Ops
from recipes.models import olmo2
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    HUB_FIELDS,
    MLP,
    CausalLM,
    Kind,
    Names,
    flops,
    hub,
    read_sizes,
    rms_norm,
)

DELTA: Names = (
    ("input_layernorm.weight", "delta_norm/scale", None),
    ("post_attention_layernorm.weight", "mlp_norm/scale", None),
    ("linear_attn.q_proj.weight", "delta/wq", 1),
    ("linear_attn.k_proj.weight", "delta/wk", 1),
    ("linear_attn.v_proj.weight", "delta/wv", 1),
    ("linear_attn.a_proj.weight", "delta/decay", 1),
    ("linear_attn.dt_bias", "delta/decay_bias", None),
    ("linear_attn.A_log", "delta/decay_log", None),
    ("linear_attn.b_proj.weight", "delta/strength", 1),
    ("linear_attn.g_proj.weight", "delta/gate", 1),
    ("linear_attn.o_norm.weight", "delta/out_norm/scale", None),
    ("linear_attn.o_proj.weight", "delta/wo", 2),
)
THETA = 10_000.0
"""Base of the rotary frequencies if nothing says another one, or that there are none."""
OTHER_NAMES = {"attention_layer_norm": "input_layernorm", "feedforward_layer_norm": "post_attention_layernorm"}
"""Names of norms in the released files, and of other ones in files that transformers saves."""
OVERRIDES = {
    "layer_types": "model.recurrent",
    "linear_num_key_heads": "model.key_heads",
    "linear_num_value_heads": "model.value_heads",
    "linear_key_head_dim": "model.key_size",
    "linear_value_head_dim": "model.value_size",
    "linear_conv_kernel_dim": "model.taps",
    "linear_allow_neg_eigval": "model.doubled",
}


@dataclass(frozen=True)
class HybridKind(Kind):
    """What distinguishes the layers of an `OlmoHybrid` from each other."""

    recurrent: bool = False
    """The layer is a gated delta net."""


@dataclass(frozen=True, kw_only=True)
class OlmoHybridConfig(olmo2.Olmo2Config):
    """The sizes of an `OlmoHybrid`."""

    key_heads: int | None = None
    """Heads of queries and keys in a gated delta net. None: ``heads``."""
    value_heads: int | None = None
    """Heads of values in a gated delta net, a multiple of its key heads. None: ``heads``."""
    key_size: int | None = None
    """Features of a key head in a gated delta net. None: 3/4 embed / key heads."""
    value_size: int | None = None
    """Features of a value head in a gated delta net. None: twice those of a key head."""
    taps: int = 4
    """Positions that the convolution in a gated delta net sees."""
    doubled: bool = True
    """The writing strength in a gated delta net is in (0, 2) rather than (0, 1)."""
    chunk: int = 64
    """Positions that a gated delta net computes at once; the results depend on it by rounding alone."""
    recurrent: tuple[bool, ...] = ()
    """Whether each layer is a gated delta net. Empty: all but each fourth, and all but the last if there are fewer."""
    rotary: bool = False
    """Give attention rotary positions; without them the fields of the rotary frequencies have no effect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_heads", "value_heads", "key_size", "value_size", "taps", "chunk"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise UserError(f"model.{name}", expected="an integer of at least 1", got=repr(size), do="Enlarge it.")
        if self.recurrent and len(self.recurrent) != self.layers:
            raise UserError(
                "model.recurrent",
                expected=f"{self.layers} values, one for each layer",
                got=str(len(self.recurrent)),
                do="Change model.layers too, or leave recurrent empty.",
            )

    def build(self) -> OlmoHybrid:  # type: ignore[override]  # shares the sizes of Olmo2, not its class
        """Return the model."""
        return OlmoHybrid(self)

    def small(self) -> OlmoHybridConfig:
        """Return the same kind of model with small sizes."""
        made: OlmoHybridConfig = super(OlmoHybridConfig, replace(self, recurrent=(), layers=2)).small()
        groups = self.delta["value_heads"] // self.delta["key_heads"]
        heads = min(self.delta["key_heads"], 2)
        sizes: dict[str, Any] = {
            "key_heads": heads,
            "value_heads": heads * min(groups, 2),
            "key_size": 8,
            "value_size": 12,
        }
        return replace(made, **sizes, taps=min(self.taps, 3), chunk=min(self.chunk, 8))

    @property
    def delta(self) -> dict[str, int]:
        """The sizes of a gated delta net."""
        keys = self.key_heads or self.heads
        size = self.key_size or max(1, int(0.75 * self.embed / keys))
        return {
            "key_heads": keys,
            "value_heads": self.value_heads or self.heads,
            "key_size": size,
            "value_size": self.value_size or 2 * size,
        }

    @property
    def kinds(self) -> tuple[HybridKind, ...]:
        """The kind of each layer."""
        return tuple(HybridKind(recurrent=r) for r in self.recurrent or usual(self.layers))

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers.

        Raises:
            UserError: all layers are of one kind, which transformers refuses.
        """
        kinds, delta = self.kinds, self.delta
        if len(set(kinds)) == 1:
            raise UserError(
                "model.recurrent",
                expected="a gated delta net and a layer with attention, at least one of each",
                got=f"{self.layers} layers of one kind",
                do="Export --to orbax, dcp, torch or nnx.",
            )
        fields = {
            "eos_token_id": None,  # the default of the type is an id beyond a smaller table
            "attention_bias": self.attention_bias,
            "layer_types": ["linear_attention" if kind.recurrent else "full_attention" for kind in kinds],
            "linear_num_key_heads": delta["key_heads"],
            "linear_num_value_heads": delta["value_heads"],
            "linear_key_head_dim": delta["key_size"],
            "linear_value_head_dim": delta["value_size"],
            "linear_conv_kernel_dim": self.taps,
            "linear_allow_neg_eigval": self.doubled,
        }
        made = hub(self, "olmo_hybrid", "OlmoHybridForCausalLM", (), **fields)
        # transformers rotates by theta 10,000 unless the field is there and null.
        none: dict[str, Any] = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"))
        config = {**made.config, **({} if self.rotary else none)}
        overrides = {**HUB_FIELDS, **OVERRIDES}
        return replace(
            made,
            config=config,
            rows=(*made.rows, *self._layer_rows()),
            overrides=overrides,
            other_names=OTHER_NAMES,
            # transformers saves the kernels in three equal parts, whatever the sizes of keys and values are.
            pieces=tuple(
                tuple(f"model.layers.{i}.linear_attn.{part}_conv1d.weight" for part in "qkv")
                for i, kind in enumerate(kinds)
                if kind.recurrent
            ),
        )

    def _layer_rows(self) -> list[Row]:
        attention = [*olmo2.NORMS, *ATTENTION, *(ATTENTION_BIASES if self.attention_bias else ())]
        found = []
        for i, (kind, (path, at)) in enumerate(zip(self.kinds, places_of(self.kinds, "blocks"), strict=True)):
            name = f"model.layers.{i}"
            found += [
                Row(theirs=f"{name}.{theirs}", ours=f"{path}/{ours}", layer=at, rows=inputs)
                for theirs, ours, inputs in (*(DELTA if kind.recurrent else attention), *MLP)
            ]
            for part in "qkv" if kind.recurrent else "":
                theirs = f"{name}.linear_attn.{part}_conv1d.weight"
                found.append(Row(theirs=theirs, ours=f"{path}/delta/{part}_conv", layer=at, rows=1, depthwise=True))
        return found

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens.

        They are those of `CausalConfig` for the layers with attention. For a gated delta net they are 6 per token for
        each weight, and 18 for each element of a state: it is read twice and written once. What the chunks add to the
        recurrence is not counted, as pairs that a mask hides are not.
        """
        c, delta = self, self.delta
        layers = sum(kind.recurrent for kind in self.kinds)
        mlp = 3 * c.embed * c.mlp_size
        keys, values = delta["key_heads"] * delta["key_size"], delta["value_heads"] * delta["value_size"]
        weights = c.embed * (2 * keys + 3 * values + 2 * delta["value_heads"]) + c.taps * (2 * keys + values) + mlp
        state = values * delta["key_size"]
        attending = flops(c, seq_len, [kind for kind in self.kinds if not kind.recurrent], mlp=mlp)
        return attending + layers * seq_len * (6.0 * weights + 18.0 * state)


def usual(layers: int) -> tuple[bool, ...]:
    """Return whether each layer is a gated delta net, if nothing else is said."""
    found = [bool((i + 1) % 4) for i in range(layers)]
    return tuple(found) if layers > 3 else (*found[:-1], False)


class DeltaBlock(Module):
    """x + delta(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: OlmoHybridConfig) -> None:
        self.delta_norm = rms_norm(c)
        self.delta = GatedDeltaNet(embed=c.embed, **c.delta, taps=c.taps, doubled=c.doubled, chunk=c.chunk)
        self.mlp_norm = rms_norm(c)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)

    def __call__(
        self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None, documents: Array | None
    ) -> tuple[Array, None]:
        x_BSE = x_BSE + self.delta(ops, self.delta_norm(ops, x_BSE), documents)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class AttentionBlock(olmo2.Block):
    """x + norm(attention(x)), then x + norm(mlp(x))."""

    def __call__(
        self, ops: Ops, x_BSE: Array, ropes: tuple[Any, ...], segment_ids: Array | None, documents: Array | None = None
    ) -> tuple[Array, None]:
        return super().__call__(ops, x_BSE, ropes, segment_ids)


class OlmoHybrid(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has. No state and no convolution
    crosses from a document to the next one."""

    def __init__(self, c: OlmoHybridConfig) -> None:
        def layer(kind: HybridKind) -> Module:
            return DeltaBlock(c) if kind.recurrent else AttentionBlock(c, kind)

        super().__init__(c, layers_of(c.kinds, layer), rms_norm(c))

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the rotary table or None, the segment ids, and the numbers of the documents."""
        ropes = super().shared(ops, positions, segment_ids)[0] if self.config.rotary else (None,)
        return ropes, segment_ids, documents_of(ops, segment_ids)


def from_hub(fields: Fields) -> OlmoHybridConfig:
    """Return the sizes of an OLMo Hybrid. Defaults are those of OlmoHybridConfig in transformers."""
    fields.only("hidden_act", "silu")
    for name in ("a_log_min", "a_log_max", "dt_min", "dt_max", "dt_init_floor"):  # how weights began
        fields.get(f"linear_{name}")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters")
    given = rope if isinstance(rope, dict) and "rope_theta" in rope else fields.config
    rotary = given.get("rope_theta", THETA) is not None  # null: no rotary positions, as in the released model
    sizes = read_sizes(fields)
    if not rotary:
        sizes |= {"rope_theta": THETA, "rope_scaling": None}
    layers, heads = sizes["layers"], sizes["heads"]
    keys = fields.size("linear_num_key_heads", heads)
    size = fields.size("linear_key_head_dim", max(1, int(0.75 * sizes["embed"] / keys)))
    values = fields.size("linear_num_value_heads", heads)
    if values % keys:
        fields.problem("linear_num_value_heads", f"a multiple of linear_num_key_heads, {keys}", values)
    return OlmoHybridConfig(
        **sizes,
        attention_bias=fields.flag("attention_bias", False),
        key_heads=keys,
        value_heads=values,
        key_size=size,
        value_size=fields.size("linear_value_head_dim", 2 * size),
        taps=fields.size("linear_conv_kernel_dim", 4),
        doubled=fields.flag("linear_allow_neg_eigval", True),
        recurrent=recurrent_of(fields, layers),
        rotary=rotary,
    )


def recurrent_of(fields: Fields, layers: int) -> tuple[bool, ...]:
    """Return whether each layer is a gated delta net, from the field `layer_types`."""
    named, kinds = fields.get("layer_types"), ("linear_attention", "full_attention")
    if named is None:
        return usual(layers)
    if not isinstance(named, list) or len(named) != layers or set(named) != set(kinds):
        fields.problem("layer_types", f"{layers} times linear_attention or full_attention, each at least once")
        return usual(layers)
    return tuple(name == "linear_attention" for name in named)
