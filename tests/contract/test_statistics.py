"""Statistics every n steps: the probe's norms, and activations, the same on every backend and mesh, in the record and
the trackers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.data import open_data
from portatrain.errors import UserError
from portatrain.model.measured import KINDS as ACTIVATIONS
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.metrics.record import StepRecord
from portatrain.training.metrics.trackers import scalars
from portatrain.training.statistics import KINDS, Statistics, flat
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.short_runs import SMALL, small

WORDS = ["statistics_every=3", "steps=7", "optimizer=SGD", "optimizer.lr=0.1", "checkpoint_every=none"]


def recipe(*more: str) -> Recipe:
    return small(*WORDS, *more)


def recorded(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "attempts/1/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 8))
    return {row["step"]: row["statistics"] for row in rows if "statistics" in row}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    at = tmp_path_factory.mktemp("statistics")
    for backend in BACKENDS:
        assert train(recipe(), RunDir(at / backend), backend=backend) == 0
    return {backend: at / backend for backend in BACKENDS}


def compare(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> None:
    assert list(a) == list(b) == [3, 6]
    for step, found in a.items():
        assert list(sorted(found)) == sorted(b[step])
        for name, value in found.items():
            assert abs(value - b[step][name]) <= 1e-6 * abs(value), (step, name)


def norms(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.partition("/")[0] in KINDS}


def test_backends_have_the_same_numbers_a_layer(runs: dict[str, Path]) -> None:
    first, *others = (recorded(run) for run in runs.values())
    for other in others:
        compare(first, other)
    made = recipe()
    wanted = set()
    for name, info in made.describe().params.items():
        places = [f"/{i}" for i in range(made.model.layers)] if info.stack_dims else [""]  # type: ignore[attr-defined]
        wanted |= {f"{kind}/{name}{place}" for kind in KINDS for place in places}
    for found in first.values():
        assert set(norms(found)) == wanted and all(math.isfinite(v) and v > 0 for v in norms(found).values())
        places = [f"/{i}" for i in range(made.model.layers)]  # type: ignore[attr-defined]
        one = {"rms": ("", "/attn", "/mlp"), "dead": ("/mlp",), "logit": ("/attn",)}
        assert {f"{kind}/blocks{at}{n}" for kind in ACTIVATIONS for at in one[kind] for n in places} <= set(found)
        # The norm of the whole gradient is that of its parts.
    row = RunDir(next(iter(runs.values()))).curve()[2]
    whole = math.sqrt(sum(v * v for k, v in first[3].items() if k.startswith("grad/")))
    assert whole == pytest.approx(row["grad_norm"], rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_they_are_those_of_the_probe_and_change_nothing(backend: str) -> None:
    made = recipe("clip_norm=0.05")  # so that updates are of clipped gradients, and gradients are not
    program = make_program(made)
    split = open_data(made.data, seed=0).train
    batches = [made.microbatches(split.batch(8 * n, 8)) for n in range(2)]
    states, losses = [], []
    for statistics in (False, True):
        run: Any = backend_class(backend)(program)
        state = run.init_state()
        for step, batch in enumerate(batches, 1):
            probe = run.probe(state, batch, step=step, scale=0.5)
            state, result = run.step(state, batch, step=step, scale=0.5, **({"statistics": True} if statistics else {}))
        losses.append(float(result.loss))
        states.append({b.name: b.fetch() for b in run.local_boxes(state) if b.role == "params"})
        got = flat(result.statistics)
        assert bool(got) == statistics
    want = flat({name: value for name, value in probe.items() if name.partition("/")[0] in KINDS})
    assert set(norms(got)) == set(want)
    for name, value in want.items():
        assert abs(got[name] - value) <= 1e-6 * value, name
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for name, value in states[0].items():
        assert np.abs(states[1][name] - value).max() <= 1e-6 * np.abs(value).max(), name


def test_a_backend_whose_step_has_none_is_probed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Any) -> None:
    kind = backend_class(BACKENDS[-1])
    monkeypatch.setattr(kind, "takes_statistics", False)
    assert train(recipe(), RunDir(tmp_path / "run"), backend=BACKENDS[-1]) == 0
    within = {step: norms(found) for step, found in recorded(runs[BACKENDS[-1]]).items()}
    compare(within, recorded(tmp_path / "run"))  # its probe has no activations
    monkeypatch.setattr(kind, "probe", None)
    with pytest.raises(UserError, match="statistics_every"):
        Statistics(recipe(), kind(make_program(recipe())))


def test_trackers_get_them_and_a_wrong_number_is_refused() -> None:
    norms = flat({"grad/a": np.array([1.0, 2.0]), "params/b": np.float64(3.0), "update/c": np.array([[4.0]])})
    assert norms == {"grad/a/0": 1.0, "grad/a/1": 2.0, "params/b": 3.0, "update/c/0.0": 4.0}
    about: Any = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 1, "time_s": 1.0, "step_s": 1.0}
    record = StepRecord(step=3, **about, tokens_per_s=1.0, statistics=norms)
    assert scalars(record, "train")["train/grad/a/1"] == 2.0
    with pytest.raises(UserError, match="statistics_every"):
        recipe("statistics_every=0")


@pytest.mark.full
@pytest.mark.meshes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("backend", "mesh"),
    [("jax", "context=2,tensor=2"), ("torch", "context=2,tensor=2"), ("torch", "fsdp=2"), ("deepspeed-2", "fsdp=2")],
)
def test_a_mesh_has_the_same_numbers(backend: str, mesh: str, tmp_path: Path, runs: dict[str, Path]) -> None:
    if missing(backend):
        pytest.skip(f"no {backend}")
    sizes = [word for size in (*SMALL, *WORDS) for word in ("--set", size)]
    words = ["train", "tiny-lm", "--backend", backend, "--mesh", mesh, "--run-dir", str(tmp_path / "run"), *sizes]
    done = subprocess.run([sys.executable, "-m", "portatrain", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    compare(recorded(runs[BACKENDS[0]]), recorded(tmp_path / "run"))
