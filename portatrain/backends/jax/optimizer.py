"""An optimizer rule as an `optax.GradientTransformation`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import optax

import jax
import jax.numpy as jnp
from portatrain.module import TensorInfo
from portatrain.optim import Rule


class RuleState(NamedTuple):
    """count: () int32, the steps applied so far; slots[slot][name]: float32."""

    count: Any
    slots: dict[str, dict[str, Any]]


class _Namespace:
    """jax.numpy for rules, with matmul a full float32 product on every device."""

    sqrt, sign, expm1, maximum = jnp.sqrt, jnp.sign, jnp.expm1, jnp.maximum
    sum, mean, swapaxes, reshape = jnp.sum, jnp.mean, jnp.swapaxes, jnp.reshape
    matmul = staticmethod(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))


xp = _Namespace


def transformation(
    rule: Rule, infos: Mapping[str, TensorInfo], decay: frozenset[str]
) -> optax.GradientTransformationExtraArgs:
    """The rule for a dict of parameters by name. `update` takes `scale=`, the schedule's multiplier, () float32."""

    def init(params: Mapping[str, Any]) -> RuleState:
        slots: dict[str, dict[str, Any]] = {}
        for name in params:
            for slot, what in rule.rule_for(infos[name]).slots(infos[name]).items():
                slots.setdefault(slot, {})[name] = jnp.zeros(what.shape, what.dtype)
        return RuleState(jnp.zeros((), jnp.int32), slots)

    def update(
        grads: Mapping[str, Any], state: RuleState, params: Any = None, *, scale: Any, **_: Any
    ) -> Any:
        count = state.count + 1
        deltas, slots = {}, {slot: dict(named) for slot, named in state.slots.items()}
        for name, grad in grads.items():
            info = infos[name]
            deltas[name], new = rule.rule_for(info).update(
                xp, info=info, grad=grad, param=params[name],
                slots={slot: named[name] for slot, named in state.slots.items() if name in named},
                scale=scale, count=count.astype(jnp.float32), decay=name in decay,
            )  # fmt: skip
            for slot, value in new.items():
                slots[slot][name] = value
        return deltas, RuleState(count, slots)

    return optax.GradientTransformationExtraArgs(init, update)
