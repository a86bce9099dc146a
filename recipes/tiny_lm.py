"""tiny-lm: a byte-level decoder on the source code of Python's standard library. It trains in minutes on two cores."""

from __future__ import annotations

from portatrain.data import Stdlib
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from portatrain.training.hooks import TextSample, TrigramBaseline
from recipes.models.decoder import DecoderConfig


def recipe() -> Recipe:
    return Recipe(
        name="tiny-lm",
        model=DecoderConfig(vocab=256, embed=128, layers=4, heads=4, kv_heads=2, mlp=384),
        data=Stdlib(seq_len=256, validation=0.03),
        optimizer=AdamW(lr=3e-3, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=30, min_ratio=0.1),
        steps=600,
        batch=8,
        eval_every=100,
        eval_final_batches="all",
        hooks=(TrigramBaseline(), TextSample(prompt="def ")),
    )
