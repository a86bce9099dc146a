"""A small recipe on eight small texts, for tests of what a run says and of those that listen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from portatrain.data import TextFiles
from portatrain.optim import AdamW, Constant
from portatrain.recipe import Recipe
from recipes.models.decoder import DecoderConfig


def recipe_in(folder: Path, name: str, **more: Any) -> Recipe:
    """Write the texts into `folder`; return the recipe, with the fields `more`."""
    for n in range(8):
        (folder / f"{n}.txt").write_text(f"{n} and {n} make {2 * n}.\n" * 8)
    return Recipe(
        name=name,
        model=DecoderConfig(vocab=256, embed=16, layers=1, heads=2),
        data=TextFiles(paths=str(folder / "*.txt"), seq_len=16, validation=0.4),
        optimizer=AdamW(lr=1e-3),
        schedule=Constant(),
        steps=4,
        batch=4,
        eval_every=2,
        eval_batches=1,
        **more,
    )
