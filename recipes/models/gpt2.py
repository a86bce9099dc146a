"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm before each part, biases everywhere, GELU.

Files hold weights as (input, output), with queries, keys and values in one tensor. Shape letters: B batch, S seq,
E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub, Row
from portatrain.errors import UserError
from portatrain.model.layers import MLP, Attention, LayerNorm
from portatrain.model.module import Module, Param, Stack
from portatrain.model.ops import Array, Ops
from recipes.models.causal import CausalLM, Kind, check_sizes, flops

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# A tensor of a layer: its name in transformers, ours, and the number of contracted axes; None: a vector as it is.
LAYER = (
    ("ln_1.weight", "attn_norm/scale", None),
    ("ln_1.bias", "attn_norm/bias", None),
    ("attn.c_proj.weight", "attn/wo", 2),
    ("attn.c_proj.bias", "attn/o_bias", None),
    ("ln_2.weight", "mlp_norm/scale", None),
    ("ln_2.bias", "mlp_norm/bias", None),
    ("mlp.c_fc.weight", "mlp/up", 1),
    ("mlp.c_fc.bias", "mlp/up_bias", None),
    ("mlp.c_proj.weight", "mlp/down", 1),
    ("mlp.c_proj.bias", "mlp/down_bias", None),
)


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The sizes of a `GPT2`."""

    vocab: int
    embed: int
    layers: int
    heads: int
    positions: int = 1024
    """The longest text, in tokens: rows of the table of positions."""
    mlp: int | None = None
    """Hidden features of the feed-forward block. None: 4 embed."""
    activation: str = "gelu_tanh"
    """'gelu_tanh', 'gelu' or 'relu'."""
    tied: bool = True
    """Use the embedding table as the output table."""
    dropout: float = 0.0
    """Dropout rate after the embedding."""
    norm_eps: float = 1e-5
    """The eps of all norms."""
    z_loss: float = 0.0
    """Weight of the z-loss; 0 switches it off."""

    def __post_init__(self) -> None:
        check_sizes(self)

    def build(self) -> GPT2:
        """Return the model."""
        return GPT2(self)

    def small(self) -> GPT2Config:
        """Return the same kind of model with small sizes, for `portatrain check`."""
        heads, mlp = min(self.heads, 4), self.mlp and 48
        sizes: dict[str, Any] = {
            "vocab": min(self.vocab, 64),
            "embed": 8 * heads,
            "heads": heads,
            "layers": min(self.layers, 2),
        }
        return replace(self, **sizes, mlp=mlp)

    @property
    def head_size(self) -> int:
        """Features per head."""
        return self.embed // self.heads

    @property
    def kv(self) -> int:
        """Number of key-value heads: that of the heads."""
        return self.heads

    @property
    def mlp_size(self) -> int:
        """Hidden features of the feed-forward block."""
        return self.mlp or 4 * self.embed

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers."""
        config = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab,
            "n_positions": self.positions,
            "max_position_embeddings": self.positions,
            "n_embd": self.embed,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_inner": self.mlp_size,
            "activation_function": {v: k for k, v in reversed(ACTIVATIONS.items())}[self.activation],
            "layer_norm_epsilon": self.norm_eps,
            "tie_word_embeddings": self.tied,
        }
        rows = [
            Row(theirs="transformer.wte.weight", ours="embed/table"),
            Row(theirs="transformer.wpe.weight", ours="place"),
            Row(theirs="transformer.ln_f.weight", ours="final_norm/scale"),
            Row(theirs="transformer.ln_f.bias", ours="final_norm/bias"),
        ]
        rows += [] if self.tied else [Row(theirs="lm_head.weight", ours="head")]
        for i in range(self.layers):
            at = f"transformer.h.{i}"
            rows += [
                Row(theirs=f"{at}.{theirs}", ours=f"blocks/{ours}", layer=i, rows=inputs, transposed=False)
                for theirs, ours, inputs in LAYER
            ]
            for n, letter in enumerate("qkv"):
                part = (n * self.embed, (n + 1) * self.embed)
                weight, bias = f"blocks/attn/w{letter}", f"blocks/attn/{letter}_bias"
                shared: dict[str, Any] = {"layer": i, "transposed": False, "part": part}
                rows += [
                    Row(theirs=f"{at}.attn.c_attn.weight", ours=weight, rows=1, **shared),
                    Row(theirs=f"{at}.attn.c_attn.bias", ours=bias, rows=0, **shared),
                ]
        names = {
            "n_embd": "embed",
            "n_layer": "layers",
            "n_head": "heads",
            "n_inner": "mlp",
            "n_positions": "positions",
        }
        names |= {"vocab_size": "vocab", "layer_norm_epsilon": "norm_eps", "tie_word_embeddings": "tied"}
        return Hub(config=config, rows=tuple(rows), overrides={k: f"model.{v}" for k, v in names.items()})

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens, as
        `CausalConfig.flops_per_sample` counts them."""
        return flops(self, seq_len, (Kind(),) * self.layers, mlp=2 * self.embed * self.mlp_size)


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: GPT2Config) -> None:
        self.attn_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        # A bias of keys changes nothing without rotary positions, but files have one.
        self.attn = Attention(embed=c.embed, heads=c.heads, kv_heads=c.heads, head_dim=c.head_size, bias="qkvo")
        self.mlp_norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = MLP(embed=c.embed, mlp=c.mlp_size, activation=c.activation)

    def __call__(self, ops: Ops, x_BSE: Array, segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), None, segment_ids)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE)), None


class GPT2(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has.

    Raises:
        UserError: embed is no multiple of heads, or a text is longer than the table of positions.
    """

    def __init__(self, c: GPT2Config) -> None:
        if c.embed % c.heads:
            raise UserError("GPT2Config", expected="embed a multiple of heads", got=str(c.embed), do="Change one.")
        norm = LayerNorm(embed=c.embed, eps=c.norm_eps)
        super().__init__(c, Stack(Block(c), c.layers), norm, dropout=c.dropout)
        self.place = Param(positions=c.positions, embed=c.embed, fan_in_axes=0)

    def embedded(self, ops: Ops, tokens: Array, positions: Array) -> Array:
        """Return the sum of the features of tokens and positions, (B, S, E)."""
        if tokens.shape[1] > self.config.positions:
            raise UserError(
                f"a text of {tokens.shape[1]} tokens",
                expected=f"at most model.positions={self.config.positions}",
                got="a longer one",
                do="Set data.seq_len, or model.positions, which then is a table to train.",
            )
        return self.embed(ops, tokens) + ops.embed(self.place, positions)

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the segment ids."""
        return (segment_ids,)


def from_hub(fields: Fields) -> GPT2Config:
    """Return the sizes of a GPT-2. Defaults are those of GPT2Config in transformers."""
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn"):
        fields.get(name)  # dropout while training, which a recipe decides; names without effect
    for name in ("use_proj", "type", "activation", "proj_to_labels", "first_dropout"):
        fields.get(f"summary_{name}")  # of heads for classification
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    activation = fields.only("activation_function", *ACTIVATIONS)
    return GPT2Config(
        vocab=fields.size("vocab_size"),
        embed=fields.size("n_embd"),
        layers=fields.size("n_layer"),
        heads=fields.size("n_head"),
        positions=fields.size("n_positions", 1024),
        mlp=fields.optional("n_inner") or 4 * fields.size("n_embd"),
        activation=ACTIVATIONS[activation],
        tied=fields.flag("tie_word_embeddings", True),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
    )
