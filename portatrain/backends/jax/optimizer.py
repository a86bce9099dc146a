"""Wrap an optimizer rule as an `optax.GradientTransformation`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from portatrain.backends.state import slot_tensors
from portatrain.model import dropout_hash, precision
from portatrain.model.module import TensorInfo
from portatrain.optim import Rule


class RuleState(NamedTuple):
    """count: () int32, the number of applied steps; slots[slot][name]: float32 arrays."""

    count: Any
    slots: dict[str, dict[str, Any]]


class _Namespace:
    """Give rules jax.numpy, with a matmul in full float32 on every device."""

    sqrt, sign, expm1, maximum = jnp.sqrt, jnp.sign, jnp.expm1, jnp.maximum
    sum, mean, swapaxes, reshape = jnp.sum, jnp.mean, jnp.swapaxes, jnp.reshape
    matmul = staticmethod(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))


xp = _Namespace


def kept(value: Any, info: TensorInfo, role: str, seed: int, count: Any) -> Any:
    """Return a new float32 value in the dtype of its state tensor; to bfloat16 it is rounded stochastically."""
    if info.dtype != "bfloat16":
        return value
    words = precision.noise(
        jnp.asarray(dropout_hash.words(seed), jnp.int32),
        count,
        role,
        info.name,
        (0,) * value.ndim,
        value.shape,
        lambda n: jnp.arange(n, dtype=jnp.int32),
    )
    bits = precision.rounded_bits(jax.lax.bitcast_convert_type(value, jnp.int32), words)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def transformation(
    rule: Rule, infos: Mapping[str, TensorInfo], decay: frozenset[str], seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation of a dict of parameters by name. `update` takes `scale=`, the multiplier of the
    schedule, () float32, and returns float32 deltas. Slots are kept in the dtypes of their tensors, rounded by
    `seed`."""
    slot_infos = {name: slot_tensors(rule, info) for name, info in infos.items()}

    def init(params: Mapping[str, Any]) -> RuleState:
        slots: dict[str, dict[str, Any]] = {}
        for name in params:
            for slot, what in slot_infos[name].items():
                slots.setdefault(slot, {})[name] = jnp.zeros(what.shape, what.dtype)
        return RuleState(jnp.zeros((), jnp.int32), slots)

    def update(grads: Mapping[str, Any], state: RuleState, params: Any = None, *, scale: Any, **_: Any) -> Any:
        count = state.count + 1
        deltas, slots = {}, {slot: dict(named) for slot, named in state.slots.items()}
        for name, grad in grads.items():
            info = infos[name]
            deltas[name], new = rule.rule_for(info).update(
                xp,
                info=info,
                grad=grad,
                param=_wide(params[name]),
                slots={slot: _wide(named[name]) for slot, named in state.slots.items() if name in named},
                scale=scale,
                count=count.astype(jnp.float32),
                decay=name in decay,
            )
            for slot, value in new.items():
                what = slot_infos[name][slot]
                slots[slot][name] = kept(value, what, what.role, seed, count)
        return deltas, RuleState(count, slots)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
