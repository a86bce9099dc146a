"""gpt2, gpt2-medium, gpt2-large and gpt2-xl: decoders with the sizes of the released GPT-2 models.

Sizes are those of config.json of openai-community/gpt2 (the defaults of transformers' GPT2Config), -medium, -large and
-xl. In their tokenizer 50256 (`<|endoftext|>`) lies between documents. The training data is yours: files of token ids,
named with ``--set data.paths=/data/tokens/*.bin`` (uint16, with the id 50256 between documents), as nanoGPT and llm.c
write them. These recipes are planned; no test trains them.

The batch of 512 samples is that of Radford et al. 2019, section 2.3, which names no learning rate. Learning rates, the
batch of gpt2-xl, betas, weight decay, warm-up and number of tokens are those of GPT-3 at the nearest sizes (Brown et
al. 2020, arXiv:2005.14165, table 2.1 and appendix B). There the cosine ends after 260 of 300 billion tokens, here at
the end. The table has 50,257 rows, an odd number, so `tensor` cannot divide it; ``--set model.vocab=50304`` makes it
longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.gpt2 import GPT2Config


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    embed: int
    layers: int
    heads: int
    lr: float
    batch: int = 512
    """The number of samples in a step, of 1024 tokens each."""
    warmup: int = 715
    """Steps of warm-up: 375 million tokens."""
    steps: int = 572_205
    """300 billion tokens."""


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 124, 355, 774 and 1558 million parameters.
    "gpt2": Size(embed=768, layers=12, heads=12, lr=6e-4),
    "gpt2-medium": Size(embed=1024, layers=24, heads=16, lr=3e-4),
    "gpt2-large": Size(embed=1280, layers=36, heads=20, lr=2.5e-4),
    "gpt2-xl": Size(embed=1600, layers=48, heads=25, lr=2e-4, batch=1024, warmup=358, steps=286_102),
}


def recipe(name: str = "gpt2") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the smallest.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("GPT-2 recipe", name, RECIPES)
    size = RECIPES[name]
    return Recipe(
        name=name,
        model=GPT2Config(vocab=50_257, embed=size.embed, layers=size.layers, heads=size.heads, positions=1024),
        data=TokenMemmap(paths=(), seq_len=1024, vocab=50_257, dtype="uint16", separator=50_256, validation=0.001),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=size.warmup, min_ratio=0.1),
        steps=size.steps,
        batch=size.batch,
        precision="bf16",
        remat="block",
        compute={"positions": ()},  # the table of positions is whole along them
        frozen=("blocks/attn/k_bias",),  # a bias of keys changes no softmax, as no key is rotated; files have it
        eval_every=1000,
        checkpoint_every=500,
    )
