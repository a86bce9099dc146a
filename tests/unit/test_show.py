"""`portatrain show`, and axes that no mapping knows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from portatrain.backends.base import backend_class, missing
from portatrain.backends.program import make_program
from portatrain.cli import main
from portatrain.model.layout import Mesh, unknown_axes
from portatrain.model.module import Module, Param, Stack, describe
from portatrain.recipe import apply_overrides, load_recipe, shipped_recipes

Capture = pytest.CaptureFixture[str]
OWN = """
from dataclasses import dataclass
from portatrain import Module, Param, Recipe
from portatrain.data import Stdlib
from portatrain.optim import AdamW, Constant

class Net(Module):
    def __init__(self):
        self.table = Param(vocab=256, embd=32, fan_in_axes=0)
        self.into = Param(embd=32, mlp=64)
        self.out = Param(mlp=64, embd=32)
    def __call__(self, ops, batch):
        x = ops.embed(self.table, batch["tokens"])
        x = x + ops.einsum("bsm,me->bse", ops.tanh(ops.einsum("bse,em->bsm", x, self.into)), self.out)
        return ops.cross_entropy(x, self.table, batch["targets"], mask=batch["mask"])

@dataclass(frozen=True, kw_only=True)
class Sizes:
    def build(self):
        return Net()

def recipe():
    return Recipe(name="own", model=Sizes(), data=Stdlib(seq_len=16), optimizer=AdamW(lr=1e-3), schedule=Constant(),
                  steps=2, batch=4)
