"""Mutants of a checkpoint: wrong states with valid checksums, which the continuity check must refuse, and small changes
of one kind, to measure from which size on the check sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from portatrain.checkpoint.rewrite import rewritten
from portatrain.recipe import Recipe

Values = dict[str, np.ndarray]
Meta = dict[str, Any]
Mutant = Callable[[Values, Meta, Recipe], None]
"""Changes the tensors and the meta of a checkpoint in place."""


def rewrite(path: Path, mutate: Mutant, recipe: Recipe, *, fingerprints: bool = False) -> None:
    """Replace the checkpoint in the folder `path` by a mutant of it, committed, with valid checksums.

    fingerprints: keep the fingerprints of the tensors, which do not fit the mutant. Without them the mutant is like a
    checkpoint of an older release, and only the record can tell.
    """

    def change(values: Values, meta: Meta) -> None:
        mutate(values, meta, recipe)
        if not fingerprints:
            meta.pop("fingerprints", None)

    rewritten(path, change)


def _slots(values: Values, slot: str) -> list[str]:
    return [n for n in values if n.startswith(f"opt/{slot}/")]


def second_moment_zeroed(values: Values, meta: Meta, recipe: Recipe) -> None:
    for name in _slots(values, "v"):
        values[name][...] = 0


def first_moment_zeroed(values: Values, meta: Meta, recipe: Recipe) -> None:
    for name in _slots(values, "m"):
        values[name][...] = 0


def count_off_by_one(values: Values, meta: Meta, recipe: Recipe) -> None:
    values["opt/count"] = values["opt/count"] + np.int32(1)


def data_shifted(values: Values, meta: Meta, recipe: Recipe) -> None:
    meta["data"]["next_sample"] += 1


def random_word_changed(values: Values, meta: Meta, recipe: Recipe) -> None:
    meta["rng"]["word"] = str(int(meta["rng"]["word"]) ^ 1)


def seed_changed(values: Values, meta: Meta, recipe: Recipe) -> None:
    meta["rng"]["seed"] = str(int(meta["rng"]["seed"]) + 1)


def learning_rate_off_by_a_step(values: Values, meta: Meta, recipe: Recipe) -> None:
    """Set the schedule back by a step: the learning rate of a run that counts one step less."""
    meta["schedule"]["learning_rate"] = recipe.optimizer.lr * recipe.lr_scale(meta["step"])


def step_off_by_one(values: Values, meta: Meta, recipe: Recipe) -> None:
    meta["step"] += 1


def layers_swapped(values: Values, meta: Meta, recipe: Recipe) -> None:
    """Swap two layers of every parameter of the largest Stack, with their slots and averages."""
    for name, array in values.items():
        if "blocks/" in name and array.ndim and array.shape[0] > 1:
            array[[0, 1]] = array[[1, 0]]


def one_tensor_swapped(values: Values, meta: Meta, recipe: Recipe) -> None:
    """Swap two layers of one parameter, and nothing else."""
    array = values[next(n for n in sorted(values) if n.startswith("params/blocks/") and values[n].ndim > 2)]
    array[[0, 1]] = array[[1, 0]]


def slots_of_layers_swapped(values: Values, meta: Meta, recipe: Recipe) -> None:
    for name in [*_slots(values, "m"), *_slots(values, "v")]:
        if "blocks/" in name:
            values[name][[0, 1]] = values[name][[1, 0]]


MUTANTS: Mapping[str, Mutant] = {
    f.__name__: f
    for f in (
        second_moment_zeroed,
        first_moment_zeroed,
        count_off_by_one,
        data_shifted,
        random_word_changed,
        seed_changed,
        learning_rate_off_by_a_step,
        step_off_by_one,
        layers_swapped,
        one_tensor_swapped,
        slots_of_layers_swapped,
    )
}


def effects() -> Mapping[str, Callable[[Values, float], None]]:
    """Return small changes of one tensor in one layer, by size."""
    rng = np.random.default_rng(0)

    def noise(array: np.ndarray, size: float) -> None:
        layer = array[0]
        rms = float(np.sqrt(np.mean(np.square(layer, dtype=np.float64))))
        change = rng.standard_normal(layer.shape)
        before = np.linalg.norm(layer.astype(np.float64))
        layer += (size * rms * change).astype(layer.dtype)
        layer *= np.float32(before / np.linalg.norm(layer.astype(np.float64)))  # the norm alone must not tell

    def scaled(role: str) -> Callable[[Values, float], None]:
        def change(values: Values, size: float) -> None:
            values[f"{role}/blocks/mlp/up"][0] *= np.float32(1 + size)

        return change

    def noisy(role: str) -> Callable[[Values, float], None]:
        def change(values: Values, size: float) -> None:
            noise(values[f"{role}/blocks/mlp/up"], size)

        return change

    return {
        "a layer's weights times 1 + x": scaled("params"),
        "a layer's first moment times 1 + x": scaled("opt/m"),
        "a layer's second moment times 1 + x": scaled("opt/v"),
        "noise of x of its scale in a layer's weights, its norm kept": noisy("params"),
        "noise of x of its scale in a layer's first moment, its norm kept": noisy("opt/m"),
    }


def smallest(seen: Callable[[float], bool], *, low: float = 2.0**-24, high: float = 2.0) -> float | None:
    """Return the smallest power of two from which on `seen` is true, by bisection; None if even `high` is not seen."""
    sizes = [low * 2.0**i for i in range(int(np.log2(high / low)) + 1)]
    if not seen(sizes[-1]):
        return None
    first, last = -1, len(sizes) - 1
    while last - first > 1:
        middle = (first + last) // 2
        if seen(sizes[middle]):
            last = middle
        else:
            first = middle
    return sizes[last]
