"""The code of docs/start/layer.md, as it stands there, on both backends."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.testing import parity

PAGE = Path(__file__).parents[2] / "docs" / "start" / "layer.md"
SMALL = [
    "model.layers=2",
    "model.embed=32",
    "model.mlp=64",
    "data.seq_len=32",
    "batch=8",
    "steps=10",
    "schedule.warmup=0",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    (code,) = re.findall(r'```python title="scaled_lm.py"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("tutorial") / "scaled_lm.py"
    path.write_text(code)
    return apply_overrides(load_recipe(str(path)), SMALL)


def sizes(name: str, recipe: Recipe, steps: int) -> dict[str, np.ndarray]:
    """The layer's States after some steps."""
    backend = backend_class(name)(make_program(recipe))
    state = backend.init_state()
    for step, batch in enumerate(parity.batches(recipe, steps), start=1):
        state, _ = backend.step(state, batch, step=step, scale=1.0)
    return {box.name: box.fetch() for box in backend.local_boxes(state) if box.role == "state"}


@pytest.mark.parametrize("name", [n for n in ("jax", "torch") if not missing(n)])
def test_the_layers_state_does_not_depend_on_accumulation(name: str, recipe: Recipe) -> None:
    whole = sizes(name, recipe, 3)
    cut = sizes(name, apply_overrides(recipe, ["accumulation=4"]), 3)
    assert (whole["balance/square"] != 1).all() and (whole["balance/sum"] == 0).all()
    np.testing.assert_allclose(cut["balance/square"], whole["balance/square"], rtol=1e-5)


def test_both_backends_follow_the_same_curve(recipe: Recipe) -> None:
    given = parity.batches(recipe, 4)
    traces = [parity.trace(backend_class(name), recipe, given) for name in ("jax", "torch")]
    verdict = parity.compare(*traces, bound=parity.bound_of(recipe, given))
    assert not verdict.failures, str(verdict)
