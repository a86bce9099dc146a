"""`--profile FIRST:LAST`: the trace, its ten most expensive operations, ranges outside the run, profilers that fail."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.profile import Operation, most_expensive
from portatrain.backends.torch.backend import TorchBackend
from portatrain.cli import launch_main, main
from portatrain.errors import UserError
from portatrain.recipe import Recipe
from portatrain.runs.events import Kind
from portatrain.runs.history import read_history
from portatrain.runs.profiles import in_words
from portatrain.runs.report.page import page
from portatrain.runs.run_dir import RunDir
from portatrain.system.stop_signals import StopSignals
from portatrain.training.metrics.console import ConsoleSink
from portatrain.training.profiling import StepRange
from portatrain.training.trainer import train
from tests.support.short_runs import losses, small

TINY = ("model.layers=1", "steps=4", "schedule.warmup=0", "eval_final_batches=1", "data=TextFiles", "data.seq_len=16")


def tiny(folder: Path) -> Recipe:
    """Return a recipe of four small steps on a few texts below `folder`."""
    texts = folder / "texts"
    texts.mkdir()
    for n in range(40):
        (texts / f"{n}.txt").write_text(f"Text {n} of a small file. " * 20)
    return small(*TINY, f"data.paths={texts}")


class Calls:
    """A sink that calls `on_start` with the attempt's folder, and `on_step` after every step."""

    def __init__(self, on_start: Callable[[Path], object] = id, on_step: Callable[[int], object] = id) -> None:
        self._on_start, self._on_step = on_start, on_step

    def start(self, info: Any) -> None:
        self._on_start(Path(info.run_dir, "attempts", str(info.attempt)))

    def step(self, record: Any) -> None:
        self._on_step(record.step)

    def eval(self, record: Any) -> None: ...

    def event(self, kind: str, **fields: object) -> None: ...

    def end(self, summary: Mapping[str, object]) -> None: ...


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("100", "expected two steps, FIRST:LAST"),
        ("", "expected two steps"),
        ("2:", "expected two steps"),
        ("2:3:4", "expected two steps"),
        ("a:b", "got 'a:b'"),
        ("-1:3", "expected two steps"),
        ("2.0:3", "expected two steps"),
        ("²:3", "expected two steps"),
        ("1:99999999999999999999", "expected two steps"),
        ("3:2", "Use --profile 2:3."),
        ("1:0", "Count steps from 1."),
        ("0:2", "expected steps from 1 to 8"),
        ("9:9", "expected steps from 1 to 8"),
        ("8:9", "got 8 to 9"),
    ],
)
def test_a_range_outside_the_run_is_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        StepRange.parse(text, 8)
    assert says in str(error.value)
    assert (StepRange.parse("8:8", 8), StepRange.parse("1:8", 8)) == (
        StepRange(first=8, last=8),
        StepRange(first=1, last=8),
    )


