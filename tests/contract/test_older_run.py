"""A run that an older release wrote, when every module of the package stood in one folder, is read and resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from portatrain.cli import launch_main, main
from portatrain.data import TextFiles
from portatrain.errors import UserError
from portatrain.model.lora import LoRA
from portatrain.model.rope import RopeScaling
from portatrain.optim import AdamW
from portatrain.optim.schedules import Cosine
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.hooks import TextSample
from portatrain.training.trainer import train
from recipes.models.decoder import DecoderConfig
from tests.support.running import BACKENDS

OLD = Path(__file__).parents[1] / "golden" / "run-of-the-flat-package"
STOPPED, STEPS = 5, 8
# The losses of steps 6 to 8 when the code that began the run ended it.
LOSSES = [5.492416858673096, 5.482413291931152, 5.496954917907715]
MOVED = {"portatrain.rope:RopeScaling", "portatrain.lora:LoRA", "portatrain.schedules:Cosine"}


def recipe(lr: float = 1e-2) -> Recipe:
    """Return the recipe of the run, as a user writes it today."""
    return Recipe(
        name="old",
        model=DecoderConfig(
            vocab=256, embed=16, layers=2, heads=2, kv_heads=1, mlp=16, rope_scaling=RopeScaling(factor=2.0)
        ),
        data=TextFiles(paths="corpus", seq_len=32, validation=0.2),
        optimizer=AdamW(lr=lr),
        schedule=Cosine(warmup=2),
        steps=STEPS,
        batch=4,
        eval_batches=2,
        lora=LoRA(rank=2),
        hooks=(TextSample(prompt="2 times "),),
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A copy of the run, with its corpus in the working directory."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RunDir("run")


def test_its_recipe_is_the_one_of_today(run: RunDir) -> None:
    stored = run.run_info()
    text = json.dumps(stored["recipe"])
    assert all(f'"{name}"' in text for name in (*MOVED, "portatrain.hooks:TextSample"))
    assert run.recipe() == recipe()
    assert stored["recipe_sha256"] != recipe().sha256  # or this test shows nothing


def test_commands_read_it(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_main(["status", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["steps"]) == ("STOPPED", STOPPED, STEPS)
    assert main(["ckpt", "ls", "run"]) == 0
    assert str(STOPPED) in capsys.readouterr().out.split()
    assert main(["report", "run"]) == 0
    assert "2 times " in Path("run/report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_goes_on_to_the_same_end(backend: str, run: RunDir) -> None:
    assert train(recipe(), run, backend=backend) == 0
    assert run.is_done
    (resumed,) = run.events("resumed")
    assert (resumed["step"], resumed["verdict"]) == (STOPPED, "continuous")
    assert [row["loss"] for row in run.curve()[STOPPED:]] == pytest.approx(LOSSES, rel=1e-6)


def test_another_recipe_is_refused_by_the_field_that_differs_alone(run: RunDir) -> None:
    with pytest.raises(UserError) as caught:
        run.check(recipe(lr=2e-2))
    assert "differs in optimizer.lr)" in str(caught.value)
