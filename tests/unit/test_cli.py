"""The command line, called in this process: what is run, and what a user's mistake looks like."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portatrain.cli import launch_main, main
from portatrain.recipe import Recipe
from portatrain.runs.run_dir import RunDir
from portatrain.training.metrics import Sink
from tests.support.folders import listing
from tests.support.recipe_files import BAD_FILES, GOOD

Capture = pytest.CaptureFixture[str]
Unchanged = Callable[[Path], None]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in, with a good recipe, bad ones, and some things in the way."""
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "bad").mkdir()
    for case, (source, _) in BAD_FILES.items():
        (tmp_path / "bad" / f"{case.replace(' ', '_')}.py").write_text(source)
    (tmp_path / "a_file").write_text("in the way")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo.jpg").write_text("not a run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def refused(command: Callable[[Sequence[str]], int], words: Sequence[str], capture: Capture) -> str:
    """Run ``words``, which must be a user's mistake: exit code 2, one paragraph with all its parts."""
    capture.readouterr()
    before = listing(Path.cwd())
    assert command(words) == 2
    out, err = capture.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert ": expected " in err
    assert ", got " in err
    assert err.rstrip().endswith((".", "'", "]"))
    assert "Traceback" not in err
    assert listing(Path.cwd()) == before, "something changed on disk"
    return err


TRAIN = ["train", "mine.py", "--run-dir", "run"]
MISTAKES = [
    (["trian", "mine.py"], "Did you mean train"),
    (["train"], "RECIPE"),
    (["train", "mine.py"], "--run-dir"),
    ([*TRAIN, "extra"], "extra"),
    ([*TRAIN, "--bakend", "jax"], "Did you mean --backend"),
    ([*TRAIN, "--devices", "two"], "--devices"),
    ([*TRAIN, "--devices", "0"], "at least 1"),
    ([*TRAIN, "--stop-at", "-1"], "at least 1"),
    ([*TRAIN, "--stop-at", "6"], "1 to 5"),
    ([*TRAIN, "--mesh", "fdsp=2"], "Did you mean fsdp"),
    ([*TRAIN, "--mesh", "fsdp=two"], "fsdp=two"),
    ([*TRAIN, "--mesh", "fsdp=2", "--devices", "3"], "--devices 2"),
    ([*TRAIN, "--backend", "jacks"], "jax, torch"),
    ([*TRAIN, "--track", "wanbd"], "Did you mean wandb"),
    ([*TRAIN, "--set", "steps"], "field=value"),
    ([*TRAIN, "--set", "stpes=3"], "Did you mean steps"),
    ([*TRAIN, "--set", "steps=0"], "at least 1"),
    ([*TRAIN, "--set", "model.witdh=3"], "Did you mean width"),
    ([*TRAIN, "--set", "model.width=wide"], "an integer"),
    ([*TRAIN, "--set", "accumulation=3"], "nearest valid size: batch=3"),
    (["train", "nothing.py", "--run-dir", "run"], "no such file"),
    (["train", "bad", "--run-dir", "run"], "tiny-lm"),
    (["train", "tiny-ml", "--run-dir", "run"], "Did you mean tiny-lm"),
    (["train", "mine.py", "--run-dir", "a_file"], "a file"),
    (["train", "mine.py", "--run-dir", "a_file/run"], "a file"),
    (["train", "mine.py", "--run-dir", "foreign"], "photo.jpg"),
]


@pytest.mark.parametrize(("words", "hint"), MISTAKES, ids=lambda value: " ".join(value) if value != str(value) else "")
def test_mistake_of_train(words: list[str], hint: str, capsys: Capture) -> None:
    assert hint in refused(main, words, capsys)


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_recipe_file(case: str, capsys: Capture) -> None:
    file = f"bad/{case.replace(' ', '_')}.py"
    assert BAD_FILES[case][1] in refused(main, ["train", file, "--run-dir", "run"], capsys)
    assert BAD_FILES[case][1] in refused(launch_main, ["--cluster", "local", file], capsys)


