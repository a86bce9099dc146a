"""The view of a run that a hook gets: plain values and NumPy arrays, the same on every backend and mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portatrain.backends.base import Backend
from portatrain.data import OpenData
from portatrain.errors import UserError, choice
from portatrain.model.module import Definition
from portatrain.recipe import Recipe

if TYPE_CHECKING:
    from portatrain.training.generation import Continued


class TrainingView:
    """One attempt at a run, as its hooks see it. Hooks run in every process; all of them must make the same calls.

    Attributes:
        recipe, definition, data: the recipe, the model's parameters by name, and the opened data.
        folder: the run directory on this machine.
        backend: the name of the backend.
        process: this process's number; write files in process 0 alone.
        metrics: numbers by name, of the last step (`loss`, `grad_norm`, `lr`, ...) and of the last evaluation
            (`validation_loss`, ...).
    """

    def __init__(
        self,
        *,
        recipe: Recipe,
        definition: Definition,
        data: OpenData,
        folder: Path,
        backend: Backend,
        state: Callable[[], Any],
        step: Callable[[], int],
        event: Callable[..., None],
    ) -> None:
        self.recipe, self.definition, self.data, self.folder = recipe, definition, data, folder
        self.backend, self.process = backend.name, backend.process
        self.metrics: dict[str, float] = {}
        self._backend, self._state, self._step, self._event = backend, state, step, event

    @property
    def step(self) -> int:
        """The number of steps trained so far; with asynchronous steps it may be one more than in the last record."""
        return self._step()

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return self.recipe.steps

    def event(self, kind: str, **fields: Any) -> None:
        """Send an event to every sink; it becomes a line of events.jsonl.

        fields: numbers, text, True, False, None, and lists and dictionaries of these. An array of one element is a
        number.

        Raises:
            UserError: a field is something else.
        """
        self._event(kind, **{name: _plain(value, f"event {kind!r}, field {name}") for name, value in fields.items()})

    def evaluate(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return 'loss_B', 'weight_B' and every `ops.aux` a sample, without dropout. `batch` has leading axis B."""
        return self._backend.eval(self._state(), batch)

    def predict(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the model's `predict` on a batch of samples."""
        return self._backend.predict(self._state(), batch)

    def live(self) -> tuple[Backend, Any]:
        """Return the backend and its state as it is now, of which a hook makes a `TrainedModel`. Every process must use
        it together, and the state ends with the next step, which changes the weights."""
        return self._backend, self._state()

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, temperature: float = 0.7, top_p: float = 1.0
    ) -> list[Continued]:
        """Continue prompts, lists of token ids, by `max_tokens` tokens each. A draw depends on the recipe's seed, the
        number of the prompt and the position. It works on every backend and mesh, and so without a cache: every token
        runs the model on the length of a training sample. `portatrain.load(run).generate` has a cache.

        Raises:
            UserError: the model has no `predict` that returns logits, or it does not read from left to right.
        """
        from portatrain.training.drawing import Drawing
        from portatrain.training.generation import Generator

        context = self.recipe.data.tokens_per_sample()
        generator = Generator(self._backend, self._state, context=context, cache=False)
        drawing = Drawing(temperature=temperature, top_p=top_p, seed=self.recipe.seed)
        return generator(prompts, max_tokens=max_tokens, drawing=drawing)

    def parameter(self, name: str) -> np.ndarray:
        """Return the parameter `name` whole, whatever the mesh. It takes the parameter's size of memory.

        Raises:
            UserError: there is no such parameter, or the backend cannot gather one from several processes.
        """
        if name not in self.definition.params:
            raise choice(f"parameter {name!r}", name, self.definition.params)
        gather = getattr(self._backend, "whole_parameter", None)
        if gather is not None and self._backend.processes > 1:
            return gather(self._state(), name)
        shape = self.definition.params[name].shape
        found, covered = None, np.zeros(shape, bool)
        for box in self._backend.local_boxes(self._state()):
            if (box.role, box.name) != ("params", name):
                continue
            values = np.asarray(box.fetch())
            found = np.empty(shape, values.dtype) if found is None else found
            at = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            found[at], covered[at] = values.reshape(box.shape), True
        if found is None or not covered.all():
            raise UserError(
                f"parameter {name!r} on {self.backend}",
                expected="a backend that gathers parameters from all processes (whole_parameter)",
                got=f"{self._backend.processes} processes, of which this one holds a part",
                do="Use jax in one process or torch, or read the parameter from a checkpoint.",
            )
        return found


def _plain(value: Any, what: str) -> Any:
    """Return the value of a field of an event as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(one, f"{what}, key {key!r}") for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, f"{what}, element {i}") for i, one in enumerate(value)]
    shape = getattr(value, "shape", None)
    if shape is not None and math.prod(shape) == 1:
        return _plain(value.item(), what)
    size = "" if shape is None else f" of shape {tuple(shape)}"
    raise UserError(
        what,
        expected="numbers, text, True, False, None, or lists and dictionaries of these",
        got=f"{type(value).__name__}{size}",
        do="Give a number such as float(x.mean()), a list such as x.tolist(), or a text such as str(x).",
    )
