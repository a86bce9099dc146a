"""Surgery in forks: the record, what follows it, and mistakes. Curves are in test_surgery_curves.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import portatrain
from checkpoints_format import LocalStore, Reader
from portatrain.cli import main
from portatrain.runs.run_dir import RunDir
from tests.support import tiny_experts, tiny_fork
from tests.support.running import BACKENDS

AT = 2
EXPERTS = ["--set", "model.experts=2", "--surgery", "experts"]
VOCABULARY = ["--set", "model.vocab=8", "--surgery", "vocabulary"]


def fork(runs: Path, parent: str, new: str, *words: str) -> RunDir:
    assert main(["fork", parent, "--runs", str(runs), "--at", str(AT), "--run", new, *words]) == 0
    return RunDir(runs / new)


def resume(runs: Path, name: str, *words: str) -> int:
    return main(["resume", name, "--runs", str(runs), *words])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with `base`, which stopped after two steps."""
    folder = tiny_fork.write(tmp_path_factory.mktemp("surgery"))
    (folder / "own.py").write_text(Path(tiny_experts.__file__).read_text())
    words = [str(folder / "own.py"), "--run-dir", str(folder / "runs/base"), "--backend", BACKENDS[-1]]
    assert main(["train", *words, "--stop-at", str(AT)]) == 85
    return folder / "runs"


# ---- the record


