"""A transformer encoder's layers, which a ViT and the towers of a SigLIP share, and their names in transformers.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portatrain.checkpoint.interop import Fields, Row
from portatrain.errors import UserError
from portatrain.model.layers import MLP, Attention, Dropout, LayerNorm
from portatrain.model.module import Module, Stack
from portatrain.model.ops import Array, Ops
from recipes.models.causal import check_sizes

ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""An activation's name in transformers -> ours. gelu_new and gelu_pytorch_tanh are one function."""

# A tensor of a layer, ours, by the name that a family gives it: a weight and a bias each.
WEIGHTS: Mapping[str, tuple[str, str, int | None]] = {
    "q": ("attn/wq", "attn/q_bias", 1),
    "k": ("attn/wk", "attn/k_bias", 1),
    "v": ("attn/wv", "attn/v_bias", 1),
    "o": ("attn/wo", "attn/o_bias", 2),
    "up": ("mlp/up", "mlp/up_bias", 1),
    "down": ("mlp/down", "mlp/down_bias", 1),
    "attn_norm": ("attn_norm/scale", "attn_norm/bias", None),
    "mlp_norm": ("mlp_norm/scale", "mlp_norm/bias", None),
}


@dataclass(frozen=True, kw_only=True)
class EncoderSizes:
    """The sizes of an encoder, that is, of its layers."""

    embed: int
    layers: int
    heads: int
    mlp: int | None = None
    """Hidden features of the feed-forward part. None: 4 embed."""
    activation: str = "gelu"
    """'gelu', 'gelu_tanh', 'relu' or 'silu'."""
    norm_eps: float = 1e-6
    """The eps of all norms."""

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.embed % (2 * self.heads):
            raise UserError(
                type(self).__name__,
                expected="embed a multiple of 2 * heads, so that heads have an even number of features",
                got=f"embed={self.embed}, heads={self.heads}",
                do="Change one of the two.",
            )

    @property
    def mlp_size(self) -> int:
        """Hidden features of the feed-forward part."""
        return self.mlp or 4 * self.embed

    def small_sizes(self) -> dict[str, Any]:
        """Return the small sizes of an encoder of the same kind, for `portatrain check`."""
        heads = min(self.heads, 4)
        return {"embed": 8 * heads, "layers": min(self.layers, 2), "heads": heads, "mlp": self.mlp and 48}

    def flops_of(self, positions: int) -> float:
        """Return the floating-point operations of forward and backward of the layers for one sample.

        They are 6 for each weight and position, and 12 * embed * positions^2 for the attention of each layer.
        """
        weights = 4 * self.embed**2 + 2 * self.embed * self.mlp_size
        return self.layers * (6.0 * weights * positions + 12.0 * self.embed * positions**2)


class EncoderLayer(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every position attends to all positions.

    Args:
        c: the sizes.
        bias: the letters of what has a bias in attention, as in `Attention`.
        dropout: the rate after attention and after the feed-forward part.
    """

    def __init__(self, c: EncoderSizes, *, bias: str = "qkvo", dropout: float = 0.0) -> None:
        self.attn_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.attn = attention(c, bias=bias)
        self.attn_dropout = Dropout(dropout)
        self.mlp_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = MLP(embed=c.embed, mlp=c.mlp_size, activation=c.activation)
        self.mlp_dropout = Dropout(dropout)

    def __call__(self, ops: Ops, x_BSE: Array) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn_dropout(ops, self.attn(ops, self.attn_norm(ops, x_BSE)))
        return x_BSE + self.mlp_dropout(ops, self.mlp(ops, self.mlp_norm(ops, x_BSE))), None


class Encoder(Module):
    """The layers of an encoder and the norm after them: (B, S, E) to (B, S, E)."""

    def __init__(self, c: EncoderSizes, **options: Any) -> None:
        self.blocks = Stack(EncoderLayer(c, **options), c.layers)
        self.norm = LayerNorm(embed=c.embed, eps=c.norm_eps)

    def __call__(self, ops: Ops, x_BSE: Array) -> Array:
        x_BSE, _ = self.blocks(ops, ops.shard(x_BSE, "batch", "res_seq", None))
        return ops.shard(self.norm(ops, x_BSE), "batch", "seq", None)


def attention(c: EncoderSizes, *, bias: str = "qkvo") -> Attention:
    """Return attention in which every position attends to all positions."""
    return Attention(
        embed=c.embed, heads=c.heads, kv_heads=c.heads, head_dim=c.embed // c.heads, causal=False, bias=bias
    )


def layer_rows(names: Mapping[str, str], theirs: str, ours: str, layers: int, *, without: str = "") -> Iterable[Row]:
    """Return the rows of an encoder's layers.

    names: the name of each of `WEIGHTS` in a layer of theirs. theirs, ours: the path of the layers, theirs with a place
    for the number. without: the letters of what has no bias.
    """
    for i in range(layers):
        for name, (weight, bias, inputs) in WEIGHTS.items():
            at = f"{theirs.format(i)}.{names[name]}"
            yield Row(theirs=f"{at}.weight", ours=f"{ours}/{weight}", layer=i, rows=inputs)
            if name not in without:
                yield Row(theirs=f"{at}.bias", ours=f"{ours}/{bias}", layer=i, rows=None if inputs is None else 0)


def both(theirs: str, ours: str, bias: str, inputs: int | None) -> tuple[Row, Row]:
    """Return the rows of a weight and of a vector beside it."""
    weight = Row(theirs=f"{theirs}.weight", ours=ours, rows=inputs)
    return weight, Row(theirs=f"{theirs}.bias", ours=bias, rows=None if inputs is None else 0)


def patch_rows(theirs: str, ours: str) -> tuple[Row, Row]:
    """Return the rows of the map from patches to features: a convolution over (features, channels, rows, columns)."""
    kernel = Row(theirs=f"{theirs}.weight", ours=f"{ours}/kernel", axes=(3, 2, 0, 1))
    return kernel, Row(theirs=f"{theirs}.bias", ours=f"{ours}/bias")


def read_sizes(fields: Fields, *, eps: float, activation: str, **defaults: int) -> dict[str, Any]:
    """Return the sizes of an encoder from a config.json; the others are the type's defaults."""
    named = fields.only("hidden_act", *dict.fromkeys((activation, *ACTIVATIONS, "gelu_new", "swish")))
    return {
        "embed": fields.size("hidden_size", defaults["embed"]),
        "layers": fields.size("num_hidden_layers", defaults["layers"]),
        "heads": fields.size("num_attention_heads", defaults["heads"]),
        "mlp": fields.size("intermediate_size", defaults["mlp"]),
        "activation": {**ACTIVATIONS, "gelu_new": "gelu_tanh", "swish": "silu"}[named],
        "norm_eps": fields.number("layer_norm_eps", eps),
    }


def read_pair(fields: Fields, name: str, default: int) -> tuple[int, int]:
    """Return rows and columns, from a field that has one number for both or two."""
    found = fields.get(name, default)
    pair = [found, found] if isinstance(found, int) else found
    good = isinstance(pair, Sequence) and len(pair) == 2
    if not good or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        fields.problem(name, "a whole number of at least 1, or two of them")
        return default, default
    return pair[0], pair[1]


def config_of(c: EncoderSizes) -> dict[str, Any]:
    """Return the fields of config.json for an encoder."""
    return {
        "hidden_size": c.embed,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_size,
        "hidden_act": {ours: theirs for theirs, ours in ACTIVATIONS.items()}[c.activation],
        "layer_norm_eps": c.norm_eps,
    }
