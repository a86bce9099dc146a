"""mistral-7b: a decoder with the sizes of the released Mistral 7B v0.1, 7.24 billion parameters.

Sizes are those of config.json of mistralai/Mistral-7B-v0.1 (the defaults of transformers' MistralConfig, but for the
eps of norms). In its tokenizer 1 (`<s>`) begins a document. The training data is yours: files of token ids, named with
``--set data.paths=/data/tokens/*.bin`` (uint16, with the id 1 before every document). This recipe is planned; no test
trains it.

Nothing has been published about how it was trained but the length of 8,192 (Jiang et al. 2023, arXiv:2310.06825). The
learning rate, warm-up, decay and tokens a step are those of Llama 3 8B (`llama3.py`); the number of tokens is ours.
"""

from __future__ import annotations

from portatrain.data import TokenMemmap
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig


def recipe() -> Recipe:
    """Return the recipe."""
    return Recipe(
        name="mistral-7b",
        model=DecoderConfig(
            vocab=32_000,
            embed=4096,
            layers=32,
            heads=32,
            kv_heads=8,
            head_dim=128,
            mlp=14_336,
            window=4096,
            tied=False,
            rope_theta=10_000.0,
            norm_eps=1e-5,
        ),
        data=TokenMemmap(paths=(), seq_len=8192, vocab=32_000, dtype="uint16", separator=1, validation=0.001),
        optimizer=AdamW(lr=3e-4, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=8000, min_ratio=0.01),
        steps=500_000,  # 2.1 trillion tokens
        batch=512,  # samples, 4.2 million tokens
        precision="bf16",
        remat="block",
        eval_every=1000,
        checkpoint_every=500,
    )
