"""qwen2-7b: a decoder with the sizes of the released Qwen 2 7B and Qwen 2.5 7B, 7.62 billion parameters.

Sizes are those of config.json of Qwen/Qwen2.5-7B. In its tokenizer 151643 (`<|endoftext|>`) ends a document. The
training data is yours: files of token ids, named with ``--set data.paths=/data/tokens/*.bin`` (uint32, with the id
151643 between documents). This recipe is planned; no test trains it.

The number of tokens is that of Qwen 2 (Yang et al. 2024, arXiv:2407.10671, section 3.1) and the length that of its
training before the last stage (section 3.2). The optimizer has not been published: the learning rate, warm-up, decay
and tokens a step are those of Llama 3 8B (`llama3.py`).
"""

from __future__ import annotations

from portatrain.data import TokenMemmap
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.qwen2 import Qwen2Config


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="qwen2-7b",
        model=Qwen2Config(
            vocab=152_064,
            embed=3584,
            layers=28,
            heads=28,
            kv_heads=4,
            head_dim=128,
            mlp=18_944,
            tied=False,
            rope_theta=1e6,
            norm_eps=1e-6,
        ),
        data=TokenMemmap(paths=(), seq_len=4096, vocab=152_064, dtype="uint32", separator=151_643, validation=0.001),
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=1_669_000,  # 7 trillion tokens
        batch=1024,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
