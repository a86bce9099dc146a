"""mixture: a byte-level decoder with eight experts a layer, two of them for each byte (Jiang et al. 2024, Mixtral).

Train it:  launch --cluster local examples/mixture.py

Shapes are in names: B batch, S seq, E embed.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Recipe, Stack
from portatrain.data import Stdlib
from portatrain.model.layers import Attention, Embedding, Experts, MixtureMLP, RMSNorm, Router
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine


class Block(Module):
    """x + attention(norm(x)), then x + mixture(norm(x))."""

    def __init__(self, c: MixtureConfig) -> None:
        self.attn_norm = RMSNorm(embed=c.embed)
        self.attn = Attention(embed=c.embed, heads=c.heads, kv_heads=c.heads, head_dim=c.embed // c.heads)
        self.mixture_norm = RMSNorm(embed=c.embed)
        self.mixture = MixtureMLP(
            router=Router(embed=c.embed, experts=c.experts, chosen=c.chosen, balance_loss=0.01, z_loss=1e-3),
            experts=Experts(embed=c.embed, mlp=c.mlp, experts=c.experts),
        )

    def __call__(self, ops: Ops, x_BSE: Array, rope: Array, segment_ids: Array | None) -> tuple[Array, None]:
        x_BSE = x_BSE + self.attn(ops, self.attn_norm(ops, x_BSE), rope, segment_ids)
        return x_BSE + self.mixture(ops, self.mixture_norm(ops, x_BSE)), None


class Mixture(Module):
    def __init__(self, c: MixtureConfig) -> None:
        self.embed = Embedding(vocab=c.vocab, embed=c.embed)
        self.blocks = Stack(Block(c), c.layers)
        self.final_norm = RMSNorm(embed=c.embed)
        self.head_dim = c.embed // c.heads

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        rope = ops.rope_table(batch["positions"], self.head_dim)
        x_BSE = ops.shard(self.embed(ops, batch["tokens"]), "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, x_BSE, rope, batch["segment_ids"])
        x_BSE = ops.shard(self.final_norm(ops, x_BSE), "batch", "seq", None)
        return ops.cross_entropy(x_BSE, self.embed.table, batch["targets"], mask=batch["mask"])


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    vocab: int = 256
    embed: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 96
    """Hidden features of one expert."""
    experts: int = 8
    chosen: int = 2

    def build(self) -> Mixture:
        return Mixture(self)


def recipe() -> Recipe:
    return Recipe(
        name="mixture",
        model=MixtureConfig(),
        data=Stdlib(seq_len=128, validation=0.03),
        optimizer=AdamW(lr=5e-3, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.1),
        steps=200,
        batch=16,
        eval_every=100,
        eval_final_batches=8,
    )
