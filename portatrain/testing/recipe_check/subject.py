"""What is checked: a small recipe, its parameters, and what running it in the oracle gives."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.reference.run import Forward, after_step, forward, initial_states
from portatrain.backends.state import initial_box
from portatrain.errors import StorageError, UserError, users_code
from portatrain.model.module import Definition, Normal
from portatrain.recipe import Recipe
from portatrain.testing.recipe_check.report import CheckFailed, Finding
from portatrain.testing.recipe_check.small import Batch, Small

Arrays = dict[str, np.ndarray]
MODES = {True: "training", False: "evaluation"}


@dataclass(kw_only=True)
class Subject:
    """What is checked. initial: the parameters of a fresh run. moved: parameters of which none is at a special value
    such as zero, so that a factor of zero hides nothing; both float64 arrays of float32 values."""

    small: Small
    initial: Arrays
    moved: Arrays
    used: set[str] = field(default_factory=set)
    """The operations that the model called."""
    over_batch: list[str] = field(default_factory=list)
    """Its calls of reductions over the batch, each with its place."""
    predicts: bool = False
    """True if the model has a `predict` that takes the batches of its data."""
    axes: dict[str, str] = field(default_factory=dict)
    """The axes that it gives `ops.shard`, each with the first place."""

    @property
    def recipe(self) -> Recipe:
        return self.small.recipe

    @property
    def definition(self) -> Definition:
        return self.small.definition

    @property
    def batch(self) -> Batch:
        return self.small.batches[0]

    def run(self, params: Arrays, *, training: bool, method: str = "__call__", **options: Any) -> Forward:
        """Run the model on the first batch in the oracle."""
        context = Context(seed=self.recipe.seed, step=1, training=training)
        with np.errstate(all="ignore"):
            return forward(self.definition, params, self.batch, context, method=method, **options)


def subject_of(small: Small) -> Subject:
    rng = np.random.default_rng(1)
    initial, moved = {}, {}
    for name, info in small.definition.params.items():
        origin = (0,) * len(info.shape)
        start = initial_box(info, small.recipe.seed, origin, info.shape).astype(np.float64)
        if isinstance(info.init, Normal):
            size: Any = 0.3 * info.init.std
        else:
            size = 0.1 * np.maximum(1.0, np.abs(start))
        initial[name] = start
        moved[name] = (start + size * rng.normal(size=info.shape)).astype(np.float32).astype(np.float64)
    return Subject(small=small, initial=initial, moved=moved)


def tried(call: Any) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def explained(error: Exception, where: str) -> Finding:
    """Return the finding for an error that `where` ended in, with the place in the user's file.

    An error without a line of the user's, or one of the machine, is a failure of the check itself.
    """
    if isinstance(error, UserError):
        failed = isinstance(error, (CheckFailed, StorageError))
        said = f"expected {error.expected}, got {error.got}"
        at = "" if getattr(error, "trace", "") else users_code.at_line(error)  # a message with a trace has the line
        what = f"{error.what} ({at})" if at and at not in error.what else error.what
        return Finding(what=what, said=said, do=error.do, numbers=not failed, failed=failed)
    line = users_code.at_line(error, called=True)
    paragraph = users_code.explained(error, where if line else "")
    if paragraph is not None:
        return explained(paragraph, where)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return Finding(
        what=where,
        said=f"expected a check that ends, got {type(error).__name__}: {error}{place}",
        do="The check itself failed, which says nothing of the recipe. Run it again; please report this if it fails "
        "again.",
        numbers=False,
        failed=True,
    )


def losses(
    subject: Subject, definition: Definition, training: bool, params: Arrays | None = None, *, states: bool = False
) -> np.ndarray:
    """Return the losses and weights of all samples and the auxiliary losses; with `states`, everything else too."""
    context = Context(seed=subject.recipe.seed, step=1, training=training)
    with np.errstate(all="ignore"):
        found = forward(definition, subject.moved if params is None else params, subject.batch, context)
    auxes = [found.auxes[name] for name in sorted(found.auxes)]
    values = [found.value.loss_B, found.value.weight_B, *(aux.value_B.ravel() for aux in auxes if states or aux.loss)]
    if states:
        values += [found.states[name].astype(np.float64).ravel() for name in sorted(found.states)]
    return np.concatenate(values)


def objective(subject: Subject, params: Arrays) -> float:
    """Return the mean loss of the first batch, with its auxiliary losses, in training."""
    found = subject.run(params, training=True)
    assert found.objective is not None
    return float(found.objective) / float(np.sum(found.value.weight_B))


def states_after_step(subject: Subject, params: Arrays) -> Arrays:
    """Return the States after the first step."""
    if not subject.definition.states:
        return {}
    return after_step(subject.definition, subject.run(params, training=True).states)


def first_states(subject: Subject) -> Arrays:
    return initial_states(subject.definition)
