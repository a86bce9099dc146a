"""The commands `portatrain plan` and `portatrain clusters`: what they print, and one clear error for each mistake."""

from __future__ import annotations

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from portatrain.commands import clusters, plan
from portatrain.errors import UserError
from portatrain.plan.clusters.names import EXAMPLES


def call(module: Any, *words: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    module.add_arguments(parser)
    return int(module.run(parser.parse_args(list(words))))


def test_json_is_a_list_with_one_object_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, "llama3-8b", "--cluster", "tpu-v5p-256,h100-64,h200-8,cs3-1,m4-max-1", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["cluster"] for one in found] == ["tpu-v5p-256", "h100-64", "h200-8", "cs3-1", "m4-max-1"]
    assert [one["status"] for one in found] == ["fits", "fits", "fits", "not-planned", "does-not-fit"]
    best = found[0]["plan"]
    assert best["mesh"]["fsdp"] == 128 and best["memory_total_bytes"] == sum(best["memory_bytes"].values())
    assert best["step_s"] == pytest.approx(sum(best["time_s"].values()))
    assert len(found[0]["others"]) == 9 and all(other["why_not"] for other in found[0]["others"])
    assert found[0]["mfu_convention"] and found[0]["confidence"]["time"]["typical_error"] > 0
    assert {piece["mesh_axis"] for piece in best["torus_order"]} == {"fsdp"}
    assert found[4]["short_bytes"] > 0 and found[4]["would_fit"]


def test_tables_name_every_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, "llama3-1b") == 0
    text = capsys.readouterr().out
    for name in EXAMPLES:
        assert name in text
    assert "leave-one-out" in text and "no recomputation" in text


def test_one_cluster_is_shown_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, "llama3-70b", "--cluster", "h100-64") == 0
    text = capsys.readouterr().out
    for part in ("by term", "how the mesh maps to the hardware", "why not the others", "optimizer", "GB/s a device"):
        assert part in text


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, "llama3-70b", "--cluster", "h200-8") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "does not fit by" in text and "more chips: h200-16" in text and "bf16-state" in text


def test_a_recipe_file_with_overrides_and_its_own_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    recipe = tmp_path / "mine.py"
    source = Path(__file__).parents[2] / "recipes" / "tiny_lm.py"
    recipe.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "clusters.toml").write_text("[lab]\nchip = 'h100'\ncount = 8\nprices = {spot = 2}\n", encoding="utf-8")
    assert call(plan, str(recipe), "--cluster", "lab", "--set", "model.layers=8", "--batch", "32", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["cluster"], found["batch"], found["price"]["value"]) == ("lab", 32, 2)


def test_presets_take_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(plan, "llama3-8b", "--cluster", "h100-8", "--set", "batch=64", "--seq-len", "4096", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["seq_len"]) == (64, 4096)


def test_a_token_of_data_without_tokens_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for recipe, told in (("tiny-vit", True), ("tiny-lm", False)):
        assert call(plan, recipe, "--cluster", "h100-8") == 0
        assert ("tok counts the 16 positions" in " ".join(capsys.readouterr().out.split())) is told


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "cost.svg"
    assert call(plan, "llama3-8b", "--cluster", "h100-64,tpu-v5p-256", "--plot", str(target), "--json") == 0
    picture = ET.fromstring(target.read_text(encoding="utf-8"))
    texts = {text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {"h100-64", "tpu-v5p-256", "days per run"} <= texts
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["llama3-9b", "--cluster", "h100-8"], "llama3-8b"),
        (["llama3-8b", "--cluster", "h10-8"], "Did you mean h100"),
        (["llama3-8b", "--cluster", "tpu-v5p-4x4x6"], "4x4x8"),
        (["llama3-8b", "--cluster", ","], "--cluster"),
        (["llama3-8b", "--cluster", "h100-8", "--mesh", "fsdp=3"], "8 devices"),
        (["llama3-8b", "--cluster", "h100-8", "--mesh", "fdsp=8"], "fsdp"),
        (["llama3-8b", "--cluster", "h100-8", "--precision", "bf8"], "bf16"),
        (["llama3-8b", "--cluster", "h100-8", "--remat", "all"], "block"),
        (["llama3-8b", "--cluster", "h100-8", "--batch", "0"], "at least 1"),
        (["llama3-8b", "--cluster", "h100-8", "--set", "bach=8"], "batch"),
        (["tiny-vit", "--cluster", "h100-8", "--seq-len", "512"], "how long its samples are"),
        (["llama3-8b", "--cluster", "h100-8", "--plot", "/nowhere/cost.png"], "--plot"),
        (["llama3-8b", "--cluster", "h100-8", "--plot", "cost.png"], ".svg"),
    ],
)
def test_mistakes(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        call(plan, *words)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (None, ["tpu-v5p", "gb300", "ascend910c", "cpu"]),
        ("h100", ["989.5 TFLOP/s", "370 GB/s", "p5.48xlarge", "torch"]),
        ("tpu-v5p-256", ["4x4x8, all axes wrap", "128 tpu-v5p", "32", "2765 GB/s"]),
        ("gb300-72", ["~2500 TFLOP/s", "1 domain of 72"]),
    ],
)
def test_clusters(name: str | None, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(clusters, *([name] if name else [])) == 0
    text = capsys.readouterr().out
    for part in parts:
        assert part in text


def test_clusters_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(clusters, "mi300x-64", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chips"] == 64 and found["figures"]["link"]["value"] == 64
    assert found["figures"]["link"]["source"] and not found["figures"]["link"]["estimate"]
    assert call(clusters, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["chips"]) > 30


def test_clusters_shows_your_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clusters.toml").write_text(
        "[lab]\nchip = 'h100'\ncount = 64\nengine = 'slurm'\nstorage = '/data'\n", encoding="utf-8"
    )
    assert call(clusters) == 0
    text = capsys.readouterr().out
    assert "lab" in text and "slurm" in text and "clusters.toml:1" in text


def test_unknown_cluster() -> None:
    with pytest.raises(UserError, match="Did you mean"):
        call(clusters, "h1000-8")
