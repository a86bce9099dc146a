"""The rules against the optimizers that torch and optax ship, where they are the same rule; in float64.

torch and optax optimizers run in float64 here, so that a difference is one of formula, not of rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portatrain.backends.torch.optimizer import total_norm
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule
from tests.support.optim_cases import Tensor, randoms, update, zeros

STEPS = 5
MATRIX = Tensor(name="w", shape=(6, 8), axes=("embed", "mlp"))
TALL = Tensor(name="w", shape=(8, 6), axes=("mlp", "embed"))
VECTOR = Tensor(name="b", shape=(7,), axes=("embed",))


def ours(rule: Rule, info: Tensor, *, decay: bool = True) -> np.ndarray:
    param, grads = randoms(info, seed=5, steps=STEPS)
    slots = zeros(rule, info)
    for count, grad in enumerate(grads, start=1):
        param, slots = update(
            np, rule, info, param, grad, slots, scale=np.float64(1), count=np.float64(count), decay=decay
        )
    return param


def by_torch(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer], info: Tensor, transpose: bool) -> np.ndarray:
    """torch's parameter is the transpose where it must be (out x in), as torch's Linear keeps it."""
    param, grads = randoms(info, seed=5, steps=STEPS)
    tensor = torch.nn.Parameter(torch.tensor(param.T.copy() if transpose else param))
    optimizer = make([tensor])
    for grad in grads:
        tensor.grad = torch.tensor(grad.T.copy() if transpose else grad)
        optimizer.step()
    out = tensor.detach().numpy()
    return out.T if transpose else out


def by_optax(transform: optax.GradientTransformation, info: Tensor) -> np.ndarray:
    param, grads = randoms(info, seed=5, steps=STEPS)
    with jax.enable_x64(True):
        p = jax.numpy.asarray(param)
        state = transform.init(p)
        for grad in grads:
            updates, state = transform.update(jax.numpy.asarray(grad), state, p)
            p = optax.apply_updates(p, updates)
        return np.asarray(p)


@pytest.mark.parametrize("info", [MATRIX, TALL, VECTOR], ids=["wide", "tall", "vector"])
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (AdamW(lr=1e-2, weight_decay=0.1), lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)),
        (
            AdamW(lr=1e-2, b1=0.8, b2=0.95, eps=1e-3),
            lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0),
        ),
        (SGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (SGD(lr=0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (SGD(lr=0.1, momentum=0.9, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
        # torch clamps the finished estimate at eps1^2, ours adds eps1 to the square: equal when both vanish
        (
            Adafactor(lr=1e-2, relative=True, weight_decay=0.1, eps1=1e-30),
            lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1, eps=(1e-30, 1e-3)),
        ),
    ],
    ids=["adamw", "adamw-betas", "sgd", "momentum", "nesterov", "adafactor"],
)
def test_torch(rule: Rule, make: Any, info: Tensor) -> None:
    np.testing.assert_allclose(ours(rule, info), by_torch(make, info, False), rtol=1e-12, atol=1e-14)


def optax_adafactor(lr: float, *, clip: float, relative: bool) -> optax.GradientTransformation:
    """optax.adafactor as it is composed there, but t**-0.8 in float64: optax itself takes it in float32."""
    return optax.chain(
        optax.scale_by_factored_rms(
            min_dim_size_to_factor=2, decay_rate_fn=lambda step, rate: 1.0 - (step + 1.0) ** -rate
        ),
        optax.clip_by_block_rms(clip),
        optax.scale_by_param_block_rms() if relative else optax.identity(),
        optax.scale(-lr),
    )


@pytest.mark.parametrize("info", [MATRIX, TALL, VECTOR], ids=["wide", "tall", "vector"])
@pytest.mark.parametrize(
    ("rule", "transform"),
    [
        (AdamW(lr=1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)),
        (Lion(lr=1e-3, weight_decay=0.1), optax.lion(1e-3, weight_decay=0.1)),
        (SGD(lr=0.1, momentum=0.9), optax.sgd(0.1, momentum=0.9)),
        (SGD(lr=0.1, momentum=0.9, nesterov=True), optax.sgd(0.1, momentum=0.9, nesterov=True)),
        (Adafactor(lr=1e-2, relative=True), optax_adafactor(1e-2, clip=1.0, relative=True)),
        (Adafactor(lr=1e-2, clip=0.5), optax_adafactor(1e-2, clip=0.5, relative=False)),
    ],
    ids=["adamw", "lion", "momentum", "nesterov", "adafactor-relative", "adafactor"],
)
def test_optax(rule: Rule, transform: optax.GradientTransformation, info: Tensor) -> None:
    np.testing.assert_allclose(ours(rule, info), by_optax(transform, info), rtol=1e-12, atol=1e-14)


class InFloat64(TorchDispatchMode):
    """Runs in float64 what asks for bfloat16, by whichever method it asks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.bfloat16:
            kwargs["dtype"] = torch.float64
            self.asked += 1
        return func(*args, **kwargs)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("info", [MATRIX, TALL], ids=["wide", "tall"])
def test_torch_muon(info: Tensor, nesterov: bool) -> None:
    """Equal to torch.optim.Muon once its bfloat16 iteration runs in float64."""
    got = ours(Muon(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1), info)
    with InFloat64() as mode:
        want = by_torch(
            lambda p: torch.optim.Muon(p, lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.1), info, True
        )
    assert mode.asked  # otherwise torch's Muon does not round any more, and this class may go
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)


def test_coupled_decay_is_not_torchs_sgd() -> None:
    """Our decay is decoupled: with torch's, which goes through the momentum, the curves part."""
    rule = SGD(lr=0.1, momentum=0.9, weight_decay=0.1)
    theirs = by_torch(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), MATRIX, False)
    assert np.max(np.abs(ours(rule, MATRIX) - theirs)) > 1e-3


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("shapes", [[(3,), (7, 11)], [(128, 384)] * 40, [(1_000_001,)], [(2048, 2048)]], ids=str)
def test_the_norm_is_right_whatever_comes_first(shapes: list[tuple[int, ...]], skewed: bool) -> None:
    """Within a quarter of what two backends may differ by; torch's own is not, where early elements are large."""
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    for grad in grads:
        if skewed:
            grad.reshape(-1)[: grad.size // 50] *= 100
    exact = np.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads))
    assert abs(float(total_norm([torch.from_numpy(grad) for grad in grads])) / exact - 1) < 2.5e-7
