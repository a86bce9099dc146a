"""hybrid: a byte-level OLMo Hybrid, three gated delta nets to one layer of attention, on Python's standard library.

Train it:  launch --cluster local examples/hybrid.py
"""

from __future__ import annotations

from portatrain import Recipe
from portatrain.data import Stdlib
from portatrain.optim import AdamW, Cosine
from portatrain.training.hooks import TextSample, TrigramBaseline
from recipes.models.olmo_hybrid import OlmoHybridConfig


def recipe() -> Recipe:
    return Recipe(
        name="hybrid",
        model=OlmoHybridConfig(vocab=256, embed=64, layers=4, heads=4, key_heads=2, value_heads=2, mlp=192),
        data=Stdlib(seq_len=128, validation=0.03),
        optimizer=AdamW(lr=3e-3, b2=0.95, weight_decay=0.1),
        schedule=Cosine(warmup=20, min_ratio=0.1),
        steps=200,
        batch=8,
        eval_every=100,
        hooks=(TrigramBaseline(), TextSample(prompt="def ")),
    )
