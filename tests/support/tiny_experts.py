"""A model with a feed-forward part, dense or of experts, so small that the float64 oracle can train it by finite
differences. Tests copy this file; it reads the tokens beside it (`tiny_fork.write`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portatrain import Module, Param, Recipe
from portatrain.data import TokenMemmap
from portatrain.model.layers import Experts, GatedMLP, MixtureMLP, Router
from portatrain.optim import AdamW, Constant

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Sizes:
    vocab: int = 7
    embed: int = 2
    mlp: int = 3
    experts: int = 0
    chosen: int = 2
    normalise: bool = True

    def build(self) -> Any:
        return Tiny(self)


class Tiny(Module):
    def __init__(self, c: Sizes) -> None:
        self.table = Param(vocab=c.vocab, embed=c.embed, fan_in_axes=0, init=1.0)
        if c.experts:
            router = Router(embed=c.embed, experts=c.experts, chosen=c.chosen, normalise=c.normalise)
            self.mlp: Any = MixtureMLP(router=router, experts=Experts(embed=c.embed, mlp=c.mlp, experts=c.experts))
        else:
            self.mlp = GatedMLP(embed=c.embed, mlp=c.mlp)
        self.out = Param(vocab=c.vocab, embed=c.embed, fan_in_axes=0, init=0.5)

    def hidden(self, ops: Any, batch: Any) -> Any:
        x_BSE = ops.embed(self.table, batch["tokens"])
        return x_BSE + self.mlp(ops, x_BSE)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return ops.cross_entropy(self.hidden(ops, batch), self.out, batch["targets"], mask=batch["mask"])

    def predict(self, ops: Any, batch: Any) -> Any:
        return ops.einsum("bse,ve->bsv", self.hidden(ops, batch), self.out, dtype="float32")


def recipe() -> Recipe:
    return Recipe(
        name="tiny",
        model=Sizes(),
        data=TokenMemmap(paths=str(HERE / "a.bin"), seq_len=6, vocab=7, validation=0.0),
        optimizer=AdamW(lr=0.05, b2=0.95, weight_decay=0.1),
        schedule=Constant(warmup=2),
        steps=7,
        batch=4,
        ema_decay=0.9,
        checkpoint_every=2,
        checkpoint_keep=99,
        eval_batches=1,
    )
