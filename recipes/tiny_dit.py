"""tiny-dit: a diffusion transformer with flow matching on scikit-learn's handwritten digits, in three minutes on two
CPU cores. `python -m recipes.sample_images runs/tiny-dit` draws digits from it.
"""

from __future__ import annotations

from portatrain.data import Digits
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.dit import DiTConfig


def recipe() -> Recipe:
    return Recipe(
        name="tiny-dit",
        model=DiTConfig(rows=8, columns=8, channels=1, patch=2, classes=10, embed=64, layers=3, heads=4),
        data=Digits(),
        optimizer=AdamW(lr=2e-3, b2=0.98, weight_decay=0.01),
        schedule=Cosine(warmup=50, min_ratio=0.01),
        steps=1500,
        batch=64,
        eval_every=300,
        eval_final_batches="all",
        ema_decay=0.995,
    )
