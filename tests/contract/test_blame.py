"""Blame names every poisoned document, and the branch without its samples is the run that never saw them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class
from portatrain.backends.program import make_program
from portatrain.backends.state import full_name
from portatrain.cli import main
from portatrain.data import open_data
from portatrain.data.in_sample import parts_of
from portatrain.recipe import load_recipe
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import FOUND, OK
from portatrain.testing.parity import bound_of
from portatrain.training.blame.run import blame
from portatrain.training.open_data import data_of
from tests.support import poisoned, spiky
from tests.support.running import BACKENDS

BACKEND = BACKENDS[-1]
MOST = 20
"""Tokens of a document in a sample that make it most of the sample."""


def trained(folder: Path, name: str, *words: str, backend: str = BACKEND) -> RunDir:
    given = ["train", str(folder / "recipe.py"), "--run-dir", str(folder / "runs" / name), "--backend", backend]
    assert main([*given, *words]) == OK
    return RunDir(folder / "runs" / name)


def blamed(runs: Path, *words: str) -> int:
    return main(["blame", *words, "--runs", str(runs)])


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.curve()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every backend on poisoned texts."""
    made = poisoned.write(tmp_path_factory.mktemp("poisoned"))
    for backend in BACKENDS:
        trained(made, f"run-{backend}", backend=backend)
    return made


# ---- who is to blame


def check_named(run: RunDir, first: int, last: int) -> int:
    """Every sample that is mostly of a poisoned document is to blame and is named by it, and no clean one is; return
    how many are to blame."""
    verdict, recipe = blame(run, first, last, most=99)
    data = data_of(recipe, recipe.describe(), run.data())
    there = parts_of(recipe.data, data, [one.sample.number for one in verdict.judged])
    assert len(verdict.judged) == (last - first + 1) * recipe.batch and not verdict.notes
    for step in verdict.steps:
        assert sum(one.share or 0.0 for one in step.samples) == pytest.approx(1, abs=1e-4)
    out = 0
    for one in verdict.judged:
        poison = [p for p in there[one.sample.number] if _poisoned(p)]
        if any(p.tokens is None or len(p.tokens) >= MOST for p in poison):
            out += 1
            assert one in verdict.blamed, (one.sample, poison)
            assert one.documents[0].part.name == poison[0].name
        elif not poison:
            assert one not in verdict.blamed, (one.sample, one.parts)
    return out


def _poisoned(part: Any) -> bool:
    if part.tokens is None:
        return part.document in (*poisoned.WRONG_LABELS, *poisoned.SPOILT)
    assert part.file is not None, part.why
    return Path(part.file).stem in poisoned.POISON


def test_poisoned_documents_are_named(folder: Path) -> None:
    assert check_named(RunDir(folder / f"runs/run-{BACKEND}"), 44, 47) >= 8


@pytest.mark.full
@pytest.mark.parametrize("kind", ["packed", "mixture", "images", "texts"])
def test_poisoned_documents_are_named_in_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    poisoned.write(tmp_path, "texts")
    if kind == "packed":
        assert main(["data", "pack", str(tmp_path / "recipe.py"), str(tmp_path / "store")]) == OK
    made = poisoned.write(tmp_path / "made", kind)
    if kind == "packed":
        shutil.move(tmp_path / "store", made / "store")
    run = trained(made, "run", backend=BACKENDS[0])
    first = 31 if kind == "mixture" else 21  # letters are no surprise before: it has seen half the texts
    assert check_named(run, first, 60) >= 8
    if kind != "images":
        verdict, _ = blame(run, first, 60, most=99)
        named = {Path(part.file or "").stem for part, _, _ in verdict.documents()}
        assert named == set(poisoned.POISON)


def test_the_command_says_it(folder: Path, capsys: pytest.CaptureFixture[str], unchanged: Callable) -> None:
    run = folder / "runs" / f"run-{BACKEND}"
    unchanged(run)
    assert blamed(run.parent, run.name, "--step", "54") == FOUND
    out = capsys.readouterr().out
    assert "garbage.txt (document " in out and "\\x" in out and out.isascii()
    assert "sample 430 is to blame, with 17 % of the gradient of step 54, from garbage.txt; " in out
    assert f"portatrain blame {run.name} --without 430 --run NEW" in out

    assert blamed(run.parent, run.name, "--steps", "53:54", "--json") == FOUND
    found = json.loads(capsys.readouterr().out)["blame"]
    assert found["blamed"] == [430] and found["without"] == ["430"] and len(found["samples"]) == 16
    (row,) = [row for row in found["samples"] if row["blamed"]]
    assert row["loss_deviations"] > 40 and row["why"].startswith("a loss 4") and row["parts"][0]["tokens"] == 32
    assert {layer["name"] for layer in found["layers"]} == {"table", "mix", "out"}

    assert blamed(run.parent, run.name, "--step", "50") == OK
    assert "no sample stands out: the farthest is sample " in capsys.readouterr().out
    assert blamed(run.parent, run.name, "--step", "50", "--width", "0.5") == FOUND


