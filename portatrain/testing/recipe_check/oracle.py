"""The checks of a definition and of its forward pass, in the oracle: nothing here needs a framework.

Each takes a `Subject` and returns findings; none if all is well.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import numpy as np

from portatrain.backends.base import check_loss
from portatrain.backends.program import make_program
from portatrain.backends.reference.guard import GuardedOps
from portatrain.backends.reference.run import Forward
from portatrain.errors import UserError
from portatrain.model.layout import unknown_axes
from portatrain.model.module import Definition, State
from portatrain.recipe import Recipe
from portatrain.testing.recipe_check.blame import OPERATIONS, place_of
from portatrain.testing.recipe_check.report import Finding
from portatrain.testing.recipe_check.subject import MODES, Subject, explained, states_after_step, tried
from portatrain.testing.recipe_check.watch import Watch, watched


def axes(recipe: Recipe, definition: Definition) -> list[Finding]:
    """Axes that no mapping knows."""
    return [
        Finding(
            what=f"axis {unknown.axis!r}",
            said=f"expected an axis of a mapping, got one of {', '.join(unknown.tensors[:3])} that is in none: it is "
            "whole on every device",
            do=unknown.do,
            numbers=False,
        )
        for unknown in unknown_axes(definition, compute=recipe.compute, params=recipe.params)
    ]


def runs(subject: Subject) -> list[Finding]:
    """What the oracle refuses in a forward pass: methods of arrays that frameworks do not share, random numbers of the
    model's own, attributes that are set."""
    found: list[Finding] = []
    for training, mode in MODES.items():
        run = partial(subject.run, subject.moved, training=training, operations=_noting(subject))
        watch, (value, error) = watched(partial(tried, run), subject.definition)
        found += random_numbers(watch, mode) + _assigned(subject.definition, watch, mode)
        if error is not None and not found:
            found.append(explained(error, f"the model in {mode}"))
        if error is None and value is not None and not found:
            found += _not_finite(subject, value, mode)
        if found:
            break
    if not found and hasattr(subject.definition.model, "predict"):
        run = partial(subject.run, subject.moved, training=False, method="predict", operations=_noting(subject))
        watch, (_, error) = watched(partial(tried, run), subject.definition)
        found += random_numbers(watch, "predict") + _assigned(subject.definition, watch, "predict")
        if isinstance(error, UserError) and not found:
            found.append(explained(error, "the model's predict"))
        subject.predicts = error is None  # another error may say that it takes other arguments, such as a cache
    if not found and subject.definition.states:
        watch, (_, error) = watched(
            lambda: tried(lambda: states_after_step(subject, subject.moved)), subject.definition
        )
        found += random_numbers(watch, "after_step") + _assigned(subject.definition, watch, "after_step")
        if error is not None and not found:
            found.append(explained(error, "the model's after_step"))
    return found or _unknown_axes(subject)


def _unknown_axes(subject: Subject) -> list[Finding]:
    """Axes in `ops.shard` that the layout refuses in a run; in reductions they are labels."""
    known = make_program(subject.recipe).layout.known or ()
    return [
        Finding(
            what=f"axis {axis!r}",
            said=f"expected an axis of a mapping or of a parameter, got one of a value in {place} that is in none",
            do=f"Correct its name, or say in the recipe that it is whole: compute={{{axis!r}: ()}}.",
        )
        for axis, place in subject.axes.items()
        if axis not in known
    ]


def random_numbers(watch: Watch, mode: str) -> list[Finding]:
    return [
        Finding(
            what=f"random numbers of {name}",
            said=f"expected none but those of ops in {mode}, got some drawn in {place}",
            do="Use ops.dropout(x, rate, site=self.site) or ops.noise(..., site=self.site): they are the same on every "
            "framework, mesh and attempt.",
        )
        for name, place in dict.fromkeys(watch.drawn)
    ]


def _assigned(definition: Definition, watch: Watch, mode: str) -> list[Finding]:
    found = []
    for cls, name, place in dict.fromkeys(watch.assigned):
        held = [vars(m).get(name) for m in definition.modules.values() if type(m) is cls]
        state = any(isinstance(value, State) for value in held)
        found.append(
            Finding(
                what=f"{'State' if state else 'attribute'} {cls.__name__}.{name}",
                said=f"expected no attribute to be set when the model runs, got one that is set in {mode} in {place}",
                do=f"Add to a State with ops.tally(self, {name}=...) in the forward pass, and set it with "
                f"ops.update(self, {name}=...) in after_step(self, ops); keep other values in local variables.",
            )
        )
    return found


def _not_finite(subject: Subject, found: Forward, mode: str) -> list[Finding]:
    _, error = tried(lambda: check_loss(found.value, subject.definition.model))
    if error is not None:
        return [explained(error, f"the model in {mode}")]
    values = {"loss": found.objective, "weight of the samples": found.value.weight_B}
    values |= {f"ops.aux({name!r})": aux.value_B for name, aux in found.auxes.items()}
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if not bad and not np.sum(found.value.weight_B) > 0:
        bad = ["sum of the samples' weights, which is not above 0"]
    return [
        Finding(
            what=f"the {name}",
            said=f"expected finite numbers in {mode}, near the initial parameters and in float64, got others",
            do="Look for a logarithm, a root or a division of zero, and for sizes that grow from layer to layer.",
        )
        for name in bad
    ]


def _noting(subject: Subject) -> type[GuardedOps]:
    """Return the guarded operations; each notes in `subject` that the model calls it."""

    def noting(name: str) -> Any:
        method = getattr(GuardedOps, name)

        def call(self: Any, *args: Any, **options: Any) -> Any:
            if not self._inside:
                subject.used.add(name)
                for axis in filter(None, args[1:] if name == "shard" else ()):
                    subject.axes.setdefault(axis, place_of(sys._getframe(1)))
                if "batch" in options.get("over", ()):
                    subject.over_batch.append(f"ops.{name} in {place_of(sys._getframe(1))}")
            return method(self, *args, **options)

        return call

    return type("Noting", (GuardedOps,), {name: noting(name) for name in OPERATIONS})
