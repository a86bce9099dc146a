"""Models that step out of what frameworks have in common are refused, with the operation to use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portatrain.backends import reference
from portatrain.backends.reference.guard import RENAMED
from portatrain.errors import UserError
from portatrain.model.module import Module, Param, describe
from portatrain.testing.guard import check_rows_independent
from recipes.models.vit import ViTConfig
from tests.support.running import image_batch, tokens_batch
from tests.support.toy_models import Nested, Routed

BATCH = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), "sample": np.arange(4)}


class Toy(Module):
    """A model whose features are `fn(ops, h)` of h (B, E)."""

    def __init__(self, fn: Callable[[Any, Any], Any]) -> None:
        self.w = Param(embed=3, mlp=4)
        self.fn = fn

    def __call__(self, ops: Any, batch: Any) -> Any:
        h = ops.einsum("be,em->bm", batch["x"], self.w)
        y = self.fn(ops, h)
        return ops.loss((y * y).sum(-1), y[:, 0] * 0.0 + 1.0)


def run(fn: Callable[[Any, Any], Any]) -> None:
    definition = describe(Toy(fn))
    reference.forward(definition, reference.initial(definition), BATCH)


ALLOWED: dict[str, Callable[[Any, Any], Any]] = {
    "arithmetic": lambda ops, h: (2.0 - h) ** 2 / (1 + h * h) - -h,
    "a NumPy number": lambda ops, h: np.float64(2.0) * h,
    "comparisons": lambda ops, h: ops.where((h > 0) & ~(h >= 1), h, 0.0),
    "indexing": lambda ops, h: h[:, None, 1:].reshape(-1, 3),
    "sum and mean of features": lambda ops, h: h - h.mean(-1)[:, None] + h.sum(1)[:, None],
    "a scan": lambda ops, h: ops.scan(lambda c, x: (c + x, c * x), h[:, 0], h)[1],
}
REFUSED: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    **{
        name: (lambda ops, h, name=name: getattr(h, name)(-1), f"ops.{name}")
        for name in (
            "std",
            "var",
            "max",
            "min",
            "sort",
            "argsort",
            "argmax",
            "cumsum",
            "clip",
            "abs",
            "sqrt",
            "softmax",
        )
    },
    **{name: (lambda ops, h, name=name: getattr(h, name), instead.split("(")[0]) for name, instead in RENAMED.items()},
    "a function of NumPy": (lambda ops, h: np.tanh(h), "ops.tanh"),
    "numpy.std": (lambda ops, h: np.std(h, -1), "ops.std"),
    "a NumPy array": (lambda ops, h: h * np.ones(4), "a Param or a State"),
    "a matmul": (lambda ops, h: h @ h, "ops.einsum"),
    "an assignment": (lambda ops, h: h.__setitem__(0, 1.0), "ops.where"),
    "a condition": (lambda ops, h: h if h[0, 0] > 0 else -h, "ops.where"),
    "a number": (lambda ops, h: h * float(h[0, 0]), "arithmetic"),
    "a loop": (lambda ops, h: [x for x in h], "ops.scan"),
    "a mask as an index": (lambda ops, h: h[h > 0], "ops.where"),
    "a negative step": (lambda ops, h: h[:, ::-1], "ops.flip"),
    "a sum over all": (lambda ops, h: h * h.sum(), "over="),
    "a sum over samples": (lambda ops, h: h * h.sum(0), "over="),
    "a method within a scan": (lambda ops, h: ops.scan(lambda c, x: (c, x.std()), h[:, 0], h)[1], "ops.std"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_frameworks_have_in_common_is_allowed(name: str) -> None:
    run(ALLOWED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_names_what_to_use(name: str) -> None:
    fn, instead = REFUSED[name]
    with pytest.raises(UserError) as caught:
        run(fn)
    assert instead in str(caught.value)


CROSSING: dict[str, Callable[[Any, Any], Any]] = {
    "an einsum of two samples": lambda ops, h: ops.einsum("be,ce->bc", h, h)[:, :1],
    "an einsum over samples": lambda ops, h: h * ops.einsum("be->e", h),
    "the first sample": lambda ops, h: h * h[:1],
    "samples in another order": lambda ops, h: h + ops.concat([h[1:], h[:1]], axis=0),
}
WITHIN: dict[str, Callable[[Any, Any], Any]] = {
    "a sum over the whole batch": lambda ops, h: h * ops.sum(h, ("batch", None), over=("batch",)),
    "a mean over the whole batch": lambda ops, h: h - ops.mean(h, ("batch", None), over=("batch",)),
    "noise": lambda ops, h: h + ops.noise(4, site=3),
}


@pytest.mark.parametrize("name", CROSSING)
def test_losses_across_samples_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="alone"):
        check_rows_independent(describe(Toy(CROSSING[name])), BATCH)


@pytest.mark.parametrize("name", [*ALLOWED, *WITHIN])
def test_samples_that_do_not_see_each_other(name: str) -> None:
    check_rows_independent(describe(Toy({**ALLOWED, **WITHIN}[name])), BATCH)


@pytest.mark.parametrize("name", ["nested", "routed", "vit"])
def test_models_that_are_shipped(name: str) -> None:
    models: dict[str, Module] = {
        "vit": ViTConfig(rows=8, columns=8, channels=1, patch=2, classes=5, embed=8, layers=1, heads=2).build(),
        "nested": Nested(vocab=7, embed=4, layers=2, inner=2, rate=0.1),
        "routed": Routed(vocab=7, embed=4, layers=2, experts=3, chosen=2, rate=0.01),
    }
    batch = image_batch(classes=5, batch=3) if name == "vit" else tokens_batch(vocab=7, batch=3, seq=6)
    check_rows_independent(describe(models[name]), batch)
