"""The report: one page that needs nothing else, and says what the record says."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from portatrain.cli import main
from portatrain.runs.history import kept_checkpoints, read_history
from portatrain.runs.report.charts import Band, Mark, chart
from portatrain.runs.run_dir import RunDir
from portatrain.system.svg import columns, ticks
from tests.support.records import attempt, row

EVAL = {"event": "eval", "step": 8, "loss": 0.7, "metrics": {"accuracy": 0.5}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Killed after step 7, resumed from step 5 on torch, stopped; refused once; resumed from 9 with a broken check."""
    run = tmp_path / "a <run> & more"
    run.mkdir()
    recipe = {"name": "x", "steps": 12, "data": {"seq_len": 8}, "note": "<script>alert(1)</script>"}
    (run / "run.json").write_text(json.dumps({"name": run.name, "recipe": recipe, "recipe_sha256": "ab" * 32}))
    began = {"device": "cpu (x86_64)", "devices": 1, "mesh": "1", "framework": "jax 0"}
    attempt(
        run,
        1,
        {**began, "backend": "jax", "began_unix_s": 1000.0},
        [row(s, 1) for s in range(1, 8)],
        [],
        {"planned": True, "plan": {"step_s": 1.5, "memory_total_bytes": 2**29}},
    )
    good = {"verdict": "continuous", "differs": [], "loss_difference": 3e-7, "loss_bound": 1e-5, "accepted": None}
    attempt(
        run,
        2,
        {**began, "backend": "torch", "mesh": "fsdp=2", "devices": 2, "began_unix_s": 1100.0},
        [row(s, 6, loss=math.pi if s == 8 else 5.0 / s) for s in range(6, 10)],
        [{"event": "resumed", "step": 5, **good}, EVAL, {"event": "end", "status": "stopped", "unix_s": 1119.0}],
        {"planned": False, "why": "no chip of the catalog"},
    )
    drift = {"verdict": "broken", "differs": ["rng.word"], "accepted": "a <b>reason</b>"}
    attempt(
        run,
        3,
        {**began, "backend": "jax", "began_unix_s": 1200.0},
        [row(10, 10)],
        [{"event": "resumed", "step": 9, **drift}],
    )
    for step, commit in ((5, True), (9, False)):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "pack").write_bytes(b"x" * 2**20)
        if commit:
            (folder / "COMMIT").write_text('{"save":"a1"}')
    return run


def test_facts(run: Path) -> None:
    found = read_history(run)
    assert [(a.number, *(a.steps or ()), a.again, a.ended) for a in found.attempts] == [
        (1, 1, 7, 2, "lost"),
        (2, 6, 9, 0, "stopped"),
        (3, 10, 10, 0, "lost"),
    ]
    first, second = found.resume_points
    assert (first.step, first.earlier, first.attempt, first.retrained, first.retrained_s) == (5, 1, 2, 2, 4.0)
    # The last step there ended at 1000 + 24; the first here began at 1100 + 12 - 2.
    assert first.gap_s == pytest.approx(1110 - 1024)
    assert (second.step, second.event["accepted"], second.retrained) == (9, "a <b>reason</b>", 0)
    assert found.lost_s == pytest.approx(4 + 86 + (1210 - 1118))
    assert [(c["step"], c["committed"]) for c in kept_checkpoints(RunDir(run))] == [(5, True), (9, False)]
    assert [r["step"] for r in found.curve] == list(range(1, 11))


def test_the_page_needs_nothing_and_says_all(run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", str(run)]) == 0
    assert "10 steps, 3 attempts, 2 resume points" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    for what in ("http:", "https:", "<script", "<link", "@import", "src=", "url("):
        assert what not in text, what
    for said in (
        "continuous",
        "loss 3.0e-07 (bound 1e-05)",
        "rng.word",
        "a &lt;b&gt;reason",
        "torch on 2 x cpu (x86_64), fsdp=2",
        "2 steps, 4.0 s",
        "planned step",
        "1.5 s",
        "not planned: no chip of the catalog",
        "not committed",
        "&lt;script&gt;alert",
        "validation loss 0.7000 at step 8, accuracy 0.5",
        "attempt 1: jax",
        "ab" * 32,
    ):
        assert said in text, said
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 4
    for svg in svgs:
        tree = ET.fromstring(svg)
        assert len(tree.findall("rect")) == 3 and len(tree.findall("g")) == 2
        numbers = [float(v) for p in tree.iter("polyline") for v in p.attrib["points"].replace(",", " ").split()]
        assert numbers and all(0 <= n <= 1000 for n in numbers)


def test_a_long_curve_is_drawn_with_its_range() -> None:
    points = [(i, math.sin(i / 50) + (5.0 if i == 7777 else 0.0)) for i in range(1, 20_001)]
    drawn = columns(points)
    assert len(drawn) <= 600 and max(c[3] for c in drawn) > 3.9  # no peak is lost
    svg = ET.fromstring(chart("t", points, steps=20_000, bands=[], marks=[]))
    assert svg.find("polygon") is not None


@pytest.mark.parametrize("values", [[], [float("nan")], [1.0], [2.0, 2.0], [0.0, 0.0], [1e30, -1e30], [1e-30, 2e-30]])
def test_odd_curves_are_drawn(values: list[float]) -> None:
    made = chart(
        "t",
        list(enumerate(values, 1)),
        steps=3,
        bands=[Band(number=9, first=1, last=1, text="&")],
        marks=[Mark(step=1, verdict="odd", text="<")],
        dots=[(1, float("inf"))],
    )
    ET.fromstring(made)
    assert "nan" not in made and "inf" not in made


def test_ticks_are_round_and_within() -> None:
    assert ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.0, 1.0) == [1.0]
    for low, high in ((0.013, 0.018), (-3, 1e6), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6 and all(low - 1e-12 <= t <= high * (1 + 1e-9) for t in found)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty", "no place"])
def test_bad_input(kind: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    words = [str(tmp_path / kind)] if kind != "no place" else [str(run), "--out", str(tmp_path / "x/y.html")]
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error


def test_a_run_that_has_not_trained_yet(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"name": "run", "recipe": {"steps": 3}}))
    assert main(["report", str(run)]) == 0
    assert "QUEUED" in (run / "report.html").read_text()
