"""Record the operations of a step in jax (`backends/watched`).

A layer of a Stack is traced by itself and not within a scan, whose values nothing outside can see. The gradient of an
array is that of a zero which is added to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portatrain.backends.base import check_loss
from portatrain.backends.jax.accumulation import summed
from portatrain.backends.watched import Call, Watched, put_together, taken_apart, watching
from portatrain.model.across_samples import Across
from portatrain.model.ops import check_layer

Values = list[tuple[list[Any], list[Any]]]
"""The arguments and the results of every call."""


class Watches:
    """The method `watch` of the backend."""

    def watch(self: Any, state: Any, batch: Mapping[str, np.ndarray], *, step: int) -> list[Watched] | None:
        """Return what each microbatch of `batch` computes, (accumulation, microbatch) arrays; the state stays. None if
        the model compares samples of several microbatches, or if several processes hold the arrays."""
        if self.processes > 1:
            return None
        n, found = next(iter(batch.values())).shape[0], []
        for i in range(n):
            across = Across(microbatches=n, index=i)
            one = _watch(self, state, {k: v[i] for k, v in batch.items()}, step, across)
            if across.wanted:
                return None
            found.append(one)
        return found


def _watch(backend: Any, state: Any, micro: Mapping[str, np.ndarray], step: int, across: Across) -> Watched:
    placed = backend._put(micro, 0)
    trained = {n: p for n, p in state["params"].items() if n in backend.program.trainable}
    frozen = {n: p for n, p in state["params"].items() if n not in backend.program.trainable}
    calls: list[Call] = []

    def run(trained: Any, zeros: Any, frozen: Any, states: Any, placed: Any) -> Any:
        calls.clear()
        values: Values = []

        def watcher(ops: Any, run: Any, call: Call, arrays: list[Any]) -> Any:
            mine = ([None] * len(arrays), None) if zeros is None else zeros[len(calls)]
            calls.append(call)
            results: list[Any] = []
            given = [_plus(x, z) for x, z in zip(arrays, mine[0], strict=True)]
            template = taken_apart(run(given), _is_array, results)
            values.append(([_plain(a) for a in arrays], [_plain(r) for r in results]))
            own = [_plus(x, z) for x, z in zip(results, mine[1] or [None] * len(results), strict=True)]
            return put_together(template, own)

        plain = backend._ops(placed, step, training=True, across=across)
        made = watching(type(plain), _is_array, watcher, lambda ops: getattr(ops, "at", None))
        made.stack = _stack  # type: ignore[attr-defined]
        ops = made(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})
        with backend.ids.model_runs():
            loss = check_loss(backend._module({**frozen, **trained}, states)(ops, placed), backend.definition.model)
        total = summed(loss, ops.auxes)
        return total, (values, total, jnp.sum(loss.weight_B))

    rest = (frozen, state["state"], placed)
    shapes, *_ = jax.eval_shape(lambda trained, *rest: run(trained, None, *rest)[1], trained, *rest)
    zeros = [tuple([_zero(s) for s in part] for part in pair) for pair in shapes]
    gradients = jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))
    (grads, given), (values, total, weight) = gradients(trained, zeros, *rest)
    for call, (args, results), (arg_grads, result_grads) in zip(calls, values, given, strict=True):
        call.args, call.results = [_host(a) for a in args], [_host(r) for r in results]
        call.arg_grads, call.result_grads = [_host(g) for g in arg_grads], [_host(g) for g in result_grads]
    return Watched(
        calls=list(calls), loss=float(total), weight=float(weight), grads={n: np.array(g) for n, g in grads.items()}
    )


def _stack(self: Any, stack: Any, carry: Any, shared: Any, per_layer: Any) -> tuple[Any, Any]:
    """As `JaxOps.stack`, one layer after another."""
    graph, stacked = nnx.split(stack.block)
    outs = []
    for i in range(stack.n):
        inner = dataclasses.replace(self, layer=self.layer * stack.n + i, auxes={}, tallies={}, across=None)
        inner.at = (getattr(self, "at", None) or 0) * stack.n + i
        args = shared if per_layer is None else (*shared, jax.tree.map(lambda a, i=i: a[i], per_layer))
        block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))
        carry, out = check_layer(block, block(inner, carry, *args))
        for name, aux in inner.auxes.items():
            self._record(name, aux)
        outs.append(out)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), outs[0], *outs[1:])


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, nnx.Variable))


def _plain(x: Any) -> Any:
    return x[...] if isinstance(x, nnx.Variable) else x


def _plus(x: Any, z: Any) -> Any:
    if z is None:
        return x
    if isinstance(x, nnx.Variable):  # a parameter stays one, with its axes
        return type(x)(_plain(x) + z, **x.get_metadata())
    return x + z


def _zero(shape: Any) -> Any:
    return jnp.zeros(shape.shape, shape.dtype) if jnp.issubdtype(shape.dtype, jnp.floating) else None


def _host(x: Any) -> Any:
    if x is None:
        return None
    return np.asarray(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x)