LOCAL = ["--cluster", "local"]
LAUNCH_MISTAKES = [
    ([], "RECIPE"),
    (["mine.py"], "--cluster"),
    (["--cluster", "tpu-v99", "mine.py"], "local"),
    (["--cluster", "locla", "mine.py"], "Did you mean local"),
    (["--cluster", "local,nowhere", "mine.py"], "nowhere"),
    (["--cluster", "", "mine.py"], "--cluster"),
    (["--cluster", ",", "mine.py"], "--cluster"),
    ([*LOCAL, "nothing.py"], "no such file"),
    ([*LOCAL, "mine.py", "--backend", "tensorflow"], "jax, torch"),
    ([*LOCAL, "mine.py", "--run", "../escape"], "letters, digits"),
    ([*LOCAL, "mine.py", "--run", ".."], "letters, digits"),
    ([*LOCAL, "mine.py", "--run", ""], "letters, digits"),
    ([*LOCAL, "mine.py", "--run", "x" * 64], "64 characters"),
    ([*LOCAL, "mine.py", "--runs", "a_file"], "a file"),
    ([*LOCAL, "mine.py", "--runs", ".", "--run", "foreign"], "photo.jpg"),
    ([*LOCAL, "mine.py", "--set", "batch=0"], "at least 1"),
]


@pytest.mark.parametrize(("words", "hint"), LAUNCH_MISTAKES, ids=lambda value: " ".join(value)[:50])
def test_mistake_of_launch(words: list[str], hint: str, capsys: Capture) -> None:
    assert hint in refused(launch_main, words, capsys)


# --- generated: a good command line with one word broken -----------------------------------------

FIELDS = [field for field in Recipe.__dataclass_fields__ if field not in ("hooks", "name")]
WORD = st.text(st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=("Cs",)), max_size=12)


@given(field=st.sampled_from(FIELDS), letter=st.sampled_from("xyz_1"), where=st.integers(0, 20))
def test_every_misspelt_field_is_answered_with_the_right_one(
    field: str, letter: str, where: int, capsys: Capture
) -> None:
    wrong = field[:where] + letter + field[where:]
    error = refused(main, [*TRAIN, "--set", f"{wrong}=1"], capsys)
    assert field in error
    assert repr(wrong) in error


@given(value=WORD, field=st.sampled_from(["steps", "batch", "seed", "model.width", "optimizer.lr", "clip_norm"]))
def test_no_word_is_taken_for_a_number(value: str, field: str, capsys: Capture) -> None:
    words = value.strip()
    try:
        float(words)
    except ValueError:
        if words.lower() not in ("none", "null"):
            refused(main, [*TRAIN, "--set", f"{field}={value}"], capsys)


@given(batch=st.integers(1, 10**6), accumulation=st.integers(2, 1000))
def test_the_sizes_that_an_error_names_do_work(batch: int, accumulation: int, capsys: Capture) -> None:
    words = ["--set", f"accumulation={accumulation}"]
    if batch % accumulation == 0:
        return
    error = refused(main, [*TRAIN, *words, "--set", f"batch={batch}"], capsys)
    named = [int(part.split()[0].rstrip(".")) for part in error.split("batch=")[1:] if part[0].isdigit()]
    offered = [size for size in named if size != batch]
    assert offered
    assert all(size % accumulation == 0 and abs(size - batch) < accumulation for size in offered)


@given(name=WORD, option=st.sampled_from(["--backend", "--mesh", "--devices", "--stop-at", "--track"]))
def test_any_word_after_an_option_is_refused_in_one_paragraph(name: str, option: str, capsys: Capture) -> None:
    known = {"--backend": {"jax", "torch"}, "--track": {"wandb", "tensorboard", "trackio", "mlflow"}}.get(option, set())
    legal = name in known or name.strip().isdigit() or not name.replace(",", "").strip()
    if not legal:
        refused(main, [*TRAIN, f"{option}={name}"], capsys)


@given(name=WORD)
def test_any_recipe_or_cluster_that_is_none(name: str, capsys: Capture) -> None:
    if name.startswith("-") or name.strip() == "local" or Path(name).exists():
        return
    refused(main, ["train", f"{name}.py", "--run-dir", "run"], capsys)
    refused(launch_main, [f"--cluster={name}", "mine.py"], capsys)


# --- a backend that is not installed ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_missing_backend_names_the_install_command(
    backend: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == backend else real(name, *rest))
    assert f"pip install 'portatrain[{backend}]'" in refused(main, [*TRAIN, "--backend", backend], capsys)
    words = ["--cluster", "local", "mine.py", "--backend", backend]
    assert f"pip install 'portatrain[{backend}]'" in refused(launch_main, words, capsys)


