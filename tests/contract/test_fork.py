"""Forks and changes of a run: the same bits without a change, the float64 oracle with one, and what is recorded.

The recipe has 32 parameters (tests/support/tiny_fork.py), so the oracle trains it by finite differences.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.program import make_program
from portatrain.cli import launch_main, main
from portatrain.data import open_data
from portatrain.recipe import Recipe
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from portatrain.testing.parity import bound_of
from tests.support import tiny_fork
from tests.support.running import BACKENDS
from tests.support.tiny_oracle import Oracle

BACKEND = BACKENDS[-1]
AT = 6


def fork(runs: Path, parent: str, new: str, at: int, *words: str) -> RunDir:
    sets = [part for word in words for part in ("--set", word)]
    assert main(["fork", parent, "--runs", str(runs), "--at", str(at), "--run", new, *sets]) == 0
    return RunDir(runs / new)


def train(runs: Path, name: str, *words: str, file: str = "one.py", backend: str = BACKEND) -> int:
    recipe = next(folder / file for folder in runs.parents if (folder / file).exists())
    return main(["train", str(recipe), "--run-dir", str(runs / name), "--backend", backend, *words])


def resume(runs: Path, name: str, *words: str) -> int:
    return main(["resume", name, "--runs", str(runs), *words])


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.curve()}


def prints(run: RunDir, step: int) -> Any:
    with LocalStore(run.path / f"checkpoints/step-{step:08d}") as store:
        return Reader(store).meta["fingerprints"]["tensors"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: `run-NAME` of every backend is trained to its end, in 26 steps."""
    folder = tiny_fork.write(tmp_path_factory.mktemp("forks"))
    made = folder / "runs"
    for backend in BACKENDS:
        assert train(made, f"run-{backend}", backend=backend) == 0
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fork_without_a_change_has_the_bits_of_the_undisturbed_run(backend: str, runs: Path) -> None:
    parent = RunDir(runs / f"run-{backend}")
    before = sorted(p.name for p in parent.path.rglob("*"))
    made = fork(runs, f"run-{backend}", f"same-{backend}", AT)
    assert resume(runs, f"same-{backend}") == 0
    was, now = losses(parent), losses(made)
    assert sorted(now) == list(range(AT + 1, 27)) and now == {step: was[step] for step in now}
    assert prints(made, 26) == prints(parent, 26)
    (resumed,) = made.events("resumed")
    assert (resumed["verdict"], resumed["tensors"]) == ("continuous", "equal")
    assert sorted(p.name for p in parent.path.rglob("*")) == before  # the parent stays as it was


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one framework is installed")
def test_a_fork_over_a_move_has_the_bits_of_the_run_that_moved(runs: Path) -> None:
    """The run itself, moved at that step, is the undisturbed one."""
    first, second = BACKENDS
    moved = RunDir(runs / "moved")
    shutil.copytree(runs / f"run-{first}", moved.path)
    for step in range(AT + 2, 27, 2):
        shutil.rmtree(moved.path / f"checkpoints/step-{step:08d}")
    for name in ("DONE", "attempts"):
        path = moved.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train(runs, "moved", backend=second) == 0
    made = fork(runs, f"run-{first}", "moved-fork", AT)
    assert resume(runs, "moved-fork", "--backend", second) == 0
    assert losses(made) == losses(moved) and sorted(losses(made)) == list(range(AT + 1, 27))
    assert prints(made, 26) == prints(moved, 26)
    assert [e["verdict"] for e in made.events("resumed")] == ["continuous"]


# ---- the oracle


CHANGES = {
    "learning rate": ("one.py", ["optimizer.lr=0.2"]),
    "batch": ("one.py", ["batch=8", "accumulation=2"]),
    "context length": ("one.py", ["data.seq_len=10"]),
    "mixture": ("mixed.py", ["data.weights=(0.3,2.0)"]),
    "cool down": ("one.py", ["schedule=WSD", "schedule.decay=3", "steps=5"]),
}


@pytest.fixture(scope="module")
def forked(runs: Path) -> dict[str, list[float]]:
    """The losses of a run of four steps, for each recipe file."""
    for file in ("one.py", "mixed.py"):
        assert train(runs, f"short-{file[:-3]}", "--set", "steps=5", "--stop-at", "2", file=file) == 85
    return {}


