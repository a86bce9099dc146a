"""A recipe with a referee: a device that computes wrong numbers ends the attempt, is named, and the run goes on from
the last commit before the last agreement as if nothing had happened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import refereed
from portatrain.backends.base import missing
from portatrain.cli import launch_main, main
from portatrain.errors import MachineError, UserError
from portatrain.recipe import Referee, Spikes
from portatrain.runs.events import Kind
from portatrain.runs.find_checkpoints import opened
from portatrain.runs.history import kept_checkpoints
from portatrain.runs.run_dir import RunDir
from portatrain.system.exit_codes import FAILED
from portatrain.training.trainer import train

BACKENDS = [name for name in ("jax", "torch") if not missing(name)]


@pytest.mark.usefixtures("compiled_quickly")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_device_ends_the_attempt_and_the_run_goes_on(
    backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks are at steps 4 and 8; the device is wrong from step 5 on, and the commits of steps 5 to 7 are not trusted.
    The save of step 7 is still being written when the attempt ends, and may not be committed."""
    recipe = refereed.recipe("cpu", every=4, steps=8)
    clean, run = RunDir(tmp_path / "clean"), RunDir(tmp_path / "run")
    assert train(recipe, clean, backend=backend) == 0
    assert [e["step"] for e in clean.events(Kind.AGREED)] == [4, 8] and not clean.events(Kind.DISAGREED)

    with refereed.flips(backend, "activations", 0, since=5), pytest.raises(MachineError, match="device 0") as error:
        train(recipe, run, backend=backend)
    assert error.value.code == FAILED
    (event,) = run.events(Kind.DISAGREED)
    assert (event["step"], event["agreed"], event["certain"]) == (8, 4, False)
    assert [(d["device"], d["process"]) for d in event["devices"]] == [(0, 0)] and event["devices"][0]["host"]
    doubted = set(run.doubted())
    assert run.committed() == 4 and 6 in doubted and doubted <= {5, 6, 7}
    assert {c["step"] for c in kept_checkpoints(run) if c["doubted"]} == doubted
    with opened(run.path) as reader:  # eval, sample and export begin from here
        assert reader.meta["step"] == 4
    assert launch_main(["status", str(run.path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "probably device 0 (process 0 on" in shown and "checkpoint of step 6 is not trusted" in shown

    assert train(recipe, run, backend=backend) == 0
    resumed = run.events(Kind.RESUMED)
    assert [(e["step"], e["verdict"], e["attempt"]) for e in resumed] == [(4, "continuous", 2)]
    assert {(e["step"], e["attempt"]) for e in run.events(Kind.NOT_TRUSTED)} == {(step, 2) for step in doubted}
    assert [row["loss"] for row in run.curve()] == [row["loss"] for row in clean.curve()]
    assert not run.doubted()  # the second attempt has committed these steps again
    assert main(["report", str(run.path)]) == 0
    assert "attempt 1: the referee found another gradient" in (run.path / "report.html").read_text()
    capsys.readouterr()
    assert launch_main(["status", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disagreements"][0]["step"] == 8


@pytest.mark.usefixtures("compiled_quickly")
def test_without_an_agreement_the_run_begins_again(tmp_path: Path) -> None:
    backend, run = BACKENDS[-1], RunDir(tmp_path / "run")
    recipe = refereed.recipe("cpu", every=4, steps=5)
    with refereed.flips(backend, "gradients", 0), pytest.raises(MachineError, match="up to step 0"):
        train(recipe, run, backend=backend)
    assert run.committed() is None and 2 in run.doubted()
    for unfinished in (run.path / "checkpoints/step-00000003", run.path / "checkpoints/step-00000009"):
        unfinished.mkdir(exist_ok=True)  # as of a save that was under way
        with pytest.raises(UserError, match="a checkpoint that is trusted"), opened(run.path):
            pass
    unfinished.rmdir()
    assert train(recipe, run, backend=backend) == 0
    assert run.curve()[0]["attempt"] == 2 and not run.events(Kind.RESUMED)


def test_the_step_after_a_skipped_one_is_checked(tmp_path: Path) -> None:
    backend, run = BACKENDS[-1], RunDir(tmp_path / "run")
    odd = Spikes(window=4, least=4, loss=1e-9, grad_norm=None)
    recipe = refereed.recipe("cpu", every=100, steps=12, spikes=odd)
    assert train(recipe, run, backend=backend) == 0
    skipped = [event["step"] for event in run.events(Kind.SPIKE)]
    checked = [event["step"] for event in run.events(Kind.AGREED)]
    assert skipped and checked == sorted({*(step + 1 for step in skipped if step < 12), 12})


def test_what_cannot_be_refereed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two or more devices"):
        train(refereed.recipe("devices"), RunDir(tmp_path / "run"), backend=BACKENDS[0])
    with pytest.raises(UserError, match="at least 1 step"):
        Referee(every=0)
    plain = replace(refereed.recipe(), referee=None)
    assert "referee" not in plain.to_json() and not (tmp_path / "run").exists()
