"""Comparisons of samples equal the oracle's over the whole batch, for any number of microbatches."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference, rounding
from portatrain.backends.base import Context
from portatrain.errors import UserError
from portatrain.model.module import Module, Stack, describe
from portatrain.testing.guard import check_rows_independent
from tests.support.running import BACKENDS, Running, microbatches, tokens_batch
from tests.support.toy_models import TwoTowers

ROWS, VOCAB = 8, 11
GROUPS = (None, 4)
BATCH = tokens_batch(vocab=VOCAB, batch=ROWS, seq=6)


@functools.cache
def running(backend: str, group: int | None) -> Running:
    return Running(backend, TwoTowers(vocab=VOCAB, embed=8, rate=0.2, group=group))


@functools.cache
def whole(backend: str, group: int | None) -> tuple[float, dict[str, np.ndarray]]:
    run = running(backend, group)
    return run.backend.gradients(run.state, microbatches(BATCH), step=1)


def bound(run: Running) -> float:
    return rounding.bound(run.definition, rounding.positions_in(run.definition, BATCH))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_microbatch_is_the_oracle(backend: str, group: int | None) -> None:
    run = running(backend, group)
    loss, gradients = whole(backend, group)
    true = run.oracle(BATCH, training=True)
    assert loss == pytest.approx(float(true.value.sum / true.value.weight_B.sum()), rel=bound(run))
    for name, gradient in gradients.items():
        direction = np.random.default_rng(1).normal(size=gradient.shape)
        step = 1e-5 * direction
        near = [
            reference.forward(
                run.definition,
                {**run.params, name: run.params[name] + sign * step},
                BATCH,
                Context(seed=5, step=1, training=True),
            ).value.sum
            for sign in (1, -1)
        ]
        slope = (near[0] - near[1]) / 2e-5 / true.value.weight_B.sum()
        assert (gradient * direction).sum() == pytest.approx(slope, abs=3e-6 * float(np.linalg.norm(gradient))), name


@pytest.mark.parametrize(("group", "n"), [(None, 4), (4, 2), (4, 4)])  # groups of 4: whole in a microbatch, and cut
@pytest.mark.parametrize("backend", BACKENDS)
def test_microbatches_change_nothing(backend: str, group: int | None, n: int) -> None:
    run = running(backend, group)
    loss, gradients = whole(backend, group)
    for _ in range(2):  # torch learns in the first step that it needs what all microbatches hand over
        cut_loss, cut = run.backend.gradients(run.state, microbatches(BATCH, n), step=1)
        assert cut_loss == pytest.approx(loss, rel=bound(run))
        for name, gradient in gradients.items():
            assert np.abs(cut[name] - gradient).max() <= bound(run) * np.abs(gradient).max(), name
    if group is None:
        run.state, result = run.backend.step(run.state, microbatches(BATCH, n), step=1, scale=1.0)
        assert float(result.aux["right"]) == pytest.approx(
            run.oracle(BATCH, training=True).auxes["right"].value_B.mean()
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_blank_rows_of_an_evaluation_are_no_negatives(backend: str) -> None:
    run = running(backend, None)
    blank = {k: v.copy() for k, v in BATCH.items()}
    blank["sample"][5:] = -1
    found = run.backend.eval(run.state, blank)
    few = run.oracle({k: v[:5] for k, v in BATCH.items()}).value
    assert np.allclose(found["loss_B"][:5], few.loss_B, rtol=1e-5, atol=1e-6)
    assert not found["weight_B"][5:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_predictions_compare_samples(backend: str) -> None:
    run = running(backend, None)
    true = run.oracle(BATCH, method="predict").value
    np.testing.assert_allclose(run.backend.predict(run.state, BATCH), true, rtol=1e-5, atol=1e-6)
    loss_B, weight_B = run.backend.evaluate(_alone, (BATCH["mask"].mean(1),), Context())
    assert (loss_B == BATCH["mask"].mean(1)).all() and (weight_B == 1).all()


def _alone(ops: Any, x_B: Any) -> Any:
    loss = ops.across_samples(lambda x_GN, there_GN: (x_GN, ops.cast(there_GN, "float32")), x_B)
    return loss.loss_B, loss.weight_B


class InStack(Module):
    def __init__(self) -> None:
        self.blocks = Stack(TwoTowers(vocab=VOCAB, embed=4), 2)

    def __call__(self, ops: Any, batch: Any) -> Any:
        return self.blocks(ops, batch)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mistakes(backend: str) -> None:
    run = Running(backend, TwoTowers(vocab=VOCAB, embed=8, group=3))
    with pytest.raises(UserError, match="divides the samples"):
        run.backend.gradients(run.state, microbatches(BATCH, 2), step=1)
    for group in (0, -4):
        run = Running(backend, TwoTowers(vocab=VOCAB, embed=8, group=group))
        for call in (
            lambda r: r.backend.gradients(r.state, microbatches(BATCH), step=1),
            lambda r: r.backend.gradients(r.state, microbatches(BATCH, 2), step=1),
            lambda r: r.backend.eval(r.state, BATCH),
            lambda r: r.oracle(BATCH),
        ):
            with pytest.raises(UserError, match=rf"group={group}\).*divides the samples"):
                call(run)
    inside = Running(backend, InStack())
    with pytest.raises(UserError, match="after it"):
        inside.backend.gradients(inside.state, microbatches(BATCH), step=1)


class Alone(TwoTowers):
    """Returns (loss, weight) of another shape, or adds what crosses samples outside of the operation."""

    def __init__(self, how: str) -> None:
        super().__init__(vocab=VOCAB, embed=4)
        self.how = how

    def __call__(self, ops: Any, batch: Any) -> Any:
        if self.how == "shape":
            return ops.across_samples(lambda x, there: (x[:, :1], x), batch["mask"].mean(1))
        loss = super().__call__(ops, batch)
        h = ops.weight(self.out)[0, 0] * ops.cast(batch["tokens"], "float32")
        return ops.loss(loss.loss_B + ops.einsum("bs,cs->bc", h, h)[:, 0], loss.weight_B)


def test_the_oracle_holds_models_to_it() -> None:
    for group in GROUPS:
        check_rows_independent(describe(TwoTowers(vocab=VOCAB, embed=4, group=group)), BATCH)
    with pytest.raises(UserError, match="alone"):
        check_rows_independent(describe(Alone("einsum")), BATCH)
    definition = describe(Alone("shape"))
    with pytest.raises(UserError, match=r"every array of shape \(1, 8\)"):
        reference.forward(definition, reference.initial(definition), BATCH)
