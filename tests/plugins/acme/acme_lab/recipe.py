"""tiny-vit with what the lab adds, for a few steps."""

from __future__ import annotations

from dataclasses import replace

from acme_lab.hooks import Norms
from portatrain import Recipe
from recipes.tiny_vit import recipe as base


def recipe() -> Recipe:
    whole = base()
    name = max(whole.describe().params, key=lambda n: whole.describe().params[n].size)
    return replace(whole, name="acme", hooks=(Norms(parameter=name),))