def test_no_backend_at_all(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    gone = ("jax", "torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else real(name, *rest))
    assert "pip install 'portatrain[jax]'" in refused(main, TRAIN, capsys)


# --- what is run: a stand-in for the trainer records what it is given ------------------------------


class Trainer:
    """Trains nothing: writes three steps and ends as it is told to."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.ends: list[int | BaseException] = []

    def train(self, recipe: Recipe, run: RunDir, *, sinks: Sequence[Sink], **options: Any) -> int:
        self.calls.append({"recipe": recipe, "run": run, "sinks": sinks, **options})
        end = self.ends.pop() if self.ends else 0
        with run.begin(recipe) as attempt:
            for step in (1, 2, 3):
                attempt.metrics({"step": step, "loss": 1.0 / step, "lr": 0.1})
            if isinstance(end, BaseException):
                raise end
            attempt.finish({"status": "done", "validation_loss": 0.25, "sample": "def f():\n    pass"})
        return end


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    made = Trainer()
    module: Any = ModuleType("portatrain.training.trainer")
    module.train = made.train
    monkeypatch.setitem(sys.modules, "portatrain.training.trainer", module)
    return made


def test_train_hands_everything_to_the_trainer(trainer: Trainer) -> None:
    words = ["--backend", "jax", "--mesh", "fsdp=2", "--devices", "2", "--stop-at", "4", "--set", "model.width=9"]
    trainer.ends = [85]
    assert main([*TRAIN, *words]) == 85
    (call,) = trainer.calls
    assert call["recipe"].model.width == 9
    assert call["run"].path == Path("run")
    assert (call["backend"], call["mesh"], call["devices"], call["stop_at"]) == ("jax", "fsdp=2", 2, 4)
    assert len(call["sinks"]) == 1


def test_train_goes_on_in_the_same_directory_but_not_after_the_end(trainer: Trainer, capsys: Capture) -> None:
    trainer.ends = [KeyboardInterrupt()]
    assert main(TRAIN) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
    assert "differs in seed" in refused(main, [*TRAIN, "--set", "seed=6"], capsys)
    assert main(TRAIN) == 0
    assert "finished" in refused(main, TRAIN, capsys)


def test_launch_local_trains_here_and_shows_the_results(trainer: Trainer, capsys: Capture) -> None:
    assert launch_main(["--cluster", "local", "mine.py", "--run", "first", "--set", "model.width=9"]) == 0
    assert trainer.calls[0]["recipe"].model.width == 9
    assert trainer.calls[0]["run"].path == Path("runs/first")
    out = capsys.readouterr().out
    assert "run directory    runs/first" in out
    assert "loss curve       runs/first/loss.svg" in out
    assert "validation loss  0.2500" in out
    assert "sample:\ndef f():\n    pass" in out
    assert Path("runs/first/loss.svg").stat().st_size > 1000


def test_launch_chooses_a_free_name(trainer: Trainer) -> None:
    for expected in ("mine", "mine-2", "mine-3"):
        assert launch_main(["--cluster", "local", "mine.py"]) == 0
        assert trainer.calls[-1]["run"].path == Path("runs") / expected


def test_launch_passes_exit_codes_on_and_shows_what_there_is(trainer: Trainer, capsys: Capture) -> None:
    trainer.ends = [1]
    assert launch_main(["--cluster", "local,local", "mine.py"]) == 1
    trainer.ends = [KeyboardInterrupt()]
    assert launch_main(["--cluster", "local", "mine.py"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_dry_run_prints_a_command_that_does_the_same(trainer: Trainer, capsys: Capture, unchanged: Unchanged) -> None:
    import shlex

    words = ["--cluster", "local", "mine.py", "--backend", "torch", "--set", "model.width=9", "--set", "clip_norm=none"]
    unchanged(Path.cwd() / "bad")
    before = listing(Path.cwd())
    assert launch_main([*words, "--dry-run"]) == 0
    assert listing(Path.cwd()) == before
    planned, line = capsys.readouterr().out.strip().splitlines()
    assert planned.startswith("# not planned: ")  # the model of this recipe is a stand-in
    assert line == (
        "portatrain train mine.py --run-dir runs/mine --backend torch --set model.width=9 --set clip_norm=none"
    )
    assert main(shlex.split(line)[1:]) == 0
    assert launch_main([*words, "--run", "again"]) == 0
    assert trainer.calls[0]["recipe"] == trainer.calls[1]["recipe"]


def test_dry_run_of_a_local_run_shows_its_plan(capsys: Capture) -> None:
    assert launch_main(["--cluster", "local", "tiny-lm", "--devices", "2", "--dry-run"]) == 0
    planned, line = capsys.readouterr().out.strip().splitlines()
    assert re.fullmatch(r"# plan, .*: mesh fsdp=2, [0-9.]+ s a step, 0\.[0-9]+ GiB a device, .* for 600 steps", planned)
    assert line == "portatrain train tiny-lm --run-dir runs/tiny-lm --devices 2"


def test_trackers_of_the_command_and_of_clusters_toml_reach_the_job(
    trainer: Trainer, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launchers import slurm, submission

    words = ["--cluster", "local", "mine.py", "--track", "tensorboard", "--track", "tensorboard"]
    assert launch_main([*words, "--dry-run"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("--run-dir runs/mine --track tensorboard")
    assert "Did you mean wandb" in refused(launch_main, [*words[:3], "--track", "wandbb"], capsys)

    Path("clusters.toml").write_text('[lab]\nchip = "h100"\ncount = 1\nengine = "slurm"\ntrack = ["wandb"]\n')
    handed: list[Any] = []
    monkeypatch.setattr(submission, "submit", lambda run, recipe, jobs: handed.extend(jobs))
    monkeypatch.setattr(slurm.SlurmLauncher, "check", lambda self, job: None)
    lab = ["--cluster", "lab", "tiny-lm", "--mesh", "fsdp=1"]
    assert launch_main(lab) == 0
    assert launch_main([*lab, "--track", "tensorboard"]) == 0
    assert [job.train()[-2:] for job in handed] == [["--track", "wandb"], ["--track", "tensorboard"]]
    for bad, said in (('["wandbb"]', "Did you mean wandb"), ('"wandb"', "a list of names")):
        Path("clusters.toml").write_text(f'[lab]\nchip = "h100"\ncount = 1\nengine = "slurm"\ntrack = {bad}\n')
        assert said in refused(launch_main, lab, capsys)


def test_a_bug_is_a_traceback_not_a_users_mistake(trainer: Trainer) -> None:
    trainer.ends = [RuntimeError("ours")]
    with pytest.raises(RuntimeError, match="ours"):
        main(TRAIN)


# --- help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "words"),
    [(main, []), (main, ["--help"]), (main, ["train", "--help"]), (launch_main, ["--help"]), (main, ["--version"])],
)
def test_help(command: Callable[[Sequence[str]], int], words: list[str], capsys: Capture) -> None:
    assert command(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out) > 10
    if ("--help" in words and len(words) > 1) or command is launch_main:
        assert "examples:" in out


def test_examples_in_the_help_are_commands_that_parse(capsys: Capture) -> None:
    from portatrain.commands import init, show, submit, train

    lines = itertools.chain(*((module.__doc__ or "").splitlines() for module in (train, submit, init, show)))
    examples = [line.split() for line in lines if line.startswith(("  portatrain ", "  launch "))]
    assert len(examples) >= 14
    Path("there").write_text("a file")
    Path("my_recipe.py").write_text(GOOD.replace("width: int = 4", "width: int = 4\n    embed: int = 4"))
    for words in examples:
        if words[0] == "launch":
            assert launch_main([*words[1:], "--dry-run"]) == 0, words
        elif words[1] == "init":  # all but the file is read, which then cannot be made
            assert "got 'there'" in refused(main, ["init", "there", *words[3:]], capsys)
        elif words[1] == "show":  # what is said last: the model of this recipe is a stand-in
            assert main(words[1:]) == 0 or "portatrain.Module" in capsys.readouterr().err
            capsys.readouterr()
        else:
            # A mesh that cannot be is the last thing checked before the run directory: all else has passed.
            assert "--devices" in refused(main, [*words[1:], "--mesh", "fsdp=2", "--devices", "3"], capsys)


def test_a_reader_that_goes_away_is_no_error() -> None:
    import subprocess

    code = "import sys; from portatrain.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 0
    process.stderr.close()


def test_python_dash_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "portatrain", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()[0]) == (0, "portatrain")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_behind_the_errors_leaves_the_exit_code() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "portatrain", "plan", "nosuch"], stdout=full, stderr=full, check=False
        )
    assert done.returncode == 2


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_end_no_command(closed: str, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -c 'import portatrain.cli as c, sys; sys.exit(c.launch_main([\"list\"]))'"
    there = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path, env=there, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
