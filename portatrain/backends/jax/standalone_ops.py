"""Run operations on their own, without a model, for the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portatrain.backends.base import Context
from portatrain.backends.jax.ops import JaxOps
from portatrain.backends.kernels import Site
from portatrain.backends.state import sample_words
from portatrain.model import dropout_hash

COMPUTE = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "bf16-state": jnp.bfloat16, "fp8": jnp.bfloat16}


class StandaloneOps:
    """Implement `evaluate` and `differentiate` of a backend."""

    @classmethod
    def _standalone(cls, context: Context) -> JaxOps:
        sample = np.zeros(1, np.int64) if context.sample is None else context.sample
        return JaxOps(
            step=jnp.int32(context.step),
            seed_2=jnp.asarray(dropout_hash.words(context.seed), jnp.int32),
            sample=jnp.asarray(sample_words(sample)),
            layer=jnp.int32(0),
            training=context.training,
            compute=COMPUTE[context.precision],
            site=Site(backend="jax", device=jax.default_backend()),
        )

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        args = jax.tree.map(jnp.asarray, args)
        return jax.tree.map(np.asarray, jax.jit(lambda a: fn(cls._standalone(context), *a))(args))

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        args = jax.tree.map(jnp.asarray, args)
        floating = tuple(i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating))
        run = jax.jit(jax.value_and_grad(lambda *a: fn(cls._standalone(context), *a), argnums=floating))
        value, grads = run(*args)
        return np.asarray(value), tuple(np.asarray(g) for g in grads)
