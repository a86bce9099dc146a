"""A checkpoint of another run is refused, with what differs: another recipe, other axes, another corpus."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.recipe.same import FREE, changed_fields, deciding_changes
from portatrain.runs.run_dir import RunDir
from portatrain.testing import mutants
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.short_runs import small

BACKEND, STEP = BACKENDS[-1], "checkpoints/step-00000002"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run that stopped at step 2."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    assert train(small(), run, backend=BACKEND, stop_at=2) == 85
    return run


def other(left: RunDir, path: Path, recipe: Recipe) -> RunDir:
    """A run of `recipe` with the checkpoints of `left`, as after a copy into the wrong folder."""
    run = RunDir(path)
    run.create(recipe)
    shutil.copytree(left.path / "checkpoints", path / "checkpoints")
    shutil.copytree(left.path / "data", path / "data")
    return run


def without_probe(values: Any, meta: mutants.Meta, recipe: Recipe) -> None:
    del meta["probe"]


CHANGES = [
    "optimizer.weight_decay=0.10003",
    "optimizer.b1=0.91",
    "model.dropout=0.11",
    "model.rope_theta=10000.5",
    "ema_decay=0.91",
    "clip_norm=0.9",
    "max_skips=11",
    "steps=13",
    "no_decay=('*/wq',)",
    "accumulation=4",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_recipe_is_refused_by_the_field(change: str, left: RunDir, tmp_path: Path) -> None:
    run = other(left, tmp_path / "run", small(change))
    for probe in (True, False):
        if not probe:
            mutants.rewrite(run.path / STEP, without_probe, small())
        with pytest.raises(UserError, match="another recipe, which differs in") as told:
            train(small(change), run, backend=BACKEND)
        assert change.partition("=")[0] in str(told.value)
        assert run.attempt_numbers() == []  # said before an attempt begins


def test_another_recipe_can_be_accepted_and_is_recorded(left: RunDir, tmp_path: Path) -> None:
    recipe = small("optimizer.weight_decay=0.2")
    run = other(left, tmp_path / "run", recipe)
    assert train(recipe, run, backend=BACKEND, stop_at=3, accept_drift="less decay") == 85
    (seam,) = run.events("resumed")
    assert (seam["verdict"], seam["accepted"]) == ("broken", "less decay")
    assert "recipe.optimizer.weight_decay" in seam["differs"]


def test_fields_that_do_not_decide_the_curve_may_differ(left: RunDir, tmp_path: Path) -> None:
    recipe = small("checkpoint_every=3", "eval_every=4", "remat=block", "probe_every=2")
    run = other(left, tmp_path / "run", recipe)
    assert train(recipe, run, backend=BACKEND, stop_at=3) == 85
    assert [e["verdict"] for e in run.events("resumed")] == ["continuous"]


def test_every_field_of_a_recipe_decides_or_is_listed_as_free() -> None:
    """A new field decides until someone says otherwise; no listed name is misspelt."""
    fields = set(Recipe.__dataclass_fields__)
    assert set(FREE) <= fields
    assert fields - set(FREE) >= {"model", "optimizer", "schedule", "seed", "batch", "precision", "max_skips", "decay"}


def test_a_recipe_of_an_older_release_is_the_same() -> None:
    recipe = small()
    stored = json.loads(json.dumps(recipe.to_json()))
    assert changed_fields(stored, recipe) == {}
    stored["model"]["class"] = "gone.module:Sizes"  # not installed here: compared as JSON
    assert set(changed_fields(stored, recipe)) == {"model.class"}
    assert deciding_changes({"step": 1}, recipe) == {}


def with_axes(path: Path, rename: dict[str, str]) -> None:
    """Rewrite the checkpoint with other names of axes, as another definition would have them."""
    import dataclasses

    from checkpoints_format import Writer, commit

    with LocalStore(path) as store:
        reader = Reader(store)
        meta = dict(reader.meta)
        values = {n: reader.read(n) for n in reader.names}
        layout = reader.layout
    tensors = tuple(
        dataclasses.replace(t, axes=tuple(rename.get(a, a) for a in t.axes)) if t.name.endswith("attn/wq") else t
        for t in layout.tensors
    )
    shutil.rmtree(path)
    with LocalStore(path, create=True) as store:
        layout = dataclasses.replace(layout, tensors=tensors)
        Writer(store, layout, save="axes").write(values)
        commit(store, layout, save="axes", meta=meta)


def test_axes_in_another_order_are_refused(left: RunDir, tmp_path: Path) -> None:
    run = other(left, tmp_path / "run", small())
    with_axes(run.path / STEP, {"heads": "head_dim", "head_dim": "heads"})
    with pytest.raises(UserError, match=r"other names: params/blocks/attn/wq \(layers embed head_dim heads for"):
        train(small(), run, backend=BACKEND)
    assert train(small(), run, backend=BACKEND, stop_at=3, accept_drift="renamed") == 85
