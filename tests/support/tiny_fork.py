"""A recipe of a few dozen parameters on random tokens, so small that the float64 oracle can train it by finite
differences. Tests copy this file; it reads the tokens beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from portatrain import Module, Param, Recipe
from portatrain.data import Mixture, TokenMemmap
from portatrain.model.layers import Dropout
from portatrain.optim import AdamW, Constant

HERE = Path(__file__).parent


def write(folder: Path) -> Path:
    """Copy this file into `folder` as one.py and mixed.py, with tokens; return `folder`."""
    text = Path(__file__).read_text()
    (folder / "one.py").write_text(text)
    (folder / "mixed.py").write_text(
        text.replace("recipe(data:", "base(data:").replace("return recipe(", "return base(") + MIXED
    )
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        rng.integers(0, 7, 2000).astype("<u2").tofile(folder / f"{name}.bin")
    return folder


MIXED = "\n\ndef recipe() -> Recipe:\n    return mixed()\n"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    vocab: int = 7
    embed: int = 2
    rate: float = 0.0

    def build(self) -> Any:
        return Tiny(self)


class Tiny(Module):
    def __init__(self, sizes: Sizes) -> None:
        self.dropout = Dropout(sizes.rate)
        self.table = Param(vocab=sizes.vocab, embed=sizes.embed, fan_in_axes=0, init=1.0)
        self.mix = Param(embed=sizes.embed, embed_out=sizes.embed)
        self.out = Param(vocab=sizes.vocab, embed=sizes.embed, fan_in_axes=0, init=0.5)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = self.dropout(ops, ops.embed(self.table, batch["tokens"]))
        x_BSE = ops.tanh(ops.einsum("bse,ef->bsf", x_BSE, self.mix))
        return ops.cross_entropy(x_BSE, self.out, batch["targets"], mask=batch["mask"])


def tokens(name: str) -> TokenMemmap:
    return TokenMemmap(paths=str(HERE / f"{name}.bin"), seq_len=6, vocab=7, validation=0.0)


def recipe(data: Any = None) -> Recipe:
    return Recipe(
        name="tiny",
        model=Sizes(),
        data=data or tokens("a"),
        optimizer=AdamW(lr=0.05, b2=0.95, weight_decay=0.1),
        schedule=Constant(warmup=2),
        steps=26,
        batch=4,
        ema_decay=0.9,
        checkpoint_every=2,
        checkpoint_keep=99,
        eval_batches=1,
    )


def mixed() -> Recipe:
    return recipe(Mixture(sources=(tokens("a"), tokens("b")), weights=(1.0, 1.0), block=8))
