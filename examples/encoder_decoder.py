"""encoder-decoder: a transformer that writes a sequence backwards (Vaswani et al. 2017, arXiv:1706.03762).

Train it:  launch --cluster local examples/encoder_decoder.py

The encoder sees the whole source, by ALiBi in place of position embeddings. The decoder is given the first `prompt`
tokens of the answer: they are a prefix, which all its positions see, and are not trained on. Cross-attention reads the
source.

Shapes are in names: B batch, T source positions, S target positions, E embed, H heads, D head_dim, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain import Module, Ops, Param, Recipe
from portatrain.data import DataSpec
from portatrain.model.layers import MLP, Embedding, RMSNorm
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


@dataclass(frozen=True, kw_only=True)
class Reversed(DataSpec):
    """Random sequences and their reversals; token 0 begins an answer."""

    vocab: int = 32
    length: int = 16
    size: int = 4096
    validation: float = 0.1
    version: str = "1"

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int) -> dict[str, Any]:
        source = np.random.default_rng(index).integers(1, self.vocab, self.length)
        answer = source[::-1]
        return {
            "source": source.astype(np.int32),
            "tokens": np.concatenate([[0], answer[:-1]]).astype(np.int32),
            "targets": answer.astype(np.int32),
        }


class MultiHead(Module):
    """Attention of queries to keys of another sequence, or of the same one."""

    def __init__(self, *, embed: int, heads: int) -> None:
        head_dim = embed // heads
        self.wq, self.wk, self.wv = (Param(embed=embed, heads=heads, head_dim=head_dim) for _ in range(3))
        self.wo = Param(heads=heads, head_dim=head_dim, embed=embed, fan_in_axes=2)

    def __call__(self, ops: Ops, x_BSE: Array, y_BTE: Array, **rule: Any) -> Array:
        q_BSHD = ops.einsum("bse,ehd->bshd", x_BSE, self.wq)
        k_BTHD = ops.einsum("bte,ehd->bthd", y_BTE, self.wk)
        v_BTHD = ops.einsum("bte,ehd->bthd", y_BTE, self.wv)
        return ops.einsum("bshd,hde->bse", ops.attention(q_BSHD, k_BTHD, v_BTHD, **rule), self.wo)


class EncoderLayer(Module):
    def __init__(self, c: EncoderDecoderConfig) -> None:
        self.attn_norm, self.mlp_norm = RMSNorm(embed=c.embed), RMSNorm(embed=c.embed)
        self.attn, self.mlp = MultiHead(embed=c.embed, heads=c.heads), MLP(embed=c.embed, mlp=4 * c.embed)

    def __call__(self, ops: Ops, y_BTE: Array) -> Array:
        normed_BTE = self.attn_norm(ops, y_BTE)
        y_BTE = y_BTE + self.attn(ops, normed_BTE, normed_BTE, causal=False, alibi=True)
        return y_BTE + self.mlp(ops, self.mlp_norm(ops, y_BTE))


class DecoderLayer(Module):
    def __init__(self, c: EncoderDecoderConfig) -> None:
        self.attn_norm, self.cross_norm, self.mlp_norm = (RMSNorm(embed=c.embed) for _ in range(3))
        self.attn, self.cross = (MultiHead(embed=c.embed, heads=c.heads) for _ in range(2))
        self.mlp = MLP(embed=c.embed, mlp=4 * c.embed)

    def __call__(self, ops: Ops, x_BSE: Array, y_BTE: Array, prefix_BS: Array) -> Array:
        normed_BSE = self.attn_norm(ops, x_BSE)
        x_BSE = x_BSE + self.attn(ops, normed_BSE, normed_BSE, prefix=prefix_BS, alibi=True)
        x_BSE = x_BSE + self.cross(ops, self.cross_norm(ops, x_BSE), y_BTE, causal=False)
        return x_BSE + self.mlp(ops, self.mlp_norm(ops, x_BSE))


class EncoderDecoder(Module):
    def __init__(self, c: EncoderDecoderConfig) -> None:
        self.prompt = c.prompt
        self.embed = Embedding(vocab=c.vocab, embed=c.embed, init=1.0)
        self.position = Param(positions=c.length, embed=c.embed, fan_in_axes=0, init=1.0)
        self.encoder = [EncoderLayer(c) for _ in range(c.layers)]
        self.decoder = [DecoderLayer(c) for _ in range(c.layers)]
        self.norm = RMSNorm(embed=c.embed)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        y_BTE = self.embed(ops, batch["source"]) + ops.weight(self.position)
        for layer in self.encoder:
            y_BTE = layer(ops, y_BTE)
        tokens_BS = batch["tokens"]
        at_BS = tokens_BS * 0 + ops.arange(tokens_BS.shape[1])[None, :]
        x_BSE = self.embed(ops, tokens_BS) + ops.weight(self.position)
        for block in self.decoder:
            x_BSE = block(ops, x_BSE, y_BTE, at_BS < self.prompt)
        # Position s predicts token s + 1: the prompt's own tokens are given, so that only the rest is trained on.
        mask_BS = ops.cast(at_BS >= self.prompt - 1, "float32") * batch["mask"][:, None]
        x_BSE = self.norm(ops, x_BSE) * x_BSE.shape[-1] ** -0.5
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=mask_BS)


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    vocab: int = 32
    length: int = 16
    prompt: int = 3
    embed: int = 64
    heads: int = 4
    layers: int = 2

    def build(self) -> EncoderDecoder:
        return EncoderDecoder(self)


def recipe() -> Recipe:
    return Recipe(
        name="encoder-decoder",
        model=EncoderDecoderConfig(),
        data=Reversed(),
        optimizer=AdamW(lr=2e-3, b2=0.98),
        schedule=Cosine(warmup=20, min_ratio=0.01),
        steps=400,
        batch=64,
        eval_every=100,
        compute={"positions": ()},  # whole on every device
    )
