"""A hybrid of recurrent layers and attention on every backend: packed documents, chunks, gradients, further tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.model.module import describe
from portatrain.testing.tolerance import amplification, tolerance
from portatrain.training.drawing import Drawing
from portatrain.training.generation import Generator
from recipes.models.olmo_hybrid import OlmoHybridConfig
from tests.support.running import BACKENDS, Running, microbatches, parameters, tokens_batch

SIZES = OlmoHybridConfig(
    **{"vocab": 23, "embed": 12, "layers": 3, "heads": 2, "mlp": 16, "tied": False, "chunk": 5},
    **{"key_heads": 2, "value_heads": 4, "key_size": 4, "value_size": 6, "recurrent": (True, True, False)},
)
PACKED = tokens_batch(vocab=SIZES.vocab, batch=2, seq=24, seed=2)


def exact() -> tuple[np.ndarray, float]:
    """The oracle's logits, and their amplification."""
    definition = describe(SIZES.build())
    params = parameters(definition)

    def logits(*values: np.ndarray) -> np.ndarray:
        named = dict(zip(params, values, strict=True))
        value: np.ndarray = reference.forward(
            definition, named, PACKED, method="predict", operations=reference.ReferenceOps
        ).value
        return value

    found = logits(*params.values())
    return found, amplification(logits, list(params.values()), found, np.random.default_rng(0))


@pytest.fixture(scope="module")
def oracle() -> tuple[np.ndarray, float]:
    return exact()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_and_chunks_are_the_oracles(backend: str, oracle: tuple[np.ndarray, float]) -> None:
    due, change = oracle
    most = tolerance(float(np.abs(due).max()), change)
    for chunk in (5, 64):  # chunks that do not divide the positions; one chunk
        running = Running(backend, replace(SIZES, chunk=chunk).build())
        assert np.abs(running.backend.predict(running.state, PACKED) - due).max() <= most, chunk


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_keeps_states_and_triangular_systems_in_float32(backend: str, oracle: tuple[np.ndarray, float]) -> None:
    due, change = oracle
    running = Running(backend, SIZES.build(), precision="bf16")
    most = tolerance(float(np.abs(due).max()), change, "bf16")
    assert np.abs(running.backend.predict(running.state, PACKED) - due).max() <= most


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("jax", "torch")])
def test_a_text_is_continued_without_a_cache_of_states(backend: str) -> None:
    running = Running(backend, SIZES.build())
    generator = Generator(running.backend, lambda: running.state, context=16)
    assert "mixes positions" in generator.recomputes
    text, due = [3, 1, 4], []
    found = generator([text], max_tokens=3, drawing=Drawing(temperature=0.0))[0].tokens
    params = parameters(describe(SIZES.build()))
    for _ in range(3):
        given: dict[str, Any] = {"tokens": np.array([text + due], np.int32), "sample": np.arange(1)}
        logits = reference.forward(describe(SIZES.build()), params, given, method="predict").value
        due.append(int(logits[0, -1].argmax()))
    assert list(found) == due


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("jax", "torch")])
def test_a_step_moves_every_parameter_as_the_oracle_says(backend: str) -> None:
    """The gradient along a random direction, against differences of the oracle's loss in float64."""
    running = Running(backend, SIZES.build())
    _, grads = running.backend.gradients(running.state, microbatches(PACKED), step=1)
    definition, params = describe(SIZES.build()), parameters(describe(SIZES.build()))
    rng = np.random.default_rng(7)

    def loss(moved: dict[str, np.ndarray]) -> float:
        found = reference.forward(definition, moved, PACKED, operations=reference.ReferenceOps).value
        return float(found.sum / found.weight_B.sum())

    assert grads.keys() == params.keys()
    for name, array in params.items():
        way = rng.choice((-1.0, 1.0), array.shape)
        by = 1e-5 * max(1.0, float(np.abs(array).max()))
        slope = (loss(params | {name: array + by * way}) - loss(params | {name: array - by * way})) / (2 * by)
        scale = float(np.abs(grads[name]).sum())
        assert abs(float((grads[name] * way).sum()) - slope) <= 1e-4 * scale + 1e-9, name
