"""A new kind of state is declared once, in `inventory`: every backend then makes it, saves it, restores it, measures it
in the probe and counts its memory."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends import state as states
from portatrain.backends.base import backend_class
from portatrain.backends.program import Program, make_program
from portatrain.checkpoint import format_layout, restore, shared_reads
from portatrain.checkpoint.saver import Checkpoints
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing import parity
from tests.support.running import BACKENDS, everything

SECOND = "second_average"


def small() -> Recipe:
    sizes = ["model.layers=2", "model.embed=16", "model.heads=2", "model.kv_heads=1", "model.mlp=32", "data.seq_len=16"]
    return apply_overrides(load_recipe("tiny-lm"), [*sizes, "batch=4", "ema_decay=0.9"])


@pytest.fixture
def second_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inventory` with a second average of every parameter that has one."""
    plain = states.inventory

    def more(program: Program) -> tuple[states.StateTensor, ...]:
        found = plain(program)
        return (*found, *(dataclasses.replace(t, role=SECOND) for t in found if t.role == "ema"))

    modules = [states, format_layout, restore, shared_reads]
    for name in BACKENDS:
        module = {"jax": "portatrain.backends.jax.backend", "torch": "portatrain.backends.torch.one_device"}[name]
        modules.append(__import__(module, fromlist=["inventory"]))
    for module in modules:
        monkeypatch.setattr(module, "inventory", more)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.usefixtures("second_average")
def test_a_second_average_is_seen_by_saver_restore_probe_and_memory(name: str, tmp_path: Path) -> None:
    recipe = small()
    backend = backend_class(name)(make_program(recipe))
    batches = parity.batches(recipe, 2)
    state, _ = backend.step(backend.init_state(), batches[0], step=1, scale=1.0)
    before = everything(backend, state)
    seconds = {key for key in before if key.startswith(SECOND)}
    assert {key.removeprefix(f"{SECOND}/") for key in seconds} == set(recipe.describe().params)

    memory = backend.describe_memory(state)
    assert memory[SECOND] == memory["ema"] == sum(before[key].nbytes for key in seconds)

    norms = backend.probe(state, batches[1], step=2, scale=1.0)
    for key in seconds:
        kept = norms[key].ndim
        squares = np.square(before[key].astype(np.float64)).sum(axis=tuple(range(kept, before[key].ndim)))
        np.testing.assert_allclose(norms[key], np.sqrt(squares), rtol=1e-5)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, backend, state, {"step": 1})
    checkpoints.wait()
    found = checkpoints.newest(lambda text: None)
    assert found is not None and found[0] == 1 and seconds <= set(found[1].names)
    with contextlib.closing(found[1].store):
        again = everything(backend, restore.restored(backend, found[1]))
    assert before.keys() == again.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(again[key], array)