"""
SAID = "axis 'embd' of table and 2 more is in no mapping, so it is whole on every device. Did you mean embed? "


def shown(capsys: Capture, *words: str) -> dict[str, Any]:
    assert main(["show", *words, "--json"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    return json.loads(out)


def test_every_number_of_a_small_recipe(capsys: Capture) -> None:
    found = shown(
        capsys, "tiny-lm", "--mesh", "fsdp=2,tensor=2", "--set", "frozen=embed/table", "--set", "ema_decay=0.9"
    )
    rows = {row["name"]: row for row in found["tensors"]}
    wq = rows["blocks/attn/wq"]
    assert wq == {
        "name": "blocks/attn/wq",
        "role": "params",
        "shape": [4, 128, 4, 32],
        "axes": ["layers", "embed", "heads", "head_dim"],
        "split": [[], ["fsdp"], ["tensor"], []],
        "bytes_per_device": 4 * 4 * 128 * 4 * 32 // 4,
        "init": "normal 0.08839",
        "dtype": "float32",
        "trains": True,
        "decays": True,
        "fp8": False,
        "kind": "",
        "lr_factor": 1.0,
        "multiplier": 1.0,
    }
    table = rows["embed/table"]
    assert (table["trains"], table["decays"], table["split"]) == (False, False, [["tensor"], ["fsdp"]])
    assert (rows["final_norm/scale"]["init"], rows["final_norm/scale"]["decays"]) == ("ones", False)
    frozen = table["bytes_per_device"]
    held = found["bytes_per_device"]
    trained = held["parameters"] - frozen
    assert (held["gradients"], held["averages"], held["optimizer"]) == (trained, trained, 2 * trained)
    assert found["parameters"] - found["trained_parameters"] == 256 * 128
    assert (found["mesh"], found["devices"]) == ("fsdp=2,tensor=2", 4)
    assert (found["lr"], found["parametrization"], found["axes_since_base"]) == (3e-3, None, {})


def test_what_the_width_makes_of_every_parameter(capsys: Capture) -> None:
    words = ["tiny-lm", "--set", "parametrization=MuP", "--set", "parametrization.base={'embed':64,'head_dim':16}"]
    found = shown(capsys, *words)
    rows = {row["name"]: (row["kind"], row["lr_factor"], row["multiplier"]) for row in found["tensors"]}
    assert rows["embed/table"] == ("table", 1, 0.5) and rows["blocks/attn/wq"] == ("hidden", 0.5, 1)
    assert rows["blocks/mlp/up"] == ("output", 1, 0.5)  # mlp is the same at the base
    assert found["attention_scales"] == {"blocks/attn": 0.125}  # 16^-0.5 * 16 / 32
    assert found["axes_since_base"] == {
        **{"embed": [64, 128], "head_dim": [16, 32]},
        **{"vocab": [256, 256], "heads": [4, 4], "kv_heads": [2, 2], "mlp": [384, 384]},
    }
    assert main(["show", *words]) == 0
    out, _ = capsys.readouterr()
    assert "embed 64 -> 128, head_dim 16 -> 32; as there: vocab 256, heads 4, kv_heads 2, mlp 384" in out
    assert "x 0.5 as an output" in out and "blocks/attn: scores of attention times 0.125" in out
    assert "narrower" not in out
    wider = ["show", *words[:-1], "parametrization.base={'embed':256,'head_dim':64}"]
    assert "narrower than its base in embed, head_dim: " in _out(capsys, wider)


@pytest.mark.parametrize("name", [n for n in ("jax", "torch") if not missing(n)])
@pytest.mark.parametrize("words", [[], ["precision=bf16-state"], ["lora=LoRA"], ["optimizer=Muon", "ema_decay=0.9"]])
def test_what_is_shown_is_what_a_backend_holds(name: str, words: list[str], capsys: Capture) -> None:
    small = ["model.layers=2", "model.embed=32", "model.mlp=64", *words]
    found = shown(capsys, "tiny-lm", *(word for one in small for word in ("--set", one)))
    recipe = apply_overrides(load_recipe("tiny-lm"), small)
    backend = backend_class(name)(make_program(recipe))
    sizes = {"params": 0, "opt": 0, "ema": 0}
    for box in backend.local_boxes(backend.init_state()):
        kind = box.role.partition("/")[0]
        sizes[kind] += box.fetch().nbytes if box.role != "opt/count" else 0
    held = found["bytes_per_device"]
    assert (held["parameters"], held["optimizer"], held["averages"]) == (sizes["params"], sizes["opt"], sizes["ema"])


def test_the_mesh_is_the_planned_one_of_a_cluster(capsys: Capture) -> None:
    found = shown(capsys, "llama3-8b", "--cluster", "h100-64")
    assert found["devices"] == 64
    assert main(["plan", "llama3-8b", "--cluster", "h100-64", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)
    assert Mesh.parse(found["mesh"]).devices == 64
    assert Mesh.parse(found["mesh"]) == Mesh(**planned["plan"]["mesh"])
    held, memory = found["bytes_per_device"], planned["plan"]["memory_bytes"]
    assert [held["parameters"], held["gradients"], held["optimizer"]] == pytest.approx(
        [memory["params"], memory["grads"], memory["optimizer"]]
    )


def test_the_table_names_everything(capsys: Capture) -> None:
    assert main(["show", "tiny-vit", "--mesh", "fsdp=2"]) == 0
    out, error = capsys.readouterr()
    assert error == ""
    for said in ("blocks/attn/wq", "layers=4, embed=64, heads=4, head_dim=16", "embed: fsdp", "2 devices", "optimizer"):
        assert said in out


def test_a_misspelt_axis_is_named_by_show_plan_and_train(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    assert main(["show", str(path)]) == 0
    assert f"warning: {SAID}" in capsys.readouterr().err
    (unknown,) = json.loads(_out(capsys, ["show", str(path), "--json"]))["unknown_axes"]
    assert (unknown["axis"], unknown["nearest"], unknown["tensors"]) == ("embd", "embed", ["table", "into", "out"])
    assert main(["plan", str(path), "--cluster", "h100-8", "--json"]) == 0
    assert f"warning: {SAID}" in capsys.readouterr().err
    backend = next(name for name in ("jax", "torch") if not missing(name))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "portatrain",
            "train",
            str(path),
            "--run-dir",
            str(tmp_path / "run"),
            "--backend",
            backend,
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert SAID in done.stderr.split("step 1/2")[0]  # among the first lines


def test_an_axis_that_stays_whole_on_purpose_is_not_named(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    for given in ("compute.embd=", "params.embd=", "params.embd=fsdp"):
        assert main(["show", str(path), "--set", given]) == 0
        assert capsys.readouterr().err == ""


def _out(capsys: Capture, words: list[str]) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_have_no_unknown_axis(name: str) -> None:
    recipe = load_recipe(name)
    own = {"compute": recipe.compute, "params": recipe.params}
    assert unknown_axes(recipe.describe(), **own) == []
    assert unknown_axes(apply_overrides(recipe, ["lora=LoRA"]).describe(), **own) == [] or "vit" in name


def test_the_axis_of_a_stack_is_known() -> None:
    class Inner(Module):
        def __init__(self) -> None:
            self.w = Param(embed=4, wdth=4)

    class Outer(Module):
        def __init__(self) -> None:
            self.blocks = Stack(Inner(), 3, axis="sublayers")

    (unknown,) = unknown_axes(describe(Outer()))
    assert (unknown.axis, unknown.nearest, unknown.tensors) == ("wdth", None, ("blocks/w",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny-lm", "--mesh", "fsdp=3"], "nearest sizes that work"),
        (["tiny-lm", "--mesh", "fdsp=2"], "Did you mean fsdp"),
        (["tiny-lm", "--mesh", "fsdp=2", "--cluster", "h100-8"], "got both"),
        (["tiny-lm", "--cluster", "h10-8"], "Did you mean h100"),
        (["llama3-405b", "--cluster", "h100-8"], "portatrain plan llama3-405b"),
        (["tiny-lm", "--set", "frozen=embd/*"], "Did you mean embed/*?"),
        (["tiny-lm", "--set", "model.mlp=0"], "model.mlp: expected an integer of at least 1, got 0"),
        (["tiny-ml"], "Did you mean tiny-lm"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: Capture) -> None:
    assert main(["show", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_build_that_returns_no_module_is_a_mistake(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.replace("return Net()", "Net()"))
    assert main(["show", str(path)]) == 2
    assert "a portatrain.Module from Sizes.build(), got None" in capsys.readouterr().err


def test_it_needs_no_framework() -> None:
    code = (
        "import sys; [sys.modules.__setitem__(n, None) for n in ('jax', 'torch', 'flax', 'optax')]; "
        "from portatrain.cli import main; sys.exit(main(['show', 'tiny-lm', '--mesh', 'fsdp=2', '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"] == 2
