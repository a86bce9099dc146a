"""Models in precision fp8: which weights, the same results for other microbatches, LoRA, refusals, and moved runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference, rounding
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.errors import UserError
from portatrain.model.fp8 import SCALINGS, quantise, quantised_names
from portatrain.model.lora import LoRA
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing import parity
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.short_runs import small
from tests.support.toy_models import Routed

WEIGHTS = {f"blocks/attn/{w}" for w in ("wq", "wk", "wv", "wo")} | {f"blocks/mlp/{w}" for w in ("gate", "up", "down")}


def fp8(*more: str) -> Recipe:
    return small("precision=fp8", "model.dropout=0", "ema_decay=none", "clip_norm=none", *more)


def test_the_rule_takes_the_matmuls_of_a_stack() -> None:
    assert quantised_names(fp8().describe()) == WEIGHTS
    assert quantised_names(small("precision=bf16").describe()) == set()
    assert quantised_names(fp8("fp8_matmuls=('*/mlp/*','*/wo')").describe()) == {
        n for n in WEIGHTS if "mlp" in n or n.endswith("wo")
    }
    routed = quantised_names(quantise(Routed(vocab=64, embed=16, layers=2, experts=4, chosen=2, rate=0.01)))
    assert {n.rpartition("/")[2] for n in routed} == {"up", "down"}  # not the router
    assert quantised_names(load_recipe_in_fp8("tiny-vit").describe()) >= {"blocks/attn/wq"}
    assert "patches/kernel" not in quantised_names(load_recipe_in_fp8("tiny-vit").describe())


def load_recipe_in_fp8(name: str) -> Recipe:
    return apply_overrides(load_recipe(name), ["precision=fp8"])


def test_names_shapes_and_hashes_stay() -> None:
    one, other = small("precision=bf16").describe(), small("precision=fp8").describe()
    assert one.params == other.params and one.states == other.states
    assert "fp8_matmuls" not in small().to_json()


@pytest.mark.parametrize("pattern", ["embed/table", "final_norm/scale", "*/nothing"])
def test_a_pattern_that_names_no_such_weight_is_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="fp8_matmuls"):
        fp8(f"fp8_matmuls=('{pattern}',)").describe()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_microbatches_change_nothing(name: str, scaling: str) -> None:
    """A scale is of one sample at most, so operands have the same bits; gradients of weights are added in another
    order."""
    found = []
    for accumulation in (1, 4):
        recipe = fp8(f"accumulation={accumulation}", f"fp8_scaling={scaling}")
        backend = backend_class(name)(make_program(recipe))
        (batch,) = parity.batches(recipe, 1)
        found.append(backend.gradients(backend.init_state(), batch, step=1))
    (loss, gradients), (again, others) = found
    assert again == pytest.approx(loss, rel=2.0**-20)
    bound = rounding.bound(
        recipe.describe(), rounding.positions_in(recipe.describe(), batch, microbatches=True), "bf16"
    )
    for key, gradient in gradients.items():
        assert np.abs(gradient - others[key]).max() <= bound * np.abs(gradient).max(), key


@pytest.mark.hand
@pytest.mark.filterwarnings("default")  # of torch's tracer, which turns warnings into errors of its own
@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_compiled_blocks_follow_blocks_that_are_not() -> None:
    recipe = fp8("accumulation=1")
    (batch,) = parity.batches(recipe, 1)
    losses = []
    for compiled in (False, True):
        backend = backend_class("torch")(dataclasses.replace(make_program(recipe), compile=compiled))
        losses.append(backend.gradients(backend.init_state(), batch, step=1)[0])
    assert losses[1] == pytest.approx(losses[0], rel=2.0**-8)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scaling", ["row", pytest.param("tensor", marks=pytest.mark.full)])
def test_a_model_with_low_rank_factors_is_near_the_oracle(name: str, scaling: str) -> None:
    """In float64 with the same 8-bit operands; and the result is not that of bf16."""
    recipe = dataclasses.replace(fp8("accumulation=1", f"fp8_scaling={scaling}"), lora=LoRA(rank=4))
    (batch,) = parity.batches(recipe, 1)
    losses = {}
    for precision in ("fp8", "bf16"):
        backend = backend_class(name)(make_program(dataclasses.replace(recipe, precision=precision)))
        state = backend.init_state()
        params = _params(backend, state)
        losses[precision] = backend.gradients(state, batch, step=1)[0]
    rows = {k: v[0] for k, v in batch.items()}
    exact = reference.forward(recipe.describe(), params, rows).value
    want = float(exact.sum / exact.weight_B.sum())
    assert abs(losses["fp8"] - want) <= 2.0**-8 * want
    assert losses["fp8"] != losses["bf16"]


def _params(backend: Any, state: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for box in backend.local_boxes(state):
        if box.role == "params":
            whole = found.setdefault(box.name, np.zeros(backend.program.definition.params[box.name].shape))
            whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = box.fetch()
    return found


def test_a_run_moves_between_bf16_and_fp8_only_if_told(tmp_path: Path) -> None:
    """A change of precision changes the curve, as from fp32 to bf16: refused, or accepted with its reason on record."""
    name, low, eight = BACKENDS[-1], small("precision=bf16"), small("precision=fp8")
    assert train(low, RunDir(tmp_path / "one"), backend=name, stop_at=2) == 85
    for start, end, recipe, stop in (("one", "two", eight, 4), ("two", "three", low, 6)):
        run = RunDir(tmp_path / end)
        run.create(recipe)
        for folder in ("checkpoints", "data"):
            shutil.copytree(tmp_path / start / folder, tmp_path / end / folder)
        with pytest.raises(UserError, match="precision"):
            train(recipe, run, backend=name, stop_at=stop)
        assert train(recipe, run, backend=name, stop_at=stop, accept_drift="a test") == 85
        seam = run.events("resumed")[-1]
        assert (seam["verdict"], seam["accepted"]) == ("broken", "a test")
        assert "recipe.precision" in seam["differs"], seam
    other = RunDir(tmp_path / "two")
    assert train(eight, other, backend=BACKENDS[0], stop_at=5) == 85  # the same precision in the other framework
    assert other.events("resumed")[-1]["verdict"] == "continuous"
