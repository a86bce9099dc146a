"""One optimizer update, as the backends really make it: optax's transformation under jit and the torch optimizer (fused
where torch has the rule), from identical parameters, gradients and slots, within the derived bounds."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch

from portatrain.backends.jax.optimizer import RuleState, transformation
from portatrain.backends.reference.optim_bounds import ratio
from portatrain.backends.torch.lower import Piece
from portatrain.backends.torch.optimizer import RuleOptimizer
from portatrain.model.module import Constant, TensorInfo
from portatrain.optim import SGD, Adafactor, AdamW, Lion, Muon, Rule

INFOS = {
    info.name: info
    for info in (
        TensorInfo(
            name=name,
            role="params",
            shape=shape,
            axes=axes,
            batch_dims=batch,
            fan_in_axes=inputs,
            init=Constant(value=0.0),
            stack_dims=batch,
            lr=lr,
        )
        for name, shape, axes, batch, inputs, lr in (
            ("embed/table", (256, 32), ("vocab", "embed"), 0, 0, 1.0),
            ("blocks/attn/wq", (3, 32, 4, 8), ("layers", "embed", "heads", "head_dim"), 1, 1, 1.0),
            ("blocks/attn/wo", (3, 4, 8, 32), ("layers", "heads", "head_dim", "embed"), 1, 2, 1.0),
            ("blocks/mlp/up", (3, 32, 96), ("layers", "embed", "mlp"), 1, 1, 1.0),
            ("blocks/mlp/gate", (3, 32, 96), ("layers", "embed", "mlp"), 1, 1, 0.3),  # a factor of the learning rate
            ("blocks/norm/scale", (3, 32), ("layers", "embed"), 1, 0, 1.0),
            ("final_norm/scale", (32,), ("embed",), 0, 0, 4.0),
        )
    )
}
DECAY = frozenset(n for n in INFOS if "norm" not in n)
SCALE = 0.75
RULES = [
    AdamW(lr=3e-3, b2=0.95, weight_decay=0.1),
    AdamW(lr=1e-3),
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    SGD(lr=0.1, momentum=0.9),
    Lion(lr=1e-3, weight_decay=0.3),
    Adafactor(lr=1e-2, weight_decay=0.1),
    Muon(lr=0.02, weight_decay=0.1),
]


def start(rule: Rule, seed: int) -> tuple[dict, dict, dict]:
    """Parameters, gradients and slots of a run in its middle, float32."""
    rng = np.random.default_rng(seed)

    def draw(shape: tuple[int, ...], size: float) -> np.ndarray:
        return (rng.standard_normal(shape) * size).astype(np.float32)

    params = {n: draw(i.shape, 0.05) for n, i in INFOS.items()}
    grads = {n: draw(i.shape, 1e-3) for n, i in INFOS.items()}
    slots: dict[str, dict[str, np.ndarray]] = {}
    for name, info in INFOS.items():
        for slot, what in rule.rule_for(info).slots(info).items():
            # Second moments are positive; so are Adafactor's factors.
            value = draw(what.shape, 1e-3) if slot == "m" else draw(what.shape, 1e-3) ** 2 + np.float32(1e-9)
            slots.setdefault(slot, {})[name] = value
    return params, grads, slots


def with_jax(rule: Rule, params: dict, grads: dict, slots: dict, count: int) -> tuple[dict, dict]:
    tx = transformation(rule, INFOS, DECAY)

    @jax.jit
    def update(params: dict, grads: dict, slots: dict) -> tuple[dict, dict]:
        deltas, state = tx.update(grads, RuleState(np.int32(count - 1), slots), params, scale=np.float32(SCALE))
        return {n: params[n] + deltas[n] for n in params}, state.slots

    new, moved = update(params, grads, slots)
    return jax.tree.map(np.asarray, new), jax.tree.map(np.asarray, moved)


def with_torch(rule: Rule, params: dict, grads: dict, slots: dict, count: int) -> tuple[dict, dict]:
    pieces = []
    for name, info in INFOS.items():
        for index in np.ndindex(*info.shape[: info.stack_dims]):
            tensor = torch.nn.Parameter(torch.from_numpy(params[name][index].copy()))
            tensor.grad = torch.from_numpy(grads[name][index].copy())
            pieces.append(Piece("params", name, index, tensor))
    optimizer = RuleOptimizer(rule, pieces, INFOS, DECAY)
    optimizer.set_count(count - 1)
    held = [(p, slot) for p in pieces for slot in slots if p.name in slots[slot]]
    for p, slot in held:
        optimizer.state[p.tensor][optimizer.slot(p.tensor, slot)].copy_(torch.from_numpy(slots[slot][p.name][p.index]))
    optimizer.step(scale=SCALE)
    new = {n: np.zeros_like(a) for n, a in params.items()}
    moved = {slot: {n: np.zeros_like(a) for n, a in named.items()} for slot, named in slots.items()}
    for p in pieces:
        new[p.name][p.index] = p.tensor.detach().numpy()
    for p, slot in held:
        moved[slot][p.name][p.index] = optimizer.state[p.tensor][optimizer.slot(p.tensor, slot)].numpy()
    return new, moved


def worst(rule: Rule, count: int, other: Rule | None = None) -> float:
    """The largest share of the allowed difference between JAX with `rule` and torch with `other` (or the same)."""
    params, grads, slots = start(rule, seed=count)
    new_jax, slots_jax = with_jax(rule, params, grads, slots, count)
    new_torch, slots_torch = with_torch(other or rule, params, grads, slots, count)

    def own(slots: dict, name: str) -> dict:
        return {slot: named[name] for slot, named in slots.items() if name in named}

    return max(
        ratio(
            rule,
            info,
            (new_jax[n], own(slots_jax, n)),
            (new_torch[n], own(slots_torch, n)),
            param=params[n],
            grad=grads[n],
            slots=own(slots, n),
            scale=SCALE,
            count=count,
            decay=n in DECAY,
        )
        for n, info in INFOS.items()
    )


@pytest.mark.parametrize("count", [1, 2, 1000])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_one_update_is_the_same_in_both_frameworks(rule: Rule, count: int) -> None:
    assert worst(rule, count) <= 1


@pytest.mark.parametrize(
    ("rule", "mutant"),
    [
        (AdamW(lr=3e-3, b2=0.95), AdamW(lr=3e-3, b2=0.951)),
        (AdamW(lr=3e-3, weight_decay=0.1), AdamW(lr=3e-3, weight_decay=0.1001)),
        (SGD(lr=0.1, momentum=0.9), SGD(lr=0.1, momentum=0.9001)),
        (Lion(lr=1e-3), Lion(lr=1e-3, b2=0.98)),
        (Adafactor(lr=1e-2), Adafactor(lr=1e-2, clip=0.99)),
        (Muon(lr=0.02), Muon(lr=0.02, nesterov=False)),
    ],
    ids=repr,
)
def test_a_slightly_different_rule_is_seen(rule: Rule, mutant: Rule) -> None:
    assert worst(rule, 2, mutant) > 1
