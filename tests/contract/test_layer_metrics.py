"""Metrics of layers (`ops.aux(..., reduce='layers')`): on the oracle, on every backend, in the records of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain import Module
from portatrain.errors import UserError
from portatrain.model.layers import Experts, GatedMLP, MixtureMLP, Router, layers_of
from portatrain.model.module import Param
from portatrain.recipe import apply_overrides, load_recipe
from portatrain.runs.history import read_history
from portatrain.runs.report.page import page
from portatrain.runs.run_dir import RunDir
from portatrain.training import step_records
from portatrain.training.metrics.record import StepRecord
from portatrain.training.metrics.trackers import scalars
from portatrain.training.trainer import train
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch

every_backend = pytest.mark.parametrize("backend", BACKENDS)


class Block(Module):
    """A layer of one kind: dense, or a mixture."""

    def __init__(self, routed: bool) -> None:
        router = Router(embed=8, experts=4, chosen=2, balance_loss=0.01)
        self.mlp: Any = (
            MixtureMLP(router=router, experts=Experts(embed=8, mlp=8, experts=4))
            if routed
            else GatedMLP(embed=8, mlp=8)
        )

    def __call__(self, ops: Any, x_BSE: Any) -> Any:
        return x_BSE + self.mlp(ops, x_BSE), None


class Patterned(Module):
    """Layers of two kinds, so that mixtures lie in a Stack of periods and in one after it."""

    def __init__(self, kinds: tuple[bool, ...]) -> None:
        self.table = Param(vocab=23, embed=8, fan_in_axes=0, init=1.0)
        self.blocks = layers_of(kinds, Block)

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE, _ = self.blocks(ops, ops.embed(self.table, batch["tokens"]))
        return ops.cross_entropy(x_BSE, self.table, batch["targets"], mask=batch["mask"])


@every_backend
@pytest.mark.parametrize(
    ("kinds", "remat"), [((True, True, True), "none"), ((False, True, True, False, True, True, False), "block")]
)
def test_backends_record_what_the_oracle_does(backend: str, kinds: tuple[bool, ...], remat: str) -> None:
    running, batch = Running(backend, Patterned(kinds), remat=remat), tokens_batch(vocab=23, batch=4, seq=10)
    auxes = running.oracle(batch, training=True, step=3).auxes
    state, result = running.backend.step(running.state, microbatches(batch, 2), step=3, scale=1.0)
    loads_LX, entropies_L = auxes["router_loads"].value_B.mean(0), auxes["router_entropies"].value_B.mean(0)
    assert loads_LX.shape == (sum(kinds), 4) and (loads_LX.sum(1) == 10 * 2).all()
    assert len({tuple(load) for load in loads_LX.tolist()}) == sum(kinds)  # an order of layers that is wrong is seen
    assert set(result.layers) == {"router_loads", "router_entropies"} and not set(result.aux) & set(result.layers)
    np.testing.assert_array_equal(np.asarray(result.layers["router_loads"].tolist()), loads_LX)
    np.testing.assert_allclose(result.layers["router_entropies"].tolist(), entropies_L, rtol=1e-5)
    assert "router_loads" not in running.backend.eval(state, batch)


class Wrong(Module):
    def __init__(self, *sizes: int, loss: float = 0.0) -> None:
        self.table = Param(vocab=23, embed=8, fan_in_axes=0, init=1.0)
        self.sizes, self.loss = sizes, loss

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = ops.embed(self.table, batch["tokens"])
        for n in self.sizes:
            ops.aux("part", x_BSE[:, 0, :n], reduce="layers", loss=self.loss)
        return ops.cross_entropy(x_BSE, self.table, batch["targets"])


@pytest.mark.parametrize("backend", [*BACKENDS, "oracle"])
@pytest.mark.parametrize(
    ("model", "said"), [(Wrong(2, 3), r"one shape in every call, \(B, 2\)"), (Wrong(2, loss=0.5), "a metric only")]
)
def test_what_is_refused(backend: str, model: Module, said: str) -> None:
    running, batch = (
        Running(BACKENDS[0] if backend == "oracle" else backend, model),
        tokens_batch(vocab=23, batch=2, seq=4),
    )
    with pytest.raises(UserError, match=said):
        if backend == "oracle":
            running.oracle(batch, training=True)
        else:
            running.backend.step(running.state, microbatches(batch), step=1, scale=1.0)


TINY = ["model.embed=16", "model.heads=2", "model.mlp=8", "model.experts=4", "data.seq_len=16", "batch=4", "steps=2"]
TINY += ["schedule.warmup=1", "eval_every=none", "eval_final_batches=1"]


@pytest.mark.full
def test_a_run_records_them_and_the_report_shows_them(tmp_path: Path) -> None:
    recipe = apply_overrides(load_recipe("examples/mixture.py"), TINY)
    found = {}
    for backend in BACKENDS:
        run = RunDir(tmp_path / backend)
        assert train(recipe, run, backend=backend) == 0
        found[backend] = [row["layers"] for row in run.curve()]
        for layers in found[backend]:
            assert [sum(load) for load in layers["router_loads"]] == [32.0, 32.0]
            assert all(0 < entropy <= math.log(4) for entropy in layers["router_entropies"])
        text = page(read_history(run.path), [])
        load = found[backend][-1]["router_loads"][1]
        assert "Layers at step 2" in text and " ".join(f"{v:.4g}" for v in load) in text
        assert f"{max(load) / 32:.1%}" in text
    for one, other in zip(found[BACKENDS[0]], found[BACKENDS[-1]], strict=True):
        assert one["router_loads"] == other["router_loads"]
        np.testing.assert_allclose(one["router_entropies"], other["router_entropies"], rtol=1e-5)


def test_a_report_without_layers_has_no_such_part(tmp_path: Path) -> None:
    from tests.support.records import attempt, row

    (tmp_path / "run.json").write_text('{"name": "x", "recipe": {"name": "x", "steps": 2}, "recipe_sha256": "ab"}')
    attempt(tmp_path, 1, {"began_unix_s": 1.0, "backend": "jax"}, [row(1, 1)], [])
    assert "Layers at step" not in page(read_history(tmp_path), [])


@pytest.mark.parametrize(("layers", "experts", "every"), [(2, 128, 1), (2, 129, 2), (58, 256, 58)])
def test_many_numbers_are_recorded_seldom(layers: int, experts: int, every: int) -> None:
    given = {"loads": np.full((layers, experts), 1 / 3, np.float32)}
    due = [step for step in range(1, 2 * every + 1) if step_records._layers(given, step)]
    assert due == [every, 2 * every]
    assert step_records._layers(given, every)["loads"][0][0] == 0.333333
    assert layers * experts / every <= step_records.NUMBERS
    assert step_records._layers({}, 1) == {}


def test_trackers_get_numbers() -> None:
    fields: Any = dict.fromkeys(("loss", "grad_norm", "lr", "time_s", "step_s", "tokens_per_s"), 1.0)
    layers = {"loads": [[3.0, 1.0], [2.0, 2.0]], "entropies": [0.5, 0.25]}
    found = scalars(StepRecord(step=1, tokens=1, layers=layers, **fields), "train")
    assert {k: v for k, v in found.items() if "loads" in k or "entropies" in k} == {
        "train/loads/0/min": 1.0,
        "train/loads/0/max": 3.0,
        "train/loads/1/min": 2.0,
        "train/loads/1/max": 2.0,
        "train/entropies/0": 0.5,
        "train/entropies/1": 0.25,
    }
