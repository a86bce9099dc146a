"""The tables that the optimizer tests share: tensors, rules, random steps, array namespaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """The least thing that satisfies ``portatrain.optim.Info``."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    batch_dims: int = 0
    fan_in_axes: int = 1


TENSORS = [
    Tensor(name="norm/scale", shape=(7,), axes=("embed",)),
    Tensor(name="mlp/up", shape=(6, 8), axes=("embed", "mlp")),
    Tensor(name="mlp/down", shape=(8, 6), axes=("mlp", "embed")),
    Tensor(name="embedding", shape=(9, 5), axes=("vocab", "embed"), fan_in_axes=0),
    Tensor(name="head", shape=(5, 9), axes=("embed", "vocab")),
    Tensor(name="gate", shape=(5, 1), axes=("embed", "gate")),
    Tensor(name="blocks/norm", shape=(3, 7), axes=("layers", "embed"), batch_dims=1, fan_in_axes=0),
    Tensor(name="blocks/depth", shape=(3,), axes=("layers",), batch_dims=1, fan_in_axes=0),
    Tensor(name="blocks/up", shape=(3, 6, 8), axes=("layers", "embed", "mlp"), batch_dims=1),
    Tensor(name="blocks/experts", shape=(2, 3, 5, 4), axes=("layers", "experts", "embed", "mlp"), batch_dims=2),
    Tensor(name="blocks/wq", shape=(2, 6, 3, 2), axes=("layers", "embed", "heads", "head_dim"), batch_dims=1),
    Tensor(
        name="blocks/wo", shape=(2, 3, 4, 5), axes=("layers", "heads", "head_dim", "embed"), batch_dims=1, fan_in_axes=2
    ),
]

