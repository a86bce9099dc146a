"""Check a restored state against its checkpoint's record; measure the model's rounding if the derived bounds fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from portatrain.backends import rounding
from portatrain.checkpoint.restore import Change
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.training.continuity import MEASURED_DRAWS, Bounds, compare, rounding_may_explain, verdict

Arrive = Callable[[Change | None], dict[str, Any]]
"""Restores the checkpoint with a change, or as it is, and returns its record."""


def judge(
    meta: Mapping[str, Any], recipe: Recipe, definition: Definition, positions: int, arrive: Arrive
) -> tuple[dict[str, Any], Bounds]:
    """Return the verdict on a checkpoint with this `meta`, and the bounds that were used. The state that `arrive`
    restored last is the checkpoint's own.

    If only figures that pass through the model are beyond the bounds of an ordinary model, the model may be one that
    amplifies rounding. So its parameters are moved by as much as rounding moves the result of an operation; the
    differences that this makes raise the bounds. A state that differs, and the exact part, are never measured away.
    """
    bounds = Bounds.of(definition, recipe.precision, positions)
    now = arrive(None)
    found = verdict(meta, now, bounds)
    if not rounding_may_explain(found):
        return found, bounds
    error = rounding.error(recipe.precision, rounding.longest_sum(definition, positions))
    moves = [rounding.moving(definition.params, error, seed) for seed in range(MEASURED_DRAWS)]
    bounds = bounds.raised([compare(now["probe"], arrive(move)["probe"]) for move in moves])
    arrive(None)
    return {**verdict(meta, now, bounds), "measured": True}, bounds
