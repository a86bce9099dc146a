"""Planted wrong kernels in jax: the kernels of the table with one change in what goes in, or in what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from portatrain.backends.jax.attention import written_out
from portatrain.backends.jax.grouped_matmul import ragged_dot
from portatrain.backends.kernels import Kernel
from tests.support.planted_kernels import Planted

PLANTED: list[Planted] = []
Function = Callable[..., Any]


def planted(operand: str, operation: str = "attention") -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        where = f"{__name__}:{function.__name__}"
        kernel = Kernel(operation=operation, name=function.__name__, backends=("jax",), where=where)
        PLANTED.append(Planted(kernel=kernel, backend="jax", operand=operand))
        return function

    return register


def changed_gradient(x: Any, change: Callable[[Any], Any]) -> Any:
    """Return x, whose gradient is changed on its way back."""

    @jax.custom_vjp
    def same(x: Any) -> Any:
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (change(g),))
    return same(x)


@planted("result")
def window_one_too_long(q: Any, k: Any, v: Any, *, window: int | None = None, **options: Any) -> Any:
    return written_out(q, k, v, window=None if window is None else window + 1, **options)


@planted("result")
def kv_heads_in_reverse(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return written_out(q, k[:, :, ::-1], v[:, :, ::-1], **options)


@planted("result")
def scale_missing(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return written_out(q, k, v, **{"scale": 1.0, **options})


@planted("result")
def segments_off_by_one(q: Any, k: Any, v: Any, *, segment_ids: Any = None, **options: Any) -> Any:
    if segment_ids is not None and not isinstance(segment_ids, tuple):
        segment_ids = (segment_ids, jnp.roll(segment_ids, 1, axis=1))
    return written_out(q, k, v, segment_ids=segment_ids, **options)


@planted("result")
def blind_rows_see_all(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return written_out(q, k, v, may_be_blind=False, **options)


@planted("gradient of k")
def keys_of_the_last_tile_have_no_gradient(q: Any, k: Any, v: Any, **options: Any) -> Any:
    t = k.shape[1]
    kept = (jnp.arange(t) < (t // 128 * 128 if t > 128 else t))[:, None, None]
    return written_out(q, changed_gradient(k, lambda g: jnp.where(kept, g, 0)), v, **options)


@planted("result", "grouped_matmul")
def sizes_in_turn(x: Any, w: Any, *, sizes_X: Any, **more: Any) -> Any:
    return ragged_dot(x, w, sizes_X=jnp.roll(sizes_X, 1), **more)


@planted("gradient of w", "grouped_matmul")
def garbage_in_the_gradient_of_an_empty_expert(x: Any, w: Any, *, sizes_X: Any, **more: Any) -> Any:
    w = changed_gradient(w, lambda g: jnp.where((sizes_X == 0)[:, None, None], jnp.nan, g))
    return ragged_dot(x, w, sizes_X=sizes_X, **more)
