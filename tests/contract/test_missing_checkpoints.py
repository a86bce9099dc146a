"""What is missing is not taken for new: the record of a run knows what was committed, and an attempt compares."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from portatrain.checkpoint.interop import export_import
from portatrain.cli import main
from portatrain.errors import StorageError, UserError
from portatrain.runs.commits import Recorded, newest_recorded
from portatrain.runs.events import Kind
from portatrain.runs.run_dir import RunDir
from portatrain.training.trainer import train
from tests.support.running import BACKENDS
from tests.support.short_runs import SMALL, small

BACKEND = BACKENDS[-1]
RECIPE = small("checkpoint_every=2", "checkpoint_keep=3")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train(RECIPE, RunDir(path), backend=BACKEND, stop_at=4) == 85
    return path


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> RunDir:
    shutil.copytree(stopped, tmp_path / "run")
    return RunDir(tmp_path / "run")


def refused(run: RunDir, kind: type[UserError], said: str) -> None:
    """The next attempt ends before it begins, and nothing was changed; the corpus may have been packed."""

    def there() -> list[Path]:
        return sorted(p for p in run.path.rglob("*") if "data" not in p.relative_to(run.path).parts)

    before = there()
    with pytest.raises(kind, match=said):
        train(RECIPE, run, backend=BACKEND, stop_at=5)
    assert there() == before


def test_every_commit_is_in_the_record(run: RunDir) -> None:
    assert [e["step"] for e in run.events(Kind.COMMITTED)] == [2, 4]
    assert newest_recorded(run) == Recorded(step=4, attempt=1)
    assert newest_recorded(RunDir(run.path / "nothing")) is None


def test_the_last_commit_of_which_an_attempt_wrote_counts(tmp_path: Path) -> None:
    events: dict[int, list[dict[str, object]]] = {
        1: [{"event": "save_committed", "step": 2}, {"event": "save_committed", "step": 4}, {"event": "left"}],
        2: [{"event": "left", "committed": 5}, {"event": "left", "committed": 6}, {"event": "end"}],
        3: [{"event": "start"}, {"event": "left", "committed": None}],
    }
    run = RunDir(tmp_path)
    for number, rows in events.items():
        (tmp_path / "attempts" / str(number)).mkdir(parents=True)
        (tmp_path / "attempts" / str(number) / "events.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert newest_recorded(run) == Recorded(step=4, attempt=1)
    shutil.rmtree(tmp_path / "attempts/1")
    assert newest_recorded(run) == Recorded(step=6, attempt=2)
    shutil.rmtree(tmp_path / "attempts/2")
    assert newest_recorded(run) is None


def test_checkpoints_that_are_away_are_no_new_run(run: RunDir) -> None:
    away = run.path / "checkpoints"
    away.rename(run.path.parent / "away")
    refused(run, StorageError, "the checkpoint of step 4, which attempt 1 had, got no checkpoint at all")
    away.mkdir()  # a mount point without its mount
    refused(run, StorageError, "got no checkpoint at all")
    away.rmdir()
    (run.path.parent / "away").rename(away)
    assert train(RECIPE, run, backend=BACKEND, stop_at=5) == 85
    assert [r["step"] for r in run.curve()] == [1, 2, 3, 4, 5]


def test_an_older_record_without_events_of_commits_serves_too(run: RunDir) -> None:
    events = run.path / "attempts/1/events.jsonl"
    events.write_text("".join(x + "\n" for x in events.read_text().splitlines() if '"save_committed"' not in x))
    assert run.events(Kind.COMMITTED) == []
    shutil.rmtree(run.path / "checkpoints")
    refused(run, StorageError, "the checkpoint of step 4")


@pytest.mark.parametrize("linked", ["step-00000004", "step-00000004/COMMIT"])
def test_a_newest_checkpoint_that_is_a_link_is_no_storage_that_is_away(linked: str, run: RunDir) -> None:
    """It would be tried again for ever."""
    path, elsewhere = run.path / "checkpoints" / linked, run.path.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    refused(run, UserError, "got a symbolic link, which is not followed")
    assert train(RECIPE, run, backend=BACKEND, stop_at=3, accept_drift="from step 2") == 85


def test_a_newest_checkpoint_that_is_away_is_missed(run: RunDir) -> None:
    shutil.rmtree(run.path / "checkpoints/step-00000004")
    refused(run, StorageError, "got none after step 2")
    assert train(RECIPE, run, backend=BACKEND, stop_at=4, accept_drift="lost it") == 85
    # The record now says that the run went on from step 2: what was lost before is not missed again.
    assert [e["step"] for e in run.events(Kind.RESUMED)] == [2]
    assert train(RECIPE, run, backend=BACKEND, stop_at=5) == 85


def test_a_run_that_begins_again_all_the_same_says_so(run: RunDir) -> None:
    shutil.rmtree(run.path / "checkpoints")
    assert train(RECIPE, run, backend=BACKEND, stop_at=1, accept_drift="the disk is gone") == 85
    assert [r["step"] for r in run.curve()] == [1]


def test_a_renamed_folder_is_named(run: RunDir) -> None:
    """It was exit code 75 for ever: every save of step 20 found a commit there."""
    (run.path / "checkpoints/step-00000004").rename(run.path / "checkpoints/step-00000020")
    refused(run, UserError, r"step-00000020.*the checkpoint of step 20, as its folder's name says, got the checkpoint")


def test_a_copy_under_another_step_is_neither_trained_on_nor_exported(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = run.path / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-00000100")
    refused(run, UserError, "step-00000002")
    assert main(["ckpt", "export", str(run.path), str(tmp_path / "out"), "--to", "dcp"]) == 2
    assert "the checkpoint of step 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    shutil.rmtree(folder / "step-00000100")
    shutil.rmtree(folder / "step-00000004")
    shutil.copytree(folder / "step-00000002", folder / "step-00000003")
    refused(run, UserError, "got none after step 3")  # the record is asked first


def words(path: Path) -> list[str]:
    sizes = [word for size in (*SMALL, "checkpoint_every=2", "checkpoint_keep=3") for word in ("--set", size)]
    return ["tiny-lm", "--run-dir", str(path), "--from", "dcp", *sizes]


def test_an_import_that_fails_or_is_killed_leaves_no_run_that_begins_at_random(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torch")
    out, into = tmp_path / "out", tmp_path / "into"
    assert main(["ckpt", "export", str(run.path), str(out), "--to", "dcp"]) == 0
    assert main(["ckpt", "import", str(tmp_path / "none"), *words(into)]) == 2
    assert not list(into.rglob("*.json"))

    def killed(*args: object, **more: object) -> None:
        shutil.copytree(into, tmp_path / "as it was left")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export_import, "commit", killed)
        assert main(["ckpt", "import", str(out), *words(into)]) == 130
    left = RunDir(tmp_path / "as it was left")
    assert newest_recorded(left) == Recorded(step=0, attempt=0)
    refused(left, UserError, "the checkpoint of the import or fork that the run begins from")
    assert main(["ckpt", "import", str(out), *words(into)]) == 0, capsys.readouterr().err
    assert json.loads((into / "run.json").read_text())["begun_from"]["format"] == "dcp"
    assert train(RECIPE, RunDir(into), backend=BACKEND, stop_at=5) == 85
