"""tiny-siglip: two towers, for pictures and for what is said of them, trained by the sigmoid loss over all pairs of a
batch. It takes about two minutes on two CPU cores; the pictures are drawn by a function (`recipes.pictures`).
"""

from __future__ import annotations

from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from recipes.models.siglip import ImageTower, SigLIPConfig, TextTower
from recipes.pictures import LENGTH, SIZE, VOCAB, Pictures


def recipe() -> Recipe:
    return Recipe(
        name="tiny-siglip",
        model=SigLIPConfig(
            image=ImageTower(size=SIZE, channels=3, patch=4, embed=64, layers=2, heads=4, mlp=128),
            text=TextTower(vocab=VOCAB, positions=LENGTH, embed=64, layers=2, heads=4, mlp=128),
        ),
        data=Pictures(),
        optimizer=AdamW(lr=2e-3, b2=0.95, weight_decay=0.01),
        schedule=Cosine(warmup=50, min_ratio=0.01),
        steps=600,
        batch=64,
        eval_every=150,
        eval_final_batches="all",
    )
