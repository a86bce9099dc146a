"""Say when `checkpoint_keep_best` keeps nothing: its metric does not exist, or no save has an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable

from portatrain.recipe import Recipe


def no_evaluated_save(recipe: Recipe) -> str | None:
    """Return a warning if no checkpoint of the run can have an evaluation at its step; else None."""
    best, evaluates, saves = recipe.checkpoint_keep_best, recipe.eval_every, recipe.checkpoint_every
    if best is None or (evaluates and saves and math.lcm(evaluates, saves) < recipe.steps):
        return None
    return (
        f"checkpoint_keep_best={best} keeps no checkpoint: none is saved right after an evaluation, with "
        f"eval_every={evaluates}, checkpoint_every={saves} and steps={recipe.steps}. Make checkpoint_every "
        "a multiple of eval_every."
    )


def no_such_metric(recipe: Recipe, found: Iterable[str]) -> str | None:
    """Return a warning if an evaluation with the metrics `found` lacks the metric of `checkpoint_keep_best`; else
    None."""
    if recipe.checkpoint_keep_best is None:
        return None
    names, (_, name) = sorted(found), recipe.retention.goal
    if name in names:
        return None
    return (
        f"checkpoint_keep_best={recipe.checkpoint_keep_best} keeps no checkpoint: an evaluation gives no {name}, but "
        f"{', '.join(names)}."
    )
