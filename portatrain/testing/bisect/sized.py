"""One recipe on two settings: make it small, draw batches, and replay the first steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from portatrain.backends.program import make_program
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.testing.bisect.report import Replay
from portatrain.testing.bisect.sides import Side
from portatrain.testing.bisect.step import replay
from portatrain.testing.recipe_check import oracle
from portatrain.testing.recipe_check.small import BATCHES, Small, batches_of, candidates, too_large
from portatrain.testing.recipe_check.subject import subject_of


def replay_small(sides: tuple[Side, Side], *, steps: int = BATCHES, progress: Callable[[str], None]) -> Replay:
    """Replay the first steps of fresh runs at the smallest size at which the model of the first side runs.

    Raises:
        UserError: the model does not run in the oracle at any size, or is too large for it.
    """
    first: UserError | None = None
    for pair in zip(*(candidates(side.recipe) for side in sides), strict=False):
        small, sizes = (one for one, _ in pair), pair[0][1]
        made = tuple(_as_given(one, side.recipe) for one, side in zip(small, sides, strict=True))
        try:
            definition = make_program(made[0]).definition
            if (error := too_large(made[0], definition)) is not None:
                first = first or error
                continue
            batches = batches_of(made[0], definition)[:steps]
            found = oracle.runs(subject_of(Small(recipe=made[0], definition=definition, batches=batches, sizes=sizes)))
        except UserError as error:
            first = first or error
            continue
        if found:
            first = first or UserError(
                f"recipe {sides[0].recipe.name}",
                expected="a model that runs in the oracle",
                got=f"{found[0].what}: {found[0].said}",
                do="Mend it first: `portatrain check` says more.",
            )
            continue
        running = (replace(sides[0], recipe=made[0]), replace(sides[1], recipe=made[1]))
        return replay(running, [(rows, rows) for rows in batches], sizes=sizes, progress=progress)
    assert first is not None
    raise first


def _as_given(small: Recipe, given: Recipe) -> Recipe:
    """Return the small recipe with the precision and the accumulation of the one that was given."""
    halves = given.accumulation if small.batch % given.accumulation == 0 else 1
    return replace(small, precision=given.precision, accumulation=halves)
