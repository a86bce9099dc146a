"""Sinks, FLOPs and plots."""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from portatrain.system import svg
from portatrain.system.text import counted, duration, si
from portatrain.training.metrics import EvalRecord, RunInfo, StepRecord, plot
from portatrain.training.metrics.console import ConsoleSink
from portatrain.training.metrics.flops import Peak, measured_cpu_peak, mfu
from portatrain.training.metrics.jsonl import JsonlSink
from portatrain.training.metrics.plot import draw, loss_curve, plot_run, smooth
from portatrain.training.metrics.trackers import TensorBoardSink, WandbSink, scalars
from tests.support.small_recipe import make

INFO = RunInfo(
    run="small",
    run_dir="runs/small",
    attempt=1,
    steps=20,
    first_step=1,
    backend="jax",
    device="CPU",
    mesh="1",
    precision="fp32",
    parameters=1_500_000,
    trainable=1_500_000,
    tokens_per_step=1000,
    flops_per_step=1e9,
    peak_flops=5e10,
    peak_source="measured here",
)


def record(step: int, **changes: Any) -> StepRecord:
    base: dict[str, Any] = {
        "step": step,
        "loss": 5.0 - 0.1 * step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 1000 * step,
        "time_s": 0.5 * step,
        "step_s": 0.5,
        "tokens_per_s": 2000.0,
        "mfu": 0.04,
        "aux": {"load": 0.5},
    }
    return StepRecord(**{**base, **changes})


def play(sink: Any, steps: int = 20) -> None:
    sink.start(INFO)
    for step in range(1, steps + 1):
        sink.step(record(step))
    sink.eval(EvalRecord(step=steps, loss=3.0, samples=8, time_s=9.0, eval_s=0.1, metrics={"bits_per_byte": 4.328}))
    sink.event("skipped", step=3, loss=2.557283878326416)
    sink.end({"status": "done"})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_without_a_terminal_prints_plain_lines() -> None:
    out = io.StringIO()
    play(ConsoleSink(out, every_s=0))
    text = out.getvalue()
    assert "1.50 M parameters, 20 steps of 1000 tokens, fp32, jax on CPU, mesh 1" in text
    assert "MFU is relative to 0.05 TFLOP/s (measured here)" in text
    # A mean that forgets a tenth a step lags behind a line of slope -0.1 by 0.9 (1 - 0.9^9) = 0.5513 at step 10.
    assert "step 10/20  mean loss 4.5513  2 k tokens/s  MFU 4.0%  eta 0:05" in text
    assert "step 20: validation loss 3.0000  bits per byte 4.328" in text
    assert "skipped: step 3, loss 2.55728\n" in text
    assert "\x1b" not in text


def test_console_prints_at_intervals_and_always_the_last_step() -> None:
    out = io.StringIO()
    play(ConsoleSink(out, every_s=1000))
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step ") and "/20" in line]
    assert [line.split()[1] for line in lines] == ["1/20", "20/20"]


def test_console_on_a_terminal_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    out = Terminal()
    play(ConsoleSink(out))
    text = out.getvalue()
    assert "step 20/20" in text
    assert "eta" in text
    assert "2 k tokens/s" in text
    assert "validation loss 3.0000" in text


def test_console_says_what_is_wrong() -> None:
    out = io.StringIO()
    sink = ConsoleSink(out, every_s=0)
    sink.start(INFO)
    sink.step(record(1, data_wait_s=0.25))
    sink.step(record(2, loss=float("nan"), skipped=True))
    sink.step(record(3))
    text = out.getvalue()
    assert "data wait 50%" in text
    assert "skipped: not finite" in text
    assert "nan" not in text  # the shown loss is a mean over the finite ones


def test_console_says_a_verdict_in_words() -> None:
    out = io.StringIO()
    sink = ConsoleSink(out)
    figures = {"loss_difference": 3e-7, "loss_bound": 1e-5, "state_difference": None, "state_bound": None}
    sink.event("resumed", step=20, verdict="continuous", differs=[], accepted=None, **figures)
    sink.event("resumed", step=30, verdict="broken", differs=["rng.word"], accepted="a reason")
    sink.event("warning", what="axis 'embd' is in no mapping")
    assert out.getvalue().splitlines() == [
        "resumed from the checkpoint of step 20. Continuity: continuous, loss 3.0e-07 (bound 1e-05)",
        "resumed from the checkpoint of step 30. Continuity: broken, different: rng.word, accepted: a reason",
        "warning: axis 'embd' is in no mapping",
    ]


