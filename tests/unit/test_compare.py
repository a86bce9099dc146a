"""Several runs compared: fields, curves over four axes, sweeps, prices, the table, the page and the JSON."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from portatrain.cli import main
from portatrain.runs.report.curves import Curve, curves_chart
from tests.support.records import attempt, row

H100 = {"device": "NVIDIA H100 80GB HBM3", "devices": 8, "mesh": "fsdp=8", "backend": "torch", "framework": "torch 0"}
CPU = {"device": "cpu (x86_64)", "devices": 1, "mesh": "1", "backend": "jax", "framework": "jax 0"}
Capture = pytest.CaptureFixture[str]


def make(
    runs: Path,
    name: str,
    *,
    lr: float,
    layers: int,
    steps: int = 4,
    evaluated: bool = True,
    about: dict = CPU,
    **more: Any,
) -> None:
    folder = runs / name
    folder.mkdir(parents=True)
    optimizer = {"class": "portatrain.optim:AdamW", "lr": lr}
    recipe = {"name": "x", "steps": 8, "optimizer": optimizer, "model": {"layers": layers}, "data": {"seq_len": 8}}
    (folder / "run.json").write_text(json.dumps({"name": name, "recipe": {**recipe, **more}}))
    loss = abs(lr - 3e-3) * 100 + 1 / layers
    event = {"event": "eval", "step": steps, "loss": loss, "unix_s": 1100.0}
    rows = [row(s, 1, loss=loss + 1 / s) for s in range(1, steps + 1)]
    attempt(folder, 1, {**about, "began_unix_s": 1000.0}, rows, [event] if evaluated else [])


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two rates times two depths, of which one was trained longer."""
    monkeypatch.chdir(tmp_path)
    for lr in (1e-3, 3e-3):
        for layers in (2, 4):
            make(tmp_path / "runs", f"r{lr:g}-{layers}", lr=lr, layers=layers, steps=6 if layers == 4 else 4)
    return tmp_path / "runs"


def found(capsys: Capture, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["compare", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_fields_sweeps_and_the_best(runs: Path, capsys: Capture) -> None:
    said = found(capsys)
    assert said["fields"] == ["optimizer.lr", "model.layers"] and said["common_step"] == 4
    assert said["best"] == "r0.003-4" and said["judged_by"] == "validation loss"
    by_field = {sweep["field"]: sweep["lines"] for sweep in said["sweeps"]}
    assert by_field["optimizer.lr"] == [
        {"fixed": {"model.layers": n}, "runs": [{"value": lr, "run": f"r{lr}-{n}"} for lr in ("0.001", "0.003")]}
        for n in ("2", "4")
    ]
    assert [line["fixed"] for line in by_field["model.layers"]] == [{"optimizer.lr": v} for v in ("0.001", "0.003")]
    one = next(run for run in said["runs"] if run["label"] == "r0.001-4")
    assert one["loss_at_common_step"] == pytest.approx(0.2 + 1 / 4 + 1 / 4)  # of step 4, though it has 6
    assert (one["tokens"], one["seconds"], one["usd"]) == (600, 12.0, None)
    assert not Path("compare.html").exists()  # only what was asked for


def test_runs_that_are_not_evaluated_are_judged_at_a_step_that_all_have(runs: Path, capsys: Capture) -> None:
    make(runs, "short", lr=3e-3, layers=8, steps=2, evaluated=False)
    said = found(capsys, "r0.003-4", "short")
    assert said["judged_by"] == "training loss at step 2" and said["best"] == "short"
    assert said["runs"][0]["loss_at_common_step"] == pytest.approx(1 / 4 + 1 / 2)


def test_the_page_needs_nothing_and_draws_every_axis(runs: Path, capsys: Capture) -> None:
    make(runs, "a <b> & c", lr=1e-2, layers=2, about=H100)
    assert main(["compare"]) == 0
    table = capsys.readouterr().out
    assert "a <b> & c" in table and "best by validation loss: r0.003-4" in table and "compare.html: 5 runs" in table
    text = Path("compare.html").read_text()
    for what in ("http:", "https:", "<script", "<link", "@import", "src=", "url(", "<b> &"):
        assert what not in text, what
    for said in (
        "a &lt;b&gt; &amp; c",
        "Sweep over optimizer.lr",
        "Over steps",
        "Over tokens",
        "Over seconds",
        "Over USD",
    ):
        assert said in text, said
    assert "not recorded for r0.001-2, r0.001-4, r0.003-2, r0.003-4" in text  # over USD: a CPU has no price
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg viewBox=\"0 0 1000.*?</text></svg>", text, re.DOTALL)]
    lines = [len(list(chart.iter("polyline"))) for chart in charts]
    # Sweeps: lr at 2 depths, depth at 2 rates; 4 figures over steps, 2 over tokens, seconds and USD.
    assert lines == [2, 2, 5, 5, 5, 5, 5, 5, 5, 5, 1, 1]
    for chart in charts:
        numbers = [float(v) for p in chart.iter("polyline") for v in p.attrib["points"].replace(",", " ").split()]
        assert numbers and all(0 <= n <= 1000 for n in numbers)
    assert main(["compare"]) == 0  # its own page may be written again


