"""What a recipe imports from another package: optimizer rules, schedules and data sources, by the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.runs.run_dir import RunDir
from tests.support import forks

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the package builds on torch")

ACME = Path(__file__).parents[1] / "plugins" / "acme"
SMALL = ["steps=4", "batch=8", "model.layers=1", "model.embed=32"]


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    with forks.serving():
        yield


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path.cwd()), str(ACME))), forks.QUICK: "1"}
    return forks.run([sys.executable, "-m", "portatrain.cli", *words], env=env, timeout=200)


def settings(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def trained(recipe: str, run: Path, *words: str) -> RunDir:
    done = cli("train", str(ACME / "acme_lab" / recipe), "--run-dir", str(run), *words)
    assert done.returncode in (0, 85), done.stderr
    return RunDir(run)


def test_a_rule_and_a_schedule_give_one_curve_on_every_mesh(tmp_path: Path) -> None:
    curves = {}
    for name, words in {"jax": [], "jax-2": ["--mesh", "fsdp=2"], "torch": [], "torch-2": ["--mesh", "fsdp=2"]}.items():
        backend = ["--backend", name.removesuffix("-2")]
        curves[name] = trained("own_optim.py", tmp_path / name, *settings(*SMALL), *backend, *words).curve()
    assert [row["lr"] for row in curves["jax"]] == [1e-2, 1e-2, 5e-3, 5e-3]
    assert curves["jax"][-1]["loss"] != curves["jax"][0]["loss"]
    for curve in curves.values():
        for ours, theirs in zip(curves["jax"], curve, strict=True):
            assert ours["lr"] == theirs["lr"] and abs(ours["loss"] - theirs["loss"]) <= 2e-6 * ours["loss"]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_rule_with_slots_of_another_type_is_refused(command: str, tmp_path: Path) -> None:
    words = ["--run-dir", str(tmp_path / "run")] if command == "train" else ["--cluster", "h100-8"]
    done = cli(command, str(ACME / "acme_lab" / "own_optim.py"), *words, *settings(*SMALL, "optimizer=Shapes"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "Shapes.slots(" in done.stderr and "expected slot 'm' to be a Slot, got a tuple" in done.stderr
    assert not (tmp_path / "run").exists()


def test_arrays_of_ones_own_move_between_backends(tmp_path: Path) -> None:
    whole = trained("own_data.py", tmp_path / "whole", "--backend", "jax")
    trained("own_data.py", tmp_path / "moved", "--backend", "torch", "--mesh", "fsdp=2", "--stop-at", "3")
    moved = trained("own_data.py", tmp_path / "moved", "--backend", "jax")
    assert [e["verdict"] for e in moved.events("resumed")] == ["continuous"]
    for ours, theirs in zip(whole.curve(), moved.curve(), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) <= 1e-5 * ours["loss"]
    other = cli(
        *("train", str(ACME / "acme_lab" / "own_data.py"), "--run-dir", str(tmp_path / "none"), "--set", "batch=4000")
    )
    assert other.returncode == 2 and "at least 4,000 samples" in other.stderr, other.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(("words", "said"), [(["plan", "--cluster", "h100-8"], "acme-line"), (["show"], "w")])
def test_commands_that_describe_take_own_data(words: list[str], said: str) -> None:
    command, *more = words
    done = cli(command, str(ACME / "acme_lab" / "own_data.py"), *more)
    assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