def test_console_does_not_take_the_compilation_for_the_rate() -> None:
    out = io.StringIO()
    sink = ConsoleSink(out, every_s=0)
    sink.start(INFO)
    for step, rate in ((1, 10.0), (2, 2000.0), (3, 2000.0)):
        sink.step(record(step, tokens_per_s=rate))
    first, second, third = out.getvalue().splitlines()[1:]
    assert "eta" not in first
    assert "2 k tokens/s" in second
    assert third.endswith("eta 0:08")  # 17 steps of 1000 tokens at 2000 a second


def test_console_ends_without_a_step() -> None:
    for stream in (io.StringIO(), Terminal()):
        sink = ConsoleSink(stream)
        sink.start(INFO)
        sink.end({"status": "interrupted"})


def test_jsonl_has_every_field_in_full(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.begin(make()) as attempt:
        play(JsonlSink(attempt), steps=3)
    rows = run.curve()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] == 5.0 - 0.1 * 3
    assert {"step", "loss", "grad_norm", "lr", "tokens", "time_s"} <= set(rows[0])
    assert [event["event"] for event in run.events()] == ["start", "eval", "skipped", "end"]
    assert run.events("eval")[0]["metrics"] == {"bits_per_byte": 4.328}


SVG = "{http://www.w3.org/2000/svg}"


def drawn(run: RunDir) -> ET.Element:
    """The picture of the loss curve, parsed, with every coordinate inside it."""
    assert plot_run(run) == run.path / "loss.svg"
    picture = ET.fromstring((run.path / "loss.svg").read_text())
    width, height = float(picture.attrib["width"]), float(picture.attrib["height"])
    for line in picture.iter(f"{SVG}polyline"):
        for x, y in points(line):
            assert 0 < x < width and 0 < y < height
    return picture


def points(line: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in line.attrib["points"].split())]


def texts(picture: ET.Element) -> list[str]:
    return [text.text or "" for text in picture.iter(f"{SVG}text")]