@pytest.mark.parametrize(
    ("first", "whole"), [((4.0, 3.5), True), ((900.0, 700.0), False)], ids=["within reach", "far above"]
)
def test_the_scale_holds_the_first_steps_unless_they_would_hide_the_rest(first: tuple, whole: bool) -> None:
    values = [*first, *(2.0 + i % 2 for i in range(18))]
    text = curves_chart("loss", [Curve(number=0, label="a", points=list(enumerate(values)))], x_label="steps")
    box, line = ET.fromstring(text).find("svg"), ET.fromstring(text).find("svg/polyline")
    assert box is not None and line is not None
    top = float(box.attrib["y"])
    at = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert all(y >= top for y in at[2:])
    assert all(y >= top for y in at[:2]) is whole  # what lies above the box is cut off, in its true shape
    assert at[0] < at[1] < min(at[2:])


def test_usd_are_the_chips_hours_at_the_price_of_the_cluster(runs: Path, capsys: Capture) -> None:
    make(runs, "h100", lr=1e-2, layers=2, about=H100)
    make(runs, "lab", lr=1e-2, layers=3, about={**H100, "cluster": "lab"})
    Path("clusters.toml").write_text('[lab]\nchip = "h100"\ncount = 16\nprices = { on_demand = 2.0 }\n')
    catalog, lab = found(capsys, "h100", "lab")["runs"]
    assert lab["prices"]["1"]["usd_per_hour"] == 32.0 and "lab: 16 chips at 2 USD" in lab["prices"]["1"]["source"]
    assert lab["usd"] == pytest.approx(100 / 3600 * 32)  # from the start to the evaluation, 100 s later
    assert catalog["prices"]["1"]["usd_per_hour"] == pytest.approx(8 * 6.88)


def test_of_runs_over_several_attempts_each_second_has_its_own_price(runs: Path, capsys: Capture) -> None:
    from portatrain.commands.compare import compared
    from portatrain.runs.history import read_history

    make(runs, "moved", lr=1e-2, layers=2, about=H100)
    attempt(runs / "moved", 2, {**H100, "devices": 16, "began_unix_s": 2000.0}, [row(s, 4) for s in (4, 5)], [])
    one, _ = compared([read_history(runs / "moved"), read_history(runs / "r0.001-2")]).runs
    hour = 8 * 6.88 / 3600
    assert [x for x, _ in one.curve("loss", "usd")] == pytest.approx(
        [2 * hour, 4 * hour, 6 * hour, 10 * hour, 14 * hour]
    )
    assert one.usd == pytest.approx(100 * hour + 14 * 2 * hour)


def test_a_curve_that_is_not_finite_is_the_worst_and_is_drawn(runs: Path, capsys: Capture) -> None:
    make(runs, "burst", lr=1e-2, layers=2)
    path = runs / "burst" / "attempts" / "1"
    bad = [{**row(s, 1), "loss": "nan" if s > 1 else 9.0} for s in range(1, 5)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in bad))
    (path / "events.jsonl").write_text('{"event":"eval","step":4,"loss":"nan"}\n')
    said = found(capsys, "burst", "r0.001-2", "--out", "x.html")
    assert said["best"] == "r0.001-2" and said["runs"][0]["result"] == "inf"
    text = Path("x.html").read_text()
    assert "not finite" in text and "nan," not in text
    for svg in re.findall(r"<svg viewBox=\"0 0 1000.*?</text></svg>", text, re.DOTALL):
        ET.fromstring(svg)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["r0.001-2"], "at least two"),
        (["r0.001-2", "r0.001-2"], "twice"),
        (["r0.001-2", "r0.01-2"], "Did you mean"),
        (["--runs", "nowhere"], "at least two"),
        (["--out", "notes.txt"], "was not changed"),
        (["--out", "no/where.html"], "a writable file"),
    ],
)
def test_mistakes(words: list[str], hint: str, runs: Path, capsys: Capture) -> None:
    Path("notes.txt").write_text("mine")
    assert main(["compare", *words]) == 2
    said = capsys.readouterr().err
    assert hint in said and said.count("\n") == 1 and "Traceback" not in said
    assert Path("notes.txt").read_text() == "mine"


def test_a_damaged_run_is_left_out_unless_it_is_named(runs: Path, capsys: Capture) -> None:
    (runs / "r0.001-2" / "run.json").write_text("{")
    assert main(["compare", "--json"]) == 0
    said = capsys.readouterr()
    assert len(json.loads(said.out)["runs"]) == 3 and said.err.startswith("r0.001-2 is left out: ")
    assert main(["compare", "r0.001-2", "r0.001-4"]) == 2
    assert "a JSON file that portatrain wrote" in capsys.readouterr().err


def test_runs_that_have_not_trained_are_listed(runs: Path, capsys: Capture) -> None:
    for name in ("new", "newer"):
        (runs / name).mkdir()
        (runs / name / "run.json").write_text(json.dumps({"name": name, "recipe": {"steps": 3}}))
    said = found(capsys, "new", "newer", "--out", "x.html")
    assert said["best"] is None and [run["state"] for run in said["runs"]] == ["QUEUED", "QUEUED"]
    assert "None: the recipes are the same" in Path("x.html").read_text()
