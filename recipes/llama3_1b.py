"""llama3-1b: a decoder of 1.24 billion parameters on 9 trillion tokens.

Sizes and rotary positions are those of the released Llama 3.2 1B; the token ids are those of its
tokenizer. The training data is yours: files of token ids, named with --set data.paths=/data/tokens/*.bin (uint32,
every document after the id 128000). Planned and compiled, never trained here.
"""

from __future__ import annotations

from portatrain.data import TokenMemmap
from portatrain.model.rope import RopeScaling
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig


def recipe() -> Recipe:
    return Recipe(
        name="llama3-1b",
        model=DecoderConfig(
            vocab=128_256,
            embed=2048,
            layers=16,
            heads=32,
            kv_heads=8,
            head_dim=64,
            mlp=8192,
            tied=True,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(factor=32.0),
        ),
        data=TokenMemmap(paths=(), seq_len=8192, vocab=128_256, dtype="uint32", separator=128_000, validation=0.001),
        # The released model was distilled from larger ones; this is the 8B's recipe.
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=2_146_000,  # 9 trillion tokens, 4.2 million a step
        batch=512,
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
