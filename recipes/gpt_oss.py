"""gpt-oss-20b and gpt-oss-120b: mixtures with the sizes of the released gpt-oss models.

Sizes are those of config.json of openai/gpt-oss-20b and -120b (the latter the defaults of transformers' GptOssConfig),
without the scaling of rotary positions, which lengthened the texts from 4,096 tokens. In their tokenizer 199999
(`<|endoftext|>`) ends a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 199999 between documents). These recipes are planned; no
test trains them.

Their training has not been published (OpenAI 2025, arXiv:2508.10925, says trillions of tokens). Learning rates,
warm-up, decay and tokens a step are those that Llama 3 8B had (`llama3.py`); the number of tokens is ours. The released
weights of experts have 4 bits; here they are trained like the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.gpt_oss import GptOssConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    layers: int
    experts: int


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 20.9 billion parameters, 3.6 billion of them active.
    "gpt-oss-20b": Size(layers=24, experts=32),
    # 116.8 billion parameters, 5.1 billion of them active.
    "gpt-oss-120b": Size(layers=36, experts=128),
}


def recipe(name: str = "gpt-oss-20b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 20B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("gpt-oss recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=GptOssConfig(
            vocab=201_088,
            embed=2880,
            layers=size.layers,
            heads=64,
            kv_heads=8,
            head_dim=64,
            expert_mlp=2880,
            experts=size.experts,
            chosen=4,
            window=128,
            tied=False,
            rope_theta=150_000.0,
            norm_eps=1e-5,
            balance_loss=0.01,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=201_088, dtype="uint32", separator=199_999, validation=0.001),
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=500_000,  # 2.1 trillion tokens
        batch=1024,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
