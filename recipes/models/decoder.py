"""Llama 2 and 3 and Mistral (Touvron et al. 2023; Jiang et al. 2023): RMSNorm, rotary positions, grouped-query
attention, gated MLP, and for Mistral a sliding window. It has options that neither has, which cannot be exported.

Shape letters: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from portatrain.checkpoint.interop import Fields, Hub
from portatrain.errors import UserError
from portatrain.model.layers import Attention, Dropout, GatedMLP, RMSNorm
from portatrain.model.module import Module, Stack
from portatrain.model.ops import Array, Ops
from portatrain.model.rope import Scaling
from portatrain.recipe import added_later
from recipes.models.causal import (
    ATTENTION,
    ATTENTION_BIASES,
    MLP,
    MLP_BIASES,
    PRE_NORMS,
    CausalLM,
    Kind,
    check_sizes,
    hub,
    read_sizes,
)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a `Decoder`."""

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
    dropout: float = 0.0
    """Dropout rate after the embedding, attention and feed-forward."""
    window: int | None = None
    """Tokens that a token attends to, itself included. None: all before it."""
    softcap: float | None = None
    """Softcap of attention scores. None: no cap."""
    logit_softcap: float | None = None
    """Softcap of logits. None: no cap."""
    qk_norm: bool = False
    """Apply RMSNorm to queries and keys."""
    norm_eps: float = 1e-5
    """The eps of all norms."""
    z_loss: float = 0.0
    """Weight of the z-loss; 0 switches it off."""
    sinks: bool = added_later(False)
    """Give each head of attention a learned score that takes part in its softmax and has no value (gpt-oss)."""
    value_head_dim: int | None = added_later(None)
    """Features per head of the values. None: those of queries and keys."""
    attention_bias: bool = added_later(False)
    """Add biases to queries, keys, values and the output of attention."""
    mlp_bias: bool = added_later(False)
    """Add biases to the three maps of the feed-forward block."""

    def build(self) -> Decoder:
        """Return the model."""
        return Decoder(self)

    def __post_init__(self) -> None:
        check_sizes(self)

    def small(self) -> DecoderConfig:
        """Return the same kind of decoder with small sizes, for `portatrain check`."""
        heads = min(self.heads, 4)
        return replace(
            self,
            vocab=min(self.vocab, 64),
            embed=8 * heads,
            layers=min(self.layers, 2),
            heads=heads,
            kv_heads=self.kv_heads and (heads if self.kv_heads == self.heads else max(1, heads // 2)),
            head_dim=self.head_dim and 8,
            value_head_dim=self.value_head_dim and 4,
            mlp=self.mlp and 48,
            window=self.window and min(self.window, 8),
        )

    @property
    def kv(self) -> int:
        """Number of key-value heads."""
        return self.kv_heads or self.heads

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each layer."""
        return (Kind(window=self.window),) * self.layers

    @property
    def head_size(self) -> int:
        """Features per head of queries and keys."""
        return self.head_dim or self.embed // self.heads

    @property
    def value_size(self) -> int:
        """Features per head of the values."""
        return self.value_head_dim or self.head_size

    @property
    def mlp_size(self) -> int:
        """Hidden features of the feed-forward block."""
        return self.mlp or -(-8 * self.embed // 96) * 32

    def huggingface(self) -> Hub:
        """Return the config and the tensor names of the same model in transformers.

        It is a LlamaForCausalLM, or with a window a MistralForCausalLM.

        Raises:
            UserError: a field has a value that neither supports.
        """
        same = {"softcap": None, "logit_softcap": None, "qk_norm": False, "sinks": False, "value_head_dim": None}
        for name, off in same.items():
            if getattr(self, name) != off:
                raise UserError(
                    f"model.{name}",
                    expected=f"{off}, as in a Llama",
                    got=repr(getattr(self, name)),
                    do="Export --to orbax, dcp, torch or nnx.",
                )
        names = [*PRE_NORMS, *ATTENTION, *MLP]
        biased = self.attention_bias or self.mlp_bias
        # A LlamaConfig refuses a width that is no multiple of the heads.
        if self.window is None and (biased or self.embed % self.heads == 0):
            names += ATTENTION_BIASES if self.attention_bias else ()
            names += MLP_BIASES if self.mlp_bias else ()
            biases = {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
            return hub(self, "llama", "LlamaForCausalLM", names, **biases)
        if biased:
            raise UserError(
                "model.window with biases",
                expected="a window (Mistral) or biases (Llama)",
                got="both",
                do="Export --to orbax, dcp, torch or nnx.",
            )
        return hub(self, "mistral", "MistralForCausalLM", names, sliding_window=self.window)

    def flops_per_sample(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one sample of `seq_len` tokens.

        They are, without recomputation: 6 per token for each weight of a matrix multiplication (including the head but
        not the embedding), and 12 * layers * heads * head_dim * seq_len per token for attention, halved for the causal
        mask (Chowdhery et al. 2022, appendix B) and reduced further by a window. If value heads have another size,
        head_dim is the mean of the two.
        """
        heads, kv_heads, both = self.heads, self.kv_heads or self.heads, self.head_size + self.value_size
        layer = self.embed * both * (heads + kv_heads) + 3 * self.embed * self.mlp_size
        weights = self.layers * layer + self.vocab * self.embed
        window = min(self.window or seq_len, seq_len)
        seen = window * (seq_len - window / 2)  # pairs of query and key: S^2 / 2 without a window
        return 6.0 * weights * seq_len + 6.0 * self.layers * heads * both * seen


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: DecoderConfig) -> None:
        self.attn_norm = RMSNorm(embed=c.embed, eps=c.norm_eps)
        self.attn = Attention(
            embed=c.embed,
            heads=c.heads,
            kv_heads=c.kv_heads or c.heads,
            head_dim=c.head_size,
            window=c.window,
            softcap=c.softcap,
            qk_norm=c.qk_norm,
            norm_eps=c.norm_eps,
            sinks=c.sinks,
            value_head_dim=c.value_head_dim,
            bias="qkvo" if c.attention_bias else False,
        )
        self.attn_dropout = Dropout(c.dropout)
        self.mlp_norm = RMSNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size, bias=c.mlp_bias)
        self.mlp_dropout = Dropout(c.dropout)

    def __call__(
        self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array], segment_ids: Array | None
    ) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn_dropout(ops, self.attn(ops, self.attn_norm(ops, x_BSE), rope, segment_ids))
        x_BSE = x_BSE + self.mlp_dropout(ops, self.mlp(ops, self.mlp_norm(ops, x_BSE)))
        return x_BSE, None


class Decoder(CausalLM):
    """A language model that predicts the next token; `CausalLM` says what a batch has."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__(
            c,
            Stack(Block(c), c.layers),
            RMSNorm(embed=c.embed, eps=c.norm_eps),
            dropout=c.dropout,
            logit_softcap=c.logit_softcap,
        )

    def shared(self, ops: Ops, positions: Array, segment_ids: Array | None) -> tuple[Any, ...]:
        """Return the rotary table and the segment ids, which every layer takes."""
        (table,), segments = super().shared(ops, positions, segment_ids)
        return table, segments


def from_hub(fields: Fields) -> DecoderConfig:
    """Return the sizes of a Llama or a Mistral. Defaults are those of LlamaConfig and MistralConfig."""
    llama = fields.kind == "llama"
    fields.only("hidden_act", "silu")
    return DecoderConfig(
        **read_sizes(fields, kv_heads=None if llama else 8),
        window=fields.optional("sliding_window", None if llama else 4096),
        attention_bias=fields.flag("attention_bias", False) if llama else False,
        mlp_bias=fields.flag("mlp_bias", False) if llama else False,
    )
