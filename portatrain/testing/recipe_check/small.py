"""Make a recipe small enough to be checked in seconds, and make batches for it.

A model's spec says how it is made small, by a method `small()` that returns a spec of the same kind with small sizes.
Without the method only a field `layers` is reduced, and the model is checked as it is if that takes little time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from portatrain.data.open import blank_batch
from portatrain.data.own import gives_arrays, gives_tokens
from portatrain.data.own_arrays import open_arrays
from portatrain.data.spec import DataSpec, Digits, Mixture, Preferences
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe

SAMPLES = 8
"""Samples in a batch: they divide by two microbatches of two devices each."""
MOST_SAMPLES = 128
"""The largest batch of a recipe's own that is tried, if its model does not run with `SAMPLES`."""
BATCHES = 3
SEQ_LEN = 32
"""Targets in a sample of tokens; even, so that two devices of an axis can split it."""
LAYERS = 2
LARGEST = 2.0e9
"""The largest product of parameters and positions in a batch for which the oracle still takes seconds."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Small:
    """A recipe to check, with global batches (samples, ...). sizes: how it differs from the one that was given."""

    recipe: Recipe
    definition: Definition
    batches: tuple[Batch, ...]
    sizes: str


def candidates(recipe: Recipe) -> Iterator[tuple[Recipe, str]]:
    """Yield the recipe made small in every way that is tried, smallest first, each with what was changed, in words."""
    models = [(recipe.model, "")]
    if callable(shrink := getattr(recipe.model, "small", None)):
        models.insert(0, (shrink(), "model.small()"))
    elif isinstance(layers := getattr(recipe.model, "layers", None), int) and layers > LAYERS:
        models.insert(0, (dataclasses.replace(recipe.model, layers=LAYERS), f"{LAYERS} layers"))  # type: ignore[type-var]
    lengths = [(recipe.data, "")]
    length = recipe.data.tokens_per_sample()
    if length is not None and length > SEQ_LEN and _is_tokens(recipe.data):
        lengths.insert(0, (_shortened(recipe.data), f"samples of {SEQ_LEN} tokens"))
    for samples in dict.fromkeys((SAMPLES, math.lcm(recipe.batch, 4))):  # its own, as for a group of samples
        if samples > MOST_SAMPLES:
            continue
        for model, one in models:
            for data, other in lengths:
                said = ", ".join(filter(None, (one, other)))
                yield _plain(recipe, model, data, samples), said or "the recipe's own sizes"


def _plain(recipe: Recipe, model: Any, data: DataSpec, samples: int) -> Recipe:
    """Return the recipe with a small batch and without what does not concern the model's numbers."""
    return dataclasses.replace(
        recipe,
        model=model,
        data=data,
        batch=samples,
        accumulation=1,
        batch_start=None,
        batch_ramp=0,
        precision="fp32",
        hooks=(),
        checkpoint_keep_best=None,
    )


def _shortened(data: DataSpec) -> DataSpec:
    if isinstance(data, Mixture):
        return dataclasses.replace(data, sources=tuple(_shortened(source) for source in data.sources))
    return dataclasses.replace(data, seq_len=SEQ_LEN)  # type: ignore[call-arg]


def _is_tokens(data: DataSpec) -> bool:
    return isinstance(data, (Mixture, Preferences)) or gives_tokens(data)


def too_large(recipe: Recipe, definition: Definition) -> UserError | None:
    """Return the error for a recipe that would take the oracle too long, or None."""
    positions = recipe.batch * (recipe.data.tokens_per_sample() or 1)
    if definition.parameters * positions <= LARGEST:
        return None
    kind = type(recipe.model).__name__
    return UserError(
        f"model {kind}",
        expected=f"at most {LARGEST:.0e} parameters times positions of a batch of {recipe.batch} samples",
        got=f"{definition.parameters:,} x {positions:,}",
        do=f"Give {kind} a method small() that returns a {kind} of the same kind with small sizes.",
    )


def batches_of(recipe: Recipe, definition: Definition) -> tuple[Batch, ...]:
    """Return batches for `recipe`: tokens and images are drawn; a source of arrays gives its first in training.

    Raises:
        UserError: a source of arrays gives no samples, or samples of several shapes or dtypes.
    """
    rng = np.random.default_rng(0)
    spec, samples = recipe.data, recipe.batch
    drawn = isinstance(spec, Digits) or _is_tokens(spec)
    train = open_arrays(spec, recipe.seed)["train"] if not drawn and gives_arrays(spec) else None
    made = []
    for i in range(BATCHES):
        if isinstance(spec, Digits):
            rows = _images(rng, blank_batch(spec, samples))
        elif _is_tokens(spec):
            rows = _documents(rng, blank_batch(spec, samples), _vocab(spec, definition))
            if isinstance(spec, Mixture):
                rows["source"] = (np.arange(samples) % len(spec.sources)).astype(np.int32)
        elif train is not None:
            rows = train.batch(i * samples, samples)
        else:
            rows = blank_batch(spec, samples)
        made.append(rows | {"sample": np.arange(i * samples, (i + 1) * samples, dtype=np.int64) + 5})
    return tuple(made)


def _vocab(spec: DataSpec, definition: Definition) -> int:
    tables = [t.shape[t.axes.index("vocab")] for t in definition.params.values() if "vocab" in t.axes]
    given = [v for v in (getattr(spec, "vocab", 0),) if v]
    return min((*tables, *given), default=256)


def _images(rng: np.random.Generator, like: Mapping[str, np.ndarray]) -> Batch:
    """Return images with empty borders, as scans have them: zeros meet the kinks of a model."""
    pixels = rng.random(like["image"].shape).astype(np.float32)
    pixels[:, [0, -1]] = 0
    return {
        **like,
        "image": np.where(pixels < 0.3, 0.0, pixels).astype(np.float32),
        "label": rng.integers(0, 10, len(pixels)).astype(np.int32),
        "mask": np.ones(len(pixels), np.float32),
    }


def _documents(rng: np.random.Generator, like: Mapping[str, np.ndarray], vocab: int) -> Batch:
    """Return packed documents of random length, with padding at the end of the first sample."""
    shape = like["tokens"].shape
    at = np.arange(shape[1])
    starts = rng.random(shape) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    mask = (rng.random(shape) < 0.9).astype(np.float32)
    padding = max(1, shape[1] // 8) if shape[1] > 1 else 0
    if padding:
        for array in (segments, positions, mask):
            array[0, -padding:] = 0
    drawn = rng.integers(0, vocab, (shape[0], shape[1] + 1)).astype(np.int32)
    return {
        **like,
        "tokens": drawn[:, :-1].copy(),
        "targets": drawn[:, 1:].copy(),
        "mask": mask,
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
    }
