"""trackio and MLflow themselves: three attempts on two frameworks are one run there, and no step is in it twice.

Skipped without the package: pip install 'portatrain[trackio]' or 'portatrain[mlflow]'.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from portatrain.runs.reported import scalars as scalars_of_event
from portatrain.training.metrics import EvalRecord, RunInfo, StepRecord
from portatrain.training.metrics.mlflow_sink import MlflowSink, named
from portatrain.training.metrics.trackio_sink import TrackioSink

ABOUT: dict[str, Any] = {"loss": 1.0, "grad_norm": 1.0, "lr": 1.0, "tokens": 1, "time_s": 1.0, "step_s": 1.0}
EVALUATED: dict[str, Any] = {"samples": 1, "time_s": 1.0, "eval_s": 1.0, "metrics": {"loss/code": 3.0}}
STATISTICS = {"rms/blocks/0": 0.5, "rms/blocks/attn/0": 0.25, "dead/.": 0.125}
ATTEMPTS = (("jax", 1, 5), ("torch", 4, 8), ("jax", 9, 10))
WANTED = {"train/loss": range(1, 11), "validation/loss": (5, 8, 10), "watched/heat": range(1, 11)}
"""(backend, first step, last step): the first attempt was killed after the save after step 3, and after an evaluation;
the second one stopped, and was told at the end that all is well."""


def info(run: Path, attempt: int, backend: str, first: int, name: str = "tiny") -> RunInfo:
    return RunInfo(
        run=name,
        run_dir=str(run),
        attempt=attempt,
        steps=10,
        first_step=first,
        backend=backend,
        device="2 x cpu",
        mesh="fsdp=2",
        precision="fp32",
        parameters=1,
        trainable=1,
        tokens_per_step=1,
        recipe={"name": name, "steps": 10, "model": {"layers": 2}},
        id=f"{abs(hash(str(run))):016x}"[:16],
    )


def train(make: Callable[[], Any], run: Path) -> None:
    """What the trainer tells a tracker in the three attempts. A step has the number of its attempt in its loss."""
    for attempt, (backend, first, last) in enumerate(ATTEMPTS, 1):
        sink = make()
        sink.start(info(run, attempt, backend, first))
        for step in range(first, last + 1):
            about = {**ABOUT, "loss": step + attempt / 10}
            sink.step(StepRecord(step=step, **about, tokens_per_s=1.0, statistics=STATISTICS if step == 4 else {}))
            sink.event("watched", step=step, heat=2.0 * step, where={"deep": 1.0}, words="none")
            if step in (5, 8, 10):
                sink.eval(
                    EvalRecord(
                        step=step, loss=2.0 * step, samples=1, time_s=1.0, eval_s=1.0, metrics={"loss/code": 3.0}
                    )
                )
            if step in (3, 5, 8):
                sink.event("saving", step=step)
        if attempt > 1:
            sink.end({"status": "done" if attempt == 3 else "preempted"})
        else:
            settle(sink)


def settle(sink: Any) -> None:
    """End the sender of a process that is killed once it has sent what it has."""
    if getattr(sink, "_trackio", None) is not None:
        sink._trackio.finish()


def test_trackio_has_one_run_and_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = pytest.importorskip("trackio.sqlite_storage", reason="needs trackio")
    from trackio import utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    train(TrackioSink, tmp_path / "run")
    train(TrackioSink, tmp_path / "another run")  # of the same name
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as db:
        rows = db.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    runs = {name: [(step, json.loads(text)) for of, step, text in rows if of == name] for name, *_ in rows}
    assert len(runs) == 2
    for found in runs.values():
        for key, steps in (
            ("train/loss", range(1, 11)),
            ("validation/loss", (5, 8, 10)),
            ("watched/heat", range(1, 11)),
        ):
            assert [step for step, row in found if key in row] == list(steps), key
        losses = {step: row["train/loss"] for step, row in found if "train/loss" in row}
        assert losses[4] == 4.1 and losses[6] == 6.2 and losses[10] == 10.3
        (four,) = (row for step, row in found if step == 4 and "train/loss" in row)
        assert all(four[f"train/{name}"] == value for name, value in STATISTICS.items())


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    tracking = pytest.importorskip("mlflow.tracking", reason="needs mlflow")
    pytest.importorskip("sqlalchemy", reason="needs sqlalchemy, for MLflow's database")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    yield tracking.MlflowClient()


@pytest.mark.filterwarnings("ignore")  # sqlalchemy says what MLflow uses will go
def test_mlflow_has_one_run_and_no_step_twice(tmp_path: Path, client: Any) -> None:
    train(MlflowSink, tmp_path / "run")
    (run,) = client.search_runs([client.get_experiment_by_name("portatrain").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "tiny"
    assert run.data.params == {"name": "tiny", "steps": "10", "model.layers": "2"}
    assert [run.data.tags[f"attempt.{n}"].split()[0] for n in (1, 2, 3)] == [backend for backend, *_ in ATTEMPTS]
    for key, steps in WANTED.items():
        assert [one.step for one in client.get_metric_history(run.info.run_id, key)] == list(steps), key
    losses = {one.step: one.value for one in client.get_metric_history(run.info.run_id, "train/loss")}
    assert losses[4] == 4.1 and losses[6] == 6.2 and losses[10] == 10.3
    assert {named(f"train/{name}"): value for name, value in STATISTICS.items()}.items() <= run.data.metrics.items()
    train(MlflowSink, tmp_path / "another run")
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_the_numbers_of_a_hooks_event_are_scalars_and_ours_are_none() -> None:
    given = {"step": 3, "heat": 1.5, "on": True, "by": {"a": 1, "b": "x"}, "words": "none", "list": [1.0]}
    assert scalars_of_event("watched", given) == {"watched/heat": 1.5, "watched/by/a": 1.0}
    assert scalars_of_event("saving", given) == {}
    assert named("train/grad/blocks/attn/wq/3") == "train/grad.blocks.attn.wq.3"
    assert named("validation/loss/my code!") == "validation/loss.my code_"
