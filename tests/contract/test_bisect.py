"""A bisection names the operation, parameter or rule of every planted fault, and finds nothing between sound sides."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.generated_parity.cells import generated
from portatrain.backends.base import backend_class
from portatrain.cli import main
from portatrain.recipe import apply_overrides
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import FOUND, OK
from portatrain.testing.bisect.report import Replay, Stage
from portatrain.testing.bisect.sides import Side
from portatrain.testing.bisect.step import replay
from tests.support import tiny_fork
from tests.support.running import BACKENDS

torch = pytest.importorskip("torch")

from tests.support.planted_steps import FAULTS, batches, recipe  # noqa: E402  # needs torch

QUICK = (
    "mask off by one",
    "tied gradient lost",
    "one rank's rows twice",
    "mean of the means of microbatches",
    "a square weight restored transposed",
    "beta2",
    "no clipping",
    "average too slow",
)
"""One of each stage. The others are long together."""


def replayed(*sides: Side, steps: int = 2) -> Replay:
    rows = batches(sides[0].recipe, steps)
    return replay((sides[0], sides[1]), [(b, b) for b in rows])


def check(fault: str) -> None:
    planted = FAULTS[fault]
    made = recipe(*planted.sets)
    right = Side(name="right", recipe=made, backend="torch")
    found = replayed(right, Side(name="wrong", recipe=made, make=planted.make)).fault
    assert found is not None
    assert (found.stage, list(found.wrong), found.step) == (planted.stage, ["wrong"], planted.step)
    assert planted.where in found.what and planted.hint in found.hint
    assert found.oracle is not None
    assert not abs(found.values[1] - found.oracle[1]) <= found.bound  # the numbers that are printed convict it
    if found.stage is not Stage.BACKWARD or "direction" not in found.what:
        assert abs(found.values[0] - found.oracle[0]) <= found.bound  # and acquit the other side


@pytest.mark.parametrize("fault", QUICK)
def test_a_planted_fault_is_named(fault: str) -> None:
    check(fault)


@pytest.mark.full
def test_every_planted_fault_is_named() -> None:
    for fault in FAULTS.keys() - set(QUICK):
        try:
            check(fault)
        except Exception as error:
            error.add_note(f"the fault is: {fault}")
            raise


def test_there_are_faults_of_every_stage() -> None:
    """MODEL is the stage of two recipes that differ, which is no fault."""
    assert len(FAULTS) >= 60 and {planted.stage for planted in FAULTS.values()} == set(Stage) - {Stage.MODEL}


@pytest.mark.full
def test_precisions_differ_by_rounding() -> None:
    made = recipe("model.layers=1", "model.dropout=0.1", "model.qk_norm=true")
    low = dataclasses.replace(made, precision="bf16")
    found = replayed(
        Side(name="fp32", recipe=made, backend="torch"), Side(name="bf16", recipe=low, backend="torch"), steps=1
    )
    assert found.good and found.rows[0].difference > 1e-3 and found.sentence.startswith("rounding: in 1 replayed step ")


def test_recipes_that_differ_are_no_defect() -> None:
    made = recipe()
    for word, what in (
        ("model.norm_eps=1e-6", "ops.rms_norm in blocks/attn_norm"),
        ("optimizer.b2=0.9", "slot v of"),
        ("seed=1", "parameter embed/table as ops.embed"),
    ):
        other = apply_overrides(made, [word])
        found = replayed(Side(name="a", recipe=made, backend="torch"), Side(name="b", recipe=other, backend="torch"))
        assert found.fault is not None and not found.fault.wrong and what in found.fault.what
        assert found.sentence.startswith("no defect: the two sides compute different things")


@pytest.mark.full
@pytest.mark.skipif(len(BACKENDS) < 2, reason="one framework is installed")
@pytest.mark.usefixtures("compiled_quickly")
def test_jax_beside_torch() -> None:
    """Clean; then with a wrong operation in jax, which is named with its layer."""
    from portatrain.backends.jax.ops import JaxOps

    class WrongOps(JaxOps):
        def silu(self, x: Any) -> Any:
            return x / 2 + super().silu(x) - x * 0.5 * (1 + 1e-4)

    class Wrong(backend_class("jax")):  # type: ignore[misc]
        def _ops(self, *args: Any, **options: Any) -> Any:
            made = super()._ops(*args, **options)
            return WrongOps(**{f.name: getattr(made, f.name) for f in dataclasses.fields(made)})

    made = recipe("model.layers=1", "model.embed=16", "model.mlp=32", "model.dropout=0.1")
    sides = [Side(name=name, recipe=made, backend=name) for name in ("jax", "torch")]
    assert replayed(*sides, steps=1).good
    found = replayed(Side(name="wrong", recipe=made, make=Wrong), sides[1], steps=1).fault
    assert found is not None and list(found.wrong) == ["wrong"] and found.stage is Stage.FORWARD
    assert found.what.startswith("ops.silu in blocks/mlp, layer 0 (portatrain.model.layers._mlp, line ")


@pytest.mark.soak
@pytest.mark.parametrize("number", range(60))
def test_sixty_clean_pairs(number: int) -> None:
    """Generated models and options, small: jax beside torch, in fp32, and torch in bfloat16 beside fp32."""
    cell = generated(number, 1, devices=(1,))[0]
    small = ("model.layers=2", "model.embed=16", "model.mlp=32", "model.heads=4", "model.kv_heads=2")
    more = ("model.head_dim=4", "model.vocab=32", "batch=4", "accumulation=1", "data.seq_len=16")
    made = apply_overrides(cell.recipe(), [*small, *more])
    low = dataclasses.replace(made, precision="bf16")
    other = Side(name="bf16", recipe=low, backend="torch") if number % 3 == 0 else Side(name="jax", recipe=made)
    found = replayed(Side(name="torch", recipe=made, backend="torch"), other)
    assert found.good, (str(cell), found.sentence)


# ---- the command


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portatrain.testing.recipe_check.run.on_cpu", lambda: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on torch: base, again (the same), slots (another b2)."""
    folder = tiny_fork.write(tmp_path_factory.mktemp("bisect"))
    words = {"base": (), "again": (), "slots": ("--set", "optimizer.b2=0.9")}
    for name, more in words.items():
        given = ["train", str(folder / "one.py"), "--run-dir", str(folder / "runs" / name), "--backend", "torch"]
        assert main([*given, "--set", "steps=6", *more]) == OK
    return folder / "runs"


