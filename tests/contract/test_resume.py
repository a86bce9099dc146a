"""A run that stops on one framework and resumes in the other: the same bits, the same curve; and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.backends.state import full_name
from portatrain.checkpoint.format_layout import format_layout
from portatrain.checkpoint.saver import Checkpoints, reads
from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from portatrain.testing import parity
from portatrain.training.trainer import train
from tests.support.lost_commits import lose
from tests.support.running import everything
from tests.support.short_runs import losses, small

BACKENDS = [n for n in ("jax", "torch") if not missing(n)]
PAIRS = [(a, b) for a in BACKENDS for b in BACKENDS]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = RunDir(tmp_path_factory.mktemp("runs") / "whole")
    assert train(small(), run, backend="jax") == 0
    return losses(run)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_run_that_moves_stays_on_its_curve(first: str, second: str, tmp_path: Path, undisturbed: list) -> None:
    run = RunDir(tmp_path / "run")
    assert train(small(), run, backend=first, stop_at=5) == 85
    assert not run.is_done
    assert train(small(), run, backend=second) == 0
    moved = losses(run)
    assert max(abs(a - b) / a for a, b in zip(undisturbed, moved, strict=True)) <= 1e-6
    (seam,) = run.events("resumed")
    assert (seam["step"], seam["verdict"], seam["differs"]) == (5, "continuous", [])
    assert [row["attempt"] for row in run.curve()] == [1] * 5 + [2] * 7


GROWS = ("batch=8", "accumulation=4", "batch_start=2", "batch_ramp=7")


@pytest.mark.skipif(len(BACKENDS) < 2, reason="jax and torch are not both installed")
def test_a_batch_that_grows_goes_on_where_it_was(tmp_path: Path) -> None:
    """Stopped while the batch grows, and moved: each sample once, in the sequence's order, and the same curve."""
    recipe = small(*GROWS)
    whole, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "run")
    assert train(recipe, whole, backend="jax") == 0
    assert train(recipe, run, backend="torch", stop_at=4) == 85
    assert train(recipe, run, backend="jax", stop_at=6) == 85
    assert train(recipe, run, backend="torch") == 0
    assert max(abs(a - b) / a for a, b in zip(losses(whole), losses(run), strict=True)) <= 1e-6
    assert [seam["verdict"] for seam in run.events("resumed")] == ["continuous"] * 2
    tokens = [row["tokens"] for row in run.curve()]
    assert tokens == [64 * recipe.samples_after(step) for step in range(1, 13)]
    assert tokens[:8] == [64 * n for n in (2, 4, 6, 10, 14, 20, 26, 34)]
    taken = np.concatenate([b["sample"].ravel() for b in parity.batches(recipe, 12)])
    assert taken.tolist() == list(range(recipe.samples_after(12)))


@pytest.mark.parametrize("rule", ["AdamW", "Adafactor", "Muon"])
@pytest.mark.parametrize("first", BACKENDS)
def test_there_and_back_again_gives_the_same_bits(first: str, rule: str, tmp_path: Path) -> None:
    recipe = small(f"optimizer={rule}")
    program = make_program(recipe)
    names = [first, *(b for b in BACKENDS if b != first), first]
    backend = backend_class(first)(program)
    state = backend.init_state()
    for step, batch in enumerate(parity.batches(recipe, 2), start=1):
        state, _ = backend.step(state, batch, step=step, scale=1.0)
    before = everything(backend, state)
    assert any(np.any(v) for k, v in before.items() if k.startswith("opt/"))
    assert before["opt/count"] == 2
    for leg, name in enumerate(names):
        checkpoints = Checkpoints(tmp_path / str(leg))
        checkpoints.save(2, backend, state, {"step": 2})
        checkpoints.wait()
        found = checkpoints.newest(pytest.fail)
        assert found is not None
        backend = backend_class(name)(program)
        state = backend.restore_state(reads(found[1]))
        after = everything(backend, state)
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.tobytes() == after[key].tobytes(), (name, key)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_taken(tmp_path: Path, undisturbed: list) -> None:
    run = RunDir(tmp_path / "run")
    assert train(small("checkpoint_every=3"), run, backend=BACKENDS[-1], stop_at=8) == 85
    folder = run.path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000006", "step-00000008"]  # two are kept
    flip(max((folder / "step-00000008").rglob("*.safetensors"), key=lambda p: p.stat().st_size))
    assert train(small("checkpoint_every=3"), run, backend=BACKENDS[-1]) == 0
    assert [e["step"] for e in run.events("resumed")] == [6]
    assert len(run.events("checkpoint_damaged")) == 1
    assert max(abs(a - b) / a for a, b in zip(undisturbed, losses(run), strict=True)) <= 1e-6


def test_no_checkpoint_that_verifies_is_refused_and_nothing_lost(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert train(small(), run, backend=BACKENDS[-1], stop_at=4) == 85
    flip(max((run.path / "checkpoints").rglob("*.safetensors"), key=lambda p: p.stat().st_size))
    before = {p: p.read_bytes() for p in (run.path / "checkpoints").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="one that verifies"):
        train(small(), run, backend=BACKENDS[-1])
    assert before == {p: p.read_bytes() for p in (run.path / "checkpoints").rglob("*") if p.is_file()}


def test_an_uncommitted_save_is_not_taken_for_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    assert train(small("checkpoint_every=3"), run, backend=BACKENDS[-1], stop_at=8) == 85
    lose(run, 8)
    assert train(small("checkpoint_every=3"), run, backend=BACKENDS[-1]) == 0
    assert [e["step"] for e in run.events("resumed")] == [6]
    assert run.events("checkpoint_damaged") == []


def test_the_format_holds_every_tensor_of_the_state_once(tmp_path: Path) -> None:
    program = make_program(small())
    backend = backend_class("torch")(program)
    names = {t.name for t in format_layout(program).tensors}
    assert names == {full_name(box.role, box.name) for box in backend.local_boxes(backend.init_state())}
    assert {
        "params/blocks/attn/wq",
        "opt/m/blocks/attn/wq",
        "opt/v/embed/table",
        "ema/embed/table",
        "opt/count",
    } <= names
