"""A recipe of few, slow steps, so that a test can choose the moment; its pace lies in a file beside it."""

from __future__ import annotations

from pace import Pace

from portatrain.data import TextFiles
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig


def recipe() -> Recipe:
    return Recipe(
        name="paced",
        model=DecoderConfig(vocab=256, embed=32, layers=2, heads=4, kv_heads=2, mlp=64, dropout=0.1),
        data=TextFiles(paths=("corpus",), seq_len=32, validation=0.1),
        optimizer=AdamW(lr=1e-3),
        schedule=Cosine(warmup=4),
        steps=40,
        batch=8,
        checkpoint_every=10,
        hooks=(Pace(seconds=0.25),),
    )