RULES: dict[str, Rule] = {
    "adamw": AdamW(lr=1e-2, weight_decay=0.1),
    "adamw-b95": AdamW(lr=1e-2, b1=0.95, b2=0.95, eps=1e-6, weight_decay=0.01),
    "adamw-b0": AdamW(lr=1e-2, b1=0.0, b2=0.0, weight_decay=0.1),
    "lion": Lion(lr=1e-3, weight_decay=0.3),
    "sgd": SGD(lr=0.1, weight_decay=0.01),
    "sgd-momentum": SGD(lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adafactor": Adafactor(lr=1e-2, weight_decay=0.1),
    "adafactor-relative": Adafactor(lr=1e-2, relative=True, clip=0.5, weight_decay=0.1),
    "muon": Muon(lr=2e-2, weight_decay=0.1, adamw=AdamW(lr=3e-3, weight_decay=0.2)),
    "muon-plain": Muon(lr=2e-2, nesterov=False, coefficients=((2.0, -1.5, 0.5),) * 12),
}

ELEMENTWISE = [name for name, rule in RULES.items() if isinstance(rule, AdamW | Lion | SGD)]
REDUCING = [name for name in RULES if name not in ELEMENTWISE]

SCALE = 0.75  # exact in float32


def randoms(info: Any, seed: int, steps: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A parameter and its gradients: float32 values in float64 arrays, of uneven magnitude, with some zeros."""
    rng = np.random.default_rng([seed, *info.shape])
    param = rng.normal(size=info.shape)
    param.flat[0] = 0.0
    size = np.exp(rng.normal(size=info.shape))
    grads = [size * rng.normal(size=info.shape) for _ in range(steps)]
    grads[0].flat[-1] = 0.0
    return param.astype(np.float32).astype(np.float64), [g.astype(np.float32).astype(np.float64) for g in grads]


def zeros(rule: Rule, info: Any, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    return {name: np.zeros(slot.shape, dtype) for name, slot in rule.slots(info).items()}


def update(
    xp: Any, rule: Rule, info: Any, param: Any, grad: Any, slots: dict[str, Any], *, scale: Any, count: Any, decay: bool
) -> tuple[Any, dict[str, Any]]:
    """(new parameter, new slots)."""
    delta, new = rule.update(xp, info=info, grad=grad, param=param, slots=slots, scale=scale, count=count, decay=decay)
    return param + delta, new


# --- one float32 step of several tensors in each framework, NumPy in and NumPy out ----------------

Case = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]  # parameter, gradient, slots
Result = tuple[np.ndarray, dict[str, np.ndarray]]  # new parameter, new slots


def _all(xp: Any, rule: Rule, infos: tuple[Tensor, ...], cases: Any, scale: Any, count: Any) -> list[Any]:
    return [
        update(xp, rule, info, *case, scale=scale, count=count, decay=True)
        for info, case in zip(infos, cases, strict=True)
    ]


def _map(f: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _map(f, value) for key, value in tree.items()}
    return type(tree)(_map(f, item) for item in tree) if isinstance(tree, list | tuple) else f(tree)


def run_numpy(rule: Rule, infos: tuple[Tensor, ...], cases: list[Case], count: int) -> list[Result]:
    cases = _map(lambda x: np.asarray(x, np.float32), cases)
    return _all(np, rule, infos, cases, np.float32(SCALE), np.float32(count))


def jax_namespace() -> Any:
    import jax.numpy as jnp

    names = ("sqrt", "sign", "expm1", "maximum", "sum", "mean", "swapaxes", "reshape")
    return SimpleNamespace(
        **{name: getattr(jnp, name) for name in names}, matmul=lambda x, y: jnp.matmul(x, y, precision="highest")
    )


def torch_namespace() -> Any:
    import torch

    names = ("sqrt", "sign", "expm1", "sum", "mean", "matmul", "swapaxes", "reshape")
    # clamp, unlike torch.maximum, takes a number; like it, it lets NaN through
    return SimpleNamespace(
        **{name: getattr(torch, name) for name in names}, maximum=lambda x, floor: torch.clamp(x, min=floor)
    )


@lru_cache(maxsize=1)
def _jitted(rule: Rule, infos: tuple[Tensor, ...]) -> Any:
    import jax

    return jax.jit(partial(_all, jax_namespace(), rule, infos))


def run_jax(rule: Rule, infos: tuple[Tensor, ...], cases: list[Case], count: int, *, jit: bool = False) -> list[Result]:
    import jax.numpy as jnp

    cases = _map(lambda x: jnp.asarray(x, jnp.float32), cases)
    step = _jitted(rule, infos) if jit else partial(_all, jax_namespace(), rule, infos)
    return _map(np.asarray, step(cases, jnp.float32(SCALE), jnp.float32(count)))


def run_torch(rule: Rule, infos: tuple[Tensor, ...], cases: list[Case], count: int) -> list[Result]:
    import torch

    cases = _map(lambda x: torch.tensor(np.asarray(x), dtype=torch.float32), cases)
    scalars = torch.tensor(SCALE), torch.tensor(float(count))
    return _map(lambda x: x.numpy(), _all(torch_namespace(), rule, infos, cases, *scalars))


Run = Callable[[Rule, tuple[Tensor, ...], list[Case], int], list[Result]]
FRAMEWORKS: dict[str, Run] = {"jax": run_jax, "jax-jit": partial(run_jax, jit=True), "torch": run_torch}


# --- rules that are wrong on purpose --------------------------------------------------------------


class NoBiasCorrection(AdamW):
    def step(self, xp, *, lr, **rest):
        _, new = super().step(xp, lr=lr, **rest)
        return lr * new["m"] / (xp.sqrt(new["v"]) + self.eps), new


class CoupledDecay(AdamW):
    """Decay added to the gradient, as in Adam with L2 regularisation."""

    def update(self, xp, *, grad, param, decay, **rest):
        coupled = grad + self.weight_decay * param if decay else grad
        return super().update(xp, grad=coupled, param=param, decay=False, **rest)


class LateCount(AdamW):
    """The count starts at 2."""

    def step(self, xp, *, count, **rest):
        return super().step(xp, count=count + 1.0, **rest)


class UnslicedMuon(Muon):
    """One norm over all layers."""

    def step(self, xp, *, info, grad, **rest):
        step, new = super().step(xp, info=info, grad=grad, **rest)
        n = (1 - self.momentum) * grad + self.momentum * new["m"]
        of_slice = xp.sum(n * n, axis=tuple(range(info.batch_dims, len(info.shape))), keepdims=True)
        return step * xp.sqrt(of_slice / xp.sum(n * n)), new


_adamw, _muon = RULES["adamw"], RULES["muon"]
_fields = {"lr": 1e-2, "weight_decay": 0.1}

MUTANTS: dict[str, tuple[str, Rule]] = {
    "wrong beta2": ("adamw", replace(_adamw, b2=0.99)),
    "wrong beta1": ("adamw", replace(_adamw, b1=0.8)),
    "eps 1e-4": ("adamw", replace(_adamw, eps=1e-4)),
    "learning rate x 1.001": ("adamw", replace(_adamw, lr=1.001e-2)),
    "no bias correction": ("adamw", NoBiasCorrection(**_fields)),
    "count off by one": ("adamw", LateCount(**_fields)),
    "decay coupled": ("adamw", CoupledDecay(**_fields)),
    "decay missing": ("adamw", AdamW(lr=1e-2)),
    "betas swapped": ("lion", replace(RULES["lion"], b1=0.99, b2=0.9)),
    "nesterov missing": ("sgd-nesterov", replace(RULES["sgd-nesterov"], nesterov=False)),
    "decay rate 0.81": ("adafactor", replace(RULES["adafactor"], decay_rate=0.81)),
    "update not clipped": ("adafactor-relative", replace(RULES["adafactor-relative"], clip=1e9)),
    "relative step missing": ("adafactor-relative", replace(RULES["adafactor-relative"], relative=False)),
    "momentum 0.94": ("muon", replace(_muon, momentum=0.94)),
    "four Newton-Schulz steps": ("muon", replace(_muon, coefficients=_muon.coefficients[:4])),
    "norm over all layers": ("muon", UnslicedMuon(lr=2e-2, weight_decay=0.1)),
}