def test_loss_curve_is_a_picture(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a <run> & more")
    with run.begin(make()) as attempt:
        sink = JsonlSink(attempt)
        play(sink, steps=6)
        sink.step(record(7, loss=float("nan"), skipped=True))
        attempt.write("summary.json", {"references": {"byte 3-gram model": 2.5}})
    picture = drawn(run)
    raw, mean, validation, rate = picture.iter(f"{SVG}polyline")
    assert [len(points(line)) for line in (raw, mean, validation, rate)] == [6, 6, 1, 6]  # no point for the step of NaN
    heights = [y for _, y in points(raw)]
    assert heights == sorted(heights)  # the loss falls: down is a larger y
    assert "a <run> & more" in texts(picture)


def test_loss_curve_is_in_bits_per_byte_if_they_are_known(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.begin(make()) as attempt:
        play(JsonlSink(attempt), steps=2)  # its evaluation has loss 3.0 and 4.328 bits per byte
        attempt.write("summary.json", {"references": {"byte 3-gram model": 2.5}})
    picture = drawn(run)
    assert "bits per byte" in texts(picture) and "loss" not in texts(picture)
    assert "byte 3-gram model: 2.500" in texts(picture)
    raw, _, validation, _ = picture.iter(f"{SVG}polyline")
    (reference,) = (line for line in picture.iter(f"{SVG}line") if line.attrib.get("class") == "reference")
    # Heights are linear in the value: the three values that are known give the same scale.
    (_, first), (_, second) = points(raw)
    high, low = 4.328 / 3 * 4.9, 4.328 / 3 * 4.8
    for value, y in ((4.328, points(validation)[0][1]), (2.5, float(reference.attrib["y1"]))):
        assert y == pytest.approx(first + (second - first) * (high - value) / (high - low), abs=3)


def test_loss_curve_keeps_the_whole_split_apart_from_a_part_of_it(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.begin(make()) as attempt:
        sink = JsonlSink(attempt)
        play(sink, steps=2)  # evaluates 8 samples
        sink.eval(EvalRecord(step=2, loss=2.0, samples=800, time_s=9.0, eval_s=0.1))
    picture = drawn(run)
    assert {"validation", "validation, whole split"} <= set(texts(picture))
    (circle,) = picture.iter(f"{SVG}circle")
    (diamond,) = (path for path in picture.iter(f"{SVG}path") if path.attrib.get("class") == "whole")
    assert float(circle.attrib["cy"]) < float(diamond.attrib["d"].split()[2])  # 3.0 above 2.0


def test_loss_curve_of_a_long_run_stays_small(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 5 - step / 1e5, "lr": 1e-3} for step in range(1, 100_001)]
    text = loss_curve(rows, [], title="long", references={"nothing": float("nan")})
    assert len(text) < 60_000
    ET.fromstring(text)


def test_metrics_beyond_a_bound_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDir(tmp_path / "run")
    for first, last in ((1, 200), (151, 400)):  # the second attempt goes on from step 150
        with run.begin(make()) as attempt:
            for step in range(first, last + 1):
                attempt.metrics({"step": step, "loss": 5.0 - step / 100, "lr": 1e-3, "padding": "x" * 100})
    with (run.path / "attempts" / "2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 401, "lo')  # cut short by a crash
    (whole,) = (points(line) for line in drawn(run).iter(f"{SVG}polyline") if line.attrib["class"] == "raw")
    monkeypatch.setattr(plot, "MOST_BYTES", 8000)
    (part,) = (points(line) for line in drawn(run).iter(f"{SVG}polyline") if line.attrib["class"] == "raw")
    assert 20 < len(part) < len(whole) / 5
    # 1, 1 + n, ... of the first attempt up to 150, then those of the second: each once, on the same line.
    assert [x for x, _ in part] == sorted({x for x, _ in part})
    heights = [y for _, y in part]
    assert heights == sorted(heights)


def test_loss_curve_without_steps(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.begin(make()).close()
    with pytest.raises(UserError, match="at least one step"):
        plot_run(run)
    draw(run)
    assert not (run.path / "loss.svg").exists()


def test_smooth_is_the_mean_of_the_neighbours_and_has_no_lag() -> None:
    values = [float(k * k % 7) for k in range(40)]
    for reach in (0, 1, 4):
        for index, value in enumerate(smooth(values, reach=reach)):
            near = min(reach, index, 39 - index)
            window = values[index - near : index + near + 1]
            assert value == pytest.approx(sum(window) / len(window), abs=1e-12)
    line = [0.5 * k for k in range(300)]
    assert smooth(line) == pytest.approx(line, abs=1e-9)
    assert smooth([]) == []


def test_mfu() -> None:
    peak = Peak(flops_per_s=100.0, source="a test")
    assert mfu(flops=50.0, seconds=2.0, peak=peak) == 0.25
    assert mfu(flops=None, seconds=2.0, peak=peak) is None
    assert mfu(flops=50.0, seconds=2.0, peak=None) is None
    assert mfu(flops=50.0, seconds=0.0, peak=peak) is None


def test_measured_peak_is_what_numpy_reaches() -> None:
    import time

    import numpy as np

    began_s = time.perf_counter()
    peak = measured_cpu_peak(budget_s=0.2)
    assert time.perf_counter() - began_s < 5.0
    assert "measured" in peak.source
    a = np.full((1024, 1024), 0.5, np.float32)
    began_s = time.perf_counter()
    a @ a
    # One product of our own cannot be faster than the best by more than the clock's and the machine's jitter.
    assert 2 * 1024**3 / (time.perf_counter() - began_s) < 2 * peak.flops_per_s


def test_numbers_for_people() -> None:
    assert [si(v) for v in (5.0, 1234.0, 5.6e6, 7e9)] == ["5", "1.23 k", "5.6 M", "7 G"]
    assert [duration(s) for s in (0, 59.6, 125, 3723)] == ["0:00", "1:00", "2:05", "1:02:03"]


# --- trackers: stand-ins for the packages record what they are given ------------------------------


def test_scalars_are_flat_numbers() -> None:
    found = scalars(record(3), "train")
    assert found["train/loss"] == 5.0 - 0.1 * 3
    assert found["train/load"] == 0.5
    assert "train/step" not in found
    assert "train/memory_bytes" not in found  # None
    assert all(type(value) is float for value in found.values())


def test_wandb_gets_one_curve_over_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()
    summary: dict[str, object] = {}
    run = SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("end"), summary=summary
    )
    module.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    play(WandbSink(), steps=2)
    assert (calls[0]["id"], calls[0]["name"]) == ("small", "small")  # a run of before there were ids
    assert calls[0]["resume"] == "allow"
    assert [call[0] for call in calls[1:-1]] == [1, 2, 2]
    assert calls[-1] == "end"
    assert summary == {"status": "done"}


def test_wandb_knows_a_run_by_its_id_and_not_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()
    seen: list[dict[str, Any]] = []
    run = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None, summary={})
    module.init = lambda **options: seen.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    for folder in ("a/tiny", "b/tiny", "a/tiny"):
        there = RunDir(tmp_path / folder)
        there.begin(make()).close()
        sink = WandbSink()
        sink.start(replace(INFO, run=there.path.name, id=there.run_info()["id"]))
        sink.end({})
    first, other, again = (options["id"] for options in seen)
    assert first == again != other
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert {options["name"] for options in seen} == {"tiny"}


@pytest.mark.parametrize("name", ["a:b", "a;b", "a,b", "a#b", "a?b", "a/b", "a\\b", "a%b", "tiny-lm"])
def test_the_name_of_a_run_without_an_id_makes_an_id_that_wandb_takes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = ModuleType("wandb")
    module.__spec__ = SimpleNamespace()
    seen: list[dict[str, Any]] = []
    module.init = lambda **options: seen.append(options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    WandbSink().start(replace(INFO, run=name, id=""))
    assert seen[0]["name"] == name and seen[0]["id"] == re.sub("[^a-z-]", "-", name)


def test_tensorboard_gets_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module: Any = ModuleType("tensorboardX")
    module.__spec__ = SimpleNamespace()
    module.SummaryWriter = lambda folder: SimpleNamespace(
        add_scalar=lambda name, value, step: calls.append((name, value, step)),
        add_text=lambda name, text: calls.append((name, text)),
        close=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    play(TensorBoardSink(), steps=1)
    assert ("train/loss", 4.9, 1) in calls
    assert ("validation/bits_per_byte", 4.328, 1) in calls
    assert calls[-1] == "end"


@pytest.mark.parametrize(("sink", "module"), [(WandbSink, "wandb"), (TensorBoardSink, "tensorboardX")])
def test_missing_tracker_names_the_install_command(sink: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'portatrain\["):
        sink()


@pytest.mark.parametrize(
    ("number", "things", "said"),
    [
        (0, "texts", "0 texts"),
        (1, "attempts", "1 attempt"),
        (2000, "tokens", "2,000 tokens"),
        (1, "entries", "1 entry"),
        (1, "empty files", "1 empty file"),
        (1, "files that are not UTF-8, of which each byte is a token", None),
        (1, "links to a folder that contains them", "1 link to a folder that contains it"),
    ],
)
def test_one_thing_is_no_plural(number: int, things: str, said: str | None) -> None:
    assert counted(number, things) == (said or "1 file that is not UTF-8, of which each byte is a token")


NUMBERS = (0.0, 5e-324, 1e-308, 1.0, 3.4e38, 1e308, 1.7e308, -1e308, -1.7e308)


@pytest.mark.parametrize("log", [False, True])
def test_scales_of_the_smallest_and_the_largest_numbers(log: bool) -> None:
    """A record may hold any finite number; a picture of it has few ticks, and ends no command."""
    for low, high in itertools.combinations(sorted(NUMBERS), 2):
        ends = (low, high) if log else svg.padded([low, high])
        if log and low <= 0:
            continue
        scale = svg.Scale(low=ends[0], high=ends[1], start=0, end=100, log=log)
        assert len(scale.ticks(5)) < 2000 and all(math.isfinite(scale(v)) for v in (low, high)), (low, high)
        assert svg.frame(scale, scale, x_label="a", y_label="b")
