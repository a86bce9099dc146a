"""A side of a replay: a recipe on a backend and a mesh, its state as logical tensors, and one step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from portatrain.backends.base import Arrays, Backend, Context, backend_class
from portatrain.backends.program import Program, make_program
from portatrain.backends.reference.differences import directional_derivative
from portatrain.backends.reference.run import forward, initial_states
from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.rounding import positions_in, step_error
from portatrain.backends.state import COUNT, full_name, initial_box, inventory
from portatrain.backends.watched import Watched
from portatrain.errors import UserError
from portatrain.model.module import Definition
from portatrain.recipe import Recipe
from portatrain.testing.recipe_check.measured import whole

Make = Callable[[Program], Backend]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A recipe on one setting. name: in words. kernels: (operation, kernel) of those that are named. make: makes the
    backend, by default that of the name `backend`. python: another Python that runs it; '': this one. source: the
    recipe's file or name, which other processes load."""

    name: str
    recipe: Recipe
    backend: str = "jax"
    mesh: str = ""
    kernels: tuple[tuple[str, str], ...] = ()
    make: Make | None = None
    python: str = ""
    source: str = ""


def check_shapes(a: Running, b: Running) -> None:
    """Refuse sides with a parameter or State of two shapes.

    Raises:
        UserError: there is one.
    """
    held = [side.definition.params | side.definition.states for side in (a, b)]
    for name in held[0].keys() & held[1].keys():
        mine, other = held[0][name].shape, held[1][name].shape
        if mine != other:
            raise UserError(
                f"{a.name} and {b.name}",
                expected="one model, so that both sides can begin with the same state",
                got=f"{name} of shape {list(mine)} and {list(other)}",
                do="Leave out the fields that set sizes, or give them to both sides.",
            )


class Running:
    """A side that runs. Its backend is made once; every step begins at a state that is given as logical tensors."""

    def __init__(self, side: Side) -> None:
        self._describe(side)
        # What is computed again or fused is no part of what a step means.
        made = replace(self.program, remat="none", kernels=side.kernels)
        self.backend = (side.make or backend_class(side.backend))(made)

    def _describe(self, side: Side) -> None:
        self.name, self.recipe = side.name, side.recipe
        self.program = make_program(side.recipe, mesh=side.mesh)

    def close(self) -> None:
        """End what runs for this side alone."""

    @property
    def definition(self) -> Definition:
        return self.program.definition

    @cached_property
    def _infos(self) -> dict[str, Any]:
        return {full_name(*t.key): t.info for t in inventory(self.program)}

    def first_state(self) -> Arrays:
        """Return the state of a fresh run, by full name, in the dtypes of a checkpoint."""
        found = {
            name: initial_box(info, self.recipe.seed, (0,) * len(info.shape), info.shape)
            for name, info in self._infos.items()
        }
        return {**found, COUNT: np.zeros((), np.int32)}

    def state(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """Return a state of the backend with these logical tensors; one that is not among them is as in a new run."""

        def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            full = full_name(role, name)
            if full == COUNT:
                return np.asarray(arrays[COUNT], np.int32)
            info, held = self._infos.get(full), arrays.get(full)
            if info is None:  # of a backend that keeps more than the recipe asks for
                return np.zeros(shape, np.float32)
            if held is None:
                return initial_box(info, self.recipe.seed, offset, shape)
            part = held[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            return part.astype(info.dtype) if str(part.dtype) != info.dtype else part

        return self.backend.restore_state(read)

    def whole(self, state: Any) -> Arrays:
        """Return every tensor of a state, whole, by full name."""
        return whole(self.backend, state)

    def gradients(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> tuple[float, Arrays]:
        """Return the mean loss of a step and its gradients, before clipping; the state stays."""
        return self.backend.gradients(state, batch, step=step)

    def stepped(self, state: Any, batch: Mapping[str, np.ndarray], step: int, scale: float) -> Any:
        """Return the state after a step; the given one is used up."""
        return self.backend.step(state, batch, step=step, scale=scale)[0]

    def watch(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> list[Watched] | None:
        """Return what every operation of a step took and gave; None if this backend cannot say."""
        watch = getattr(self.backend, "watch", None)
        return None if watch is None else watch(state, batch, step=step)

    def context(self, micro: Mapping[str, np.ndarray], step: int) -> Context:
        return Context(
            seed=self.recipe.seed, step=step, sample=micro.get("sample"), training=True, precision=self.recipe.precision
        )

    def parameters(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Return the parameters of a state in float64."""
        return {n: np.asarray(arrays[f"params/{n}"], np.float64) for n in self.definition.params}

    def states(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Return the model's States of a state."""
        first = initial_states(self.definition)
        return {n: np.asarray(arrays.get(f"state/{n}", first[n])).astype(first[n].dtype) for n in first}

    def objective(
        self,
        arrays: Mapping[str, np.ndarray],
        batch: Mapping[str, np.ndarray],
        step: int,
        taken: Sequence[Mapping[tuple[int, int], np.ndarray]] = (),
    ) -> Any:
        """Return the function from parameters to the mean loss of a step, with auxiliary losses, in float64. taken: for
        each microbatch results in the place of the oracle's, as `watch_oracle` takes them."""
        n = next(iter(batch.values())).shape[0]
        micros = [{k: v[i] for k, v in batch.items()} for i in range(n)]

        def loss(params: Mapping[str, np.ndarray]) -> float:
            total = weight = 0.0
            for i, micro in enumerate(micros):
                given = self.definition, params, micro, self.context(micro, step)
                with np.errstate(all="ignore"):
                    if i < len(taken) and taken[i]:
                        _, found = watch_oracle(*given, states=self.states(arrays), taken=taken[i])
                    else:
                        found = forward(*given, states=self.states(arrays))
                assert found.objective is not None
                total, weight = total + float(found.objective), weight + float(np.sum(found.value.weight_B))
            return total / weight

        return loss

    def true_gradient(
        self,
        arrays: Mapping[str, np.ndarray],
        batch: Mapping[str, np.ndarray],
        step: int,
        name: str,
        index: int,
        *,
        seed: int = 0,
        taken: Sequence[Mapping[tuple[int, int], np.ndarray]] = (),
    ) -> float:
        """Return an element, by its flat index, of the gradient of `objective` for parameter `name`; with a seed at
        parameters that are moved by rounding."""
        params = self.parameters(arrays)
        if seed:
            rng = np.random.default_rng(seed)
            positions = positions_in(self.definition, batch, microbatches=True)
            size = step_error(self.definition, positions, self.recipe.precision)
            params = {n: p * (1 + size * rng.standard_normal(p.shape)) for n, p in params.items()}
        loss = self.objective(arrays, batch, step, taken)
        unit = np.zeros(params[name].shape)
        unit.flat[index] = 1.0
        return directional_derivative(lambda p: loss({**params, name: p}), [params[name]], [unit])
