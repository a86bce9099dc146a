"""A recipe that goes back before a spike has the curve of a run that left those samples out from its first step."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import missing
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs import changes
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.system.stop_signals import StopSignals
from portatrain.training.hooks import Hook
from portatrain.training.metrics import StepRecord
from portatrain.training.options import TrainOptions
from portatrain.training.trainer import Trainer, train
from portatrain.training.view import TrainingView
from tests.support import spiky

BACKENDS = [name for name in ("jax", "torch") if not missing(name)]
BATCH = spiky.BATCH
REWIND = replace(spiky.RULE, action="rewind")
AT = (12, 22)
"""The steps that meet an outlier. Once the samples of step 12 are left out, that of step 22 comes in step 21."""
LEFT_OUT = ("44:48", "84:88")


def indices(folder: Path) -> list[int]:
    """Return the index in the source of each sample, in the order of the samples."""
    index_of = {np.float32(spiky.pair(index)[1]): index for index in range(BATCH * spiky.STEPS)}
    trainer = Trainer(spiky.recipe(), RunDir(folder / "order"), TrainOptions(backend=BACKENDS[0]))
    return [index_of[y] for y in trainer.data.train.batch(0, BATCH * spiky.STEPS)["y"]]


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    return indices(tmp_path_factory.mktemp("order"))


def spiked(order: list[int], at: tuple[int, ...] = AT, **more: Any) -> Recipe:
    """Return a recipe with an outlier in the second sample of each step of `at`, of the whole sequence."""
    outliers = [order[(step - 1) * BATCH + 1] for step in at]
    return spiky.recipe(outliers, **{"spikes": REWIND, "checkpoint_every": 4, **more})


def bits(run: RunDir) -> list[tuple[Any, ...]]:
    return [tuple(row[k] for k in ("step", "loss", "grad_norm", "lr", "tokens", "skipped")) for row in run.curve()]


def told(recipe: Recipe, left_out: tuple[str, ...], run: RunDir, backend: str) -> RunDir:
    """Train the run that left these samples out from its first step."""
    assert train(replace(recipe, leave_out=left_out), run, backend=backend) == 0
    return run


LATE = pytest.param(BACKENDS[0], True, marks=pytest.mark.full)


@pytest.mark.parametrize(("backend", "late"), [*((name, False) for name in BACKENDS), LATE])
def test_it_is_the_run_that_never_had_the_samples(
    backend: str, late: bool, order: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:  # as on an accelerator: the result of a step is read when the next one has begun
        begin = Trainer.__init__

        def lately(trainer: Trainer, *given: Any) -> None:
            begin(trainer, *given)
            trainer.backend.async_dispatch = True

        monkeypatch.setattr(Trainer, "__init__", lately)
    monkeypatch.chdir(tmp_path)  # for compare.html
    recipe, run = spiked(order), RunDir(tmp_path / "rewound")
    assert train(recipe, run, backend=backend) == 0
    other = told(recipe, LEFT_OUT, RunDir(tmp_path / "told"), backend)
    assert bits(run) == bits(other) and not any(row["skipped"] for row in run.curve())
    assert run.recipe() == other.recipe()

    went = run.events(Kind.WENT_BACK)
    assert [(e["spike"], e["step"], e["samples"]) for e in went] == [(12, 8, [44, 48]), (21, 20, [84, 88])]
    assert [(c.step, c.rewound_from, c.leaves_out) for c in changes.of(run.path)] == [(8, 12, True), (20, 21, True)]
    resumed = run.events(Kind.RESUMED)
    assert [(e["verdict"], e["tensors"]) for e in resumed] == [("changed", "equal")] * 2
    assert main(["compare", str(run.path), str(other.path)]) == 0
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert "2 times back before a spike" in page and "a spike at step 12 (loss" in page


def test_it_agrees_with_numpy(order: list[int], tmp_path: Path) -> None:
    """The oracle trains on the batches without the samples, which it cuts itself."""
    recipe = spiked(order)
    trainer = Trainer(recipe, RunDir(tmp_path / "data"), TrainOptions(backend=BACKENDS[0]))
    (box,) = [b for b in trainer.backend.local_boxes(trainer.backend.init_state()) if b.role == "params"]
    kept = [n for n in range(BATCH * (spiky.STEPS + 2)) if not 44 <= n < 48 and not 84 <= n < 88]
    rows = [trainer.data.train.batch(n, 1) for n in kept]
    batches = [
        {k: np.concatenate([row[k] for row in rows[i : i + BATCH]]) for k in ("x", "y")}
        for i in range(0, len(rows), BATCH)
    ]
    wanted = spiky.in_numpy(np.asarray(box.fetch(), float), batches)
    run = RunDir(tmp_path / "run")
    assert train(recipe, run, backend=BACKENDS[-1]) == 0
    assert not any(skipped for *_, skipped in wanted)
    # 30 steps of float32, each of which rounds sums of a few terms: 1e-5 of the value, as everywhere in fp32.
    for key, at in (("loss", 0), ("grad_norm", 1)):
        np.testing.assert_allclose([row[key] for row in run.curve()], [one[at] for one in wanted], rtol=1e-5)


def test_it_moves(order: list[int], tmp_path: Path) -> None:
    """It stops between its rewinds, and goes on elsewhere; the same samples are left out, and others too."""
    recipe, run = spiked(order), RunDir(tmp_path / "run")
    for number, stop in enumerate((13, 20, 25, None)):
        code = train(changes.settled(run.path, recipe), run, backend=BACKENDS[number % len(BACKENDS)], stop_at=stop)
        assert code == (0 if stop is None else 85)
    other = told(recipe, LEFT_OUT, RunDir(tmp_path / "told"), BACKENDS[0])
    np.testing.assert_allclose([r["loss"] for r in run.curve()], [r["loss"] for r in other.curve()], rtol=1e-5)
    assert [e["verdict"] for e in run.events(Kind.RESUMED)] == ["changed", *["continuous"] * 2, "changed", "continuous"]


KILLED = """
import os, sys, threading
from pathlib import Path
from portatrain.checkpoint.locations import FolderLocation
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from tests.contract import test_rewind as here

