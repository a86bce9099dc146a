"""The global norm and the clip scale."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from portatrain.backends.reference import optim as reference
from portatrain.errors import UserError
from portatrain.optim import clip_scale, global_norm
from tests.support.optim_cases import jax_namespace, torch_namespace


def _namespaces() -> list[tuple[str, Any, Any]]:
    import jax.numpy as jnp
    import torch

    return [
        ("numpy", np, np.asarray),
        ("jax", jax_namespace(), jnp.asarray),
        ("torch", torch_namespace(), torch.tensor),
    ]


@pytest.fixture(params=["numpy", "jax", "torch"])
def namespace(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return next((xp, array) for name, xp, array in _namespaces() if name == request.param)


def grads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"t{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate([(3,), (4, 5), (2, 3, 4)])}


def test_norm_equals_oracle(namespace: tuple[Any, Any]) -> None:
    xp, array = namespace
    values = grads()
    # Relative error at most (largest tensor + tensors + 1)/2 + 1 roundings, all terms being positive.
    bound = ((24 + 3 + 1) / 2 + 1) * 2.0**-24
    want = reference.global_norm({k: v.astype(np.float64) for k, v in values.items()})
    got = float(global_norm(xp, {k: array(v) for k, v in values.items()}))
    assert abs(got - want) <= bound * want


def test_norm_does_not_depend_on_the_order_of_the_dict() -> None:
    values = {f"t{i}": np.float32(10.0 ** (i % 7)) * np.ones(i + 1, np.float32) for i in range(20)}
    assert global_norm(np, values) == global_norm(np, dict(reversed(values.items())))


def test_norm_of_nothing_is_a_user_error() -> None:
    with pytest.raises(UserError, match="at least one trainable parameter, got none"):
        global_norm(np, {})


@pytest.mark.parametrize(
    ("norm", "expected"), [(0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (4.0, 0.25), (math.inf, 0.0), (math.nan, math.nan)]
)
def test_clip_scale(namespace: tuple[Any, Any], norm: float, expected: float) -> None:
    xp, array = namespace
    got = clip_scale(xp, array(np.float32(norm)), 1.0)
    assert str(got.dtype).endswith("float32")
    np.testing.assert_equal(float(got), expected)


def test_not_finite_gradients_show_in_the_norm() -> None:
    values = grads()
    values["t1"][0, 0] = np.nan
    assert math.isnan(global_norm(np, values))
    values["t1"][0, 0] = np.inf
    assert math.isinf(global_norm(np, values))
