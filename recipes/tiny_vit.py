"""tiny-vit: a vision transformer on scikit-learn's handwritten digits. It trains in a minute on two CPU cores."""

from __future__ import annotations

from portatrain.data import Digits
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.vit import ViTConfig


def recipe() -> Recipe:
    return Recipe(
        name="tiny-vit",
        model=ViTConfig(
            rows=8, columns=8, channels=1, patch=2, classes=10, embed=64, layers=4, heads=4, mlp=192, dropout=0.1
        ),
        data=Digits(),
        # The model soon memorises the 1,400 training images; strong weight decay makes it generalise.
        optimizer=AdamW(lr=2e-3, b2=0.98, weight_decay=2.0),
        schedule=Cosine(warmup=50, min_ratio=0.01),
        steps=900,
        batch=64,
        eval_every=150,
        eval_final_batches="all",
    )
