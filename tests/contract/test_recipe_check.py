"""`portatrain check` finds every planted fault, names what is at fault, and finds nothing in what is sound."""

from __future__ import annotations

from typing import Any

import pytest

from portatrain.backends.base import backend_class
from portatrain.testing.recipe_check.run import check_recipe
from tests.support import planted
from tests.support.running import BACKENDS

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
    "a counter": ("forward pass", "attribute Calls.calls", "planted.py, line"),
    "a counter in an object": ("the same twice", "op ops.", "planted.py, line"),
    "a parameter that is not used": ("parameters reached", "parameter spare", "frozen=('spare',)"),
    "a parameter times zero": ("parameters reached", "parameter spare", "frozen=('spare',)"),
    "a parameter of a Stack that is not used": ("parameters reached", "parameter layers_1/spare", ""),
    "a misspelt axis": ("axes", "axis 'mpl'", "Did you mean mlp"),
    "a division by zero": ("forward pass", "the loss", "finite"),
    "an error": ("forward pass", "the model in training", "planted.py, line"),
}
ON_A_BACKEND: dict[str, tuple[str, str, str]] = {
    "a mean that is tallied": ("{0}, accumulation 2", "State level", "ops.tally"),
    "a mean over the microbatch": ("{0}, accumulation 2", "loss", "two microbatches"),
    "a parameter behind stop_gradient": ("parameters reached", "parameter spare", "gradient is zero"),
}
SOUND = ("nothing", "factors that start at zero")


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
    assert found(kind) == []


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
@pytest.mark.parametrize("kind", ON_A_BACKEND)
def test_a_planted_fault_is_found_on_a_backend(kind: str) -> None:
    assert_named(found(kind, "torch"), ON_A_BACKEND[kind], "torch")


def test_every_planted_model_is_tried() -> None:
    assert planted.MODELS.keys() == {*IN_THE_ORACLE, *ON_A_BACKEND, *SOUND}


@pytest.mark.skipif("torch" not in BACKENDS, reason="torch is not installed")
def test_another_derivative_at_a_kink_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """relu as it was on jax: the derivative at 0 is 1/2."""
    import torch

    cls: Any = backend_class("torch")
    monkeypatch.setattr(cls.ops, "relu", lambda self, x: torch.maximum(x, torch.zeros_like(x)))
    assert_named(found("nothing", "torch"), ("operations at special points, torch", "op relu", "relu at points"))