def test_the_record_has_the_surgery_and_its_proof(runs: Path, capsys: Any) -> None:
    capsys.readouterr()
    assert main(["fork", "base", "--runs", str(runs), "--at", "2", "--run", "told", *EXPERTS, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["parent"]
    told = RunDir(runs / "told")
    parent = told.run_info()["parent"]
    assert said["surgery"] == parent["surgery"] and "recipe" not in said and "saved" not in said
    done = parent["surgery"]
    assert done["name"] == "experts" and done["fields"] == {"model.experts": [0, 2]}
    assert done["tensors"] == {"kept": 2, "made": 4} and done["dropped"] == ["mlp/down", "mlp/gate", "mlp/up"]
    assert done["slots"] == {"fresh": 2, "kept": 4, "mapped": 6} and done["averages"] == {
        "fresh": 1,
        "kept": 2,
        "made": 3,
    }
    proof = done["proof"]
    assert proof["function"] == "kept" and 0 <= proof["largest_difference"] <= 1e-12 * proof["largest_output"]
    assert proof["outputs"] == "logits" and (proof["samples"], proof["positions"]) == (4, 24)
    assert proof["loss"][0] == pytest.approx(proof["loss"][1], rel=1e-13)
    with LocalStore(told.path / "checkpoints/step-00000002") as store:
        assert Reader(store).meta["surgery"] == done
    # The checkpoint is whole before anything was trained: it verifies, and loads as the new model.
    assert main(["ckpt", "verify", str(told.path / "checkpoints/step-00000002")]) == 0
    model = portatrain.load(told.path, recipe=told.recipe(), backend=BACKENDS[-1])
    assert model.step == AT
    # An attempt measures the change, is preempted, and goes on.
    assert resume(runs, "told", "--backend", BACKENDS[-1], "--set", "checkpoint_every=1") == 0
    (measured,) = told.events("change_measured")
    assert measured["before"]["loss"] == pytest.approx(measured["after"]["loss"], rel=1e-6)
    assert measured["before"]["grad_norm"] and measured["after"]["update_norm"]
    assert measured["state"]["optimizer"] == "2 fresh, 4 kept, 6 mapped by surgery experts"
    page = runs / "told.html"
    assert main(["report", str(told.path), "--out", str(page)]) == 0
    assert "Surgery experts: the function of the model was kept; largest difference of logits" in page.read_text()


def test_what_it_does_to_the_function_is_said(runs: Path, capsys: Any) -> None:
    capsys.readouterr()
    words = [*EXPERTS, "--set", "model.normalise=false"]
    fork(runs, "base", "unsaid", *words, "--dry-run")
    assert not (runs / "unsaid").exists()
    said = capsys.readouterr().out
    assert "the function changes: the weights of a token's experts do not add up to 1" in said
    assert "largest difference of logits" in said and "mean difference" in said
    fork(runs, "base", "unproved", *EXPERTS, "--no-proof")
    assert "its proof was left out" in capsys.readouterr().out
    assert RunDir(runs / "unproved").run_info()["parent"]["surgery"]["proof"] == {"function": "not measured"}


def test_surgery_after_surgery_and_other_changes_at_one_step(runs: Path) -> None:
    """Each fork begins at the checkpoint of the one before it, which no attempt has trained."""
    fork(runs, "base", "first", *EXPERTS, "--set", "optimizer.lr=0.02")
    fork(runs, "first", "second", *VOCABULARY, "--set", "optimizer=Lion", "--set", "optimizer.lr=0.01")
    third = fork(runs, "second", "third", "--set", "clip_norm=0.5")
    assert resume(runs, "third", "--backend", BACKENDS[-1]) == 0
    (resumed,), (measured,) = third.events("resumed"), third.events("change_measured")
    assert (resumed["verdict"], resumed["tensors"], resumed["differs"]) == ("changed", "equal", [])
    assert {"model.experts", "model.vocab", "optimizer.lr", "clip_norm"} <= set(resumed["fields"])
    assert "then mapped" in measured["state"]["optimizer"] and third.is_done
    recipe = third.recipe()
    assert (recipe.model.experts, recipe.model.vocab, recipe.clip_norm) == (2, 8, 0.5)
    assert type(recipe.optimizer).__name__ == "Lion"


def test_a_plain_fork_of_a_fork_at_one_step(runs: Path) -> None:
    fork(runs, "base", "slow", "--set", "optimizer.lr=0.02")
    slower = fork(runs, "slow", "slower", "--set", "batch=8")
    assert resume(runs, "slower", "--backend", BACKENDS[-1]) == 0
    (resumed,) = slower.events("resumed")
    assert resumed["verdict"] == "changed" and {"optimizer.lr", "batch"} <= set(resumed["fields"])
    assert {row["lr"] for row in slower.curve()} == {0.02}


# ---- one of your own, and mistakes


OWN = """
from portatrain.checkpoint.surgery import Edit, Surgery


def tie_up(before, after):
    mean = Edit(of=("table", "out"), make=lambda a, b: FACTOR * a)
    return Surgery(edits={"table": mean})
"""


def test_a_surgery_of_your_own(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    Path("mine.py").write_text(OWN.replace("FACTOR", "1.0"))
    made = fork(runs, "base", "mine", "--surgery", "mine.py:tie_up")
    assert made.run_info()["parent"]["surgery"]["name"] == "mine.py:tie_up"
    assert resume(runs, "mine", "--backend", BACKENDS[-1]) == 0 and made.is_done
    Path("yours.py").write_text(OWN.replace("FACTOR", "1.001"))
    assert main(["fork", "base", "--runs", str(runs), "--at", "2", "--run", "n", "--surgery", "yours.py:tie_up"]) == 2
    assert "it says that the function stays, got a difference of" in capsys.readouterr().err
    assert not (runs / "n").exists()


MISTAKES = {
    "an unknown name": (["--surgery", "expert"], "Did you mean experts?"),
    "no such file": (["--surgery", "nowhere.py:f"], "no such file"),
    "nothing to do": (["--surgery", "vocabulary"], "expected a larger size of vocab"),
    "a size that shrinks": (["--set", "model.vocab=6", "--surgery", "vocabulary"], "at least the 7 that axis vocab"),
    "another surgery's": ([*EXPERTS, "--set", "model.vocab=9"], "--set changes more of the model"),
    "no surgery": (["--set", "model.vocab=9"], "portatrain fork ... --surgery NAME (docs/run/surgery.md)"),
    "experts of another size": ([*EXPERTS, "--set", "model.mlp=4"], "a dense mlp/gate of shape [2, 4]"),
    "no experts": (["--set", "model.mlp=4", "--surgery", "experts"], "expected a new model with a MixtureMLP"),
    "no LoRA": (["--surgery", "merge-lora"], "The run has no LoRA"),
    "no proof of nothing": (["--no-proof"], "expected --surgery NAME, which has a proof"),
    "another module": (["--set", "model=nowhere.at_all:Sizes", "--surgery", "experts"], "MODULE:CLASS"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_paragraph_and_writes_nothing(what: str, runs: Path, capsys: Any) -> None:
    words, said = MISTAKES[what]
    assert main(["fork", "base", "--runs", str(runs), "--at", "2", "--run", "new", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (runs / "new").exists()
