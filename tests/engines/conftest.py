"""One Slurm for the session; every test has a folder with a clusters.toml as its working directory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.slurm_here import NODES, Slurm, missing

PATIENCE = 5
FAKES = Path(__file__).parents[1] / "support" / "fakes"

CLUSTERS = """
[lab-tpu]
chip = "cpu"
count = 4
engine = "slurm"
options = {{ partition = "tpu", backend = "jax", hosts = 2, gres = "tpu:2", mesh = "fsdp=4", {common} }}

[lab-gpu]
chip = "cpu"
count = 2
engine = "slurm"
options = {{ partition = "gpu", backend = "torch", gres = "gpu:2", mesh = "fsdp=2", {common} }}
"""
COMMON = 'signal_s = 15, python = "{python}", cpus_per_task = 1'


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    gone = missing()
    if gone:
        pytest.skip(f"Slurm is not installed ({', '.join(gone)}): apt-get install slurmctld slurmd slurm-client munge")
    with Slurm(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def lab(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The scheduler, idle, with the working directory in a new folder."""
    yield from _in(slurm, tmp_path, monkeypatch, sys.executable)


@pytest.fixture
def light_lab(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    """The same, where `portatrain train` is tests/support/fakes/train.py; the variable FAKE says how it misbehaves."""
    monkeypatch.setenv("REAL_PYTHON", sys.executable)
    monkeypatch.setenv("FAKES", str(FAKES))
    yield from _in(slurm, tmp_path, monkeypatch, str(FAKES / "python"))


def _in(slurm: Slurm, folder: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> Iterator[Slurm]:
    (folder / "clusters.toml").write_text(CLUSTERS.format(common=COMMON.format(python=python)))
    monkeypatch.setenv("PYTHONPATH", str(FAKES.parents[2]))
    monkeypatch.chdir(folder)
    yield slurm
    slurm.call("scancel", "--user", _user())
    for node in NODES:  # one that a test has taken down
        if f"slurmd-{node}" not in slurm.pids:
            slurm.start_node(node)
    slurm.wait_idle()


def _user() -> str:
    import getpass

    return getpass.getuser()


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for a condition: PATIENCE times as long as it takes on a machine that has little else to do."""
    import time

    def wait(condition: Callable[[], object], seconds: float, what: str, see: Callable[[], object] = str) -> None:
        end_s = time.monotonic() + PATIENCE * seconds
        while not condition():
            assert time.monotonic() < end_s, f"not within {PATIENCE * seconds} s: {what}\n{see()}"
            time.sleep(0.1)

    return wait
