"""my-recipe: a model of one's own, without attention: it predicts the next token from the present one.

Train it:  launch --cluster local my_recipe.py
See it:    portatrain show my_recipe.py

Shapes are in names: B batch, S sequence, E embed, M mlp, V vocab.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain import Module, Ops, Param, Stack
from portatrain.data import Stdlib
from portatrain.model.layers import Embedding, RMSNorm
from portatrain.model.ops import Array, Batch, Loss
from portatrain.optim import AdamW, Cosine
from portatrain.recipe import Recipe

# Data: the source code of Python's standard library, which needs no download. A token is a byte.
# Yours: TextFiles(paths="folder of text files", ...), Jsonl(...) or TokenMemmap(...), all in portatrain.data.
DATA = Stdlib(seq_len=128, validation=0.03)
VOCAB = 256


class Block(Module):
    """x + out(tanh(in(norm(x))))."""

    def __init__(self, *, embed: int, mlp: int) -> None:
        self.norm = RMSNorm(embed=embed)
        # A Param is one line: keywords are logical axes with their sizes, in the order in which they lie in memory.
        # The mesh splits axes by name: `embed` over fsdp, `mlp` over tensor. `portatrain show` says what that gives.
        # An axis that is to stay whole is said in the recipe (compute={"my_axis": ()}), so that a typo is not silent.
        self.into = Param(embed=embed, mlp=mlp)
        self.out = Param(mlp=mlp, embed=embed)

    def __call__(self, ops: Ops, x_BSE: Array) -> tuple[Array, None]:
        # `ops` has the operations, the same on every framework; + - * / and slices work on arrays as they are.
        hidden_BSM = ops.tanh(ops.einsum("bse,em->bsm", self.norm(ops, x_BSE), self.into))
        change_BSE = ops.einsum("bsm,me->bse", hidden_BSM, self.out)
        # Where values lie: samples over the batch axes of the mesh, positions over context (and tensor).
        return x_BSE + ops.shard(change_BSE, "batch", "res_seq", None), None


class Model(Module):
    def __init__(self, config: Config) -> None:
        self.embed = Embedding(vocab=config.vocab, embed=config.embed)
        self.blocks = Stack(Block(embed=config.embed, mlp=config.mlp), config.layers)  # adds the axis `layers`
        self.norm = RMSNorm(embed=config.embed)
        self.head = Param(vocab=config.vocab, embed=config.embed, fan_in_axes=0, init=config.embed**-0.5)

    def __call__(self, ops: Ops, batch: Batch) -> Loss:
        """Return the loss: here a cross-entropy, summed over the targets that `mask` counts."""
        return ops.cross_entropy(self.hidden(ops, batch), self.head, batch["targets"], mask=batch["mask"])

    def predict(self, ops: Ops, batch: Batch) -> Array:
        """Return the logits, (B, S, V), from which `portatrain sample` draws. Training does not need it."""
        return ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.head, dtype="float32")

    def hidden(self, ops: Ops, batch: Batch) -> Array:
        """Return the features before the output table, (B, S, E)."""
        x_BSE = ops.shard(self.embed(ops, batch["tokens"]), "batch", "res_seq", None)
        x_BSE, _ = self.blocks(ops, x_BSE)
        return ops.shard(self.norm(ops, x_BSE), "batch", "seq", None)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes of the model: what --set model.embed=128 changes, and what a run's record holds."""

    vocab: int = VOCAB
    embed: int = 64
    mlp: int = 192
    layers: int = 2

    def build(self) -> Model:
        return Model(self)


def recipe() -> Recipe:
    """Return everything that decides the run. Every field can be changed from outside: --set model.layers=4."""
    return Recipe(
        name="my-recipe",
        model=Config(),
        data=DATA,
        # Other rules: Muon, Lion, Adafactor, SGD. The schedule multiplies lr: up over `warmup` steps, then down.
        optimizer=AdamW(lr=4e-3, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.1),
        steps=200,
        batch=16,  # samples a step, over all devices; accumulation=2 takes them in two halves
        eval_every=50,
        precision="fp32",  # "bf16" on accelerators
    )