@pytest.mark.parametrize("backend", [pytest.param(b, marks=() if b == BACKEND else pytest.mark.full) for b in BACKENDS])
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_fork_is_the_oracle_that_makes_the_same_change(
    what: str, backend: str, runs: Path, forked: Any
) -> None:
    file, words = CHANGES[what]
    name = f"{what.replace(' ', '-')}-{backend}"
    made = fork(runs, f"short-{file[:-3]}", name, 2, *words)
    assert resume(runs, name, "--backend", backend) == 0
    recipe = made.recipe()
    old = Recipe.from_json(made.run_info()["parent"]["recipe"])
    mine = Oracle(old)
    wanted = [mine.step(old, open_data(old.data, seed=0).train, step) for step in (1, 2)]
    split, given = open_data(recipe.data, seed=0).train, []
    same = Oracle(old)
    for step in (1, 2):
        same.step(old, open_data(old.data, seed=0).train, step)
    for step in (3, 4, 5):
        rows = split.batch(mine.next, recipe.batch)
        given.append(recipe.microbatches(rows))
        wanted.append(mine.step(recipe, split, step))
    bound = bound_of(recipe, given)
    found = {**losses(RunDir(runs / f"short-{file[:-3]}")), **losses(made)}
    assert [row["step"] for row in made.curve()] == [3, 4, 5]
    for step, loss in enumerate(wanted, start=1):
        assert abs(found[step] - loss) <= bound * abs(loss), (step, found[step], loss, bound)
    # Without the change the losses are others, so the comparison can fail.
    other = [same.step(old, open_data(old.data, seed=0).train, step) for step in (3, 4, 5)]
    assert max(abs(a - b) for a, b in zip(other, wanted[2:], strict=True)) > 100 * bound
    (measured,) = made.events("change_measured") or [None]
    if what != "cool down":  # its past is as it was, which is proved and not measured
        assert measured["before"]["loss"] and measured["after"]["update_norm"]
        assert [e["verdict"] for e in made.events("resumed")] == ["changed"]


