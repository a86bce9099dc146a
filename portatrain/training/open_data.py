"""Open a recipe's data and check that its model can train on it."""

from __future__ import annotations

import shutil
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.data import OpenData, open_data
from portatrain.data.left_out import LeftOut
from portatrain.data.read_ahead import Rows
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe


def data_of(recipe: Recipe, definition: Definition, folder: Path) -> OpenData:
    """Open the data, packed into `folder`, without the samples that the recipe leaves out. If the data is not usable,
    `folder` and its parents are left unchanged.

    Raises UserError if there is less than one batch, or if the data has more ids than the model's vocabulary.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    data = open_data(recipe.data, seed=recipe.seed, pack_dir=folder)
    try:
        data.train.require(recipe.batch)
        data.train.check_end(recipe.numbers_of(recipe.steps)[1])
        _check_vocab(recipe, definition, data.vocab)
    except UserError:
        if folder in made and folder.exists():  # a source of arrays is not packed
            shutil.rmtree(folder)
            for parent in made[1:]:
                parent.rmdir()
        raise
    return replace(data, train=LeftOut(data.train, recipe.left_out)) if recipe.leave_out else data


def rows_here(backend: Any, recipe: Recipe) -> Rows:
    """Return the function that says which samples of a batch this process uses, (samples,) bool; None if all."""
    here = getattr(backend, "rows_here", None)
    mine = None if here is None else here(recipe.microbatch)
    return lambda samples: None if mine is None else np.tile(mine, samples // recipe.microbatch)


def _check_vocab(recipe: Recipe, definition: Definition, ids: int) -> None:
    tables = [(t.shape[t.axes.index("vocab")], t.name) for t in definition.params.values() if "vocab" in t.axes]
    # A source of arrays may have several kinds of ids, of which some index a small table: backends check its batches.
    tables = tables if recipe.data.tokens_per_sample() else sorted(tables)[-1:]
    rows, name = min(tables, default=(ids, ""))
    if rows < ids:
        do = f"Set {_vocab_field(recipe.model, 'model') or 'the vocabulary of the model'}={ids}"
        if recipe.init is not None:
            do = f"Take the tokenizer of the weights that the run begins with, {recipe.init}"
        if rows == ids - 1 and getattr(recipe.data, "tokenizer", None) and getattr(recipe.data, "bos", None) is None:
            do += ", or name the token that opens a document (data.bos): without one, an id is added for it"
        raise UserError(
            f"recipe {recipe.name}: model",
            expected=f"a vocabulary of at least the data's {ids} ids",
            got=f"{name} with {rows}",
            do=f"{do}.",
        )


def _vocab_field(spec: Any, path: str) -> str | None:
    """Return the dotted field of a model's sizes that sets its vocabulary; None if none is called so."""
    if not is_dataclass(spec):
        return None
    names = [field.name for field in fields(spec)]
    if "vocab" in names:
        return f"{path}.vocab"
    inner = (_vocab_field(getattr(spec, name), f"{path}.{name}") for name in names)
    return next(filter(None, inner), None)