@pytest.mark.parametrize(
    "words",
    [
        ["portatrain", "train", "tiny-lm", "--run-dir", "RUN", "--stop-at", "5", "--profile", "5:6"],
        ["launch", "--cluster", "local", "tiny-lm", "--run", "x", "--runs", "RUN", "--profile", "6:5"],
    ],
    ids=["train", "launch"],
)
def test_a_command_refuses_it_before_anything_is_written(words: list[str], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    command = {"portatrain": main, "launch": launch_main}[words[0]]
    assert command([str(run) if w == "RUN" else w for w in words[1:]]) == 2
    error = capsys.readouterr().err
    assert "--profile" in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not run.exists()


@pytest.mark.parametrize(("backend", "named"), [("jax", "dot"), ("torch", "aten::mm")])
def test_the_trace_and_its_most_expensive_operations(backend: str, named: str, tmp_path: Path) -> None:
    run, said = RunDir(tmp_path / "run"), io.StringIO()
    assert train(tiny(tmp_path), run, backend=backend, profile="2:3", sinks=[ConsoleSink(said)]) == 0
    folder = run.path / "attempts" / "1"
    with gzip.open(folder / "profile-2-3.trace.json.gz", "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]  # what Perfetto reads: complete events of Chrome's format
    calls = [event for event in events if event.get("ph") == "X" and event["dur"] >= 0 and event["ts"] >= 0]
    assert any(event["name"].startswith(named) for event in calls)
    steps = [e for e in calls if e["name"].partition(" ")[0] == "step" or "step_num" in e.get("args", {})]
    numbers = sorted({int(e["args"].get("step_num") or e["name"].split()[-1]) for e in steps})
    assert numbers == [2, 3]
    (event,) = run.events(Kind.PROFILED)
    assert (event["first"], event["last"], event["files"][0]) == (2, 3, "profile-2-3.trace.json.gz")
    assert all((folder / file).stat().st_size for file in event["files"])
    operations = event["operations"]
    assert len(operations) == 10 and all(op["calls"] > 0 and op["time_s"] > 0 for op in operations)
    assert [op["time_s"] for op in operations] == sorted((op["time_s"] for op in operations), reverse=True)
    assert 0 < sum(op["share"] for op in operations) <= 1 + 1e-9
    text = said.getvalue()
    assert str(folder / event["files"][0]) in text and all(op["name"] in text for op in operations)
    shown = page(read_history(run), [])
    assert "<h2>Profiles</h2>" in shown and all(op["name"] in shown for op in operations)
    if backend == "jax":
        import jax

        planes = jax.profiler.ProfileData.from_file(str(folder / event["files"][1]))
        assert any(plane.name.startswith("/host:CPU") for plane in planes.planes)


def test_a_profile_changes_no_loss_and_a_resumed_run_goes_on_past_its_range(tmp_path: Path) -> None:
    plain, run = RunDir(tmp_path / "plain"), RunDir(tmp_path / "run")
    recipe = tiny(tmp_path)
    assert train(recipe, plain, backend="torch") == 0
    for stop, wanted in ((2, "1:2"), (3, "1:2"), (None, "2:4")):
        assert train(recipe, run, backend="torch", profile=wanted, stop_at=stop) == (85 if stop else 0)
    assert losses(run) == losses(plain)
    made = [(e["attempt"], e["first"], e["last"]) for e in run.events(Kind.PROFILED)]
    assert made == [(1, 1, 2), (3, 4, 4)]  # attempt 3 resumed inside its range, and profiled the rest
    (skipped,) = run.events(Kind.PROFILE_SKIPPED)
    assert skipped["attempt"] == 2 and skipped["what"] == "steps 1 to 2: the run resumes after step 2"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_a_profiler_that_cannot_write_does_not_end_the_run(backend: str, tmp_path: Path) -> None:
    run, said = RunDir(tmp_path / "run"), io.StringIO()
    in_the_way = Calls(lambda folder: (folder / "profile-2-2.trace.json.gz" / "full").mkdir(parents=True))
    sinks = [in_the_way, ConsoleSink(said)]
    assert train(tiny(tmp_path), run, backend=backend, profile="2:2", sinks=sinks) == 0
    (failed,) = run.events(Kind.PROFILE_FAILED)
    assert failed["what"].startswith("step 2: IsADirectoryError") and not run.events(Kind.PROFILED)
    assert "profile failed: step 2: IsADirectoryError" in said.getvalue()


def test_a_profiler_that_cannot_start_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> Any:
        raise RuntimeError("no profiler today")

    monkeypatch.setattr(TorchBackend, "start_trace", broken)
    run = RunDir(tmp_path / "run")
    assert train(tiny(tmp_path), run, backend="torch", profile="2:3") == 0
    (failed,) = run.events(Kind.PROFILE_FAILED)
    assert failed["what"] == "steps 2 to 3: RuntimeError: no profiler today"


def test_a_run_that_is_stopped_inside_the_range_keeps_what_was_traced(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with StopSignals() as signals:
        stops = Calls(on_step=lambda step: signals.strengthen("preempt") if step == 3 else None)
        assert train(tiny(tmp_path), run, backend="torch", profile="2:4", sinks=[stops], signals=signals) == 85
    (made,) = run.events(Kind.PROFILED)
    assert (made["first"], made["last"]) == (2, 3)
    assert (run.path / "attempts/1/profile-2-3.trace.json.gz").exists()


def test_a_backend_without_a_profiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "start_trace", None)  # as torch-xla declares
    with pytest.raises(UserError, match="expected a backend with a profiler"):
        train(tiny(tmp_path), RunDir(tmp_path / "run"), backend="torch", profile="2:3")
    assert not (tmp_path / "run").exists()


def test_the_order_and_the_shares_of_operations() -> None:
    rows = [Operation(name=f"op{n}", about="", calls=1, time_s=float(n)) for n in range(20)]
    found = most_expensive(rows)
    assert [row["name"] for row in found] == [f"op{n}" for n in range(19, 9, -1)]
    assert found[0]["share"] == 19 / 190
    assert most_expensive([]) == [] and most_expensive(rows[:1])[0]["share"] == 0.0


@pytest.mark.parametrize(
    "damage",
    [
        {},
        {"files": 7, "operations": {"a": 1}, "first": [1], "last": None},
        {"operations": [3, {"name": 5, "calls": -1, "time_s": "x", "share": 1e300, "about": ["a"]}], "files": [None]},
        {"operations": [{"name": "<b>", "calls": True, "time_s": -1.0, "share": None}], "first": "<i>"},
    ],
)
def test_a_damaged_event_is_shown_as_far_as_it_can_be_read(damage: dict[str, Any]) -> None:
    assert in_words({"event": "profiled", **damage}, "here")[0].startswith("profile of step")
