"""Bound a step's time from below: run only its matrix products and its attention, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.shapes import Shape


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """Return (tokens, in, out) of every weight's product in the forward pass; the backward pass has two more of
    each."""
    t, e, d = shape.tokens, shape.embed, shape.head_dim
    layer = [(e, shape.heads * d), (e, shape.kv_heads * d), (e, shape.kv_heads * d), (shape.heads * d, e)]
    layer += [(e, shape.mlp), (e, shape.mlp), (shape.mlp, e)]
    return [(t, i, o) for i, o in [*layer * shape.layers, (e, shape.vocab)]]


def _qkv(shape: Shape) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    return [rng.standard_normal((shape.batch, shape.seq, h, shape.head_dim)).astype(np.float32) for h in heads]


def with_torch(shape: Shape) -> Callable[[], object]:
    import torch
    import torch.nn.functional as F

    given = [(torch.randn(t, i), torch.randn(i, o), torch.randn(t, o)) for t, i, o in products(shape)]
    q, k, v = (torch.from_numpy(a).transpose(1, 2).requires_grad_() for a in _qkv(shape))
    upstream = torch.randn(q.shape)

    def run() -> None:
        for x, w, dy in given:
            torch.mm(x, w)
            torch.mm(dy, w.T)
            torch.mm(x.T, dy)
        for _ in range(shape.layers):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shape.heads != shape.kv_heads)
            torch.autograd.grad(out, (q, k, v), upstream)

    return run


def with_jax(shape: Shape) -> Callable[[], object]:
    import jax
    import jax.numpy as jnp

    from portatrain.backends.jax.flags import compiler_options

    rng = np.random.default_rng(0)
    given = [
        tuple(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((t, i), (i, o), (t, o)))
        for t, i, o in products(shape)
    ]
    qkv = [jnp.asarray(a) for a in _qkv(shape)]

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    @functools.partial(jax.jit, compiler_options=compiler_options(jax.devices()[0].platform))
    def step(given: Any, qkv: Any) -> Any:
        outs: list[Any] = [(x @ w, dy @ w.T, x.T @ dy) for x, w, dy in given]
        for _ in range(shape.layers):
            # The barrier keeps equal calls from being merged into one.
            qkv = jax.lax.optimization_barrier(qkv)
            out, back = jax.vjp(attend, *qkv)
            outs.append(back(out))
        return outs

    return lambda: jax.block_until_ready(step(given, qkv))
