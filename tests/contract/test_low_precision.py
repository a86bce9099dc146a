"""bfloat16 on whole models: sums of gradients are float32, and a state in bfloat16 loses no step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from portatrain.backends.base import backend_class
from portatrain.backends.program import Program
from portatrain.model.layout import Layout
from portatrain.model.module import Module, Param, describe
from portatrain.model.precision import stored
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule
from tests.support.mesh_cases import CASES
from tests.support.running import BACKENDS, everything, microbatches

pytestmark = pytest.mark.usefixtures("compiled_quickly")

ROWS = 16


class Lookup(Module):
    """The sum of the rows of a table: the gradient of a row is how often it is looked up."""

    def __init__(self, vocab: int) -> None:
        self.table = Param(vocab=vocab, embed=8, fan_in_axes=0, init="zeros")

    def __call__(self, ops: Any, batch: Any) -> Any:
        x_BSE = ops.embed(self.table, batch["tokens"])
        return ops.loss(ops.sum(x_BSE, ("batch", "seq", "embed"), over=("seq", "embed")), batch["mask"])


class Weighted(Module):
    """The sum of x W: the gradient of a column of W is the sum of x over all rows."""

    def __init__(self) -> None:
        self.w = Param(embed=4, mlp=3)

    def __call__(self, ops: Any, batch: Any) -> Any:
        y_BSM = ops.einsum("bse,em->bsm", batch["x"], self.w)
        return ops.loss(ops.sum(y_BSM, ("batch", "seq", "mlp"), over=("seq", "mlp")), batch["mask"])


def program(model: Module, precision: str, rule: Rule | None = None, **options: Any) -> Program:
    definition = stored(describe(model), precision)
    names = frozenset(definition.params)
    given = {"trainable": names, "decay": frozenset(), "seed": 5, "precision": precision, **options}
    return Program(definition=definition, layout=Layout.of(definition), optimizer=rule or SGD(lr=1.0), **given)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [4, 1 << 14])
def test_a_frequent_token_has_its_whole_gradient(name: str, precision: str, vocab: int) -> None:
    """In bfloat16 the sum would end at 256, where one more changes nothing."""
    tokens = np.full((ROWS, 1000), 1, np.int32)
    tokens[:, ::4] = 2
    batch = microbatches({"tokens": tokens, "mask": np.ones(ROWS, np.float32), "sample": np.arange(ROWS)})
    backend = backend_class(name)(program(Lookup(vocab), precision))
    _, found = backend.gradients(backend.init_state(), batch, step=1)
    np.testing.assert_array_equal(found["table"][:4, 0], [0, 750, 250, 0])


@pytest.mark.parametrize("precision", ["bf16", "bf16-state"])
def test_jax_sums_gradients_of_weights_in_float32(precision: str) -> None:
    """257 and 4369 are no numbers of bfloat16. A program of many devices adds up what leaves this product."""
    if "jax" not in BACKENDS:
        pytest.skip("jax is not installed")
    x = np.ones((ROWS, 257, 4), np.float32)
    batch = microbatches({"x": x, "mask": np.ones(ROWS, np.float32) / ROWS, "sample": np.arange(ROWS)})
    backend = backend_class("jax")(program(Weighted(), precision))
    _, found = backend.gradients(backend.init_state(), batch, step=1)
    want = np.float32(ROWS * 257)
    if precision == "bf16":
        assert (found["w"] == want).all()
    else:  # rounded once, to what the weight is kept in
        np.testing.assert_allclose(found["w"], want, rtol=2.0**-8)


@pytest.mark.parametrize("name", BACKENDS)
def test_steps_below_half_a_last_place_add_up(name: str) -> None:
    """Rows of ones fall by 2^-12 a step, of which rounding to nearest would keep none (the neighbour is 2^-8 below)."""
    tokens = np.full((ROWS, 64), 1, np.int32)
    batch = microbatches({"tokens": tokens, "mask": np.ones(ROWS, np.float32), "sample": np.arange(ROWS)})
    model = Lookup(4)
    model.table = Param(vocab=4, embed=2048, fan_in_axes=0, init="ones")
    backend = backend_class(name)(program(model, "bf16-state", SGD(lr=2.0**-12 / 64)))
    state, steps = backend.init_state(), 256
    for step in range(1, steps + 1):
        state, _ = backend.step(state, batch, step=step, scale=1.0)
    row = everything(backend, state)["params/table"].astype(np.float64)[1]
    want = 1 - steps * 2.0**-12
    # Each step moves an element by 2^-8 with probability 1/16.
    deviation = 2.0**-8 * np.sqrt(steps / 16 / 2048)
    assert abs(row.mean() - want) < 5 * deviation and row.std() > 2.0**-8


@pytest.mark.parametrize(
    "rule",
    [AdamW(lr=1e-3, weight_decay=0.1), SGD(lr=0.1, momentum=0.9), Lion(lr=1e-4), Adafactor(lr=1e-2), Muon(lr=1e-2)],
    ids=lambda r: type(r).__name__,
)
def test_backends_keep_the_same_state(rule: Rule) -> None:
    """One step from one state on either backend: what is kept differs where the computation does, by its bound."""
    if len(BACKENDS) < 2:
        pytest.skip("needs both frameworks")
    case, found = CASES["lm, bf16 state"], {}
    for name in BACKENDS:
        backend = backend_class(name)(program(case.model.build(), "bf16-state", rule))
        state, result = backend.step(backend.init_state(), case.batches()[0], step=1, scale=1.0)
        assert not int(result.skipped)
        held = backend.describe_memory(state)
        size = backend.program.definition.parameters
        assert held["params"] == 2 * size and held["opt"] <= 2 * 2 * size + 64
        found[name] = everything(backend, state)
    one, two = found.values()
    for key, a in one.items():
        if key.startswith(("params/", "opt/")) and a.shape:
            assert str(a.dtype) == "bfloat16", key
            x, y = a.astype(np.float64), two[key].astype(np.float64)
            scale = np.abs(x).max()
            assert np.abs(x - y).mean() <= 2.0**-6 * scale, key
    same = [(one[k] == two[k]).mean() for k in one if k.startswith("params/")]
    assert np.mean(same) > 0.5  # the same random words: else half of all that moves would differ
