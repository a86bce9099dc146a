"""A run records its plan, and runs teach the planner: planned beside measured, and the factor that follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from portatrain.cli import main
from portatrain.model.layout import Mesh
from portatrain.plan import calibrate
from portatrain.plan.clusters.catalog import CHIPS
from portatrain.plan.cost import efficiency
from portatrain.plan.recorded import measured, of_run, with_factor
from portatrain.recipe import load_recipe
from portatrain.runs.run_dir import RunDir


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "portatrain" / "efficiency.json"


def finished(folder: Path, *, step_s: float, recipe_name: str = "tiny-lm", device: str = "cpu (x86_64)") -> Path:
    """A run directory as the trainer leaves it, of 12 steps that took ``step_s`` each after two slow ones."""
    recipe = load_recipe(recipe_name)
    with RunDir(folder).begin(recipe) as attempt:
        attempt.note("plan.json", of_run(recipe, Mesh(), device))
        for step in range(1, 13):
            took = 40 * step_s if step < 3 else step_s
            attempt.metrics({"step": step, "loss": 1.0, "step_s": took, "memory_bytes": 500_000_000})
    return folder


@pytest.mark.parametrize(
    ("device", "mesh", "cluster"),
    [
        ("cpu (x86_64)", Mesh(fsdp=2), "cpu-2"),
        ("TPU v5", Mesh(fsdp=128), "tpu-v5p-256"),
        ("TPU7x", Mesh(fsdp=16, tensor=8), "tpu-7x-128"),
        ("TPU v6 lite", Mesh(fsdp=256), "tpu-v6e-256"),
        ("NVIDIA H100 80GB HBM3", Mesh(fsdp=8, tensor=8), "h100-64"),
        ("NVIDIA B200", Mesh(fsdp=8), "b200-8"),
    ],
)
def test_what_a_run_landed_on_is_planned(device: str, mesh: Mesh, cluster: str) -> None:
    found = of_run(load_recipe("llama3-8b"), mesh, device)
    assert found["planned"], found
    assert found["cluster"] == cluster and found["plan"]["step_s"] > 0 and found["plan"]["remat"] == "block"


def test_what_cannot_be_planned_says_why() -> None:
    recipe = load_recipe("tiny-lm")
    assert "NVIDIA L4" in of_run(recipe, Mesh(), "NVIDIA L4")["why"]
    assert "tpu-v5p" in of_run(recipe, Mesh(fsdp=3), "TPU v5")["why"]
    assert "does not divide" in of_run(recipe, Mesh(fsdp=16), "cpu (x86_64)")["why"]


def test_measured_leaves_out_what_compiles() -> None:
    rows = [{"step": n, "step_s": 100.0 if n < 3 else float(n), "memory_bytes": n} for n in range(1, 8)]
    assert measured(rows) == {"step_s": 5.0, "steps": 5, "memory_bytes": 7}
    assert measured(rows[:4]) is None


def test_the_fitted_factor_makes_the_plan_right(tmp_path: Path) -> None:
    slow, fast = finished(tmp_path / "slow", step_s=0.8), finished(tmp_path / "fast", step_s=0.2)
    found = calibrate.seen([slow, fast])
    for one, step_s in zip(found, (0.8, 0.2), strict=True):
        assert one.factor is not None
        again = with_factor(load_recipe("tiny-lm"), Mesh(), "cpu (x86_64)", one.factor)
        assert again == pytest.approx(step_s, rel=2e-3)
    (change,) = calibrate.fit(found)
    assert (change.chip, change.attempts, change.before) == ("cpu", 2, efficiency.ALL)
    assert found[0].factor < change.after < found[1].factor  # type: ignore[operator]


def test_calibrate_says_what_it_changed_and_plans_use_it(
    tmp_path: Path, own_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", step_s=0.3)
    assert main(["plan", "--calibrate", str(run)]) == 0
    told = capsys.readouterr().out
    assert f"{efficiency.ALL:.3f}" in told and "your own runs: 1" in told and str(own_config) in told.replace("\n", "")
    kept = json.loads(own_config.read_text())["cpu"]["factor"]
    assert efficiency.of(CHIPS["cpu"]).value == kept
    assert efficiency.of(CHIPS["cpu"]).basis == "your own runs"
    assert efficiency.published(CHIPS["cpu"]).value == efficiency.ALL
    assert main(["plan", "tiny-lm", "--cluster", "cpu-1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["confidence"]["time"]["efficiency"] == kept


@pytest.mark.parametrize(
    ("make", "told"),
    [(lambda p: p / "nothing", "run.json"), (lambda p: finished(p / "odd", step_s=1.0, device="abacus"), "abacus")],
)
def test_mistakes(
    make: object, told: str, tmp_path: Path, own_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--calibrate", str(make(tmp_path))]) == 2  # type: ignore[operator]
    assert told in capsys.readouterr().err
    assert not own_config.exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"cpu": 3}', '{"cpu": {"factor": -1}}', '{"cpu": {"factor": "x"}}'])
def test_a_damaged_file_of_factors_is_named(text: str, own_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_config.parent.mkdir(parents=True)
    own_config.write_text(text)
    assert main(["plan", "tiny-lm", "--cluster", "cpu-1"]) == 2
    assert str(own_config) in capsys.readouterr().err
    assert of_run(load_recipe("tiny-lm"), Mesh(), "cpu (x86_64)")["planned"] is False  # a run starts all the same
