"""Running whole models on a backend with given parameters, for comparison with the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from portatrain.backends import reference
from portatrain.backends.base import Backend, Context, backend_class, missing
from portatrain.backends.program import Program
from portatrain.backends.state import full_name
from portatrain.checkpoint.format_layout import format_layout
from portatrain.model.layout import Layout
from portatrain.model.module import Definition, Module, describe
from portatrain.optim import SGD

BACKENDS = [name for name in ("jax", "torch") if not missing(name)]

Arrays = Mapping[str, np.ndarray]


def program(definition: Definition, **options: Any) -> Program:
    """A program of `definition` on one device; a rate so small that a step changes no parameter."""
    names = frozenset(definition.params)
    given = {"optimizer": SGD(lr=1e-30), "trainable": names, "decay": frozenset(), "seed": 5, **options}
    return Program(definition=definition, layout=Layout.of(definition), **given)


class Running:
    """`model` on backend `name`, with parameters that are not those of a fresh run: norms and biases move too."""

    def __init__(self, name: str, model: Module, **options: Any) -> None:
        self.definition = describe(model)
        self.program = program(self.definition, **options)
        self.backend: Backend = backend_class(name)(self.program)
        self.params = parameters(self.definition)
        self.states = reference.initial_states(self.definition)
        self.state = self.backend.restore_state(self.read)

    def read(self, role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        held = {"params": self.params, "ema": self.params, "state": self.states}.get(role)
        if held is None:
            return np.zeros(shape, np.int32 if role == "opt/count" else np.float32)
        info = self.definition.tensors["params" if role == "ema" else role, name]
        box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
        return held[name][box].astype(info.dtype)

    def oracle(self, batch: Arrays, *, training: bool = False, step: int = 1, **options: Any) -> reference.Forward:
        context = Context(seed=self.program.seed, step=step, training=training)
        return reference.forward(self.definition, self.params, batch, context, states=self.states, **options)

    def tensors(self, role: str) -> dict[str, np.ndarray]:
        """The logical tensors of a role, put together from the backend's boxes."""
        found: dict[str, np.ndarray] = {}
        for box in self.backend.local_boxes(self.state):
            if box.role == role:
                info = self.definition.tensors[role, box.name]
                whole = found.setdefault(box.name, np.zeros(info.shape, info.dtype))
                whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = box.fetch()
        return found


def parameters(definition: Definition, seed: int = 0) -> dict[str, np.ndarray]:
    """float64 arrays of float32 values: `reference.initial`, with every constant made to vary a little."""
    rng = np.random.default_rng(seed)
    made = reference.initial(definition, seed)
    for name, array in made.items():
        if np.ptp(array) == 0:
            made[name] = (array + 0.1 * rng.normal(size=array.shape)).astype(np.float32).astype(np.float64)
    return made


def tokens_batch(*, vocab: int, batch: int, seq: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A packed batch: documents of random length with positions that start again, padding at the end of sample 0, and
    a mask with holes and fractions."""
    rng = np.random.default_rng(seed)
    starts = rng.random((batch, seq)) < 0.2
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    at = np.arange(seq)
    positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
    mask = np.where(rng.random((batch, seq)) < 0.2, 0.0, rng.choice([0.5, 1.0], (batch, seq)))
    segments[0, -2:], mask[0, -2:], positions[0, -2:] = 0, 0, 0
    return {
        "tokens": rng.integers(0, vocab, (batch, seq)).astype(np.int32),
        "targets": rng.integers(0, vocab, (batch, seq)).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "mask": mask.astype(np.float32),
        "sample": np.arange(3, 3 + batch, dtype=np.int64) + 2**33,
    }


def image_batch(*, classes: int, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.random((batch, 8, 8, 1)).astype(np.float32),
        "label": rng.integers(0, classes, batch).astype(np.int32),
        "mask": np.ones(batch, np.float32),
        "sample": np.arange(batch, dtype=np.int64),
    }


def microbatches(batch: Arrays, n: int = 1) -> dict[str, np.ndarray]:
    """(samples, ...) as (n, samples / n, ...), as `Backend.step` takes it."""
    return {key: array.reshape(n, -1, *array.shape[1:]) for key, array in batch.items()}


def everything(backend: Any, state: Any) -> dict[str, np.ndarray]:
    """The whole state as logical tensors."""
    found = {}
    for tensor in format_layout(backend.program).tensors:
        found[tensor.name] = np.zeros(tensor.shape, tensor.dtype)
    for box in backend.local_boxes(state):
        where = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
        found[full_name(box.role, box.name)][where] = box.fetch()
    return found
