"""The models of examples/, and two recipes whose samples meet or are given noise: one curve on jax, torch and a
mesh, and over moves.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing.guard import check_rows_independent
from portatrain.testing.parity import batches
from portatrain.training.trainer import make_program, train
from tests.support import forks
from tests.support.short_runs import losses

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = (
    "conv_net",
    "diffusion",
    "two_towers",
    "recurrent",
    "encoder_decoder",
    "mixture",
    "hybrid",
    "tiny-siglip",
    "tiny-dit",
)
SMALL = ("steps=9", "schedule.warmup=2", "batch=16", "accumulation=2", "eval_every=none", "eval_final_batches=2")
BOUND = 1e-6

pytestmark = pytest.mark.skipif(bool(missing("jax") or missing("torch")), reason="jax and torch are not both installed")


def recipe(name: str) -> Recipe:
    return apply_overrides(load_recipe(named(name)), list(SMALL))


def named(name: str) -> str:
    """What a command takes: the name of a recipe, or a file of examples/."""
    return name if "-" in name else str(EXAMPLES / f"{name}.py")


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    with forks.serving():
        yield


def on_two(name: str, run: Path, *more: str, code: int) -> None:
    """Train on two processes."""
    words = [named(name), "--run-dir", str(run), "--mesh", "fsdp=2", *more]
    sizes = [word for size in SMALL for word in ("--set", size)]
    command = [sys.executable, "-m", "portatrain.cli", "train", *words, *sizes]
    done = forks.run(command)
    assert done.returncode == code, done.stderr[-2000:]


@pytest.mark.parametrize("name", MODELS)
def test_samples_see_each_other_only_where_they_may(name: str) -> None:
    small = recipe(name)
    batch = {key: array[0] for key, array in batches(small, 1)[0].items()}
    check_rows_independent(make_program(small).definition, batch)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "hybrid"])  # benchmarks/resume_hybrid.py
def test_one_curve_everywhere(name: str, tmp_path: Path) -> None:
    small = recipe(name)
    whole = RunDir(tmp_path / "jax")
    assert train(small, whole, backend="jax") == 0
    torch, cut, moved = (RunDir(tmp_path / what) for what in ("torch", "fsdp", "moved"))
    assert train(small, torch, backend="torch") == 0
    on_two(name, cut.path, "--backend", "torch", "--devices", "2", code=0)
    assert train(small, moved, backend="jax", stop_at=3) == 85
    assert train(small, moved, backend="torch", stop_at=5) == 85
    on_two(name, moved.path, "--backend", "torch", "--devices", "2", "--stop-at", "7", code=85)
    assert train(small, moved, backend="jax") == 0
    assert [seam["verdict"] for seam in moved.events("resumed")] == ["continuous"] * 3
    runs = {"torch": torch, "fsdp=2": cut, "moved": moved}
    true = losses(whole)
    for what, run in runs.items():
        assert max(abs(a - b) / a for a, b in zip(true, losses(run), strict=True)) <= BOUND, what
