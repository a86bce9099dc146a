"""Exports of models that are not plain: factors of LoRA, States, tied tables, Stacks in Stacks, superblocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints_format import LocalStore, Reader
from portatrain.backends.base import backend_class
from portatrain.checkpoint.interop import trees
from portatrain.checkpoint.saver import Checkpoints
from tests.support.mesh_cases import CASES
from tests.support.running import BACKENDS

MODELS = (
    "lm",
    "lm, untied, all options",
    "lm, LoRA",
    "routed",
    "nested",
    "lm, bf16 state",
    "vit, accumulation, dropout",
)


@pytest.fixture
def saved(request: Any, tmp_path: Path) -> Any:
    """(program, reader, tensors by name) of a checkpoint of the model, on a backend."""
    program = CASES[request.param].program("")
    backend = backend_class(BACKENDS[-1])(program)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, backend, backend.init_state(), {"step": 1})
    checkpoints.wait()
    with LocalStore(tmp_path / "checkpoints/step-00000001") as store:
        reader = Reader(store)
        yield program, reader, {name: reader.read(name) for name in reader.names}


@pytest.mark.parametrize("saved", MODELS, indirect=True)
def test_the_lowered_module_takes_its_state_dict(saved: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    program, reader, held = saved
    trees.to_torch(reader, program.definition, tmp_path)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    module = backend_class("torch")(program).lower()
    for tensor in module.state_dict().values():
        tensor.zero_()
    found = module.load_state_dict(state)
    assert not found.missing_keys and not found.unexpected_keys
    assert sum(t.numel() for t in dict(module.named_parameters()).values()) == sum(
        a.size for n, a in held.items() if n.startswith("params/")
    )
    assert any(bool(t.any()) for t in module.state_dict().values())


@pytest.mark.parametrize("saved", MODELS, indirect=True)
@pytest.mark.parametrize("kind", ["orbax", "dcp"])
def test_every_tensor_leaves_and_comes_back(kind: str, saved: Any, tmp_path: Path) -> None:
    pytest.importorskip({"orbax": "orbax.checkpoint", "dcp": "torch"}[kind])
    _, reader, held = saved
    out = tmp_path / "out"
    out.mkdir()
    write, read = {"orbax": (trees.to_orbax, trees.from_orbax), "dcp": (trees.to_dcp, trees.from_dcp)}[kind]
    write(reader, out)
    back = read(out)
    assert back.keys() == held.keys()
    assert all(np.asarray(back[n]).tobytes() == held[n].tobytes() for n in held)


def test_a_leaf_that_is_also_a_folder_has_a_name_of_its_own() -> None:
    names = {"a/w": 1, "a/w/lora_a": 2, "a/w/lora_b": 3, "b/base": 4, "c": 5}
    tree = trees.nested(names)
    assert tree["a"]["w"] == {"base": 1, "lora_a": 2, "lora_b": 3}
    assert trees.flat(tree) == names