where, point, backend = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
owner, name = {"removal": (FolderLocation, "remove"), "change": (RunDir, "change"), "after": (RunDir, "change")}[point]
before = getattr(owner, name)

def killed(self, *given):
    if point != "change":
        before(self, *given)
    if threading.current_thread() is threading.main_thread():  # otherwise it is the rule for keeping checkpoints
        os._exit(9)

recipe = here.wide(here.indices(where))
setattr(owner, name, killed)
train(recipe, RunDir(where / "run"), backend=backend)
"""


def wide(order: list[int]) -> Recipe:
    """Return a recipe that goes back over checkpoints: the first one that is old enough is two before the newest."""
    rule = replace(REWIND, before=5, after=1)
    return spiked(order, (16,), spikes=rule, checkpoint_every=2)


LATER = [pytest.param(name, marks=pytest.mark.full) for name in ("change", "after")]


@pytest.mark.parametrize("point", ["removal", *LATER])
def test_killed_in_the_middle_of_a_rewind(point: str, order: list[int], tmp_path: Path) -> None:
    """When one of two checkpoints is removed, before the change is recorded, after it: the next attempt has the same
    curve in the end. Retention kept the checkpoint to go back to, besides the newest ones."""
    backend = BACKENDS[-1]
    words = [sys.executable, "-c", KILLED, str(tmp_path), point, backend]
    assert subprocess.run(words, timeout=120, capture_output=True).returncode == 9
    run, recipe = RunDir(tmp_path / "run"), wide(order)
    assert [change.rewound_from for change in changes.of(run.path)] == ([16] if point == "after" else [])
    assert run.committed() == (14 if point == "removal" else 10)
    assert train(changes.settled(run.path, recipe), run, backend=backend) == 0
    # Steps 11 to 17 are left out: samples 40 to 67.
    other = told(recipe, ("40:68",), RunDir(tmp_path / "told"), backend)
    assert bits(run) == bits(other) and run.recipe() == other.recipe()


def test_spikes_at_one_place_end_the_run(order: list[int], tmp_path: Path) -> None:
    recipe = spiked(order, tuple(range(12, 31)), spikes=replace(REWIND, max_rewinds=2))
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=r"at most max_rewinds=2 spikes after the checkpoint of step 8") as raised:
        train(recipe, run, backend=BACKENDS[-1])
    assert "portatrain blame run --step 12" in str(raised.value)
    assert run.recipe().leave_out == ("44:52",) and run.committed() == 8
    with pytest.raises(UserError, match="max_rewinds"):  # and again, at the first spike
        train(run.recipe(), run, backend=BACKENDS[-1])
    assert len(run.events(Kind.WENT_BACK)) == 2


def test_before_the_first_checkpoint_it_begins_again(order: list[int], tmp_path: Path) -> None:
    recipe, run = spiked(order, (12,), checkpoint_every=None), RunDir(tmp_path / "run")
    assert train(recipe, run, backend=BACKENDS[-1], stop_at=14) == 85
    assert run.events(Kind.WENT_BACK)[0]["step"] == 0 and not run.events(Kind.RESUMED)
    other = told(replace(recipe, steps=14), ("44:48",), RunDir(tmp_path / "told"), BACKENDS[-1])
    assert bits(run) == bits(other)


@dataclass(frozen=True, kw_only=True)
class Stops(Hook):
    """Asks the run to stop, as a signal does, when it has a spike."""

    def on_step(self, run: TrainingView, record: StepRecord) -> None:
        if record.skipped:
            SIGNALS[0].strengthen("preempt")


SIGNALS: list[StopSignals] = []


@pytest.mark.parametrize("every", [None, 4])
def test_asked_to_stop_while_it_goes_back(every: int | None, order: list[int], tmp_path: Path) -> None:
    recipe = spiked(order, (12,), checkpoint_every=every, hooks=(Stops(),))
    run = RunDir(tmp_path / "run")
    with StopSignals() as signals:
        SIGNALS[:] = [signals]
        assert train(recipe, run, backend=BACKENDS[-1], signals=signals) == 85
    assert [e["status"] for e in run.events(Kind.END)] == ["preempted"] and len(run.events(Kind.WENT_BACK)) == 1
    assert train(changes.settled(run.path, recipe), run, backend=BACKENDS[-1]) == 0
    assert bits(run) == bits(told(recipe, ("44:48",), RunDir(tmp_path / "told"), BACKENDS[-1]))


def test_what_is_gone_is_not_gone_back_to(order: list[int], tmp_path: Path) -> None:
    """A run whose old checkpoints were removed by hand does not begin again."""
    recipe, run = spiked(order, (16,), spikes=replace(REWIND, before=5)), RunDir(tmp_path / "run")
    assert train(recipe, run, backend=BACKENDS[-1], stop_at=13) == 85
    for path in (run.path / "checkpoints").iterdir():
        if path.name != "step-00000013":
            (path / "COMMIT").unlink()
    with pytest.raises(UserError, match="a checkpoint of step 0 to 10, to go back to"):
        train(recipe, run, backend=BACKENDS[-1])


def test_it_does_not_go_back_past_a_change(order: list[int], tmp_path: Path) -> None:
    """Steps before a change of the trajectory were taken under another recipe, and keep their samples."""
    file, folder = tmp_path / "spiky.py", str(tmp_path / "run")
    outliers = [order[15 * BATCH + 1]]
    rule = "spikes=replace(spiky.RULE, action='rewind', before=9)"
    file.write_text(
        "from dataclasses import replace\nfrom tests.support import spiky\n"
        f"def recipe():\n    return spiky.recipe({outliers}, checkpoint_every=2, {rule})\n"
    )
    words = [str(file), "--run-dir", folder, "--backend", BACKENDS[-1]]
    assert main(["train", *words, "--stop-at", "9"]) == 85
    assert main(["resume", folder, "--set", "optimizer.lr=0.04", "--reason", "slower"]) == 0
    run = RunDir(Path(folder))
    assert [(e["step"], e["spike"], e["samples"]) for e in run.events(Kind.WENT_BACK)] == [(9, 16, [36, 64])]
    assert [row["lr"] for row in run.curve()] == [spiky.LR] * 9 + [0.04] * 21


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_step_that_is_not_finite_is_a_spike(value: str, order: list[int], tmp_path: Path) -> None:
    recipe = spiked(order, (12,))
    recipe = replace(recipe, data=replace(recipe.data, by=value))
    run = RunDir(tmp_path / "run")
    assert train(recipe, run, backend=BACKENDS[-1]) == 0
    assert [e["spike"] for e in run.events(Kind.WENT_BACK)] == [12] and not run.events(Kind.SKIPPED)
    assert bits(run) == bits(told(recipe, ("44:48",), RunDir(tmp_path / "told"), BACKENDS[-1]))


@pytest.mark.meshes
def test_two_processes_go_back_together(order: list[int], tmp_path: Path) -> None:
    """Both open the run again in the same processes; what they trained is the run of one process, within rounding."""
    if missing("torch"):
        pytest.skip("torch is not installed")
    file, folder = tmp_path / "spiky.py", tmp_path / "run"
    outliers = [order[(step - 1) * BATCH + 1] for step in AT]
    file.write_text(
        "from dataclasses import replace\nfrom tests.support import spiky\ndef recipe():\n"
        f"    rule = replace(spiky.RULE, action='rewind')\n"
        f"    return spiky.recipe({outliers}, checkpoint_every=4, spikes=rule)\n"
    )
    words = [str(file), "--run-dir", str(folder), "--backend", "torch", "--mesh", "fsdp=2"]
    done = subprocess.run(
        [sys.executable, "-m", "portatrain", "train", *words], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    run = RunDir(folder)
    assert [e["spike"] for e in run.events(Kind.WENT_BACK)] == [12, 21] and run.attempt_numbers() == [1, 2, 3]
    other = told(spiked(order), LEFT_OUT, RunDir(tmp_path / "told"), "torch")
    np.testing.assert_allclose([r["loss"] for r in run.curve()], [r["loss"] for r in other.curve()], rtol=1e-5)
