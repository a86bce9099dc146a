"""Begin a run with the weights of a folder of transformers (`Recipe.init`), each process reading its own ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_format import Box
from checkpoints_format.dtypes import NUMPY
from portatrain.backends.base import Backend
from portatrain.backends.program import Program
from portatrain.backends.state import full_name, initial_box, inventory
from portatrain.checkpoint.interop import huggingface
from portatrain.recipe import Recipe
from portatrain.system.paths import expand

Read = Callable[[str, str, tuple[int, ...], tuple[int, ...]], np.ndarray]


def first_state(backend: Backend, recipe: Recipe) -> Any:
    """Return the state before the first step: from the folder that the recipe names, or else the initial weights.

    Raises:
        UserError: a folder that is not of the recipe's model; every field and tensor that differs is listed.
    """
    if recipe.init is None:
        return backend.init_state()
    return backend.restore_state(first_weights(recipe, backend.program))


def first_weights(recipe: Recipe, program: Program) -> Read:
    """Return `reader_of` the folder that the recipe names as its start."""
    return reader_of(Path(expand(str(recipe.init))), recipe, program)


def reader_of(folder: Path, recipe: Recipe, program: Program) -> Read:
    """Return what `Backend.restore_state` reads from: parameters, their averages and the States that the folder has are
    the folder's, all else is as in a new run. Reads only the headers of the files; a box then reads little more than
    its own range.

    Raises:
        UserError: as `first_state`.
    """
    tensors = program.definition.tensors
    given = huggingface.read(folder, recipe, {full_name(*key): info.shape for key, info in tensors.items()})
    held = {tensor.key: tensor.info for tensor in inventory(program)}

    def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        info = held.get((role, name))
        if info is None:  # the count of applied steps
            return np.zeros(shape, np.int32)
        like = tensors.get(("params" if role == "ema" else role, name))
        if like is None:  # slots
            return np.zeros(shape, NUMPY[info.dtype])
        if (full := full_name(like.role, like.start or name)) in given:
            return given[full](Box(offset, shape)).astype(NUMPY[info.dtype], copy=False)
        # Factors of LoRA, which no folder has; States.
        return initial_box(like, recipe.seed, offset, shape).astype(NUMPY[info.dtype], copy=False)

    return read
