"""What processes recorded of their rows of a batch is, put together, what one process records of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from portatrain import MuP
from portatrain.backends import reference
from portatrain.backends.base import Context
from portatrain.backends.reference.watched import watch_oracle
from portatrain.backends.watched import Call, Watched
from portatrain.model.layout import Mesh
from portatrain.model.module import Definition
from portatrain.testing.bisect.together import together
from recipes.models.decoder import DecoderConfig
from tests.support.operating import recipe_of, rows

MODEL = DecoderConfig(vocab=20, embed=8, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=6, mlp_bias=True)


def recorded(definition: Definition, part: slice) -> Watched:
    """Return what the oracle records of some rows; a gradient is one that is as large as its array's values."""
    params, micro = reference.initial(definition), {k: v[part] for k, v in rows().items()}
    calls, found = watch_oracle(definition, params, micro, Context(sample=np.arange(3)[part]))
    for call in calls:
        call.arg_grads = [None if a.dtype.kind != "f" else a.copy() for a in call.args]
        call.result_grads = [None if r.dtype.kind != "f" else r.copy() for r in call.results]
    assert found.objective is not None
    weight = float(np.sum(found.value.weight_B))
    return Watched(calls=calls, loss=float(found.objective), weight=weight, grads=params)


@pytest.fixture(scope="module")
def definition() -> Definition:
    return recipe_of(MODEL).describe()


def parts(definition: Definition, mesh: str) -> list[Watched]:
    """Return the records of the processes of a mesh: those along `tensor` have the same rows."""
    cut = {0: slice(0, 2), 1: slice(2, 3)} if "fsdp" in mesh else {0: slice(0, 3)}
    return [recorded(definition, cut[Mesh.parse(mesh).coordinates(r)["fsdp"]]) for r in range(Mesh.parse(mesh).devices)]


@pytest.mark.parametrize("mesh", ["fsdp=2", "tensor=2", "fsdp=2,tensor=2"])
def test_rows_lie_one_after_another(definition: Definition, mesh: str) -> None:
    whole = recorded(definition, slice(0, 3))
    made = together(Mesh.parse(mesh), parts(definition, mesh), whole.calls)
    assert made.weight == whole.weight and made.loss == pytest.approx(whole.loss, rel=1e-12)
    blocks = 2 if "fsdp" in mesh else 1
    for mine, true in zip(made.calls, whole.calls, strict=True):
        assert (mine.name, mine.template) == (true.name, true.template)
        same(mine.args, true.args)
        same(mine.results, true.results)
        for tag, arg, got, due in zip(true.tags, true.args, mine.arg_grads, true.arg_grads, strict=True):
            # What every process has whole has a gradient from the rows of each; a parameter's is a sum already.
            of_rows = arg.ndim > 0 and arg.shape[0] == 3
            factor = 1 if tag is not None or of_rows else blocks
            assert (got is None) == (due is None)
            assert got is None or np.allclose(got, factor * due, rtol=1e-12, atol=1e-14), (str(true), tag)


def test_a_parameter_with_a_multiplier_is_recorded_as_one_without(definition: Definition) -> None:
    """bisect compares the calls of two models; an argument that has its default value is none that differs."""
    scaled = replace(recipe_of(MODEL), parametrization=MuP(base={"embed": 4})).describe()
    assert scaled.params["blocks/attn/wq"].multiplier == 0.5
    here, there = (recorded(one, slice(0, 3)).calls for one in (definition, scaled))
    assert [(call.name, call.template) for call in here] == [(call.name, call.template) for call in there]


def same(mine: Sequence[np.ndarray], true: Sequence[np.ndarray]) -> None:
    for a, b in zip(mine, true, strict=True):
        assert a.shape == b.shape and np.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_copy_that_differs_in_one_process_is_the_one_that_is_judged(definition: Definition, rank: int) -> None:
    whole, each = recorded(definition, slice(0, 3)), parts(definition, "fsdp=2")

    def weight(calls: Sequence[Call]) -> np.ndarray:
        at = next((k, j) for k, c in enumerate(whole.calls) for j, t in enumerate(c.tags) if t and "wq" in t[0])
        return calls[at[0]].args[at[1]]

    weight(each[rank].calls)[0, 0, 0] += 1.0
    found = together(Mesh.parse("fsdp=2"), each, whole.calls)
    assert weight(found.calls)[0, 0, 0] == weight(whole.calls)[0, 0, 0] + 1.0