def test_a_step_that_was_skipped_changes_nothing_in_the_replay(tmp_path: Path) -> None:
    """The replay passes over the spike, and its samples are named by their index."""
    recipe = spiky.recipe((50,), name="spiky", checkpoint_every=None)
    from portatrain.training.trainer import train

    run = RunDir(tmp_path / "spiky")
    assert train(recipe, run, backend=BACKEND) == OK
    skipped = [row["step"] for row in run.curve() if row.get("skipped")]
    assert len(skipped) == 1
    verdict, _ = blame(run, skipped[0], spiky.STEPS, most=99)
    assert verdict.notes == []  # every loss of the replay is the recorded one
    (one,) = verdict.blamed
    assert one.sample.step == skipped[0] and one.parts[0].document == 50
    assert [part.name for part, _, _ in verdict.documents()] == ["sample 50 of Points"]


# ---- the branch


def clean(run: RunDir, at: int, left_out: Sequence[int], backend: str) -> tuple[list[float], dict[str, Any], list]:
    """Train on from a checkpoint without some samples, step by step, with batches put together sample by sample."""
    recipe = run.recipe()
    split = open_data(recipe.data, seed=recipe.seed).train
    numbers = [n for n in range(2 * recipe.steps * recipe.batch) if n not in left_out]
    made = backend_class(backend)(make_program(recipe))
    with LocalStore(run.path / f"checkpoints/step-{at:08d}") as store:
        reader = Reader(store)

        def read(role: str, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            return np.asarray(reader.read(full_name(role, name)))[box]

        state = made.restore_state(read)
    found, given = [], []
    for step in range(at + 1, recipe.steps + 1):
        rows = [split.batch(n, 1) for n in numbers[(step - 1) * recipe.batch : step * recipe.batch]]
        given.append(recipe.microbatches({k: np.concatenate([row[k] for row in rows]) for k in rows[0]}))
        state, result = made.step(state, given[-1], step=step, scale=recipe.lr_scale(step))
        found.append(float(result.loss))
    return found, {b.name: b.fetch() for b in made.local_boxes(state) if b.role == "params"}, given


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_branch_is_the_run_that_never_saw_them(
    backend: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(folder / f"runs/run-{backend}")
    words = ["--without", "352:354", "--without", "357:360", "--without", "430"]
    assert blamed(run.path.parent, run.path.name, *words, "--run", f"clean-{backend}") == OK
    assert "step 45 trains on the first of samples 352:354,357:360,430; the nearest" in capsys.readouterr().out
    branch, out = RunDir(run.path.parent / f"clean-{backend}"), {352, 353, 357, 358, 359, 430}
    now = losses(branch)
    assert sorted(now) == list(range(41, 61)) and branch.recipe().leave_out == ("352:354", "357:360", "430")
    wanted, params, given = clean(run, 40, sorted(out), backend)
    assert [now[step] for step in sorted(now)] == wanted  # bit for bit
    with LocalStore(branch.path / "checkpoints/step-00000060") as store:
        reader = Reader(store)
        for name, value in params.items():
            np.testing.assert_array_equal(
                reader.read(f"params/{name}"), value.reshape(reader.read(f"params/{name}").shape)
            )
    was = losses(run)
    assert [step for step in now if now[step] != was[step]] == list(range(45, 61))  # the same up to the first of them
    (resumed,) = branch.events("resumed")
    assert (resumed["verdict"], resumed["tensors"]) == ("changed", "equal")
    assert branch.run_info()["parent"]["reason"] == "without samples 352:354, 357:360, 430"
    for other in BACKENDS:
        if other != backend:
            theirs, _, _ = clean(run, 40, sorted(out), other)
            bound = bound_of(branch.recipe(), given)
            apart = max(abs(a - b) / abs(a) for a, b in zip(wanted, theirs, strict=True))
            moved = max(abs(was[step] - now[step]) / was[step] for step in now)
            assert apart <= bound * len(given) ** 0.5 < moved / 10


def test_a_fresh_run_without_them_is_the_branch(folder: Path) -> None:
    """The run that never saw the samples, trained from its first step, has the same curve to the last bit."""
    branch = RunDir(folder / f"runs/clean-{BACKEND}")
    if not branch.path.exists():
        pytest.skip("the branch is made by another test, which was not chosen")
    fresh = trained(folder, "fresh", "--set", "leave_out=352:354,357:360,430")
    mine, theirs = losses(fresh), losses(branch)
    assert {step: mine[step] for step in theirs} == theirs
    verdict, _ = blame(branch, 54, 55, most=99)  # its numbers are those of the whole sequence
    assert not {352, 358, 430} & {one.sample.number for one in verdict.judged} and not verdict.notes


def test_a_branch_of_a_branch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = folder / "runs"
    words = ["--without", "466", "--no-train", "--json"]
    assert blamed(runs, f"run-{BACKEND}", "--without", "430", "--run", "one", "--no-train") == OK
    assert main(["resume", "one", "--runs", str(runs)]) == OK
    capsys.readouterr()
    assert blamed(runs, "one", *words, "--run", "two") == OK
    branch = json.loads(capsys.readouterr().out)["branch"]
    assert (branch["leave_out"], branch["at"], branch["trained"]) == ("430,466", 55, False)
    assert RunDir(runs / "two").recipe().leave_out == ("430", "466") and not RunDir(runs / "two").curve()
    assert blamed(runs, "one", "--without", "466", "--run", "three", "--dry-run") == OK
    assert not (runs / "three").exists()


# ---- what is refused


def test_mistakes_end_in_one_paragraph(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs, name = folder / "runs", f"run-{BACKEND}"

    def said(*words: str, where: Path = runs) -> str:
        capsys.readouterr()
        assert blamed(where, *words) == 2
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err.splitlines()[-1]

    assert "expected a step to replay, or samples to leave out" in said(name)
    assert "--without alone" in said(name, "--without", "3") and "--run alone" in said(
        name, "--step", "3", "--run", "n"
    )
    assert "a step that the run has trained, got steps 1 to 60" in said(name, "--step", "61")
    assert "Steps count from 1" in said(name, "--step", "0")
    assert "the first of them not after the last" in said(name, "--steps", "5:3")
    assert "N1:N2 for samples N1 to N2 - 1" in said(name, "--without", "7:3", "--run", "new")
    assert "up to 479" in said(name, "--without", "480", "--run", "new")
    assert "a number of deviations above 0" in said(name, "--step", "3", "--width", "0")
    assert "Choose another --run" in said(name, "--without", "400", "--run", name)
    early = said(name, "--without", "3", "--run", "new")
    assert "a commit before step 1" in early and "--set leave_out=3" in early

    gone = tmp_path / "gone"
    shutil.copytree(runs / name, gone)
    for step in range(5, 50, 5):
        shutil.rmtree(gone / f"checkpoints/step-{step:08d}")
    message = said("gone", "--step", "48", "--replay", "10", where=tmp_path)
    assert "step 0, the initial weights as the nearest (commits: 50, 55, 60)" in message and "--replay 48" in message

    assert main(["fork", name, "--runs", str(runs), "--at", "50", "--run", "child"]) == OK
    assert "no step yet" in said("child", "--step", "40")
    assert main(["resume", "child", "--runs", str(runs)]) == OK
    assert f"those of its parent: portatrain blame {name}" in said("child", "--step", "40")
    assert f"Step 46 is one of its parent: portatrain blame {name}" in said("child", "--without", "360", "--run", "x")


def test_samples_that_were_trained_on_cannot_be_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fork", f"run-{BACKEND}", "--runs", str(folder / "runs"), "--at", "50", "--run", "late"]
    assert main([*words, "--set", "leave_out=399,420"]) == 2
    err = capsys.readouterr().err
    assert "expected samples from 400 on" in err and "Fork the run at a checkpoint before" in err


def test_a_run_of_another_machine_is_noted(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(folder / "runs" / f"run-{BACKEND}", odd)
    rows = odd / "attempts/1/metrics.jsonl"
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[51]["loss"] *= 1.001
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    about = json.loads((odd / "attempts/1/attempt.json").read_text())
    (odd / "attempts/1/attempt.json").write_text(json.dumps({**about, "backend": "deepspeed-2", "mesh": "fsdp=2"}))
    load_recipe(str(folder / "recipe.py"))
    verdict, _ = blame(RunDir(odd), 52, 52, most=99)
    notes = " ".join(verdict.notes)
    assert "trained on deepspeed-2; it is replayed on torch" in notes and "one device and not on fsdp=2" in notes
    assert "step 52: the run recorded the loss" in notes


def test_a_run_that_was_changed_is_replayed_as_it_was(folder: Path) -> None:
    """From the commit of the change on, its slots are mapped, and the batch is another one."""
    runs, sets = folder / "runs", ["optimizer=Lion", "optimizer.lr=1e-3", "batch=4", "accumulation=1", "steps=70"]
    given = [part for word in sets for part in ("--set", word)]
    assert main(["fork", f"run-{BACKEND}", "--runs", str(runs), "--at", "50", "--run", "lion", *given]) == OK
    assert main(["resume", "lion", "--runs", str(runs)]) == OK
    verdict, _ = blame(RunDir(runs / "lion"), 58, 60, most=99)
    assert verdict.notes == [] and [one.sample.number for one in verdict.judged if one.sample.step == 58]
    assert {one.sample.number for one in verdict.judged} == set(range(428, 440))
    assert 430 in [one.sample.number for one in verdict.blamed]
