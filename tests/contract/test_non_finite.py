"""A number that is not finite ends nothing: it is written, read back, and compared with itself as equal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class, missing
from portatrain.cli import launch_main, main
from portatrain.recipe import Recipe, apply_overrides, load_recipe
from portatrain.recipe.retention import Retention
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.run_dir import RunDir
from portatrain.system import json_files
from portatrain.training import continuity
from portatrain.training.metrics.jsonl import JsonlSink
from portatrain.training.metrics.record import EvalRecord, StepRecord
from portatrain.training.trainer import train
from tests.support import small_recipe
from tests.support.lost_commits import lose
from tests.support.sizes import SIZES

BACKENDS = [n for n in ("jax", "torch") if not missing(n)]
ODD = (math.nan, math.inf, -math.inf)
STEP = StepRecord(step=1, loss=1.0, grad_norm=1.0, lr=0.1, tokens=1, time_s=1.0, step_s=1.0, tokens_per_s=1.0)
EVAL = EvalRecord(step=1, loss=1.0, samples=1, time_s=1.0, eval_s=1.0)
MEASURED = ("loss", "grad_norm", "lr", "mfu")
"""Fields of a step that are computed from the model; the others are clocks and counters."""


def same(a: object, b: object) -> bool:
    return a == b or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def strictly(path: Path) -> list[Any]:
    """Every line of a file as strict JSON: NaN and Infinity are refused."""

    def refuse(text: str) -> None:
        raise AssertionError(f"{path}: {text} is no JSON")

    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(line, parse_constant=refuse) for line in lines]


def writers() -> Iterator[tuple[str, Callable[[JsonlSink, Any, float], None], Callable[[RunDir], Any]]]:
    """Every writer of the record: its name, how it writes a number, how that is read."""
    for name in MEASURED:
        yield (
            f"step.{name}",
            lambda sink, run, x, name=name: sink.step(replace(STEP, **{name: x})),
            lambda run, name=name: run.rows(1, "metrics")[0][name],
        )
    yield (
        "step.aux",
        lambda s, run, x: s.step(replace(STEP, aux={"a": x})),
        lambda r: r.rows(1, "metrics")[0]["aux"]["a"],
    )
    yield (
        "step.statistics",
        lambda s, run, x: s.step(replace(STEP, statistics={"a": x})),
        lambda r: r.rows(1, "metrics")[0]["statistics"]["a"],
    )
    yield (
        "step.layers",
        lambda s, run, x: s.step(replace(STEP, layers={"a": [x, 1.0]})),
        lambda r: r.rows(1, "metrics")[0]["layers"]["a"][0],
    )
    yield "eval.loss", lambda s, run, x: s.eval(replace(EVAL, loss=x)), lambda r: r.events(Kind.EVAL)[0]["loss"]
    yield (
        "eval.metrics",
        lambda s, run, x: s.eval(replace(EVAL, metrics={"a": x})),
        lambda r: r.events(Kind.EVAL)[0]["metrics"]["a"],
    )
    for key in ("loss", "grad_norm", "loss_difference", "loss_bound"):
        yield (
            f"event.{key}",
            lambda s, run, x, key=key: s.event(Kind.SKIPPED, step=1, **{key: x}),
            lambda r, key=key: r.events(Kind.SKIPPED)[0][key],
        )
    read = json_files.number
    yield "end", lambda s, run, x: s.end({"status": "done", "x": x}), lambda r: read(r.events(Kind.END)[0]["x"])
    yield "summary.json", lambda s, a, x: a.write("summary.json", {"x": x}), lambda r: read(r.summary()["x"])
    yield (
        "plan.json",
        lambda s, a, x: a.note("plan.json", {"x": [x]}),
        lambda r: read(json_files.read_json(r.path / "attempts/1/plan.json")["x"][0]),
    )


def test_every_field_of_a_record_is_tried_or_a_clock() -> None:
    clocks = {"step", "tokens", "time_s", "step_s", "tokens_per_s", "memory_bytes", "data_wait_s", "skipped"}
    mappings = {"aux", "layers", "statistics"}  # tried apart
    assert {f.name for f in fields(StepRecord)} == clocks | mappings | set(MEASURED)
    assert set(asdict(EVAL)) == {"step", "loss", "samples", "time_s", "eval_s", "metrics"}


@pytest.mark.parametrize("value", ODD, ids=str)
@pytest.mark.parametrize(("name", "write", "read"), list(writers()), ids=lambda v: v if isinstance(v, str) else "")
def test_every_writer_of_the_record(name: str, write: Any, read: Any, value: float, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.begin(small_recipe.make()) as attempt:
        write(JsonlSink(attempt), attempt, value)
    assert same(read(run), value), name
    for path in run.path.rglob("*.json*"):
        strictly(path)
    found = read_history(run)
    json.dumps(found.as_json(), allow_nan=False)


def test_null_is_read_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.begin(small_recipe.make()):
        pass
    run.path.joinpath("attempts/1/metrics.jsonl").write_text('{"step": 1, "loss": null, "time_s": 1.0}\n')
    assert math.isnan(run.curve()[0]["loss"]) and math.isnan(read_history(run).loss or 0.0)


@pytest.mark.parametrize("value", ODD, ids=str)
def test_a_probe_with_such_numbers_equals_itself_and_nothing_else(value: float) -> None:
    found = {"losses": [1.0, value], "norms": {"w": [1.0, value], "grad/w": value, "update/w": [value, 0.5]}}
    stored = json.loads(json.dumps(json_files.strict(found), allow_nan=False))
    assert {k: v for k, (v, _) in continuity.compare(stored, found).items()} == dict.fromkeys(
        ("loss", "mean", "state", "grad", "update"), 0.0
    )
    other = {"losses": [1.0, 2.0], "norms": {"w": [1.0, 2.0], "grad/w": 2.0, "update/w": [2.0, 0.5]}}
    for was, now in ((stored, other), (other, found)):
        assert all(v > 1 for k, (v, _) in continuity.compare(was, now).items()), (was, now)
    exact = {"step": 1, "schedule": {"learning_rate": value}}
    assert (
        continuity.verdict(
            json_files.strict(exact), exact, continuity.Bounds.of(load_recipe("tiny-lm").describe(), "fp32", 512)
        )["differs"]
        == []
    )


def test_the_replay_of_a_lost_attempt() -> None:
    rows = [{"step": 2, "loss": None}, {"step": 3, "loss": math.inf}, {"step": 4, "loss": 1.0}]
    replay = continuity.Replay.of(rows, 1, 1e-5)
    assert replay is not None and replay.add(2, math.nan) is None and replay.add(3, math.inf) is None
    found = replay.add(4, 1.0)
    assert found is not None and found["verdict"] == "continuous"
    replay = continuity.Replay.of(rows, 1, 1e-5)
    assert replay is not None
    found = replay.add(2, 1.0)
    assert found is not None and found["verdict"] == "broken"


def test_the_best_checkpoint_is_none_of_those() -> None:
    metrics = {2: {"loss": math.nan}, 4: {"loss": 1.0}, 6: {"loss": -math.inf}}
    assert Retention(last=1, best="min:loss").kept([2, 4, 6], metrics) == {4, 6}


def recipe() -> Recipe:
    return apply_overrides(load_recipe("tiny-lm"), SIZES)


ONE_OF_EACH = [("jax", math.nan), ("torch", math.inf)]
CASES = [
    pytest.param(b, v, marks=() if (b, v) in ONE_OF_EACH else pytest.mark.full, id=f"{b}-{v}")
    for b in BACKENDS
    for v in (math.nan, math.inf)
]


@pytest.mark.parametrize(("backend", "value"), CASES)
def test_a_run_saves_and_resumes_over_such_a_step(
    backend: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps 2 to 5 are not finite: they are saved after, evaluated, logged beyond the last commit, and replayed."""
    cls = backend_class(backend)
    step, evaluate = cls.step, cls.eval
    bad = range(2, 6)

    def odd_step(self: Any, state: Any, batch: Any, *, step: int, scale: float, _step: Any = step) -> Any:
        state, result = _step(self, state, batch, step=step, scale=scale)
        now[0] = step
        if step in bad:
            result = replace(result, loss=value, grad_norm=value, skipped=1, aux={**result.aux, "x": value})
        return state, result

    def odd_eval(self: Any, state: Any, batch: Any) -> Mapping[str, Any]:
        found = dict(evaluate(self, state, batch))
        if now[0] in bad:
            found["loss_B"] = np.full_like(np.asarray(found["loss_B"]), value)
        return found

    now = [0]
    monkeypatch.setattr(cls, "step", odd_step)
    monkeypatch.setattr(cls, "eval", odd_eval)
    run = RunDir(tmp_path / "runs" / "a")
    assert train(recipe(), run, backend=backend, stop_at=3) == 85
    with LocalStore(run.path / "checkpoints/step-00000003") as store:
        assert Reader(store).meta["history"][-1] == [3, str(value)]
    now[0] = 3
    assert train(recipe(), run, backend=backend, stop_at=5) == 85
    # As if that attempt had been lost after the save of step 4: its row of step 5 is beyond the last commit.
    lose(run, 5)
    now[0] = 4
    assert train(recipe(), run, backend=backend) == 0
    verdicts = [e["verdict"] for e in run.events(Kind.RESUMED)]
    assert verdicts == ["continuous"] * len(verdicts) and len(verdicts) >= 2
    assert [same(r["loss"], value) for r in run.curve()] == [s in bad for s in range(1, 9)]
    for path in run.path.rglob("*.json*"):
        strictly(path)
    assert read_history(run).skipped == list(bad)
    monkeypatch.chdir(tmp_path)
    assert launch_main(["status", "a", "--json"]) == 0 and main(["report", str(run.path)]) == 0
    json.loads(capsys.readouterr().out.partition("\n/")[0].rpartition("}")[0] + "}")