def bisect(runs: Path, *words: str) -> int:
    return main(["bisect", *words, "--runs", str(runs)])


def test_runs_of_one_recipe(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bisect(runs, "base", "again") == OK
    out = capsys.readouterr().out
    assert "steps 1 to 6 in both, checkpoints of 3 steps in both" in out
    assert "not replayed: no step of the records differs by more than rounding" in out


def test_runs_of_two_recipes(runs: Path, capsys: pytest.CaptureFixture[str], unchanged: Callable[[Path], None]) -> None:
    unchanged(runs)
    assert bisect(runs, "base", "slots", "--json") == FOUND
    found = json.loads(capsys.readouterr().out)
    assert found["records"]["recipe"] == {"optimizer.b2": [0.95, 0.9]}
    assert {sign["what"].split(",")[0] for sign in found["records"]["signs"]} >= {"the norm of a tensor", "the loss"}
    fault = found["replay"]["fault"]
    assert (fault["step"], fault["stage"], fault["wrong"]) == (1, "rule", [])
    assert fault["what"].startswith("slot v of parameter mix") and "b2=0.9," in fault["hint"]


def _copied(runs: Path, tmp_path: Path, name: str, run: str = "again") -> Path:
    shutil.copytree(runs / run, tmp_path / name)
    return tmp_path / name


def test_a_record_that_its_recipe_does_not_give(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong number of a machine: neither side of the replay has it."""
    rows = _copied(runs, tmp_path, "odd") / "attempts/1/metrics.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[4]["loss"] *= 1.001
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bisect(runs, "base", str(tmp_path / "odd")) == FOUND
    out = capsys.readouterr().out
    assert "step 5, the loss" in out and "a defect outside of the recipe: odd recorded the loss" in out


def test_mistakes_end_in_one_paragraph(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main(["bisect", *words, "--runs", str(runs)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "expected another run, or two settings of a recipe" in said("base")
    assert "two names with settings" in said("base", "again", "--a", "backend=torch")
    assert "similar" in said("base", "agian") or "again" in said("base", "agian")
    assert "no '='" in said("tiny-lm", "--a", "torch", "--b", "backend=torch")

    sizes = [str(runs.parent / "one.py"), "--a", "backend=torch", "--b", "backend=torch", "--b", "model.vocab=9"]
    assert "of shape [7, 2] and [9, 2]" in said(*sizes) and "\n" not in said(*sizes)

    wide = tmp_path / "wide"
    given = ["train", str(runs.parent / "one.py"), "--run-dir", str(wide), "--backend", "torch", "--set", "steps=2"]
    assert main([*given, "--set", "model.embed=4"]) == OK
    assert "different models: table ([7, 2] and [7, 4])" in said("base", str(wide))

    late = _copied(runs, tmp_path, "late")
    (late / "attempts/1/metrics.jsonl").write_text("")
    assert "steps 1 to 6 in base, no recorded step in late" in said("base", str(late))

    gone = _copied(runs, tmp_path, "gone", "slots")
    shutil.rmtree(gone / "checkpoints")
    message = said("base", str(gone), "--steps", "1")
    assert "common checkpoints: none" in message and "checkpoint_keep_every=1" in message


def test_records_that_are_too_thin_say_what_to_record(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thin = _copied(runs, tmp_path, "thin", "slots")
    shutil.rmtree(thin / "checkpoints")
    about = json.loads((thin / "attempts/1/attempt.json").read_text())
    assert about.pop("packages")["numpy"] == np.__version__
    (thin / "attempts/1/attempt.json").write_text(json.dumps(about))
    assert bisect(runs, "base", str(thin), "--records") == FOUND
    out = capsys.readouterr().out
    assert "train with probe_every=1" in out and "before versions of packages were recorded" in out
    assert RunDir(thin).curve()[0]["step"] == 1  # nothing is written


def test_a_recipe_on_two_settings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--a", "backend=torch", "--b", "backend=torch", "--b", "optimizer.weight_decay=0.05"]
    assert main(["bisect", "tiny-lm", *words, "--json"]) == FOUND
    found = json.loads(capsys.readouterr().out)
    assert found["sides"] == ["torch", "torch, optimizer.weight_decay=0.05"]
    assert found["fault"]["stage"] == "rule" and "as with weight_decay=0.05" in found["fault"]["hint"]
