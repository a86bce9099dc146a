"""The validation loss and bits per byte of each source of a mixture: the oracle's, on every backend and mesh."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portatrain
from portatrain.backends import reference
from portatrain.cli import main
from portatrain.data import Mixture, open_data
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing.tolerance import amplification, tolerance
from portatrain.training.trainer import train
from tests.support.named_mixture import recipe
from tests.support.running import BACKENDS, everything


def metrics(run: Path) -> list[dict[str, float]]:
    return [{"loss": e["loss"], **e["metrics"]} for e in RunDir(run).events("eval")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("mixed")
    assert train(recipe(at), RunDir(at / "run"), backend=BACKENDS[-1]) == 0
    return at


def held_out(made: Recipe) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return the held-out windows by the names of the sources, each source opened by itself."""
    found: dict[str, list[dict[str, np.ndarray]]] = {}
    assert isinstance(made.data, Mixture)
    for name, source in zip(made.data.names, made.data.sources, strict=True):
        split = open_data(source, seed=made.seed).validation
        if split is not None:
            found.setdefault(name, []).append(split.batch(0, split.windows))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_source_has_the_loss_of_its_own_held_out_texts(backend: str, trained: Path) -> None:
    made = recipe(trained)
    model: Any = portatrain.load(trained / "run", backend=backend)
    split = open_data(made.data, seed=made.seed).validation
    assert split is not None
    whole, samples, got = model.evaluate_split(split, batch=5)
    named = {n.removeprefix("params/"): a for n, a in everything(model._backend, model._state).items()}
    params = {name: named[name].astype(np.float64) for name in model._backend.definition.params}
    want: dict[str, float] = {}
    for name, batches in held_out(made).items():

        def loss(*arrays: np.ndarray, batches: list = batches) -> np.ndarray:
            given = dict(zip(params, arrays, strict=True))
            parts = [reference.forward(model._backend.definition, given, batch).value for batch in batches]
            sums = [np.array([part.loss_B.sum(), part.weight_B.sum()]) for part in parts]
            total, weight = np.sum(sums, axis=0)
            return np.array(total / weight)

        exact = loss(*params.values())
        moves = amplification(loss, list(params.values()), exact, np.random.default_rng(0))
        assert abs(got[f"loss/{name}"] - float(exact)) <= tolerance(float(exact), moves)
        # Bytes are tokens: every byte is a target, so a nat is 1 / ln 2 bits.
        assert got[f"bits_per_byte/{name}"] == pytest.approx(got[f"loss/{name}"] / math.log(2), rel=1e-12)
        want[name] = float(exact)
    assert samples == split.windows and set(want) == {"web", "sums"}
    assert min(want.values()) < whole < max(want.values())
    assert abs(want["web"] - want["sums"]) > 1e-2  # so that a mix-up of the sources shows


def test_the_loop_records_them_and_the_commands_show_them(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    rows = metrics(trained / "run")
    keys = [f"{metric}/{name}" for metric in ("loss", "bits_per_byte") for name in ("web", "sums")]
    assert [set(keys) <= set(row) and not any("none" in key for key in row) for row in rows] == [True] * 3
    summary = json.loads((trained / "run/summary.json").read_text())
    assert summary["loss/web"] == rows[-1]["loss/web"]
    assert main(["eval", "run", "--backend", BACKENDS[-1], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [said[key] for key in keys] == [rows[-1][key] for key in keys]
    assert main(["report", "run"]) == 0
    page = (trained / "run/report.html").read_text()
    assert "Validation by source" in page and f"<td>{rows[-1]['loss/sums']:.5g}</td>" in page
    other = replace(recipe(trained), name="other", seed=1, checkpoint_keep_best="min:loss/sums", checkpoint_every=1)
    assert train(other, RunDir(trained / "other"), backend=BACKENDS[-1]) == 0
    assert not RunDir(trained / "other").events("warning")
    capsys.readouterr()
    assert main(["compare", "run", "other", "--runs", ".", "--out", "both.html", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert runs[1]["validation_metrics"]["loss/web"] == metrics(trained / "other")[-1]["loss/web"]
    page = (trained / "both.html").read_text()
    assert page.count("validation loss of web") >= 1 and f"{rows[-1]['loss/web']:.5g}" in page


def test_a_mixture_without_names_numbers_its_sources_and_changing_names_leaves_the_run(trained: Path) -> None:
    made = recipe(trained)
    data = made.data
    assert isinstance(data, Mixture)
    plain = replace(made, data=replace(data, names=()), steps=2, eval_every=None)
    run = RunDir(trained / "plain")
    assert train(replace(plain, checkpoint_every=1), run, backend=BACKENDS[-1], stop_at=1) == 85
    named = replace(plain, data=replace(data, names=("p", "q", "r", "s")))
    assert train(named, run, backend=BACKENDS[-1]) == 0
    assert {"loss/p", "loss/r", "loss/s"} <= set(metrics(run.path)[-1])
    (resumed,) = run.events("resumed")
    assert resumed["verdict"] == "continuous"
    other = RunDir(trained / "numbered")
    assert train(plain, other, backend=BACKENDS[-1]) == 0
    last, numbered = metrics(run.path)[-1], metrics(other.path)[-1]
    assert {k: last[f"loss/{k}"] for k in "prs"} == {
        k: numbered[f"loss/source-{n}"] for k, n in (("p", 0), ("r", 2), ("s", 3))
    }


@pytest.mark.full
@pytest.mark.meshes
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "mesh"), [("jax", "fsdp=2,tensor=2"), ("torch", "fsdp=2")])
def test_a_mesh_has_the_same_numbers(backend: str, mesh: str, trained: Path) -> None:
    run = trained / f"mesh-{backend}"
    (trained / "mixed.py").write_text(
        "from pathlib import Path\nfrom tests.support import named_mixture\n"
        f"def recipe():\n    return named_mixture.recipe(Path({str(trained)!r}))\n"
    )
    words = ["train", str(trained / "mixed.py"), "--run-dir", str(run), "--mesh", mesh, "--backend", backend]
    done = subprocess.run([sys.executable, "-m", "portatrain", *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(trained / "run"), metrics(run), strict=True):
        assert set(a) == set(b)
        for key, value in a.items():
            assert abs(value - b[key]) <= 1e-6 * abs(value), key
