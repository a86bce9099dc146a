"""Blame a run whose checkpoints are in an object store, and one whose whole directory is; `make test-s3` runs it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from portatrain.cli import main
from portatrain.runs.open import open_run
from portatrain.system.exit_codes import FOUND, MISTAKE, OK, STORAGE
from tests.support import poisoned
from tests.support.running import BACKENDS
from tests.support.s3 import Proxy, s3

pytest.importorskip("obstore")

STEP = 54
"""A step with a sample of bytes without sense (tests/support/poisoned.py)."""


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Proxy]]:
    with s3(monkeypatch) as found:
        yield found


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    assert main(["blame", *words, "--step", str(STEP), "--json"]) == FOUND
    return json.loads(capsys.readouterr().out)["blame"]


def test_checkpoints_in_s3(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It names what it names on a disk, bit for bit, though every eleventh request fails; so does the branch."""
    url, proxy = there
    made = poisoned.write(tmp_path / "made")
    runs = made / "runs"
    words = ["train", str(made / "recipe.py"), "--backend", BACKENDS[-1], "--run-dir"]
    assert main([*words, str(runs / "here")]) == OK
    proxy.fault = lambda method, path, number: 500 if number % 11 == 0 else None
    assert main([*words, str(runs / "there"), "--checkpoints", f"{url}/checkpoints"]) == OK
    assert not (runs / "there/checkpoints").exists()
    capsys.readouterr()
    both = [found(capsys, name, "--runs", str(runs)) for name in ("here", "there")]
    assert both[0] == both[1] and both[0]["blamed"] and not both[1]["notes"]
    number = both[1]["blamed"][0]
    branch = ["--without", str(number), "--run", "without"]
    assert main(["blame", "there", "--runs", str(runs), *branch]) == OK
    assert main(["blame", "here", "--runs", str(runs), "--without", str(number), "--run", "same"]) == OK
    curves = [
        [(row["step"], row["loss"]) for row in open_run(str(runs / name)).curve()] for name in ("without", "same")
    ]
    assert curves[0] == curves[1] and curves[0][0][0] <= STEP


def test_what_is_gone_in_s3_ends_in_one_paragraph(
    there: tuple[str, Proxy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, proxy = there
    made = poisoned.write(tmp_path / "made")
    words = ["train", str(made / "recipe.py"), "--backend", BACKENDS[-1], "--run-dir", str(made / "runs/run")]
    assert main([*words, "--checkpoints", f"{url}/checkpoints", "--stop-at", "30"]) == 85

    def said(*more: str, code: int = MISTAKE) -> str:
        capsys.readouterr()
        assert main(["blame", "run", "--runs", str(made / "runs"), *more]) == code
        error = capsys.readouterr().err.splitlines()
        assert not [line for line in error if "Traceback" in line]
        return error[-1]

    assert "expected a step that the run has trained, got steps 1 to 30" in said("--step", "31")
    assert "at most 1 steps before it" in said("--step", "28", "--replay", "1")
    proxy.fault = lambda method, path, number: 403 if method == "GET" else None
    assert said("--step", "28", code=STORAGE).startswith("error: ")
    proxy.fault = lambda method, path, number: 404 if method == "GET" and "/pack-" in path else None
    gone = said("--step", "28", code=STORAGE)
    assert "step-00000025/pack-a1-00000-0000.safetensors: expected to read it, got no such object" in gone


def test_a_run_directory_in_s3(
    there: tuple[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url, _ = there
    made = poisoned.write(tmp_path / "made")
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "one"))
    assert main(["train", str(made / "recipe.py"), "--backend", BACKENDS[-1], "--run-dir", url]) == OK
    monkeypatch.setenv("PORTATRAIN_SCRATCH", str(tmp_path / "two"))
    capsys.readouterr()
    (first, *_) = found(capsys, url)["documents"]
    assert Path(first["document"]["file"]).stem == "garbage"
