"""tiny-vit with the lab's rule and schedule."""

from __future__ import annotations

from dataclasses import replace

from acme_lab.optim import Halving, Shapes, Signum
from portatrain import Recipe
from recipes.tiny_vit import recipe as base

__all__ = ["Halving", "Shapes", "Signum", "recipe"]


def recipe() -> Recipe:
    return replace(base(), name="acme-optim", optimizer=Signum(lr=1e-2, weight_decay=0.1), schedule=Halving(warmup=1))
