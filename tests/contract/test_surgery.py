"""Surgery in forks: the curve after it beside the float64 oracle that does the same, the record, and mistakes.

The recipe has a few dozen parameters (tests/support/tiny_experts.py), so the oracle trains it by finite differences.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portatrain
from checkpoints_format import LocalStore, Reader
from portatrain.backends.state import initial_box
from portatrain.cli import main
from portatrain.data import open_data
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.testing.parity import bound_of
from tests.support import tiny_experts, tiny_fork
from tests.support.running import BACKENDS
from tests.support.tiny_oracle import Oracle

AT, STEPS = 2, 7
EXPERTS = ["--set", "model.experts=2", "--surgery", "experts"]
VOCABULARY = ["--set", "model.vocab=10", "--surgery", "vocabulary"]


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


# ---- the curve after it


Arrays = dict[str, np.ndarray]


def with_experts(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    found = {name: array for name, array in arrays.items() if not name.startswith("mlp/")}
    for part in ("gate", "up", "down"):
        found[f"mlp/experts/{part}"] = np.stack([arrays[f"mlp/{part}"]] * 2) / 2.0**degree
    return {**found, "mlp/router/weight": start["mlp/router/weight"] * (degree == 0)}


def with_ids(arrays: Arrays, start: Arrays, degree: int) -> Arrays:
    def rows(table: np.ndarray) -> np.ndarray:
        return np.concatenate([table, np.tile(table.mean(0) * (degree == 0), (3, 1))])

    return {name: rows(array) if name in ("table", "out") else array for name, array in arrays.items()}


def operated(was: Oracle, recipe: Recipe, rule: Callable[[Arrays, Arrays, int], Arrays]) -> Oracle:
    """The oracle's own surgery, on its parameters and on the slots of AdamW."""
    made = Oracle(recipe)
    start = {n: initial_box(t, recipe.seed, (0,) * len(t.shape), t.shape) for n, t in made.infos.items()}
    parts = {slot: {n: held[slot] for n, held in was.slots.items()} for slot in ("m", "v")}
    made.params = rule(was.params, start, 0)
    moved = {slot: rule(parts[slot], start, degree) for slot, degree in (("m", 1), ("v", 2))}
    made.slots = {n: {slot: moved[slot][n] for slot in moved} for n in made.params}
    made.count, made.next = was.count, was.next
    return made


SURGERIES = {"experts": (EXPERTS, with_experts), "vocabulary": (VOCABULARY, with_ids)}


@pytest.mark.parametrize("what", [pytest.param("experts", marks=pytest.mark.full), "vocabulary"])
def test_the_curve_after_surgery_is_that_of_the_oracle(what: str, runs: Path) -> None:
    """Five steps on each backend, from one checkpoint, beside the oracle that operates on its own state."""
    words, rule = SURGERIES[what]
    old = RunDir(runs / "base").recipe()
    split, mine = open_data(old.data, seed=0).train, Oracle(old)
    for step in range(1, AT + 1):
        mine.step(old, split, step)
    wanted: list[float] = []
    for backend in BACKENDS:
        made = fork(runs, "base", f"{what}-{backend}", *words)
        assert resume(runs, made.path.name, "--backend", backend) == 0
        recipe = made.recipe()
        if not wanted:
            after = operated(mine, recipe, rule)
            given = [recipe.microbatches(split.batch(at * recipe.batch, recipe.batch)) for at in range(AT, STEPS)]
            wanted = [after.step(recipe, split, step) for step in range(AT + 1, STEPS + 1)]
            bound = bound_of(recipe, given)
        rows = made.curve()
        assert [row["step"] for row in rows] == list(range(AT + 1, STEPS + 1))
        for row, loss in zip(rows, wanted, strict=True):
            assert abs(row["loss"] - loss) <= bound * abs(loss), (backend, row["step"], row["loss"], loss, bound)
        (resumed,) = made.events("resumed")
        assert (resumed["verdict"], resumed["tensors"], resumed["differs"]) == ("changed", "equal", [])
    # With slots that begin at zero the second loss is another, so the comparison can fail.
    other = operated(mine, recipe, rule)
    for held in other.slots.values():
        for slot in held:
            held[slot] = held[slot] * 0.0
    other.step(recipe, split, AT + 1)
    assert abs(other.loss(recipe, split, AT + 2) - wanted[1]) > 100 * bound


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
    assert (recipe.model.experts, recipe.model.vocab, recipe.clip_norm) == (2, 10, 0.5)
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
}  # fmt: skip


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_paragraph_and_writes_nothing(what: str, runs: Path, capsys: Any) -> None:
    words, said = MISTAKES[what]
    assert main(["fork", "base", "--runs", str(runs), "--at", "2", "--run", "new", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (runs / "new").exists()
