"""mixtral-8x7b and mixtral-8x22b: mixtures with the sizes of the released Mixtral models.

Sizes are those of config.json of mistralai/Mixtral-8x7B-v0.1 (the defaults of transformers' MixtralConfig) and of
Mixtral-8x22B-Instruct-v0.1. In their tokenizers 1 (`<s>`) begins a document. The training data is yours: files of token
ids, named with ``--set data.paths=/data/tokens/*.bin`` (uint16, with the id 1 before every document). These recipes are
planned, and mixtral-8x7b was compiled for 256 B200s; no test trains them.

Nothing has been published about how they were trained (Jiang et al. 2024, arXiv:2401.04088). Learning rates, warm-up,
decay and tokens a step are those that Llama 3 had at about as many active parameters (`llama3.py`); the weight of the
balance loss is that of Switch Transformers (Fedus et al. 2021, arXiv:2101.03961, section 2.2). The number of tokens and
the length of 4,096 are ours; the released models take texts of 32,768 and 65,536 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.mixtral import MixtralConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    vocab: int
    embed: int
    layers: int
    heads: int
    expert_mlp: int
    lr: float


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 46.7 billion parameters, 12.9 billion of them active.
    "mixtral-8x7b": Size(vocab=32_000, embed=4096, layers=32, heads=32, expert_mlp=14_336, lr=3e-4),
    # 140.6 billion parameters, 39.2 billion of them active.
    "mixtral-8x22b": Size(vocab=32_768, embed=6144, layers=56, heads=48, expert_mlp=16_384, lr=1.5e-4),
}


def recipe(name: str = "mixtral-8x7b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 8x7B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("Mixtral recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=MixtralConfig(
            vocab=size.vocab,
            embed=size.embed,
            layers=size.layers,
            heads=size.heads,
            kv_heads=8,
            head_dim=128,
            expert_mlp=size.expert_mlp,
            experts=8,
            chosen=2,
            tied=False,
            rope_theta=1e6,
            norm_eps=1e-5,
            balance_loss=0.01,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=size.vocab, dtype="uint16", separator=1, validation=0.001),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=500_000,  # 2.1 trillion tokens
        batch=1024,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
