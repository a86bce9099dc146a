"""A Llama-like decoder (Touvron et al. 2023): RMSNorm, rotary positions, grouped-query attention, gated MLP.

Shape letters: B batch, S seq, E embed, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from portatrain.checkpoint.interop import Hub, Row
from portatrain.errors import UserError
from portatrain.model.layers import Attention, Dropout, Embedding, GatedMLP, RMSNorm
from portatrain.model.module import Module, Param, Stack
from portatrain.model.ops import Array, Batch, Loss, Ops
from portatrain.model.rope import RopeScaling
from portatrain.recipe import added_later

# The tensors of a layer: name in LlamaForCausalLM, our name, and the number of contracted axes.
LLAMA = (
    ("input_layernorm", "attn_norm/scale", None),
    ("self_attn.q_proj", "attn/wq", 1),
    ("self_attn.k_proj", "attn/wk", 1),
    ("self_attn.v_proj", "attn/wv", 1),
    ("self_attn.o_proj", "attn/wo", 2),
    ("post_attention_layernorm", "mlp_norm/scale", None),
    ("mlp.gate_proj", "mlp/gate", 1),
    ("mlp.up_proj", "mlp/up", 1),
    ("mlp.down_proj", "mlp/down", 1),
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
}


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
    rope_scaling: RopeScaling | None = None
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

    def build(self) -> Decoder:
        """Return the model."""
        return Decoder(self)

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
        kv_heads, scaling = self.kv_heads or self.heads, self.rope_scaling
        stretch: dict[str, object] | None = None
        if scaling is not None:
            stretch = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
                "original_max_position_embeddings": scaling.original,
            }
        config = {
            "architectures": ["LlamaForCausalLM" if self.window is None else "MistralForCausalLM"],
            "model_type": "llama" if self.window is None else "mistral",
            "vocab_size": self.vocab,
            "hidden_size": self.embed,
            "intermediate_size": self.mlp_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self.head_size,
            "rms_norm_eps": self.norm_eps,
            # transformers 4 reads these two, and takes 10,000 where they are missing; 5 reads the third.
            "rope_theta": self.rope_theta,
            "rope_scaling": stretch,
            "rope_parameters": {"rope_theta": self.rope_theta, **(stretch or {"rope_type": "default"})},
            "tie_word_embeddings": self.tied,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
        }
        if self.window is None:
            config |= {"attention_bias": False, "mlp_bias": False}
        else:
            config |= {"sliding_window": self.window}
        rows = [
            Row(theirs="model.embed_tokens.weight", ours="embed/table"),
            Row(theirs="model.norm.weight", ours="final_norm/scale"),
        ]
        if not self.tied:
            rows.append(Row(theirs="lm_head.weight", ours="head"))
        for i in range(self.layers):
            rows += [
                Row(theirs=f"model.layers.{i}.{theirs}.weight", ours=f"blocks/{ours}", layer=i, rows=inputs)
                for theirs, ours, inputs in LLAMA
            ]
        return Hub(config=config, rows=tuple(rows), overrides=HUB_FIELDS)

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
        )
        self.attn_dropout = Dropout(c.dropout)
        self.mlp_norm = RMSNorm(embed=c.embed, eps=c.norm_eps)
        self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp_size)
        self.mlp_dropout = Dropout(c.dropout)

    def __call__(
        self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array], segment_ids: Array | None
    ) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn_dropout(ops, self.attn(ops, self.attn_norm(ops, x_BSE), rope, segment_ids))
        x_BSE = x_BSE + self.mlp_dropout(ops, self.mlp(ops, self.mlp_norm(ops, x_BSE)))
        return x_BSE, None


class Decoder(Module):
    """A language model that predicts the next token.

    A batch has tokens and targets, (B, S) integers. For packed documents it also has segment_ids and positions, (B, S)
    integers, and mask, (B, S) float, the weight of each target.
    """

    def __init__(self, c: DecoderConfig) -> None:
        self.embed = Embedding(vocab=c.vocab, embed=c.embed)
        self.embed_dropout = Dropout(c.dropout)
        self.blocks = Stack(Block(c), c.layers)
        self.final_norm = RMSNorm(embed=c.embed, eps=c.norm_eps)
        self.head = None if c.tied else Param(vocab=c.vocab, embed=c.embed, fan_in_axes=0, init=c.embed**-0.5)
        self.config = c

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the summed cross-entropy, in nats."""
        return ops.cross_entropy(
            self.hidden(ops, batch),
            self.output_table,
            batch["targets"],
            mask=batch.get("mask"),
            z_loss=self.config.z_loss,
            softcap=self.config.logit_softcap,
        )

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits, (B, S, V) float32. The batch needs no targets."""
        cap = self.config.logit_softcap
        logits = ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.output_table, dtype="float32")
        return logits if cap is None else cap * ops.tanh(logits / cap)

    @property
    def output_table(self) -> Array:
        """The output table, (V, E): the embedding's table if tied."""
        return self.embed.table if self.head is None else self.head

    def hidden(self, ops: Ops, batch: Batch) -> Array:
        """Return the normalised features before the output table, (B, S, E)."""

        tokens, positions = batch["tokens"], batch.get("positions")
        if positions is None:
            positions = ops.arange(tokens.shape[1])
        c = self.config
        rope = ops.rope_table(positions, c.head_size, theta=c.rope_theta, scaling=c.rope_scaling)
        x_BSE = ops.shard(self.embed(ops, tokens), "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, self.embed_dropout(ops, x_BSE), rope, batch.get("segment_ids"))
        return ops.shard(self.final_norm(ops, x_BSE), "batch", "seq", None)
