"""Statistics, values of `ops.aux` and numbers of hooks on the pages of one run and of several, and their limits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from portatrain.runs.comparison import compare, read
from portatrain.runs.history import History, read_history
from portatrain.runs.report import compared
from portatrain.runs.report.page import page
from portatrain.runs.report.watched import CHARTS, SCALARS, scalars, series
from portatrain.runs.reported import numbers
from tests.support.records import attempt, row

NAMES = ("attn/wq", "attn/wk", "attn/wv", "attn/wo", "mlp/up", "mlp/down", "attn_norm/scale", "mlp_norm/scale")


def made(where: Path, layers: int, *, rows: int = 40, aux: int = 2, **more: Any) -> Path:
    """A run of two attempts, whose second one trains the last four steps again; every second step has statistics."""
    where.mkdir()
    recipe = {"name": "x", "steps": rows, "data": {"seq_len": 8}, **more}
    (where / "run.json").write_text(json.dumps({"name": where.name, "recipe": recipe, "recipe_sha256": "ab" * 32}))

    def found(step: int) -> dict[str, float]:
        kinds = [("grad", NAMES), ("update", NAMES), ("params", NAMES), ("rms", ("attn", "mlp")), ("logit", ("attn",))]
        each = {
            f"{kind}/blocks/{name}/{layer}": step + layer / 1000
            for kind, names in kinds
            for name in names
            for layer in range(layers)
        }
        return {**each, "rms/embed": 0.25, "dead/blocks/mlp/0": 0.5}

    def rows_of(first: int, last: int) -> list[dict[str, Any]]:
        return [
            row(
                s,
                first,
                aux={f"value-{n}": float(s * n) for n in range(aux)},
                **({"statistics": found(s)} if s % 2 == 0 else {}),
            )
            for s in range(first, last + 1)
        ]

    about = {"device": "cpu", "devices": 1, "mesh": "1", "framework": "jax 0", "backend": "jax"}
    events = [{"event": "warmth", "step": s, "heat": s / 10, "by": {"a": 1.0}, "word": "x"} for s in (4, 30, rows)]
    events += [{"event": "saving", "step": 6, "seconds": 3.0}, {"event": "later", "unix_s": 1000 + 10 + 2 * 5, "n": 7}]
    attempt(where, 1, {**about, "began_unix_s": 1000.0}, rows_of(1, rows), events)
    again = [{"event": "warmth", "step": rows - 1, "heat": 9.0}]
    attempt(where, 2, {**about, "began_unix_s": 2000.0}, rows_of(rows - 3, rows), again)
    return where


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> History:
    return read_history(made(tmp_path_factory.mktemp("watched") / "small", 3))


def test_statistics_are_series_by_layer(run: History) -> None:
    found = {one.name: one for one in series(run)}
    assert list(found["grad/blocks/attn/wq"].layers) == ["0", "1", "2"]
    assert found["rms/embed"].layers == [""] and found["rms/embed"].layer(0)[0] == (2.0, 0.25)
    assert list(found["logit/blocks/attn"].values) == list(range(2, 41, 2))  # no step twice
    assert found["logit/blocks/attn"].over(2)[-1] == (40.0, 40.002)


def test_numbers_of_hooks_are_on_the_curve_at_their_step(run: History) -> None:
    assert run.reported["warmth/heat"] == [(4, 0.4), (30, 3.0), (39, 9.0)]  # step 40 was trained again, without one
    assert run.reported["warmth/by/a"] == [(4, 1.0), (30, 1.0)]
    assert run.reported["later/n"] == [(5, 7.0)]  # after the fifth row
    assert not any("saving" in name or "word" in name for name in run.reported)
    assert list(scalars(run)) == ["value-0", "value-1", "warmth/heat", "warmth/by/a", "later/n"]
    assert numbers({1: [{"event": "early", "unix_s": 5.0, "n": 1}]}, {1: []}, {}) == {"early/n": [(0, 1.0)]}


def test_the_page_shows_them(run: History) -> None:
    text = page(run, ())
    for kind in ("rms", "logit", "dead", "grad", "update", "params"):
        assert f">{kind}/blocks/" in text
    assert text.count("<details open>") == 3 and text.count("<details>") == 3
    assert "40.002 (2)" not in text and "40 (2)" in text  # four digits, and the layer
    assert "warmth/heat" in text and "value-1" in text
    assert not re.search(r"<script|https?://", text)


def test_a_model_of_100_layers_has_a_page_that_a_browser_shows(tmp_path: Path) -> None:
    deep = read_history(made(tmp_path / "deep", 100, rows=400, aux=SCALARS + 2))
    text = page(deep, ())
    assert len(text) < 4 * 2**20
    assert "grad/blocks/attn/wq, over the layers" in text
    assert f"Not drawn: value-{SCALARS}, " in text
    # A curve for each of the least, the middle and the largest layer, and no more.
    (chart,) = re.findall(
        r'aria-label="grad/blocks/attn/wq">.*?</svg></svg>|aria-label="grad/blocks/attn/wq">.*?</p>', text
    )[:1]
    assert chart.count("<polyline") == 3


def test_names_beyond_the_limit_are_in_the_table(tmp_path: Path) -> None:
    folder = made(tmp_path / "many", 1, rows=4)
    path = folder / "attempts/1/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:2]]
    rows[1]["statistics"] = {f"grad/tensor-{n}": float(n) for n in range(CHARTS + 3)}
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "attempts/2/metrics.jsonl").write_text("")
    text = page(read_history(folder), ())
    assert "3 more are in the table alone" in text and f"<td>grad/tensor-{CHARTS + 2}</td>" in text
    assert text.count('aria-label="grad/tensor-') == CHARTS


def test_a_number_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "odd", 2, rows=4)
    path = folder / "attempts/2/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["statistics"]["grad/blocks/attn/wq/1"] = "nan"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = read_history(folder)
    (one,) = (one for one in series(found) if one.name == "grad/blocks/attn/wq")
    assert math.isnan(one.over(2)[-1][1])
    assert "not finite" in page(found, ())


def test_several_runs_are_compared_by_their_largest_layers(tmp_path: Path) -> None:
    folders = [made(tmp_path / name, layers, rows=8, note=name) for name, layers in (("one", 2), ("two", 9))]
    text = compared.page(compare(read([str(folder) for folder in folders])))
    assert "logit/blocks/attn, largest layer" in text and "warmth/heat" in text and "value-1" in text
    (chart,) = re.findall(r'aria-label="value-1">.*?</svg></svg>|aria-label="value-1">.*?class="title"', text)[:1]
    assert chart.count("<polyline") == 2
