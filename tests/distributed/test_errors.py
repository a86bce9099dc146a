"""What the torch backend refuses, before it waits for anybody or allocates anything; one paragraph with a way out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from portatrain.backends.torch import TorchBackend
from portatrain.backends.torch.mesh import check_processes
from portatrain.backends.torch.parallel import Cut, cut_of
from portatrain.cli import main
from portatrain.errors import UserError
from portatrain.model.layout import COMPUTE, PARAMS, Layout, Mesh
from portatrain.model.module import describe
from tests.support.mesh_cases import CASES
from tests.support.own_recipe import GOOD

pytestmark = pytest.mark.meshes

LM = CASES["lm"]


def test_one_process_on_a_mesh_of_more() -> None:
    with pytest.raises(UserError, match=r"2 processes, one a device, got one process.*--devices 2.*torchrun"):
        TorchBackend(LM.program("fsdp=2"))


@pytest.mark.parametrize(("world", "mesh"), [("3", "fsdp=2"), ("2", "fsdp=2,tensor=2")])
def test_a_mesh_unequal_to_the_processes(world: str, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=f"got {world}.*fsdp={world}"):
        TorchBackend(LM.program(mesh))


def test_a_mistake_in_a_model_is_one_paragraph_of_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every process of the mesh comes upon it; it is said once, and its traceback is in the record."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(GOOD.replace("ops.tanh(", "ops.tanhh("))
    assert main(["train", "own.py", "--run-dir", "run", "--backend", "torch", "--devices", "2"]) == 2
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "own.py, line 24, in Block.__call__" in said and "Did you mean ops.tanh?" in said
    (kept,) = re.findall(r"(run/attempts/1/error\S*\.txt) has it", said)
    assert Path(kept).read_text().startswith("Traceback")


def test_as_many_processes_as_devices() -> None:
    check_processes(Mesh.parse("fsdp=2,tensor=2"), 4)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        ("fsdp=3", r"axis 'embed'.*nearest sizes that work are 30 or 33"),
        ("tensor=3", "axis '(heads|vocab|mlp|kv_heads)'"),
        ("context=3", "axis 'seq'.*nearest sizes"),
        ("replica=32", "axis 'batch'"),
        ("expert=2", "an 'experts' axis"),
    ],
)
def test_sizes_that_do_not_divide(mesh: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        LM.program(mesh)


def _with(params: dict[str, object] | None = None, case: str = "lm", mesh: str = "fsdp=2,tensor=2") -> None:
    program = CASES[case].program(mesh)
    layout = dataclasses.replace(program.layout, params={**COMPUTE, **PARAMS, **(params or {})})
    TorchBackend(dataclasses.replace(program, layout=layout))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"mlp": ("fsdp", "tensor"), "embed": ()}, r"axis 'mlp'.*'fsdp', 'tensor'.*\('tensor', 'fsdp'\)"),
        ({"heads": ()}, "axis 'heads'"),
        ({"layers": "fsdp", "embed": ()}, "the axis of a Stack"),
    ],
)
def test_layouts_that_fsdp2_cannot_hold(params: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        _with(params)


def test_experts_that_do_not_divide() -> None:
    with pytest.raises(UserError, match=r"axis 'experts'.*expert=3"):
        _with(case="routed", mesh="expert=3")


def test_tensor_is_major_to_fsdp_on_one_dimension() -> None:
    info = describe(LM.model.build()).params["blocks/mlp/up"]
    params = {**COMPUTE, "mlp": ("tensor", "fsdp")}
    layout = Layout(mesh=Mesh(fsdp=2, tensor=2), params=params)
    assert cut_of(layout, info) == Cut((32, 64), ((), ("tensor", "fsdp")))
