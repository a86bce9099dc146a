"""A backend of another package: found by its entry point, run by name, held to the public contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from portatrain.backends.base import backend_class, check_backend, default_backend, missing, process_per_device
from portatrain.commands.options import check_track
from portatrain.errors import UserError
from portatrain.runs.run_dir import RunDir
from tests.support import forks

pytestmark = pytest.mark.skipif(bool(missing("torch")), reason="the package builds on torch")

ACME = Path(__file__).parents[1] / "plugins" / "acme"


def python(*words: str, plugins: bool = True) -> subprocess.CompletedProcess[str]:
    paths = [str(Path.cwd()), *([str(ACME)] if plugins else [])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return forks.run([sys.executable, "-m", *words], env=env, timeout=200)


def train(run: Path, backend: str, *, plugins: bool = True) -> subprocess.CompletedProcess[str]:
    sizes = ["steps=3", "schedule.warmup=1", "batch=8", "model.layers=2", "model.embed=32"]
    more = [word for size in sizes for word in ("--set", size)]
    words = ["portatrain.cli", "train", "tiny-vit", "--run-dir", str(run), "--backend", backend, *more]
    return python(*words, plugins=plugins)


def test_it_passes_where_it_is_right() -> None:
    done = python("portatrain.testing", "acme", "--only", "rms_norm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 differ" in done.stdout


def test_it_fails_where_it_is_wrong_and_says_where() -> None:
    done = python("portatrain.testing", "acme-broken", "--only", "attention full, window")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "DIFFERS attention full, window=3: fp32 result" in done.stdout


def test_it_trains_on_the_same_curve(tmp_path: Path) -> None:
    for backend in ("acme", "torch"):
        done = train(tmp_path / backend, backend)
        assert done.returncode == 0, done.stderr
    mine, ours = RunDir(tmp_path / "acme").curve(), RunDir(tmp_path / "torch").curve()
    assert [r["step"] for r in mine] == [1, 2, 3]
    for a, b in zip(mine, ours, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * b["loss"]


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("acme-empty", "backend acme-empty: expected a class with the verbs of portatrain.backends.base.Backend"),
        ("acme-gone", "backend acme-gone: expected acme_chip.nowhere:Backend to be importable"),
        ("acne", "Did you mean acme"),
    ],
)
def test_what_cannot_be_used(backend: str, said: str, tmp_path: Path) -> None:
    done = train(tmp_path / "run", backend)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_without_the_package_there_is_no_such_backend(tmp_path: Path) -> None:
    done = train(tmp_path / "run", "acme", plugins=False)
    assert done.returncode == 2 and "got 'acme'" in done.stderr, done.stderr


def test_cases_that_no_word_selects() -> None:
    done = python("portatrain.testing", "acme", "--only", "flux capacitor")
    assert done.returncode == 2 and "a word in the name of a case" in done.stderr


SIZES = ["steps=4", "schedule.warmup=1", "batch=8", "model.layers=2", "model.embed=32", "eval_every=2"]


def lab(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    settings = [word for size in SIZES for word in ("--set", size)]
    recipe = str(ACME / "acme_lab" / "recipe.py")
    return python("portatrain.cli", "train", recipe, "--run-dir", str(run), *settings, *words)


def test_a_hook_sees_the_same_parameters_on_every_mesh(tmp_path: Path) -> None:
    norms = {}
    for name, words in {"jax": [], "jax-2": ["--mesh", "fsdp=2"], "torch": [], "torch-2": ["--mesh", "fsdp=2"]}.items():
        done = lab(tmp_path / name, "--backend", name.removesuffix("-2"), *words)
        assert done.returncode == 0, done.stderr
        run = RunDir(tmp_path / name)
        norms[name] = [(row["when"], row["step"], row["norm"]) for row in run.events("norm")]
        assert run.summary()["steps_seen"] == 4 and run.summary()["last_loss"] == run.curve()[-1]["loss"]
    assert [row[:2] for row in norms["jax"]] == [("start", 0), ("save", 4), ("end", 4)]
    for found in norms.values():
        for (*at, mine), (*there, theirs) in zip(norms["jax"], found, strict=True):
            assert at == there and abs(mine - theirs) <= 1e-6 * mine


def test_a_tracker_is_found_by_name_and_one_that_fails_is_dropped(tmp_path: Path) -> None:
    done = lab(tmp_path / "run", "--backend", "torch", "--track", "acme", "--track", "acme-failing")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "acme.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 1, 2, 3, 4]
    assert rows[-1] == {"status": "done"}
    (failed,) = RunDir(tmp_path / "run").events("sink_failed")
    assert failed["sink"] == "FailingTracker"
    assert failed["why"].startswith("RuntimeError: the service is gone (") and "FailingTracker.step" in failed["why"]
    assert done.stderr.count("FailingTracker gets no more metrics") == 1 and "Traceback" not in done.stderr
    for name, said in {
        "acme-no-sink": "methods of portatrain.training.metrics.Sink",
        "acm": "Did you mean acme",
    }.items():
        done = lab(tmp_path / "none", "--backend", "torch", "--track", name)
        assert done.returncode == 2 and said in done.stderr, done.stderr


def test_a_chip_is_listed_and_planned() -> None:
    done = python("portatrain.cli", "clusters")
    assert done.returncode == 0 and "acme-one" in done.stdout, done.stdout + done.stderr
    done = python("portatrain.cli", "plan", "tiny-vit", "--cluster", "acme-one-2")
    assert done.returncode == 0 and "acme-one-2" in done.stdout, done.stdout + done.stderr
    done = python("portatrain.cli", "plan", "tiny-vit", "--cluster", "acme-none-2")
    assert done.returncode == 2 and "chip acme-none: expected acme_lab.nowhere:CHIP to be importable" in done.stderr


def test_packages_are_not_searched_for_names_that_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(group: str | None = None) -> None:
        raise AssertionError("the metadata of packages was read")

    monkeypatch.setattr("portatrain.system.plugins.entry_points", asked)
    installed = [name for name in ("jax", "torch") if not missing(name)]
    assert [check_backend(name) for name in installed] == installed
    assert default_backend() == installed[0]
    assert check_track("--track", ["wandb", "tensorboard"]) == ("wandb", "tensorboard")
    with pytest.raises(AssertionError, match="was read"):
        check_backend("nowhere")


def test_a_backend_says_that_every_device_has_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ACME))
    assert process_per_device("acme") and process_per_device("torch") and process_per_device("deepspeed-2")
    assert not process_per_device("jax") and not process_per_device(None)


def test_a_kernel_of_the_package_runs_and_is_named_in_the_record(tmp_path: Path) -> None:
    for name, plugins in (("acme", True), ("ours", False)):
        done = train(tmp_path / name, "torch", plugins=plugins)
        assert done.returncode == 0, done.stderr
    mine, ours = RunDir(tmp_path / "acme"), RunDir(tmp_path / "ours")
    (event,) = mine.events("kernels")
    assert {c["kernel"] for c in event["choices"]} == {"acme-einsum"}
    for a, b in zip(mine.curve(), ours.curve(), strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * b["loss"]

    # Packed documents have segments, which this kernel does not cover: it is refused, and not passed over in silence.
    sizes = [
        "steps=2",
        "schedule.warmup=1",
        "batch=4",
        "model.layers=1",
        "model.embed=32",
        "data.seq_len=32",
        "hooks=()",
    ]
    words = ["portatrain", "train", "tiny-lm", "--backend", "torch", *(w for size in sizes for w in ("--set", size))]
    refused = python(*words, "--kernel", "attention=acme-einsum", "--run-dir", str(tmp_path / "x"))
    assert refused.returncode == 2 and "segments" in refused.stderr and "Traceback" not in refused.stderr


@pytest.mark.parametrize("error", [ImportError("libcudart.so.13: cannot open shared object file"), AttributeError("x")])
def test_a_framework_whose_installation_is_broken_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object, name: str) -> None:
        raise error

    monkeypatch.setattr("portatrain.system.plugins.Registry.load", broken)
    name = next(n for n in ("jax", "torch") if not missing(n))
    with pytest.raises(UserError, match=rf"backend {name}: expected .*importable.*pip install"):
        backend_class(name)


def test_a_family_is_found_by_its_model_type(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"model_type": "acme_lm", **sizes, "intermediate_size": 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("portatrain.cli", "init", str(tmp_path / "mine.py"), "--from", str(tmp_path))
    done = python(*words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "mine.py").read_text()
    assert "DecoderConfig(" in text and "rope_theta=700.0" in text
    done = python(*words, plugins=False)
    assert done.returncode == 2 and "the nearest is llama" in done.stderr, done.stderr
