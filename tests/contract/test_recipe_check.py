"""`portatrain check` finds every planted fault, names what is at fault, and finds nothing in what is sound."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import backend_class
from portatrain.errors import UserError, users_code
from portatrain.recipe import load_recipe, shipped_recipes
from portatrain.testing.recipe_check import compare, processes, properties, small
from portatrain.testing.recipe_check.blame import place_of
from portatrain.testing.recipe_check.measured import Measured
from portatrain.testing.recipe_check.report import Finding
from portatrain.testing.recipe_check.run import MESHES, check_recipe
from portatrain.testing.recipe_check.small import candidates
from portatrain.testing.recipe_check.subject import explained
from tests.support import planted
from tests.support.own_recipe import GOOD
from tests.support.running import BACKENDS
from tests.support.shipped import USUAL, each

# fault -> (check, part of what is named, part of the sentence)
IN_THE_ORACLE: dict[str, tuple[str, str, str]] = {
    "an einsum of two samples": ("samples alone", "op ops.einsum('be,ce->bc')", "planted.py, line"),
    "an einsum over samples": ("samples alone", "op ops.einsum('bm->m')", "depends on the others"),
    "the samples in another order": ("forward pass", "ops.roll, axis=0", "over="),
    "the first sample": ("samples alone", "op ops.relu", "depends on the others"),
    "a sort over samples": ("forward pass", "ops.cumsum", "over="),
    "std": ("forward pass", "x.std", "ops.std"),
    "std of features": ("forward pass", "x.std", "ops.std"),
    "max": ("forward pass", "x.max", "ops.max"),
    "a sum over samples": ("forward pass", "x.sum(0)", "ops.sum"),
    "a mean over all": ("forward pass", "x.mean()", "ops.mean"),
    "a Python random number": ("forward pass", "random", "planted.py, line"),
    "a Python random number of its own": ("forward pass", "random.Random", "planted.py, line"),
    "a Python random number in an argument": (
        "forward pass",
        "random",
        f"planted.py, line {inspect.getsourcelines(planted.DrawnInAnArgument.hidden)[1] + 1}.",
    ),
    "a NumPy random number": ("forward pass", "numpy.random", "planted.py, line"),
    "a NumPy generator made in the pass": ("forward pass", "default_rng", "ops.dropout"),
    "a random number in one call of a hundred": ("forward pass", "random", "planted.py, line"),
    "bytes of the system": ("the same twice", "op ops.", "in call"),
    "the time": ("the same twice", "op ops.", "planted.py, line"),
    "a random number when built": ("the same twice", "construction", "built anew"),
    "a dropout of its own": ("forward pass", "numpy.random.Generator", "in training"),
    "a dropout by a mask of NumPy": ("forward pass", "numpy.random", "ops.dropout"),
    "a State set as an attribute": ("forward pass", "State Counting.seen", "ops.tally"),
    "a State updated in the forward pass": ("forward pass", "ops.update(Updating", "ops.tally"),
    "a State set as an attribute after a step": ("forward pass", "State AfterStep.seen", "ops.update"),
    "an axis of a value": ("forward pass", "axis 'mpl'", "planted.py, line"),
    "an axis of other layers": ("forward pass", "axis 'head_dim'", "planted.py, line"),
    "two samples in one row": ("samples alone", "the number of samples", "write -1"),
    "two samples that see each other": ("samples alone", "op ops.softmax", "depends on the others"),
    "a counter": ("forward pass", "attribute Calls.calls", "planted.py, line"),
    "a counter in an object": ("the same twice", "op ops.", "planted.py, line"),
    "a parameter that is not used": ("parameters reached", "parameter spare", "frozen=('spare',)"),
    "a parameter times zero": ("parameters reached", "parameter spare", "frozen=('spare',)"),
    "a parameter of a Stack that is not used": ("parameters reached", "parameter layers_1/spare", ""),
    "the number of samples": ("samples alone", "op ops.", "depends on the others"),
    "a mean over the microbatch": ("samples alone", "ops.mean in", "in training"),
    "a mean that is tallied": ("samples alone", "State level", "ops.tally"),
    "a call that is tallied": ("samples alone", "State level", "ops.tally"),
    "a mean over the batch in evaluation": ("samples alone", "ops.mean in", "in evaluation"),
    "a misspelt axis": ("axes", "axis 'mpl'", "Did you mean mlp"),
    "a division by zero": ("forward pass", "the loss", "finite"),
    "an error": ("forward pass", "the model in training", "planted.py, line"),
}
ON_A_BACKEND: dict[str, tuple[str, str, str]] = {
    "a root of zero": ("{0}, one device", "the gradient of bias, into", "expected finite numbers"),
    "a parameter behind stop_gradient": ("parameters reached", "parameter spare", "gradient is zero"),
}
ON_A_MESH = ("the rank of a process",)
SOUND = (
    "nothing",
    "a label in a reduction",
    "factors that start at zero",
    "a comparison of samples",
    "a comparison in groups",
)


def found(kind: str, *backends: str, **fields: Any) -> list[Any]:
    return list(check_recipe(planted.recipe(kind, **fields), backends=backends).findings)


def assert_named(findings: list[Any], wanted: tuple[str, str, str], *names: str) -> None:
    check, what, said = wanted
    named = [f for f in findings if f.check == check.format(*names)]
    assert any(what in str(f) and said in str(f) for f in named), "\n".join(map(repr, findings)) or "nothing found"


@pytest.mark.parametrize("kind", IN_THE_ORACLE)
def test_a_planted_fault_is_found_without_a_framework(kind: str) -> None:
    assert_named(found(kind), IN_THE_ORACLE[kind])


@pytest.mark.parametrize("kind", SOUND)
def test_nothing_is_found_in_sound_models(kind: str) -> None:
    assert found(kind, *BACKENDS[-1:]) == []


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
@pytest.mark.parametrize("kind", ON_A_BACKEND)
def test_a_planted_fault_is_found_on_a_backend(kind: str) -> None:
    assert_named(found(kind, "torch"), ON_A_BACKEND[kind], "torch")


ROOT = Path(__file__).parents[2]
EXAMPLES = [str(p) for p in sorted((ROOT / "examples").glob("*.py")) if "def recipe(" in p.read_text()]
ALL = [*shipped_recipes(), *EXAMPLES]


def distinct() -> list[str]:
    """Recipes that differ once they are small; the larger ones of a family are the same model then."""
    made: dict[str, str] = {}
    for name in [*USUAL, *ALL]:
        small = next(candidates(load_recipe(name)))[0].to_json()
        made.setdefault(json.dumps([small["model"], small["data"]], sort_keys=True), name)
    return list(made.values())


@pytest.mark.parametrize("name", each(distinct()))
def test_nothing_is_found_in_shipped_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(properties, "REPEATS_S", 0.1)
    report = check_recipe(load_recipe(name), backends=())
    assert report.findings == [] and all(row.status == "ok" for row in report.rows)


WHOLE = ("tiny-lm", str(ROOT / "examples" / "recurrent.py"))
"""What the long tests check on all meshes; the soak checks every recipe."""


@pytest.mark.timeout(900)
@pytest.mark.skipif(len(BACKENDS) < 2, reason="jax and torch are not both installed")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in WHOLE else pytest.mark.soak) for name in ALL]
)
def test_the_whole_check_finds_nothing_in_shipped_recipes(name: str, tmp_path: Path) -> None:
    """With the meshes of jax's simulated devices and of torch's processes: a row for each, none left out."""
    found = checked(name, tmp_path)
    assert found["found"] == []
    left = [row for row in found["checks"] if row["status"] != "ok"]
    assert all("tensor" in row["about"] and name not in shipped_recipes() for row in left), left
    assert {f"{b} on {mesh}" for b in BACKENDS for mesh in MESHES} <= {row["name"] for row in found["checks"]}


FAULTS_IN_A_FILE = {
    "relu as it was on jax": (
        "import jax.numpy as jnp\n"
        "from portatrain.backends.jax.ops import JaxOps\n"
        "JaxOps.relu = lambda self, x: jnp.maximum(x, jnp.zeros_like(x))\n",
        "nothing",
        ("operations at special points, jax", "op relu", "on jax"),
    ),
    "a rule that draws": ("", "nothing", ("optimizer rule", "rule OwnRandomRule", "drawn in")),
    "the rank of a process": ("", "the rank of a process", ("torch on fsdp=2", "the loss of the first step", "fsdp=2")),
}


@pytest.mark.skipif(len(BACKENDS) < 2, reason="jax and torch are not both installed")
@pytest.mark.parametrize(
    "fault", [pytest.param(f, marks=pytest.mark.full if "relu" in f else pytest.mark.soak) for f in FAULTS_IN_A_FILE]
)
def test_the_whole_check_finds_a_fault_in_a_file(fault: str, tmp_path: Path) -> None:
    before, kind, wanted = FAULTS_IN_A_FILE[fault]
    rule = "optimizer=planted.OwnRandomRule(lr=0.1)" if "rule" in fault else ""
    text = (
        f"{before}from tests.support import planted\n\n\ndef recipe():\n    return planted.recipe({kind!r}, {rule})\n"
    )
    (tmp_path / "own.py").write_text(text)
    found = checked("own.py", tmp_path, code=1)
    assert_named([Finding(**finding) for finding in found["found"]], wanted)


def checked(recipe: str, folder: Path, *, code: int = 0) -> Any:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    words = [sys.executable, "-m", "portatrain", "check", recipe, "--json"]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), ValueError("of portatrain's own")]
)
def test_a_failure_of_the_check_is_no_fault_of_the_recipe(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(subject: Any) -> Any:
        raise error

    as_ours = reached.__code__.replace(co_filename=str(properties.__file__))  # it counts as a function of the check
    monkeypatch.setattr(reached, "__code__", as_ours)
    monkeypatch.setattr(properties, "reached", reached)
    report = check_recipe(planted.recipe(), backends=())
    (finding,) = report.findings
    assert finding.check == "parameters reached" and "The check itself failed" in finding.do
    assert finding.failed and not report.refusing


def test_an_exit_code_of_processes_is_no_fault_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "run_processes", lambda *_: 1)
    there = processes.on_meshes("torch", planted.recipe(), "own.py", ["fsdp=2"], [], {}, {})
    error = there["fsdp=2"]
    assert isinstance(error, UserError) and "exit code 1" in str(error)
    assert not explained(error, "torch on fsdp=2").numbers


RULES = {
    "draws": (planted.OwnRandomRule(lr=0.1), "planted.py, line"),
    "divides by zero": (planted.DividingRule(lr=0.1), "finite update of"),
    "has another shape": (planted.SummedRule(lr=0.1), "of shape (6, 8)"),
}


@pytest.mark.parametrize("fault", RULES)
def test_a_rule_that_is_wrong_is_found(fault: str) -> None:
    rule, said = RULES[fault]
    assert_named(found("nothing", optimizer=rule), ("optimizer rule", f"rule {type(rule).__name__}", said))


def test_a_model_that_is_too_large_is_said_to_be_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "LARGEST", 100.0)
    report = check_recipe(planted.recipe(), backends=())
    assert [row.name for row in report.rows] == ["axes", "forward pass"] and not report.refusing
    assert "a method small()" in str(report.findings[0])


def test_a_package_with_a_similar_name_is_the_users() -> None:
    there: dict[str, Any] = {"place_of": place_of, "sys": sys}
    file = ROOT / "portatrain_models" / "net.py"
    exec(compile("def call():\n    return place_of(sys._getframe())\n", str(file), "exec"), there)
    assert there["call"]() == f"{users_code.shown(str(file))}, line 2"


def test_a_model_without_a_loss_is_found_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted.Base, "__call__", lambda self, ops, batch: batch["x"])
    (finding,) = found("nothing")
    assert "test_recipe_check.py, line" in finding.what
    assert "array of shape (8, 6)" in finding.said


def test_an_error_on_a_mesh_has_the_line_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any, **__: Any) -> Any:
        raise ValueError("the shapes do not fit")

    monkeypatch.setattr(processes, "backend_class", lambda name: lambda program: None)
    monkeypatch.setattr(processes, "measure", measured)
    fields = ("batches", "points", "states")
    job = {"backend": "torch", "recipe": planted.recipe().to_json(), "source": "tiny-lm", "meshes": ["fsdp=2"]}
    (tmp_path / "job").write_bytes(pickle.dumps(job | dict.fromkeys(fields)))
    with pytest.raises(UserError, match=r"torch on fsdp=2 \(.*test_recipe_check\.py, line \d+.*the shapes do not fit"):
        processes.main(argparse.Namespace(folder=str(tmp_path), cwd=str(tmp_path)))


def test_samples_of_several_shapes_are_a_fault() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Ragged(planted.Points):
        def sample(self, index: int) -> Mapping[str, Any]:
            found = super().sample(index)
            return {**found, "x": found["x"][: 5 + index % 2]}

    report = check_recipe(dataclasses.replace(planted.recipe(), data=Ragged()), backends=())
    (finding,) = report.refusing
    assert "Ragged.sample(" in finding.what and "key 'x'" in finding.what


def test_every_planted_model_is_tried() -> None:
    assert planted.MODELS.keys() == {*IN_THE_ORACLE, *ON_A_BACKEND, *SOUND, *ON_A_MESH}


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_another_derivative_at_a_kink_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """relu as it was on jax: the derivative at 0 is 1/2."""
    import torch

    cls: Any = backend_class("torch")
    monkeypatch.setattr(cls.ops, "relu", lambda self, x: torch.maximum(x, torch.zeros_like(x)))
    assert_named(found("nothing", "torch"), ("operations at special points, torch", "op relu", "relu at points"))


OF_A_FRAMEWORK = {
    "jax": ("import jax.numpy as jnp\n        return jnp.tanh(x)", "an array handed to jax"),
    "torch": ("import torch\n        return torch.tanh(x)", "operations of `ops` in a model"),
    "scipy": ("import scipy.special as s\n        return x * float(s.erf(0.5))", None),
}


@pytest.mark.parametrize("framework", OF_A_FRAMEWORK)
def test_a_function_of_a_framework_is_named_with_its_line(framework: str, tmp_path: Path) -> None:
    """It is imported where it is used, and modules may draw random numbers as they are imported."""
    line, said = OF_A_FRAMEWORK[framework]
    drawing = tmp_path / f"draws_for_{framework}.py"
    drawing.write_text("import numpy as np\nSEED = np.random.rand()\nRNG = np.random.default_rng(0).random()\n")
    text = GOOD.replace("np.full(4, index / 12, np.float32)", "np.full(4, index / 12 + 0.1, np.float32)")
    inside = f"\n        sys.path.append({str(tmp_path)!r})\n        import {drawing.stem}\n        {line}"
    text = text.replace("import numpy", "import sys\nimport numpy").replace(
        'return ops.einsum("be,e->b", x_BE, self.out)', 'return self.scaled(ops.einsum("be,e->b", x_BE, self.out))'
    )
    text = text.replace("class Net(", f"    def scaled(self, x):{inside}\n\nclass Net(")
    file = tmp_path / "own.py"
    file.write_text(text)
    report = check_recipe(load_recipe(str(file)), backends=())
    if said is None:
        assert not report.findings
        return
    (finding,) = report.findings
    assert said in f"{finding.what}: {finding.said}" and finding.check == "forward pass", finding
    at = text[: text.index(line.splitlines()[-1].strip())].count("\n") + 1
    assert f"own.py, line {at}, in Head.scaled" in finding.what, finding


def test_a_metric_that_is_a_difference_of_large_numbers_is_not_blamed_for_its_rounding() -> None:
    """As a reward margin is: its bound grows by how far it moves when every parameter moves by its last bit."""

    def measured(margin: float) -> Measured:
        return Measured(loss={"moved": 1.0}, gradients={"moved": {}}, evaluated={"margin": np.array([margin])})

    def found(margin: float, near: float) -> list[str]:
        one = measured(0.05)
        pair = ("one device", "a mesh")
        near_one = compare.sensitivity(one, measured(near))
        return [f.what for f in compare.differences(one, measured(margin), near_one, names=pair, rule="", start={})]

    assert found(0.05 + 4e-6, near=0.05 + 1e-6) == []
    assert found(0.05 + 4e-6, near=0.05) == found(0.05 + 4e-5, near=0.05 + 1e-6) == ["evaluation, margin"]
