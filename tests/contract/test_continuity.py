"""The continuity check: mutants with valid checksums are refused, honest moves are not, a probe changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing import mutants, parity
from portatrain.training import continuity
from portatrain.training.trainer import train
from tests.support.lost_commits import lose
from tests.support.running import everything
from tests.support.short_runs import small

BACKENDS = [n for n in ("jax", "torch") if not missing(n)]

# Compiling takes most of their time.
SLOW = [("jax", "Adafactor"), ("jax", "Lion"), ("jax", "SGD")]


def bounds() -> continuity.Bounds:
    return continuity.Bounds.of(small().describe(), "fp32", 512)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run that stopped at step 4, in either precision."""
    recipe = small(f"precision={request.param}")
    run = tmp_path_factory.mktemp("runs") / "run"
    assert train(recipe, RunDir(run), backend=BACKENDS[-1], stop_at=4) == 85
    return recipe, run


@pytest.mark.parametrize("mutant", list(mutants.MUTANTS))
def test_a_mutant_with_valid_checksums_is_refused(mutant: str, left: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, stopped = left
    run = RunDir(tmp_path / "run")
    shutil.copytree(stopped, run.path)
    mutants.rewrite(run.path / "checkpoints/step-00000004", mutants.MUTANTS[mutant], recipe)
    if mutant == "step_off_by_one":  # its folder says so too: another name is refused before
        (run.path / "checkpoints/step-00000004").rename(run.path / "checkpoints/step-00000005")
    (folder,) = (run.path / "checkpoints").glob("step-*")
    with LocalStore(folder) as store:
        Reader(store).verify_all()
    saved = sorted(p.name for p in (run.path / "checkpoints").rglob("*"))
    with pytest.raises(UserError, match=r"continuity check at step \d"):
        train(recipe, run, backend=BACKENDS[-1])
    assert sorted(p.name for p in (run.path / "checkpoints").rglob("*")) == saved
    assert run.rows(2, "metrics") == []  # not one step was trained on it
    (seam,) = run.events("resumed")
    assert seam["verdict"] == "broken"
    assert seam["differs"] or seam["failed"]


def test_an_honest_rewrite_is_accepted(left: tuple[Recipe, Path], tmp_path: Path) -> None:
    """The harness of the mutants changes nothing by itself."""
    recipe, stopped = left
    run = RunDir(tmp_path / "run")
    shutil.copytree(stopped, run.path)
    mutants.rewrite(run.path / "checkpoints/step-00000004", lambda values, meta, recipe: None, recipe)
    assert train(recipe, run, backend=BACKENDS[-1], stop_at=5) == 85
    assert [s["verdict"] for s in run.events("resumed")] == ["continuous"]


def test_drift_that_is_accepted_is_recorded(left: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, stopped = left
    run = RunDir(tmp_path / "run")
    shutil.copytree(stopped, run.path)
    mutants.rewrite(run.path / "checkpoints/step-00000004", mutants.layers_swapped, recipe)
    assert train(recipe, run, backend=BACKENDS[-1], accept_drift="a test", stop_at=5) == 85
    assert [(s["verdict"], s["accepted"]) for s in run.events("resumed")] == [("broken", "a test")]


PROBED = [
    pytest.param(name, rule, marks=[pytest.mark.full] if (name, rule) in SLOW else [])
    for name in BACKENDS
    for rule in ("AdamW", "Adafactor", "Muon", "Lion", "SGD")
]


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize(("name", "rule"), PROBED)
def test_a_probe_is_the_step_that_comes_and_changes_nothing(name: str, rule: str) -> None:
    recipe = small(f"optimizer={rule}", "frozen=('blocks/attn/wq',)")
    backend = backend_class(name)(make_program(recipe))
    state = backend.init_state()
    for step, batch in enumerate(parity.batches(recipe, 2), start=1):
        state, _ = backend.step(state, batch, step=step, scale=1.0)
    batch = parity.batches(recipe, 3)[2]
    before = everything(backend, state)
    found = backend.probe(state, batch, step=3, scale=0.5)
    after = everything(backend, state)
    assert all(np.array_equal(before[k], after[k]) for k in before)
    state, result = backend.step(state, batch, step=3, scale=0.5)
    now = everything(backend, state)
    total = 0.0
    for key, array in before.items():
        if key == "opt/count":
            continue
        keep = found[key].ndim
        np.testing.assert_allclose(found[key], per_layer(array, keep), rtol=1e-5, atol=1e-30)
        role, _, tensor = key.partition("/")
        if role == "params" and tensor != "blocks/attn/wq":
            change = per_layer(now[key].astype(np.float64) - array, keep)
            scale = np.abs(array).max() * np.sqrt(array.size) * 2.0**-23  # what adding to a float32 loses
            np.testing.assert_allclose(found[f"update/{tensor}"], change, rtol=1e-4, atol=scale)
            total += float(np.square(found[f"grad/{tensor}"]).sum())
    assert np.sqrt(total) == pytest.approx(float(result.grad_norm), rel=1e-5)
    assert "grad/blocks/attn/wq" not in found


def per_layer(array: np.ndarray, keep: int) -> np.ndarray:
    flat = array.astype(np.float64).reshape(*array.shape[:keep], -1)
    return np.sqrt(np.square(flat).sum(-1))


def test_where_a_commit_has_no_probe_the_logged_steps_serve(tmp_path: Path) -> None:
    recipe = small("probe_every=99", "checkpoint_every=3")
    run = lost_after(recipe, tmp_path / "run", BACKENDS[-1])
    assert train(recipe, run, backend=BACKENDS[-1]) == 0
    verdicts = [(s["step"], s["verdict"]) for s in run.events("resumed")]
    assert verdicts == [(6, "unproven"), (9, "continuous")]
    assert run.events("resumed")[1]["steps"] == [7, 8, 9]


def lost_after(recipe: Recipe, path: Path, backend: str) -> RunDir:
    """A run of 9 steps whose last commit, of step 6, has no probe: as if killed while it saved step 9."""
    run = RunDir(path)
    assert train(recipe, run, backend=backend, stop_at=9) == 85
    lose(run, 9)
    with LocalStore(path / "checkpoints/step-00000006") as store:
        assert "probe" not in Reader(store).meta
    return run


def test_logged_steps_that_differ_refuse(tmp_path: Path) -> None:
    recipe = small("probe_every=99", "checkpoint_every=3")
    run = lost_after(recipe, tmp_path / "run", BACKENDS[-1])
    mutants.rewrite(run.path / "checkpoints/step-00000006", mutants.layers_swapped, recipe)
    with pytest.raises(UserError, match="trained again"):
        train(recipe, run, backend=BACKENDS[-1])
    assert [s["verdict"] for s in run.events("resumed")] == ["unproven", "broken"]
    assert not (run.path / "checkpoints/step-00000009/COMMIT").exists()


def test_the_history_of_losses_travels_with_the_checkpoint(left: tuple[Recipe, Path]) -> None:
    _, stopped = left
    with LocalStore(stopped / "checkpoints/step-00000004") as store:
        history = Reader(store).meta["history"]
    assert history == [[r["step"], r["loss"]] for r in RunDir(stopped).curve()]


def test_bounds_are_on_differences_of_a_probe() -> None:
    was = {"losses": [1.0] * 64, "norms": {"params/a": [1.0, 2.0], "grad/a": [1.0, 1e-9], "update/a": 1.0}}
    same = json.loads(json.dumps(was))
    assert all(v == 0 for v, _ in continuity.compare(was, same).values())
    same["norms"]["grad/a"][1] = 2e-9  # rounding of what is nothing beside the largest
    assert continuity.compare(was, same)["grad"][0] == pytest.approx(1e-6)
    same["norms"]["params/a"][1] = float("nan")
    assert continuity.compare(was, same)["state"] == (float("inf"), "params/a")
    del same["norms"]["update/a"]
    assert continuity.compare(was, same)["update"][0] == float("inf")
    same["losses"] = [1.0]
    assert continuity.compare(was, same)["loss"][0] == float("inf")


def test_samples_that_changed_behind_their_fingerprint_are_named() -> None:
    found = {"differs": ["data.next_batch"], "failed": [], "tensors": "equal"}
    assert "other samples of step 5: a file that it reads has changed" in str(continuity.refusal(4, found))
    for other in ({"tensors": ["params/a"]}, {"differs": ["data.next_batch", "rng.word"]}):
        assert "a changed model, corpus or seed" in str(continuity.refusal(4, {**found, **other}))


def test_a_meta_without_its_exact_part_is_broken() -> None:
    meta: Mapping[str, Any] = {
        "step": 1,
        "applied": 1,
        "data": {"next_sample": 8},
        "rng": {"word": "1"},
        "schedule": {"learning_rate": 1.0},
        "probe": {"losses": [1.0], "norms": {}},
    }
    assert continuity.verdict(meta, meta, bounds())["verdict"] == "continuous"
    for gone in continuity.EXACT:
        less = {k: v for k, v in meta.items() if k != gone}
        assert continuity.verdict(less, meta, bounds())["verdict"] == "broken", gone


def signs_flipped(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
    for name in [n for n in values if n.startswith("ema/")]:
        np.negative(values[name], out=values[name])


def elements_permuted(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
    array = values["ema/blocks/mlp/up"]
    array[...] = np.random.default_rng(0).permuted(array, axis=1)


def heads_exchanged(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
    array = values["ema/blocks/attn/wq"]
    array[:, :, [0, 1]] = array[:, :, [1, 0]]


def rare_tokens_exchanged(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
    """Exchange the rows of two bytes that no text has, in weights, slots and averages."""
    for name in [n for n in values if n.endswith("/embed/table")]:
        values[name][[254, 255]] = values[name][[255, 254]]


def one_bit(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
    values["opt/v/blocks/attn/wo"].reshape(-1).view(np.uint32)[99] ^= 1


KEPT_NORMS = {
    f.__name__: f for f in (signs_flipped, elements_permuted, heads_exchanged, rare_tokens_exchanged, one_bit)
}


@pytest.mark.parametrize("mutant", KEPT_NORMS)
def test_a_mutant_that_keeps_every_norm_is_refused_by_its_fingerprint(
    mutant: str, left: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, stopped = left
    run = RunDir(tmp_path / "run")
    shutil.copytree(stopped, run.path)
    seen: set[str] = set()

    def changed(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
        before = {n: a.tobytes() for n, a in values.items()}
        KEPT_NORMS[mutant](values, meta, recipe)
        seen.update(n for n, a in values.items() if a.tobytes() != before[n])

    mutants.rewrite(run.path / "checkpoints/step-00000004", changed, recipe, fingerprints=True)
    with pytest.raises(UserError, match="bits different in") as told:
        train(recipe, run, backend=BACKENDS[-1])
    assert min(seen) in str(told.value) or len(seen) > 6
    (seam,) = run.events("resumed")
    assert set(seam["tensors"]) == seen and seam["verdict"] == "broken"
    assert not seam["failed"]  # the probe sees nothing of it


def test_fingerprints_that_this_version_cannot_compare_refuse(left: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, stopped = left
    run = RunDir(tmp_path / "run")
    shutil.copytree(stopped, run.path)

    def newer(values: mutants.Values, meta: mutants.Meta, recipe: Recipe) -> None:
        meta["fingerprints"]["algorithm"] = "splitmix64-product-2"

    mutants.rewrite(run.path / "checkpoints/step-00000004", newer, recipe, fingerprints=True)
    with pytest.raises(UserError, match=r"got fingerprints\.algorithm different"):
        train(recipe, run, backend=BACKENDS[-1])
    assert run.events("resumed")[0]["tensors"] == "not compared"
