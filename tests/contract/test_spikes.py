"""A recipe with `spikes`: a step that is one changes nothing, on every backend and after every move."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from portatrain.training.options import TrainOptions
from portatrain.training.trainer import Trainer, train
from tests.support import spiky

BACKENDS = [name for name in ("jax", "torch") if not missing(name)]
AT = (12, 13, 22)
"""The steps that get an outlier: two in a row, the second of which is judged before the first one's result is used."""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, list[Any], np.ndarray]:
    """A recipe with outliers in the steps AT, the batches of all its steps, and its initial weights."""
    folder = tmp_path_factory.mktemp("plain")

    def opened(recipe: Recipe, name: str) -> Trainer:
        return Trainer(recipe, RunDir(folder / name), TrainOptions(backend=BACKENDS[0]))

    # Sample n is some index of the source: the y of the plain source says which.
    index_of = {np.float32(spiky.pair(index)[1]): index for index in range(spiky.BATCH * spiky.STEPS)}
    plain = opened(spiky.recipe(), "a").data.train.batch(0, spiky.BATCH * spiky.STEPS)
    outliers = [index_of[plain["y"][(step - 1) * spiky.BATCH]] for step in AT]
    recipe = spiky.recipe(outliers)
    trainer = opened(recipe, "b")
    batches = [trainer.data.train.batch(n * spiky.BATCH, spiky.BATCH) for n in range(spiky.STEPS)]
    (box,) = [b for b in trainer.backend.local_boxes(trainer.backend.init_state()) if b.role == "params"]
    return recipe, batches, np.asarray(box.fetch(), float)


def check(run: RunDir, planned: tuple[Recipe, list[Any], np.ndarray]) -> None:
    _, batches, w_E = planned
    wanted = spiky.in_numpy(w_E, batches)
    curve = run.curve()
    assert tuple(step for step, one in enumerate(wanted, 1) if one[2]) == AT  # the oracle sees them, and no others
    assert [bool(row.get("skipped")) for row in curve] == [skipped for *_, skipped in wanted]
    # 30 steps of float32, each of which rounds sums of a few terms: 1e-5 of the value, as everywhere in fp32.
    for key, at in (("loss", 0), ("grad_norm", 1)):
        np.testing.assert_allclose([row[key] for row in curve], [one[at] for one in wanted], rtol=1e-5)
    events = run.events(Kind.SPIKE)
    assert [(e["step"], e["samples"]) for e in events] == [(s, [(s - 1) * spiky.BATCH, s * spiky.BATCH]) for s in AT]
    assert all(e["loss"] > e["loss_limit"] for e in events) and not run.events(Kind.SKIPPED)
    assert read_history(run).spikes == list(AT)


LATE = pytest.param(BACKENDS[0], True, marks=pytest.mark.full)


@pytest.mark.parametrize(("backend", "late"), [*((name, False) for name in BACKENDS), LATE])
def test_a_spike_changes_nothing(backend: str, late: bool, planned: Any, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    trainer = Trainer(planned[0], run, TrainOptions(backend=backend))
    if late:  # as on an accelerator: the result of a step is read when the next one has begun
        trainer.backend.async_dispatch = True
    assert trainer.run() == 0
    check(run, planned)
    assert run.summary()["skipped_steps"] == list(AT)
    assert main(["report", str(run.path)]) == 0
    assert "3 steps skipped: spikes" in (run.path / "report.html").read_text()


def test_it_is_the_same_after_every_move(planned: Any, tmp_path: Path) -> None:
    """It stops before a spike, between two in a row, and where the window spans two attempts."""
    run = RunDir(tmp_path / "run")
    for number, stop in enumerate((11, 12, 18, None)):
        code = train(planned[0], run, backend=BACKENDS[number % len(BACKENDS)], stop_at=stop)
        assert code == (0 if stop is None else 85)
    assert [e["verdict"] for e in run.events(Kind.RESUMED)] == ["continuous"] * 3
    check(run, planned)


@pytest.mark.full
def test_a_change_of_the_trajectory_begins_a_new_window(planned: Any, tmp_path: Path) -> None:
    file, folder = tmp_path / "spiky.py", str(tmp_path / "run")
    outliers = planned[0].data.outliers
    file.write_text(f"from tests.support import spiky\ndef recipe():\n    return spiky.recipe({outliers})\n")
    words = [str(file), "--run-dir", folder, "--backend", BACKENDS[0]]
    assert main(["train", *words, "--stop-at", "11"]) == 85
    assert main(["resume", folder, "--set", "optimizer.lr=0.01", "--reason", "slower"]) == 0
    run = RunDir(Path(folder))
    rates = [row["lr"] for row in run.curve()]
    assert rates == [spiky.LR] * 11 + [0.01] * 19
    # Steps 12 and 13 come before the new window has its least number of steps.
    assert not {12, 13} & {e["step"] for e in run.events(Kind.SPIKE)} and len(run.events(Kind.CHANGE_MEASURED)) == 1


@pytest.mark.full
def test_spikes_without_end_end_the_run(planned: Any, tmp_path: Path) -> None:
    recipe = replace(planned[0], max_skips=1)
    with pytest.raises(UserError, match="not finite or is a spike"):
        train(recipe, RunDir(tmp_path / "run"), backend=BACKENDS[0])
