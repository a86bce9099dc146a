"""gemma2-2b, -9b, -27b and gemma3-1b, -4b, -12b, -27b: the sizes of the released Gemma 2 and 3, without their vision.

Sizes are those of config.json of google/gemma-2-2b, -9b and -27b and of google/gemma-3-1b-pt, -4b-pt, -12b-pt and
-27b-pt (their text_config), without the scaling of rotary positions, which came at the end of pre-training. In their
tokenizers 2 (`<bos>`) begins a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint32, with the id 2 before every document). These recipes are planned; no
test trains them.

The numbers of tokens are those of the reports (Gemma Team 2024, arXiv:2408.00118, section 3.1; 2025, arXiv:2503.19786,
section 2.2). The released models were distilled from larger ones (Gemma 2 27B was not); here they train from scratch.
Gemma 3 was trained on texts of 32,768 tokens, here both on 8,192. The optimizer has not been published: learning
rates, warm-up, decay and tokens a step are those that Llama 3 had at about as many parameters (`llama3.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.data import TokenMemmap
from portatrain.errors import choice
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.gemma import GemmaConfig


@dataclass(frozen=True, kw_only=True)
class Size:
    """The fields that differ between the recipes."""

    generation: int
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int = 256
    mlp: int
    window: int
    query_scale: int = 256
    """Scores are multiplied by query_scale^-0.5."""
    lr: float = 3e-4
    tokens: float
    """Trained tokens, in trillions."""


# The keys are the names under which portatrain ships these recipes.
RECIPES = {
    # 2.61, 9.24 and 27.2 billion parameters.
    "gemma2-2b": Size(
        generation=2, vocab=256_000, embed=2304, layers=26, heads=8, kv_heads=4, mlp=9216, window=4096, tokens=2
    ),
    "gemma2-9b": Size(
        generation=2, vocab=256_000, embed=3584, layers=42, heads=16, kv_heads=8, mlp=14_336, window=4096, tokens=8
    ),
    "gemma2-27b": Size(
        generation=2,
        vocab=256_000,
        embed=4608,
        layers=46,
        heads=32,
        kv_heads=16,
        head_dim=128,
        mlp=36_864,
        window=4096,
        query_scale=144,
        lr=1.5e-4,
        tokens=13,
    ),
    # 1.00, 3.88, 11.8 and 27.0 billion parameters.
    "gemma3-1b": Size(
        generation=3, vocab=262_144, embed=1152, layers=26, heads=4, kv_heads=1, mlp=6912, window=512, tokens=2
    ),
    "gemma3-4b": Size(
        generation=3, vocab=262_208, embed=2560, layers=34, heads=8, kv_heads=4, mlp=10_240, window=1024, tokens=4
    ),
    "gemma3-12b": Size(
        generation=3, vocab=262_208, embed=3840, layers=48, heads=16, kv_heads=8, mlp=15_360, window=1024, tokens=12
    ),
    "gemma3-27b": Size(
        generation=3,
        vocab=262_208,
        embed=5376,
        layers=62,
        heads=32,
        kv_heads=16,
        head_dim=128,
        mlp=21_504,
        window=1024,
        query_scale=168,
        lr=1.5e-4,
        tokens=14,
    ),
}


def recipe(name: str = "gemma3-4b") -> Recipe:
    """Return the recipe of that name. A copy of this file, given by its path, makes the 4B.

    Raises:
        UserError: `RECIPES` has no such name.
    """
    if name not in RECIPES:
        raise choice("Gemma recipe", name, RECIPES)
    size = RECIPES[name]
    two, batch, seq_len = size.generation == 2, 512, 8192  # 4.2 million tokens a step
    return Recipe(
        name=name,
        model=GemmaConfig(
            generation=size.generation,
            vocab=size.vocab,
            embed=size.embed,
            layers=size.layers,
            heads=size.heads,
            kv_heads=size.kv_heads,
            head_dim=size.head_dim,
            mlp=size.mlp,
            window=size.window,
            query_scale=size.query_scale,
            softcap=50.0 if two else None,
            logit_softcap=30.0 if two else None,
            rope_theta=10_000.0 if two else 1e6,
            tied=True,
            norm_eps=1e-6,
        ),
        data=TokenMemmap(paths=(), seq_len=seq_len, vocab=size.vocab, dtype="uint32", separator=2, validation=0.001),
        optimizer=AdamW(lr=size.lr, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=round(size.tokens * 1e12 / (batch * seq_len)),
        batch=batch,
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
