"""A recipe's data, open, and of a kind that its model takes."""

from __future__ import annotations

import shutil
from pathlib import Path

from portatrain.data import OpenData, open_data
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe


def data_of(recipe: Recipe, definition: Definition, folder: Path) -> OpenData:
    """The data, packed into `folder`; nothing stays there, or above it, of data that will not do.

    Raises UserError where there is less than one batch, or more ids than the model's vocabulary.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    data = open_data(recipe.data, seed=recipe.seed, pack_dir=folder)
    try:
        data.train.require(recipe.batch)
        _check_vocab(recipe, definition, data.vocab)
    except UserError:
        if folder in made and folder.exists():  # a source of arrays is not packed
            shutil.rmtree(folder)
            for parent in made[1:]:
                parent.rmdir()
        raise
    return data


def _check_vocab(recipe: Recipe, definition: Definition, ids: int) -> None:
    table = next((t for t in definition.params.values() if "vocab" in t.axes), None)
    if table is not None and table.shape[table.axes.index("vocab")] < ids:
        raise UserError(
            f"recipe {recipe.name}: model",
            expected=f"a vocabulary of at least the data's {ids} ids",
            got=f"{table.name} with {table.shape[table.axes.index('vocab')]}",
            do=f"Set model.vocab={ids}.",
        )
