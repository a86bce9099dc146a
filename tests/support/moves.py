"""A checkpoint in memory that one backend leaves and another continues, for honest moves and for wrong ones."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from portatrain.backends import rounding
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.backends.state import inventory
from portatrain.data import open_data
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing import parity
from portatrain.training import continuity
from portatrain.training.arrival import judge

Values = dict[tuple[str, str], np.ndarray]

SMALL = ["model.embed=32", "model.mlp=64", "model.heads=4", "model.kv_heads=2", "data.seq_len=32", "batch=4"]
SMALL += ["steps=40", "schedule.warmup=4", "eval_every=none", "hooks=()"]


def small(*overrides: str) -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), [*SMALL, *overrides])


class Move:
    """What `left` leaves of `recipe` after `step` steps, for `arrived`."""

    def __init__(self, recipe: Recipe, step: int, *, left: str = "jax", arrived: str = "torch") -> None:
        self.recipe, self.step = recipe, step
        self.data = open_data(recipe.data, seed=recipe.seed).train
        program = make_program(recipe)
        backend = backend_class(left)(program)
        state = backend.init_state()
        for number, batch in enumerate(parity.batches(recipe, step), start=1):
            state, _ = backend.step(state, batch, step=number, scale=recipe.schedule(number, recipe.steps))
        self.meta = continuity.record(backend, state, recipe, self.data, step)
        self.values: Values = {t.key: np.zeros(t.info.shape, np.float32) for t in inventory(program)}
        for box in backend.local_boxes(state):
            held = box.fetch()
            if not box.name:
                self.values[box.role, ""] = held
            else:
                into = self.values[box.role, box.name]
                into[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = held
        self.program, self.arrived = program, arrived
        self.backend = backend_class(arrived)(program)

    def verdict(
        self, mutate: Callable[[Values], None] | None = None, *, changes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The verdict on arrival, of values that `mutate` changed, or in a program with other fields."""
        values = copy.deepcopy(self.values) if mutate else self.values
        if mutate:
            mutate(values)
        backend = backend_class(self.arrived)(dataclasses.replace(self.program, **changes)) if changes else self.backend

        definition = self.program.definition
        positions = rounding.positions_in(definition, self.data.batch(0, 1)) * self.recipe.batch
        error = rounding.step_error(definition, positions, self.recipe.precision)

        def arrive(change: Any) -> dict[str, Any]:
            def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
                box = values[role, name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
                return change(role, name, offset, box) if change else box

            return continuity.record(backend, backend.restore_state(read), self.recipe, self.data, self.step)

        return judge(
            self.meta,
            arrive(None),
            continuity.Bounds.of(definition, self.recipe.precision, positions),
            lambda seed: arrive(rounding.moving(definition.params, error, seed)),
        )
