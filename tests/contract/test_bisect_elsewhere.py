"""Sides of a bisection in other processes: with the packages of another environment, and on a mesh of processes."""

from __future__ import annotations

import dataclasses
import json
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from portatrain.cli import main
from portatrain.system.exit_codes import FOUND, OK
from portatrain.testing.bisect.served import running
from portatrain.testing.bisect.sides import Side
from portatrain.testing.bisect.step import replay
from portatrain.testing.recipe_check.small import batches_of

torch = pytest.importorskip("torch")

from tests.support.planted_families import MODELS  # noqa: E402  # needs torch
from tests.support.planted_steps import batches, recipe  # noqa: E402

PLANTED = '''
"""Stands for a release of torch in which one function is another one."""
import torch.nn.functional as F

right = F.silu
F.silu = lambda x, inplace=False: x / 2 + right(x) - x * 0.5 * (1 + 1e-4)
'''
SMALL = ["--a", "backend=torch", "--b", "backend=torch"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("portatrain.testing.recipe_check.run.on_cpu", lambda: None)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the packages of this one, but for torch, which says that it is another release
    and has a wrong `silu`."""
    folder = tmp_path_factory.mktemp("other")
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "these.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    (packages / "planted.py").write_text(PLANTED)
    (packages / "sitecustomize.py").write_text("import planted\n")
    release = packages / "torch-99.1.dist-info"
    release.mkdir()
    (release / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.1\n")
    return folder / "bin/python"


def test_a_fault_of_a_package_is_found_in_the_environment_that_has_it(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", "tiny-lm", *SMALL, "--python-b", str(other), "--json"]) == FOUND
    found = json.loads(capsys.readouterr().out)
    fault = found["fault"]
    assert fault["what"].startswith("ops.silu in blocks/mlp, layer 0") and fault["stage"] == "forward"
    assert fault["wrong"] == [f"torch, python={other}"]
    (note,) = [note for note in found["notes"] if note.startswith("packages that differ")]
    assert note.endswith(f": torch {torch.__version__.partition('+')[0]} and 99.1") or " and 99.1" in note


@pytest.mark.full
def test_the_same_environment_in_a_process_of_its_own_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "site-packages/tools/_vendor"  # what setuptools puts on the path once it is imported
    (own / "oddity-1.0.dist-info").mkdir(parents=True)
    (own / "oddity-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: oddity\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(own)
    made = recipe("model.layers=1")
    here = Side(name="here", recipe=made, backend="torch")
    there = Side(name="there", recipe=made, backend="torch", python=sys.executable, source="tiny-lm")
    rows = batches(made, 1)
    found = replay((here, there), [(b, b) for b in rows])
    assert found.good and found.rows[0].difference == 0.0 and not found.notes


@pytest.mark.parametrize(
    ("python", "said"),
    [("/nowhere/python", "expected the path of a Python"), ("/bin/false", "it ended with exit code 1")],
)
def test_a_python_that_does_not_run_ends_in_one_paragraph(
    python: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bisect", "tiny-lm", *SMALL, "--python-b", python]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and "Traceback" not in error


@pytest.mark.full
def test_a_fault_on_a_mesh_of_processes_is_named_by_its_operation(
    other: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each process has its rows; the oracle judges what they are together."""
    assert main(["bisect", "tiny-lm", *SMALL, "--python-b", str(other), "--b", "mesh=fsdp=2", "--json"]) == FOUND
    fault = json.loads(capsys.readouterr().out)["fault"]
    assert fault["what"].startswith("ops.silu in blocks/mlp, layer 0") and fault["stage"] == "forward"
    assert len(fault["wrong"]) == 1 and "fsdp=2" in fault["wrong"][0]


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2", "context=2", "expert=2"])
def test_operations_on_a_mesh_of_processes(mesh: str) -> None:
    """What the processes recorded, put together, is what one device records, up to rounding."""
    made = MODELS["experts with losses"]()
    batch = made.microbatches(dict(next(iter(batches_of(made, made.describe())))))
    found = []
    for side in (
        Side(name="one", recipe=made, backend="torch"),
        Side(name="m", recipe=made, backend="torch", mesh=mesh),
    ):
        runs = running(side)
        try:
            found.append(runs.watch(runs.state(runs.first_state()), batch, 1))
        finally:
            runs.close()
    (one,), (parts,) = found
    assert parts.weight == one.weight and parts.loss == pytest.approx(one.loss, rel=1e-5)
    assert [c.template for c in parts.calls] == [c.template for c in one.calls]
    for mine, its in zip(parts.calls, one.calls, strict=True):
        for part in ("args", "results", "arg_grads", "result_grads"):
            for a, b in zip(getattr(mine, part), getattr(its, part), strict=True):
                assert (a is None) == (b is None), (part, str(its))
                if a is not None:
                    assert a.shape == b.shape, (part, str(its))
                    assert np.abs(a - b).max(initial=0) <= 1e-5 * np.abs(b).max(initial=0), (part, str(its))


@pytest.mark.full
def test_bfloat16_on_a_mesh_is_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at operation by operation, though the gradients agree. FSDP2 hands out parameters that are rounded."""
    monkeypatch.setattr("portatrain.testing.bisect.step._Step._same_gradients", lambda self: False)
    made = recipe("model.layers=1", "model.dropout=0.1")
    low = dataclasses.replace(made, precision="bf16")
    sides = (
        Side(name="one", recipe=made, backend="torch"),
        Side(name="mesh", recipe=low, backend="torch", mesh="fsdp=2"),
    )
    found = replay(sides, [(b, b) for b in batches(made, 1)])
    assert found.good, found.sentence


@pytest.mark.meshes
def test_torch_on_a_mesh_beside_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    for mesh in ("fsdp=2", "tensor=2"):
        assert main(["bisect", "tiny-lm", *SMALL, "--b", f"mesh={mesh}"]) == OK
        assert "rounding: in 3 replayed steps" in capsys.readouterr().out
