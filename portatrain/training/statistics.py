"""The statistics of `statistics_every`, by layer: norms of every parameter, gradient and update, as by the probe, and
what `model/measured.py` records of activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.errors import UserError
from portatrain.model.measured import KINDS as ACTIVATIONS
from portatrain.recipe import Recipe

KINDS = ("params", "grad", "update")
"""2-norms of the parameters before the step, of the gradients before clipping, and of the updates."""


class Statistics:
    """Ask a backend for the statistics of the steps that are due.

    Raises:
        UserError: the recipe asks for them, and the backend has neither `takes_statistics` nor a probe.
    """

    def __init__(self, recipe: Recipe, backend: Backend) -> None:
        self._recipe, self._backend = recipe, backend
        self._within = bool(getattr(backend, "takes_statistics", False))
        self._probed = {"activations": True} if getattr(backend, "probes_activations", False) else {}
        if recipe.statistics_every and not self._within and getattr(backend, "probe", None) is None:
            raise UserError(
                f"recipe field statistics_every on the {backend.name} backend",
                expected="a backend with a probe, such as jax or torch",
                got=backend.name,
                do="Use another backend, or leave it out (--set statistics_every=none).",
            )

    def due(self, step: int) -> bool:
        """Return whether the statistics of `step` are recorded."""
        every = self._recipe.statistics_every
        return every is not None and step % every == 0

    def arguments(self, step: int) -> dict[str, Any]:
        """Return the keyword arguments of the backend's `step`."""
        return {"statistics": True} if self._within and self.due(step) else {}

    def before(self, state: Any, batch: Mapping[str, np.ndarray], step: int, scale: float) -> Mapping[str, np.ndarray]:
        """Return the norms of the coming step, if they are due and the step itself cannot give them; else {}."""
        if self._within or not self.due(step):
            return {}
        found: Mapping[str, np.ndarray] = self._backend.probe(state, batch, step=step, scale=scale, **self._probed)
        return {name: values for name, values in found.items() if name.partition("/")[0] in (*KINDS, *ACTIVATIONS)}


def flat(norms: Mapping[str, Any]) -> dict[str, float]:
    """Return one number a layer: 'grad/blocks/attn/wq/3', of nested Stacks '.../3.1', without Stacks 'grad/embed/w'."""
    found: dict[str, float] = {}
    for name, values in norms.items():
        for index, value in np.ndenumerate(np.asarray(values, np.float64)):
            found["/".join([name, ".".join(map(str, index))] if index else [name])] = float(value)
    return found
