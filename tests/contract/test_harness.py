"""Tasks of lm-evaluation-harness on a trained model: scores of the oracle, and the numbers of its export."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import portatrain
from portatrain.backends import reference
from portatrain.cli import main
from portatrain.data import TokenMemmap
from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from portatrain.runs.tasks import TaskResult, record, results
from portatrain.testing.tolerance import amplification, tolerance
from portatrain.training import harness
from portatrain.training.trainer import train
from tests.support import harness_tasks
from tests.support.running import BACKENDS, everything

BACKEND = BACKENDS[-1]
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("sums")
    made = harness_tasks.recipe(at, harness_tasks.tokenizer(at, adds=True), steps=12)
    assert train(made, RunDir(at / "run"), backend=BACKEND) == 0
    return at


def scorer(model: Any, *, rows: int = 8, max_length: int | None = None, opened: bool | None = None) -> Any:
    return harness._Scorer(model, rows, max_length, opened, lambda kind, done, total: None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_those_of_the_oracle(backend: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = portatrain.load(trained / "run", backend=backend)
    made = scorer(model, rows=3, max_length=20)
    rng = np.random.default_rng(0)
    pairs = [
        ([0, *rng.integers(1, 264, n).tolist()], rng.integers(1, 264, c).tolist())
        for n, c in ((4, 3), (1, 1), (30, 2), (2, 20), (0, 5), (9, 9), (40, 20), (7, 3))
    ]
    predicted = model.predict(harness.batch_of(np.array([pairs[0][0]], np.int32)))
    pairs.append((pairs[0][0], [int(predicted[0, -1].argmax())]))  # a greedy one
    found = made.scores(pairs)
    assert found[-1][1] and not all(greedy for _, greedy in found)
    named = {n.removeprefix("params/"): a for n, a in everything(model._backend, model._state).items()}
    params = {name: named[name].astype(np.float64) for name in model._backend.definition.params}
    for (context, rest), (got, greedy) in zip(pairs, found, strict=True):
        ids = (context + rest)[-21:]  # the longest text is 20 tokens, and the last one is only predicted
        batch = harness.batch_of(np.array([ids[:-1]], np.int32))

        def total(*arrays: np.ndarray, batch: dict = batch, rest: list = rest) -> np.ndarray:
            given = dict(zip(params, arrays, strict=True))
            logits = reference.forward(model._backend.definition, given, batch, method="predict").value[0, -len(rest) :]
            sums = np.log(np.exp(logits).sum(axis=-1))
            return np.array((logits[np.arange(len(rest)), rest] - sums).sum())

        exact = total(*params.values())
        moves = amplification(total, list(params.values()), exact, rng)
        assert abs(got - float(exact)) <= tolerance(abs(float(exact)), moves)
        logits = reference.forward(model._backend.definition, params, batch, method="predict").value[0, -len(rest) :]
        assert greedy == bool((logits.argmax(axis=-1) == rest).all())
    monkeypatch.setattr(harness, "LOGITS_BYTES", 1)  # one row at a time
    again = made.scores(pairs)
    assert [greedy for _, greedy in again] == [greedy for _, greedy in found]
    assert [score for score, _ in again] == pytest.approx([score for score, _ in found], rel=1e-5)
    for context, rest in (([0], []), ([], [3]), ([0], [1] * 21)):
        with pytest.raises(UserError, match="a continuation of the task: expected from 1 to 20 tokens"):
            made.scores([(context, rest)])


def test_how_a_text_is_encoded(trained: Path, tmp_path: Path) -> None:
    adds = scorer(portatrain.load(trained / "run", backend=BACKEND))
    plain = adds.encoding(b"3 and 4", "text").tolist()
    assert adds.ids("3 and 4", None) == adds.ids("3 and 4", True) == [0, *plain]
    assert adds.ids("3 and 4", False) == plain
    assert adds.ids("<s>3 and 4", None) == [0, *plain]  # and not twice
    silent = harness_tasks.recipe(tmp_path, harness_tasks.tokenizer(tmp_path, adds=False), steps=2)
    assert train(silent, RunDir(tmp_path / "run"), backend=BACKEND) == 0
    model = portatrain.load(tmp_path / "run", backend=BACKEND)
    assert scorer(model).ids("3 and 4", None) == plain  # as the exported tokenizer
    assert scorer(model, opened=True).ids("3 and 4", None) == [0, *plain]
    (tmp_path / "bytes").mkdir()
    as_bytes = harness_tasks.recipe(tmp_path / "bytes", None, steps=2)
    assert train(as_bytes, RunDir(tmp_path / "bytes/run"), backend=BACKEND) == 0
    assert scorer(portatrain.load(tmp_path / "bytes/run", backend=BACKEND)).ids("é", None) == [0, 0xC3, 0xA9]


def test_continuations_stop_and_are_cut(trained: Path) -> None:
    model = portatrain.load(trained / "run", backend=BACKEND)
    made = scorer(model)
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    texts = ["3 and 4 make", "1"]
    (whole, _), (cut, other) = made.continuations(texts, {"max_gen_toks": 12}), made.continuations(texts, options)
    assert cut == whole.split("\n")[0] and "\n" not in other
    letter = whole[1:2]
    assert made.continuations(texts[:1], {"max_gen_toks": 12, "until": letter})[0] == whole.split(letter)[0]
    for wrong, match in (({"num_beams": 4}, "got num_beams"), ({"max_gen_toks": 64}, "max_gen_toks below 64")):
        with pytest.raises(UserError, match=match):
            made.continuations(texts, wrong)


def test_mistakes(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(trained / "run")
    for words, match in (
        (["--task-folder", "x"], "--task-folder: expected --tasks, got none"),
        (["--tasks", "a", "--split", "train"], "--split: expected no other data"),
        (["--tasks", "a", "--set", "data.seq_len=3"], "--set: expected no other data"),
        (["--tasks", "a", "--limit", "0"], "--limit"),
    ):
        capsys.readouterr()
        assert main(["eval", run, *words]) == 2
        assert match in capsys.readouterr().err
    model = portatrain.load(run, backend=BACKEND)
    with monkeypatch.context() as patched:
        patched.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="no package lm_eval"):
            harness.evaluate_tasks(model, ["a"])
    ids = TokenMemmap(paths="x", seq_len=8, vocab=264, separator=0)
    model = portatrain.load(run, backend=BACKEND, recipe=replace(RunDir(run).recipe(), data=ids))
    with pytest.raises(UserError, match="token ids, of which no tokenizer is known"):
        scorer(model)


def test_results_are_on_the_curve_of_the_run(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(trained / "run")
    for step, acc in ((6, 0.25), (12, 0.5)):
        record(run, TaskResult(task="a/<b>", step=step, metrics={"acc": acc, "acc_stderr": 0.1}, shots=0, samples=4))
    record(run, TaskResult(task="a/<b>", step=12, metrics={"acc": 0.75}, shots=2))
    record(run, TaskResult(task="a/<b>", step=12, metrics={"acc": 0.625}, ema=True))
    record(run, TaskResult(task="a/<b>", step=12, metrics={"acc": float("nan")}))  # replaced by the next
    record(run, TaskResult(task="a/<b>", step=12, metrics={"acc": 0.5}, release="lm_eval 0"))
    assert [(one.label, one.step, one.metrics["acc"]) for one in results(run)] == [
        ("a/<b>", 6, 0.25),
        ("a/<b>", 12, 0.5),
        ("a/<b>, 2 shots", 12, 0.75),
        ("a/<b>, averaged weights", 12, 0.625),
    ]
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert page.count("a/&lt;b&gt;, 2 shots") and "<b>, 2" not in page and "<td>0.5</td>" in page
    assert "acc_stderr" not in page
    capsys.readouterr()
    twin = RunDir(trained / "twin")
    assert train(replace(run.recipe(), name="twin", steps=6), twin, backend=BACKEND) == 0
    assert main(["compare", str(run.path), str(twin.path), "--out", str(trained / "two.html"), "--json"]) == 0
    (first, second) = json.loads(capsys.readouterr().out)["runs"]
    assert len(first["tasks"]) == 4 and second["tasks"] == []
    assert "0.5 at step 12" in (trained / "two.html").read_text()
    (run.path / "tasks" / "step-00000001-x.json").write_text('{"task": "x", "step": -1}')
    with pytest.raises(UserError, match="step-00000001-x"):
        results(run)
    (run.path / "tasks" / "step-00000001-x.json").unlink()


def harness_here(folder: Path, *words: str) -> str:
    """Run a command in a process of its own, offline and with its caches in `folder`; return what it printed."""
    env = {**os.environ, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=250, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


THEIRS = """
import sys
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

