"""The float64 oracle of a whole run, for recipes of a few dozen parameters: gradients are finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.backends import reference
from portatrain.backends.base import Context
from portatrain.backends.program import make_program
from portatrain.backends.reference import optim as oracle
from portatrain.backends.state import initial_box
from portatrain.recipe import Recipe


class Oracle:
    """The state of a run in NumPy float64, with gradients by finite differences."""

    def __init__(self, recipe: Recipe) -> None:
        self.program = make_program(recipe)
        self.infos = self.program.definition.params
        self.params = {
            n: initial_box(t, recipe.seed, (0,) * len(t.shape), t.shape).astype(np.float64)
            for n, t in self.infos.items()
        }
        self.trained = [n for n in self.infos if n in self.program.trainable]
        self.slots = {n: oracle.init(recipe.optimizer, self.infos[n]) for n in self.trained}
        self.count, self.next = 0, 0

    def loss(self, recipe: Recipe, split: Any, step: int) -> float:
        """Return the loss on the next samples, without a step."""
        rows = split.batch(self.next, recipe.batch)
        return self._loss(recipe, rows, step)(*self.params.values())

    def _loss(self, recipe: Recipe, rows: Any, step: int) -> Callable[..., float]:
        context = Context(seed=recipe.seed, step=step, training=True)

        def loss(*arrays: np.ndarray) -> float:
            given = dict(zip(self.params, arrays, strict=True))
            found = reference.forward(self.program.definition, given, rows, context, operations=reference.ReferenceOps)
            return float(found.objective) / float(np.sum(rows["mask"]))

        return loss

    def step(self, recipe: Recipe, split: Any, step: int) -> float:
        """Train one step under `recipe` on the next samples; return the loss."""
        rows = split.batch(self.next, recipe.batch)
        self.next += recipe.batch
        names, loss = list(self.params), self._loss(recipe, rows, step)
        arrays = [self.params[n] for n in names]
        grads = {}
        for name in self.trained:
            at = names.index(name)
            grad = np.zeros(arrays[at].shape)
            for index in np.ndindex(grad.shape):
                unit = np.zeros(grad.shape)
                unit[index] = 1.0
                along = [unit if i == at else None for i in range(len(names))]
                grad[index] = reference.directional_derivative(loss, arrays, along)
            grads[name] = grad
        found = loss(*arrays)
        factor = min(1.0, float(recipe.clip_norm or np.inf) / oracle.global_norm(grads))
        self.count += 1
        for name in self.trained:
            info = self.infos[name]
            self.params[name], self.slots[name] = oracle.step(
                recipe.optimizer,
                info,
                param=self.params[name],
                grad=grads[name] * factor,
                slots=self.slots[name],
                scale=recipe.lr_scale(step),
                count=self.count,
                decay=recipe.decays(info),
            )
        return found
