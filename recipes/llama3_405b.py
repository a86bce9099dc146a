"""llama3-405b: a decoder of 406 billion parameters on 15.6 trillion tokens.

Sizes and rotary positions are those of the released Llama 3.1 405B; the token ids are those of its
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
        name="llama3-405b",
        model=DecoderConfig(
            vocab=128_256,
            embed=16_384,
            layers=126,
            heads=128,
            kv_heads=8,
            head_dim=128,
            mlp=53_248,
            tied=False,
            rope_theta=500_000.0,
            rope_scaling=RopeScaling(factor=8.0),
        ),
        data=TokenMemmap(paths=(), seq_len=8192, vocab=128_256, dtype="uint32", separator=128_000, validation=0.001),
        # Peak learning rate, warm-up and decay: The Llama 3 Herd of Models (2024), table 3 and section 3.4.1.
        optimizer=AdamW(lr=8e-5, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=930_000,  # 15.6 trillion tokens, 16.8 million a step
        batch=2048,
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