# ---- a change of the run itself


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A folder of runs with a copy of the finished run, as `a`."""
    made = runs.parent / tmp_path.name / "runs"
    shutil.copytree(runs / f"run-{BACKEND}", made / "a")
    return made


def test_a_finished_run_goes_on_with_more_steps(copied: Path, capsys: Any) -> None:
    """Its schedule has the past values that it had, which is proved; the whole check is made under the old recipe."""
    run = RunDir(copied / "a")
    was = losses(run)
    assert train(copied, "a", "--set", "steps=30") == 0
    now = losses(run)
    assert sorted(now) == list(range(1, 31)) and {s: now[s] for s in was} == was
    (change,) = run.events("recipe_changed")
    assert change["step"] == 26 and change["fields"] == {"steps": [26, 30]}
    (resumed,) = run.events("resumed")
    assert (resumed["verdict"], resumed["tensors"]) == ("continuous", "equal") and not run.events("change_measured")
    assert run.is_done and run.recipe().steps == 30 and read_history(run).steps == 30
    # The first words go on to mean this run, and a second change follows the first.
    assert train(copied, "a") == 2 and "finished" in capsys.readouterr().err
    assert resume(copied, "a", "--set", "steps=32", "--set", "eval_every=5") == 0
    assert "the past stays as it was" in capsys.readouterr().out
    assert [e["fields"] for e in run.events("recipe_changed")][1] == {"steps": [30, 32], "eval_every": [None, 5]}
    assert run.is_done and len(run.curve()) == 32


def test_the_run_that_goes_on_is_the_longer_run(runs: Path, copied: Path) -> None:
    assert train(copied, "long", "--set", "steps=30") == 0
    assert train(copied, "a", "--set", "steps=30") == 0
    assert losses(RunDir(copied / "a")) == losses(RunDir(copied / "long"))


def test_a_change_of_the_trajectory_needs_a_reason_and_is_measured(copied: Path, capsys: Any) -> None:
    run = RunDir(copied / "a")
    for words in (["steps=40", "optimizer.lr=0.1"], ["steps=40", "schedule=Cosine"]):
        sets = [part for word in words for part in ("--set", word)]
        assert resume(copied, "a", *sets) == 2
        said = capsys.readouterr().err
        assert "expected a reason, since this change affects all later steps" in said and said.count("\n") == 1
        assert train(copied, "a", *sets) == 2
        said = capsys.readouterr().err
        assert "portatrain resume a --set" in said and "portatrain fork a" in said and said.count("\n") == 1
    assert not (run.path / "changes.json").exists() and run.is_done  # nothing was changed
    assert resume(copied, "a", "--set", "steps=28", "--set", "optimizer.lr=0.1", "--reason", "too slow") == 0
    (change,) = run.events("recipe_changed")
    assert change["fields"] == {"steps": [26, 28], "optimizer.lr": [0.05, 0.1]} and change["why"] == "too slow"
    (resumed,), (measured,) = run.events("resumed"), run.events("change_measured")
    assert (resumed["verdict"], resumed["tensors"], resumed["differs"]) == ("changed", "equal", [])
    assert measured["before"]["loss"] == measured["after"]["loss"] and measured["state"]["optimizer"] == "kept"
    assert [row["lr"] for row in run.curve()][-3:] == [0.05, 0.1, 0.1]
    assert len(run.curve()) == 28 and run.is_done
    page = Path(copied / "a.html")
    assert main(["report", str(run.path), "--out", str(page)]) == 0
    assert "too slow" in page.read_text() and "What the change alone did" in page.read_text()


def test_what_the_change_alone_did_is_what_the_rule_says(runs: Path) -> None:
    """Twice the learning rate makes every update twice as large, and leaves losses and gradients as they are."""
    made = fork(runs, f"run-{BACKEND}", "twice", AT, "optimizer.lr=0.1")
    assert resume(runs, "twice") == 0
    (measured,) = made.events("change_measured")
    before, after = measured["before"], measured["after"]
    assert (before["loss"], before["grad_norm"]) == (after["loss"], after["grad_norm"])
    assert after["update_norm"] == pytest.approx(2 * before["update_norm"], rel=1e-6)  # 16 roundings of float32
    assert measured["largest"]["update"][0] == pytest.approx(1.0, rel=1e-6)


def test_an_attempt_that_dies_before_its_first_save_meets_the_change_again(copied: Path) -> None:
    run = RunDir(copied / "a")
    words = ["--set", "steps=40", "--set", "optimizer.lr=0.1", "--set", "checkpoint_every=none"]
    assert resume(copied, "a", *words, "--reason", "x", "--dry-run") == 0
    assert not (run.path / "changes.json").exists()
    assert resume(copied, "a", *words, "--reason", "x") == 0
    whole = losses(run)
    shutil.rmtree(run.path / "checkpoints/step-00000040")
    (run.path / "DONE").unlink()
    for path in run.path.glob("attempts/2/events.jsonl"):  # the commit that was lost is not in the record either
        path.write_text("".join(line for line in path.read_text().splitlines(True) if '"step":40' not in line))
    assert train(copied, "a") == 0
    assert losses(run) == whole
    assert [e["verdict"] for e in run.events("resumed")] == ["changed", "changed"]
    assert len(run.events("recipe_changed")) == 1


def test_a_change_whose_checkpoint_is_gone_is_refused(copied: Path, capsys: Any) -> None:
    run = RunDir(copied / "a")
    assert (
        resume(copied, "a", "--set", "steps=40", "--set", "clip_norm=0.1", "--reason", "x", "--mesh", "nonsense") == 2
    )
    assert not (run.path / "changes.json").exists()
    assert resume(copied, "a", "--set", "steps=28", "--set", "clip_norm=0.1", "--reason", "x") == 0
    for step in (26, 28):
        shutil.rmtree(run.path / f"checkpoints/step-{step:08d}")
    capsys.readouterr()
    (run.path / "DONE").unlink()
    assert train(copied, "a", "--accept-drift", "lost") == 2
    assert "the checkpoint of step 26, from which on the run was changed" in capsys.readouterr().err


# ---- the optimizer, and other state


def left(run: RunDir, step: int) -> tuple[dict[str, np.ndarray], Any]:
    with LocalStore(run.path / f"checkpoints/step-{step:08d}") as store:
        reader = Reader(store)
        return {t.name: reader.read(t.name) for t in reader.layout.tensors}, dict(reader.meta)


OPTIMIZERS = {
    "kept": (["optimizer.b2=0.9"], {"m": 1.0, "v": 1.0}, AT),
    "mapped": (["optimizer=Lion", "optimizer.lr=0.01"], {"m": 1.0}, AT),
    # SGD adds up what Adam averages: m' = 0.75 m + g settles at g / (1 - 0.75).
    "mapped, scaled": (["optimizer=SGD", "optimizer.momentum=0.75", "optimizer.lr=0.01"], {"m": 4.0}, AT),
    "fresh": (["optimizer=Adafactor", "optimizer.lr=0.01"], {}, 0),
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_slots_are_kept_mapped_or_fresh(rule: str, runs: Path) -> None:
    from portatrain.backends.base import backend_class
    from portatrain.checkpoint.carry import carry
    from portatrain.checkpoint.restore import restored
    from tests.support.running import everything

    words, factors, count = OPTIMIZERS[rule]
    made = fork(runs, f"run-{BACKEND}", rule.replace(", ", "-"), AT, *words)
    was, _ = left(made, AT)
    backend = backend_class(BACKEND)(make_program(made.recipe()))
    with LocalStore(made.path / f"checkpoints/step-{AT:08d}") as store:
        reader = Reader(store)
        carried = carry(reader, backend.program, Recipe.from_json(made.run_info()["parent"]["recipe"]))
        now = everything(backend, restored(backend, reader, carried=carried))
    assert carried.optimizer == rule.partition(",")[0]
    for name, value in now.items():
        role, _, rest = name.partition("/")
        if role in ("params", "ema"):
            assert np.array_equal(value, was[name])
        elif name == "opt/count":
            assert value == count
        else:
            slot = rest.partition("/")[0]
            wanted = np.float32(factors[slot]) * was[name] if slot in factors else np.zeros_like(value)
            assert np.array_equal(value, wanted), name


OTHERS = {
    "lora": ["lora=LoRA", "lora.rank=1"],
    "frozen": ["frozen=('table',)"],
    "no average": ["ema_decay=none"],
    "seed": ["seed=3"],
    "precision": ["precision=bf16-state"],
    "dropout": ["model.rate=0.5"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_changes_go_on_from_the_state(what: str, runs: Path) -> None:
    made = fork(runs, f"run-{BACKEND}", what.replace(" ", "-"), 24, *OTHERS[what])
    assert resume(runs, what.replace(" ", "-")) == 0
    (resumed,) = made.events("resumed")
    assert (resumed["verdict"], resumed["tensors"], resumed["differs"]) == ("changed", "equal", [])
    (measured,) = made.events("change_measured")
    # Factors of LoRA start at a product of zero; only bfloat16 changes what the model computes without dropout.
    same = measured["before"]["loss"] == pytest.approx(measured["after"]["loss"], rel=1e-6)
    assert same == (what not in ("precision", "seed"))  # another seed draws other samples
    assert made.is_done and sorted(losses(made)) == [25, 26]


# ---- trees of forks, and mistakes


def test_a_fork_of_a_fork_is_preempted_resumed_and_drawn(runs: Path, capsys: Any) -> None:
    fork(runs, f"run-{BACKEND}", "child", 4, "optimizer.lr=0.02", "batch=8")
    assert train(runs, "child", "--stop-at", "8") == 85
    grandchild = fork(runs, "child", "grandchild", 8, "clip_norm=0.5")
    assert train(runs, "grandchild", "--stop-at", "11") == 85
    assert launch_main(["resume", "grandchild", "--runs", str(runs)]) == 0
    assert [e["verdict"] for e in grandchild.events("resumed")] == ["changed", "continuous"]
    assert sorted(losses(grandchild)) == list(range(9, 27)) and grandchild.is_done
    # Samples go on from 4 steps of 4: the tokens say so.
    assert grandchild.curve()[-1]["tokens"] == (4 * 4 + 22 * 8) * 6
    capsys.readouterr()
    assert launch_main(["list", "--runs", str(runs), "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["grandchild"]["parent"]["run"] == "child" and rows["grandchild"]["parent"]["step"] == 8
    order = [name for name in rows if name in (f"run-{BACKEND}", "child", "grandchild")]
    assert order == [f"run-{BACKEND}", "child", "grandchild"]
    assert launch_main(["list", "--runs", str(runs)]) == 0
    assert "└ grandchild (from step 8 of child)" in capsys.readouterr().out
    page = runs.parent / "page.html"
    assert main(["report", str(grandchild.path), "--out", str(page)]) == 0
    assert "<b>grandchild</b> from step 8" in page.read_text() and "child from step 4" in page.read_text()


MISTAKES = {
    "a step that is not there": (["--at", "7", "--run", "new"], "Those of step 2, 4, 6, 8"),
    "a run that exists": (["--at", "6", "--run", f"run-{BACKEND}"], "a folder that exists, with"),
    "a shape": (["--at", "6", "--run", "new", "--set", "model.embed=3"], r"table ([7, 2] before, [7, 3] now)"),
    "an unknown field": (["--at", "6", "--run", "new", "--set", "optimizer.rate=3"], "field 'rate' of AdamW"),
    "a value": (["--at", "6", "--run", "new", "--set", "optimizer.lr=fast"], "expected a number"),
    "a pattern": (["--at", "6", "--run", "new", "--set", "frozen=('tabel',)"], "got 'tabel', which matches none"),
    "nothing left": (["--at", "26", "--run", "new"], "nothing left to train"),
    "the origin": (["--at", "6", "--run", "new", "--set", "origin=none"], "one that portatrain sets"),
    "a name": (["--at", "6", "--run", "../new"], "1 to 63 letters"),
    "no change": (["--at", "6", "--run", "new", "--set", "batch=4"], "the values that it has"),
    "fewer steps": (["--at", "6", "--run", "new", "--set", "steps=4"], "at least the 6 steps"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_ends_in_one_paragraph_and_writes_nothing(what: str, runs: Path, capsys: Any) -> None:
    words, said = MISTAKES[what]
    assert main(["fork", f"run-{BACKEND}", "--runs", str(runs), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (runs / "new").exists()


def test_a_step_that_retention_removed_is_told_with_those_that_are_kept(runs: Path, capsys: Any) -> None:
    assert train(runs, "few", "--set", "checkpoint_keep=1", "--set", "steps=8", "--set", "checkpoint_keep_every=4") == 0
    assert main(["fork", "few", "--runs", str(runs), "--at", "6", "--run", "new"]) == 2
    assert "Those of step 4, 8 are there. checkpoint_keep_every" in capsys.readouterr().err


def test_other_data_only_by_a_fork(runs: Path, copied: Path, capsys: Any) -> None:
    other = f"data.paths={runs.parent / 'b.bin'}"
    assert resume(copied, "a", "--set", other, "--set", "steps=30", "--reason", "x") == 2
    assert "portatrain fork a --at 26" in capsys.readouterr().err
    made = fork(runs, f"run-{BACKEND}", "other-data", 24, other)
    assert resume(runs, "other-data") == 0
    assert [e["verdict"] for e in made.events("resumed")] == ["changed"]


def test_json_and_dry_run(runs: Path, capsys: Any) -> None:
    words = ["fork", f"run-{BACKEND}", "--runs", str(runs), "--at", "6", "--run", "new", "--set", "optimizer.lr=0.1"]
    assert main([*words, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] is False and found["parent"]["fields"] == {"optimizer.lr": [0.05, 0.1]}
    assert not (runs / "new").exists()


def test_half_a_fork_is_no_run(runs: Path, capsys: Any) -> None:
    """A fork that was killed while it copied has a record without a checkpoint: no attempt takes it for a new run."""
    made = fork(runs, f"run-{BACKEND}", "half", AT)
    (made.path / f"checkpoints/step-{AT:08d}/COMMIT").unlink()
    assert resume(runs, "half") == 2
    assert "the import did not end" in capsys.readouterr().err
