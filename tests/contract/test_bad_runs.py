"""Mistakes that only a run can find: one paragraph, exit code 2, and nothing changed on disk (or nothing lost)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from portatrain.backends.base import missing
from portatrain.cli import main
from portatrain.runs.run_dir import RunDir

BACKENDS = [n for n in ("jax", "torch") if not missing(n)]
TINY = [
    "model.layers=1",
    "model.embed=32",
    "model.mlp=64",
    "data.seq_len=32",
    "batch=4",
    "steps=6",
    "schedule.warmup=0",
    "eval_every=none",
    "hooks=()",
]

RECIPE = """
import dataclasses
from portatrain.data import TextFiles
from recipes.tiny_lm import recipe as tiny_lm

def recipe():
    base = tiny_lm()
    model = dataclasses.replace(base.model, layers=1, embed=32, mlp=64)
    return dataclasses.replace(base, model=model, data=TextFiles(paths={paths!r}, seq_len=32), batch=4, steps=4,
                               eval_every=None, hooks=(), schedule=dataclasses.replace(base.schedule, warmup=0))
"""


def run(*words: str) -> int:
    return main(["train", *words])


def paragraph(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    assert "expected" in lines[0] and "got" in lines[0] and lines[0].rstrip().endswith((".", "'"))
    return lines[0]


CORPORA: dict[str, tuple[dict[str, bytes], str]] = {
    "missing": ({}, "nothing"),
    "empty folder": ({"notes/": b""}, "notes"),
    "empty files": ({"a.txt": b"", "b.txt": b""}, "*.txt"),
    "too small": ({"a.txt": b"short"}, "*.txt"),
    "smaller than a batch": ({"a.txt": b"x" * 70, "b.txt": b"y" * 10}, "*.txt"),
}


@pytest.mark.parametrize("corpus", CORPORA)
def test_a_corpus_that_will_not_do(
    corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture, unchanged: Callable[[Path], None]
) -> None:
    files, paths = CORPORA[corpus]
    for name, content in files.items():
        if name.endswith("/"):
            (tmp_path / name).mkdir()
        else:
            (tmp_path / name).write_bytes(content)
    recipe = tmp_path / "mine.py"
    recipe.write_text(RECIPE.format(paths=str(tmp_path / paths)))
    unchanged(tmp_path)
    assert run(str(recipe), "--run-dir", str(tmp_path / "run")) == 2
    paragraph(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--set=model.vocab=100"], "model.vocab=256"),
        (["--mesh=tensor=3"], "divides"),
        (["--mesh=fsdp=3"], "divides"),
        (["--mesh=expert=2"], "experts"),
        (["--mesh=fsdp=4", "--devices=2"], "mesh"),
        (["--mesh=rows=2"], "rows"),
        (["--set=frozen=('blocks/nothing',)"], "nothing"),
        (["--set=remat=most"], "most"),
        (["--set=batch=1000000000"], "samples"),
    ],
)
def test_what_does_not_go_together(
    change: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture, unchanged: Callable[[Path], None]
) -> None:
    unchanged(tmp_path)
    options = [f"--set={o}" for o in TINY]
    assert run("tiny-lm", "--run-dir", str(tmp_path / "run"), *options, *change) == 2
    assert says in paragraph(capsys.readouterr().err)


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_that_are_not_finite_end_the_run_and_name_the_step(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A learning rate that blows up: the steps are skipped and counted, the state stays finite, the run ends."""
    options = [f"--set={o}" for o in [*TINY, "optimizer.lr=1e30", "optimizer.weight_decay=0.0", "max_skips=2"]]
    assert run("tiny-lm", "--run-dir", str(tmp_path / "run"), f"--backend={backend}", *options) == 2
    found = RunDir(tmp_path / "run")
    skipped = [e["step"] for e in found.events("skipped")]
    assert len(skipped) == 3 and skipped == list(range(skipped[0], skipped[0] + 3))
    said = paragraph(capsys.readouterr().err)
    assert f"step {skipped[-1]} of tiny-lm" in said and f"first: step {skipped[0]}" in said
    assert [row["step"] for row in found.curve()] == list(range(1, skipped[-1] + 1))
    assert not found.is_done
    rows = (tmp_path / "run/attempts/1/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(row)["step"] for row in rows)  # not-finite numbers too are on record, as valid lines


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after step 3, and beside it one of a wider model."""
    path = tmp_path_factory.mktemp("stopped")
    for name, more in (("run", ()), ("wide", ("--set", "model.embed=48"))):
        words = [word for size in TINY for word in ("--set", size)]
        assert run("tiny-lm", "--run-dir", str(path / name), *words, *more, "--stop-at", "3") == 85
    return path


def edit_root(folder: Path, change: Callable[[dict], None]) -> None:
    """Change a checkpoint's root, with a COMMIT that agrees."""
    commit = json.loads((folder / "COMMIT").read_text())
    root = json.loads((folder / commit["root"]).read_text())
    change(root)
    data = json.dumps(root, separators=(",", ":")).encode()
    (folder / commit["root"]).write_bytes(data)
    commit |= {"length": len(data), "sha256": hashlib.sha256(data).hexdigest(), "version": root["version"]}
    (folder / "COMMIT").write_text(json.dumps(commit, separators=(",", ":")))


def _other_model(run: Path, wide: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(wide / "checkpoints", run / "checkpoints")


def _root(change: Callable[[dict], None]) -> Callable[[Path, Path], None]:
    return lambda run, wide: edit_root(run / "checkpoints" / "step-00000003", change)


NOT_THIS_RUNS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "a newer format": (_root(lambda root: root.update(version=2)), "version: expected 1, got 2"),
    "an unknown feature": (_root(lambda root: root.update(features=["zstd"])), "got 'zstd'. Read it with a newer"),
    "another model's": (_other_model, "different: params/embed/table"),
    "another corpus": (
        _root(lambda root: root["meta"]["data"].update(fingerprint="0" * 64)),
        "got a run on another corpus, 000000",
    ),
}


@pytest.mark.parametrize("case", NOT_THIS_RUNS)
def test_a_checkpoint_that_is_not_this_runs(
    case: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture, unchanged: Callable[[Path], None]
) -> None:
    change, said = NOT_THIS_RUNS[case]
    path = tmp_path / "run"
    shutil.copytree(stopped / "run", path)
    change(path, stopped / "wide")
    unchanged(tmp_path)
    words = [word for size in TINY for word in ("--set", size)]
    assert run("tiny-lm", "--run-dir", str(path), *words) == 2
    assert said in paragraph(capsys.readouterr().err)


def test_a_checkpoint_of_a_newer_format_is_not_called_damaged(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run"
    shutil.copytree(stopped / "run", path)
    edit_root(path / "checkpoints" / "step-00000003", lambda root: root.update(version=7))
    assert main(["ckpt", "ls", str(path)]) == 0
    assert main(["ckpt", "verify", str(path)]) == 1
    said = capsys.readouterr().out
    assert said.count("of a newer format") == 2 and "amaged" not in said.replace("DAMAGED", "damaged")
