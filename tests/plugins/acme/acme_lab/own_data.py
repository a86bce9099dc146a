"""A line through the lab's points: data by index, and a model for them."""

from __future__ import annotations

from acme_lab.data import LineConfig, Lines
from portatrain import Recipe
from portatrain.optim import AdamW, Cosine


def recipe() -> Recipe:
    return Recipe(
        name="acme-line",
        model=LineConfig(),
        data=Lines(),
        optimizer=AdamW(lr=0.1),
        schedule=Cosine(warmup=1),
        steps=6,
        batch=8,
        eval_every=3,
    )
