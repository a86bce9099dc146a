"""Decode with a cache in JAX: one program for the prompts, one for every further token, one for the probe."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portatrain.backends.decoding import CachedAttention, Decoding, Placed, Probe, ProbedOps, last_logits
from portatrain.backends.jax.flags import compiler_options
from portatrain.backends.jax.ops import JaxOps
from portatrain.backends.token_ids import PREDICTED
from portatrain.model.ops import check_layer


@dataclasses.dataclass
class DecodingOps(CachedAttention, JaxOps):
    """The operations of `JaxOps` with a cache."""

    decoding: Any = None

    def stack(self, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        graph, stacked = nnx.split(stack.block)
        held = self.decoding.take()

        def body(carry: Any, xs: Any) -> Any:
            mine, index, extra, cache = xs
            inner = dataclasses.replace(
                self,
                layer=self.layer * stack.n + index,
                auxes={},
                tallies={},
                named=set(),
                across=None,
                decoding=self.decoding.inside(cache),
            )
            args = shared if per_layer is None else (*shared, extra)
            block = nnx.merge(graph, mine)
            carry, out = check_layer(block, block(inner, carry, *args))
            return carry, (out, inner.decoding.made)

        xs = (stacked, jnp.arange(stack.n, dtype=jnp.int32), per_layer, held)
        carry, (outs, made) = jax.lax.scan(body, carry, xs)
        self.decoding.made.append(made)
        return carry, outs


@dataclasses.dataclass
class ProbingOps(ProbedOps, JaxOps):
    """The operations of `JaxOps` that show what mixes positions."""

    probe: Any = None


class JaxCached:
    """See `portatrain.backends.decoding.CachedModel`."""

    def __init__(self, backend: Any, state: Any) -> None:
        self._backend, self._weights = backend, (state["params"], state["state"])
        self._found: list[str] = []
        first = backend.devices.devices.flat[0]
        jit = functools.partial(jax.jit, compiler_options=compiler_options(first.platform))
        self._first = jit(self._begin, static_argnums=3)
        self._next = jit(self._extend, donate_argnums=3)
        self._probe = jit(self._probed)

    def begin(self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, length: int) -> tuple[np.ndarray, Any]:
        logits, cache = self._first(self._weights, self._backend._put(batch, 0), np.int32(offset_B), length)
        return np.asarray(logits), cache

    def extend(
        self, batch: Mapping[str, np.ndarray], offset_B: np.ndarray, cache: Any, at: int
    ) -> tuple[np.ndarray, Any]:
        there = self._backend._put(batch, 0)
        logits, cache = self._next(self._weights, there, np.int32(offset_B), cache, np.int32(at))
        return np.asarray(logits), cache

    def probe(self, batch: Mapping[str, np.ndarray], poison_BS: np.ndarray) -> tuple[np.ndarray, list[str]]:
        found = self._probe(self._weights, self._backend._put(batch, 0), np.float32(poison_BS))
        return np.asarray(found), self._found

    def _begin(self, weights: Any, batch: Any, offset_B: Any, length: int) -> tuple[Any, Any]:
        return self._run(weights, batch, offset_B, length, None, None)

    def _extend(self, weights: Any, batch: Any, offset_B: Any, cache: Any, at: Any) -> tuple[Any, Any]:
        arrays = jax.tree.leaves(cache)
        length = max((x.shape[-3] for x in arrays), default=1)  # ([layers,] B, T, K, D)
        return self._run(weights, batch, offset_B, length, cache, at)

    def _run(self, weights: Any, batch: Any, offset_B: Any, length: int, cache: Any, at: Any) -> tuple[Any, Any]:
        plain = self._backend._ops(batch, 0, training=False)
        rows, new = batch["tokens"].shape
        placed = Placed.of(plain, offset_B, new, length, at)
        ops = DecodingOps(**_fields(plain), decoding=Decoding(placed, cache))
        logits = last_logits(self._predicted(weights, ops, batch), rows, new, self._backend.definition.model)
        return logits.astype(jnp.float32), ops.decoding.made

    def _probed(self, weights: Any, batch: Any, poison_BS: Any) -> Any:
        probe = Probe(poison_BS)
        ops = ProbingOps(**_fields(self._backend._ops(batch, 0, training=False)), probe=probe)
        found = self._predicted(weights, ops, batch)
        self._found = probe.found
        return found.astype(jnp.float32)

    def _predicted(self, weights: Any, ops: Any, batch: Any) -> Any:
        with self._backend.ids.model_runs(PREDICTED):
            return self._backend._module(*weights).predict(ops, batch)


def _fields(ops: JaxOps) -> dict[str, Any]:
    return {f.name: getattr(ops, f.name) for f in dataclasses.fields(ops)}
