"""phi3-mini and phi3-medium: decoders with the sizes of the released Phi-3 models for texts of 4,096 tokens.

Sizes are those of config.json of microsoft/Phi-3-mini-4k-instruct (the defaults of transformers' Phi3Config, but for
the window) and Phi-3-medium-4k-instruct. In their tokenizer 1 (`<s>`) begins a document. The training data is yours:
files of token ids, named with ``--set data.paths=/data/tokens/*.bin`` (uint16, with the id 1 before every document).
These recipes are planned; no test trains them.

The numbers of tokens are those of the report (Abdin et al. 2024, arXiv:2404.14219, section 2). The optimizer has not
been published: learning rates, warm-up, decay and tokens a step are those of Llama 3 8B (`llama3.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.phi3 import Phi3Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    steps: int


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 3.82 billion parameters; 3.3 trillion tokens.
    "phi3-mini": Size(embed=3072, layers=32, heads=32, kv_heads=32, head_dim=96, mlp=8192, steps=786_800),
    # 14.0 billion parameters; 4.8 trillion tokens.
    "phi3-medium": Size(embed=5120, layers=40, heads=40, kv_heads=10, head_dim=128, mlp=17_920, steps=1_144_400),
}


def recipe(name: str = "phi3-mini") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the mini.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("Phi-3 recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=Phi3Config(
            vocab=32_064,
            embed=size.embed,
            layers=size.layers,
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            mlp=size.mlp,
            window=2047,
            tied=False,
            rope_theta=10_000.0,
            norm_eps=1e-5,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=32_064, dtype="uint16", separator=1, validation=0.001),
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=size.steps,
        batch=1024,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