model = HFLM(pretrained=sys.argv[1], max_length=64, device="cpu", dtype="float32", batch_size=8)
manager = TaskManager(include_path=sys.argv[2], include_defaults=False)
print(make_table(lm_eval.simple_evaluate(model=model, tasks=sys.argv[3].split(","), task_manager=manager)))
"""


def printed(text: str) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (task, metric) -> (value, standard error) of the harness's table, as it is printed."""
    found, task = {}, ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) == 9 and cells[4].strip("-:") not in ("", "Metric"):
            task = cells[0] or task
            found[task, cells[4]] = cells[6], cells[8]
    return found


def the_same(ours: dict[tuple[str, str], tuple[str, str]], theirs: dict[tuple[str, str], tuple[str, str]]) -> None:
    """All printed digits are the same, but those of perplexities of words and answers. These are exp(x) of a mean of
    sums of many tokens, printed to more digits than float32 logits decide: they agree within the tolerance of x."""
    assert set(ours) == set(theirs)
    for (task, metric), (value, error) in theirs.items():
        if metric in ("perplexity", "word_perplexity"):
            x = math.log(float(value))
            bound = float(value) * tolerance(x, x) + 1e-4  # and half a digit of each
            assert abs(float(ours[task, metric][0]) - float(value)) <= bound, (task, metric)
        else:
            assert ours[task, metric] == (value, error), (task, metric)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize("adds", [True, False], ids=["the tokenizer opens texts", "it does not"])
