"""The proof for one GPU runs at tiny sizes on a CPU, says no where it should, and ends in time."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.gpu_proof import __main__ as proof
from benchmarks.gpu_proof import parts
from benchmarks.gpu_proof.jobs import Jobs
from benchmarks.gpu_proof.page import page
from benchmarks.gpu_proof.speed import layers_that_fit

pytest.importorskip("torch")
ABOUT = {"backends": ["jax", "torch"], "about": {}, "device": "cpu", "seconds": 1.0}


def jobs(tmp_path: Path, seconds: float = 60.0) -> Jobs:
    return Jobs(device="cpu", folder=tmp_path, until=time.monotonic() + seconds)


@pytest.mark.full
def test_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gpu_proof", "--device", "cpu", "--out", str(tmp_path), "--only", "parity,rates,speed"]
    monkeypatch.setattr(sys, "argv", words)
    assert proof.main() == 0
    found = json.loads((tmp_path / "proof.json").read_text())
    (row,) = found["parity"]["rows"]
    assert 0 < row["gradient"] <= found["parity"]["bound"] < 1e-5 and not row["failures"]
    cells = {(row["who"], row["precision"]): row for row in found["speed"]["rows"]}
    assert {("jax", "fp8"), ("torch", "bf16"), ("transformers", "bf16")} <= cells.keys()
    assert all(row["tokens_per_s"] > 0 and np.isfinite(row["losses"]).all() for row in cells.values())
    assert cells["jax", "bf16"]["losses"][0] == pytest.approx(cells["torch", "bf16"]["losses"][0], rel=2e-2)
    said = (tmp_path / "proof.md").read_text()
    assert said in capsys.readouterr().out and "## Parity: good" in said


def test_a_device_with_other_numbers_is_not_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = np.ones((2, 2), np.float32)

    def answer(self: Jobs, do: str, job: dict[str, Any], *, device: str, most_s: float) -> dict[str, Any]:
        off = 1.0 + (1e-3 if job["backend"] == "torch" else 0.0)
        np.savez(job["arrays"], **{"g/w": one * off, "p/w": one})
        return {"losses": [1.0] * 5, "norms": [1.0] * 5, "bound": 1e-6}

    monkeypatch.setattr(Jobs, "answer", answer)
    part = parts.parity(jobs(tmp_path), ABOUT)
    assert not part["good"] and part["rows"][0]["failures"][0].startswith("gradient differs by 1.0")
    said = page({**ABOUT, "parity": part})
    assert "## Parity: NOT GOOD" in said and "gradient differs by" in said


def test_a_process_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Jobs, "answer", lambda *a, **k: {"error": "no such | device"})
    part = parts.parity(jobs(tmp_path), ABOUT)
    assert not part["good"]
    assert "no such / device" in page({**ABOUT, "parity": part})
    monkeypatch.setattr(Jobs, "run", lambda *a, **k: (1, "Traceback"))
    assert parts.move(jobs(tmp_path), ABOUT)["error"].endswith("Traceback")
    assert not parts.court(jobs(tmp_path), ABOUT)["good"]


def test_a_process_ends_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    code, said = jobs(tmp_path).run([sys.executable, "-c", "import time; time.sleep(60)"], device="cpu", most_s=1.5)
    assert code is None and re.match(r"ended after \d", said) and time.monotonic() - began < 30
    assert jobs(tmp_path, -1.0).answer("rates", {}, device="cpu", most_s=9)["error"] == "not begun: the time was over"


def test_only_the_cpu_is_seen_where_that_is_asked_for(tmp_path: Path) -> None:
    gpu = Jobs(device="cuda", folder=tmp_path, until=0.0)
    assert gpu.environment("cpu")["CUDA_VISIBLE_DEVICES"] == "" and gpu.environment("cpu")["JAX_PLATFORMS"] == "cpu"
    assert "JAX_PLATFORMS" not in gpu.environment("cuda")


@pytest.mark.parametrize("words", [["--only", "parity,everything"], ["--device", "rocm"], []])
def test_bad_input(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(proof, "device_here", lambda: "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu_proof", *words])
    with pytest.raises(SystemExit, match="2"):
        proof.main()
    assert "expected" in capsys.readouterr().err


def test_as_many_layers_as_fit() -> None:
    assert layers_that_fit("8b", 2**30) == 0
    found = [layers_that_fit("8b", gib * 2**30) for gib in (40, 80, 141, 1000)]
    assert found == sorted(found) and 2 <= found[0] < found[1] < found[2] < found[3] == 32
