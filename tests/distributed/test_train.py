"""`portatrain train --devices`: one run over processes and meshes has the curve of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from portatrain.runs.run_dir import RunDir
from tests.support.train_command import command, train

pytestmark = pytest.mark.meshes


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_moves_between_meshes_on_one_curve(tmp_path: Path) -> None:
    alone = train(tmp_path / "one", "--stop-at", "4")
    assert alone.returncode == 85, alone.stderr
    many = tmp_path / "many"
    for stop, mesh in ((2, "fsdp=2"), (4, "fsdp=2,tensor=2")):
        done = train(many, "--mesh", mesh, "--stop-at", str(stop))
        assert done.returncode == 85, done.stderr
        assert "Traceback" not in done.stderr
    one, two = RunDir(tmp_path / "one").curve(), RunDir(many).curve()
    assert [r["step"] for r in two] == [r["step"] for r in one] == [1, 2, 3, 4]
    assert [r["attempt"] for r in two] == [1, 1, 2, 2]
    for a, b in zip(one, two, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-6 * a["loss"]
    (resumed,) = RunDir(many).events("resumed")
    assert resumed["verdict"] == "continuous"


@pytest.mark.timeout(120)
def test_what_does_not_fit_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    began_s = time.monotonic()
    done = train(tmp_path / "run", "--mesh", "fsdp=3")
    assert done.returncode == 2
    assert "axis 'batch'" in done.stderr or "axis 'embed'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    assert time.monotonic() - began_s < 20  # generous: no framework is imported


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [[], ["--backend", "jax", "--processes", "2"]], ids=["torch", "jax"])
def test_a_process_that_dies_ends_the_run_with_its_name(how: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen(
        [*command(run, "--mesh", "fsdp=2", *how), "--set", "steps=100000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as parent:
        deadline_s = time.monotonic() + 120
        while not (run / "attempts/1/metrics.jsonl").exists() or not RunDir(run).rows(1, "metrics"):
            assert parent.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.2)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        began_s = time.monotonic()
        _, errors = parent.communicate(timeout=60)
        assert time.monotonic() - began_s < 15
    assert parent.returncode == 1
    assert "process 1 of 2 was ended by SIGKILL" in errors
    assert not any(Path(f"/proc/{c}").exists() for c in children)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "how",
    [
        pytest.param([], id="torch"),
        pytest.param(["--backend", "jax", "--processes", "2"], id="jax", marks=pytest.mark.full),
        pytest.param(["--backend", "deepspeed-2"], id="deepspeed", marks=pytest.mark.full),
    ],
)
def test_one_process_of_several_writes_the_profile(how: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = train(run, "--mesh", "fsdp=2", *how, "--stop-at", "3", "--profile", "2:3")
    assert done.returncode == 85, done.stderr
    assert "profile of steps 2 to 3" in done.stderr
    traces = sorted(path.name for path in run.rglob("*.trace.json.gz"))
    assert traces == ["profile-2-3.trace.json.gz"]
    (made,) = RunDir(run).events("profiled")
    assert len(made["operations"]) == 10