def test_the_harness_prints_the_same_for_the_run_and_for_its_export(adds: bool, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    for package in ("accelerate", "peft", "torch", "transformers"):  # those of its model for transformers
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    made = harness_tasks.recipe(tmp_path, harness_tasks.tokenizer(tmp_path, adds=adds))
    assert train(made, RunDir(tmp_path / "run"), backend="torch") == 0
    folder, names = harness_tasks.definitions(tmp_path), ",".join(harness_tasks.TASKS)
    run, hub = str(tmp_path / "run"), str(tmp_path / "hub")
    assert main(["ckpt", "export", run, hub, "--to", "huggingface"]) == 0
    theirs = printed(harness_here(tmp_path, "-c", THEIRS, hub, str(folder), names))
    assert len(theirs) == 8 and theirs["choose", "acc"][0] not in ("0.0000", "1.0000")
    tasks = ["--tasks", names, "--task-folder", str(folder)]
    for where, backend in ((run, "torch"), (run, "jax"), (hub, "torch")):
        if backend in BACKENDS:
            words = ["-m", "portatrain", "eval", where, "--backend", backend, "--max-length", "64", *tasks]
            the_same(printed(harness_here(tmp_path, *words)), theirs)
    found = {one.task: one for one in results(RunDir(run))}
    assert set(found) == set(harness_tasks.TASKS)
    assert all(one.step == made.steps and one.samples == 14 for one in found.values())
    said = json.loads(
        harness_here(
            tmp_path, "-m", "portatrain", "eval", run, "--step", "100", "--ema", "--limit", "3", "--json", *tasks
        )
    )
    assert said["recorded"] is None and said["samples"]["lines"] == 3 and said["step"] == 100
    assert said["tasks"]["lines"]["bits_per_byte"] > 0 and len(results(RunDir(run))) == 4
