"""llama3-1b, llama3-8b, llama3-70b and llama3-405b: decoders with the sizes of the released Llama 3 models.

Sizes and rotary positions are those of the released Llama 3.2 1B and Llama 3.1 8B, 70B and 405B; the token ids are
those of their tokenizer. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 128000 before every document). These recipes are planned
and compiled in tests; no test trains them.

Learning rates, warm-up and decay follow The Llama 3 Herd of Models (2024), table 3 and section 3.4.1. The released 1B
was distilled from larger models; here it trains from scratch with the 8B's learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.model.rope import RopeScaling
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    embed: int
    layers: int
    heads: int
    head_dim: int
    mlp: int
    tied: bool = False
    """True if the output projection is the embedding table."""
    rope_factor: float = 8.0
    lr: float
    batch: int
    """The number of samples in a step, of 8192 tokens each."""
    steps: int


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 1.24 billion parameters; 9 trillion tokens, 4.2 million a step.
    "llama3-1b": Size(
        embed=2048,
        layers=16,
        heads=32,
        head_dim=64,
        mlp=8192,
        tied=True,
        rope_factor=32.0,
        lr=3e-4,
        batch=512,
        steps=2_146_000,
    ),
    # 8.03 billion parameters; 15.6 trillion tokens, 4.2 million a step.
    "llama3-8b": Size(embed=4096, layers=32, heads=32, head_dim=128, mlp=14_336, lr=3e-4, batch=512, steps=3_719_000),
    # 70.6 billion parameters; 15.6 trillion tokens, 8.4 million a step.
    "llama3-70b": Size(
        embed=8192, layers=80, heads=64, head_dim=128, mlp=28_672, lr=1.5e-4, batch=1024, steps=1_860_000
    ),
    # 406 billion parameters; 15.6 trillion tokens, 16.8 million a step.
    "llama3-405b": Size(
        embed=16_384, layers=126, heads=128, head_dim=128, mlp=53_248, lr=8e-5, batch=2048, steps=930_000
    ),
}


def recipe(name: str = "llama3-8b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 8B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("Llama 3 recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=DecoderConfig(
            vocab=128_256,
            embed=size.embed,
            layers=size.layers,
            heads=size.heads,
            kv_heads=8,
            head_dim=size.head_dim,
            mlp=size.mlp,
            tied=size.tied,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(factor=size.rope_factor),
        ),
        data=TokenMemmap(paths=(), seq_len=8192, vocab=128_256, dtype="uint32", separator=128_000, validation=0.001),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=size.steps,
        batch=size.batch,
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
