"""Attention by JAX's splash kernel for TPUs. Legend: B batch, S queries, T keys, H heads, K kv_heads, D head_dim.

The kernel holds one block of scores in a TPU core's memory at a time, and skips the blocks that no query sees. Its
functions compute on the arrays of one device; `per_device.py` runs them on a mesh. On another kind of device the kernel
runs in Pallas' interpret mode: slowly, with the same values, as a check.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    FullMask,
    Mask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from portatrain.backends.kernels import LANES, splash_block
from portatrain.model.context_chunks import Chunks


def splash(
    q_BSHD: Any,
    k_BTKD: Any,
    v_BTKD: Any,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: tuple[Any, Any] | None = None,
    softcap: float | None = None,
    sinks: Any | None = None,
    scale: float | None = None,
    precision: Any = None,
    part: tuple[Any, tuple[Chunks, ...]] | None = None,
    device: str = "cpu",
    kept: str | None = None,
    **unused: Any,
) -> Any:
    """Return the attention of this device's queries over all keys. See `Ops.attention`; the table of kernels keeps the
    other options away.

    part: (index, shares): the queries are at the positions of `shares[index]`, and all shares are equally long; the
    index may be traced. None: the queries are at all positions. device: the kind of device. kept: the name, for remat,
    of the two arrays that the backward pass takes from the forward pass.
    """
    (s, d), t = q_BSHD.shape[1::2], k_BTKD.shape[1]
    index, shares = part or (0, (((0, s),),))
    block_q, block_k = splash_block(s), splash_block(t)
    if not causal and window is None and s % block_q == t % block_k == 0:
        index, shares = 0, (((0, s),),)  # every query sees every key, so that all shares have the same mask
    leaves, tree, seen = _kernel(causal, window, s, t, shares, softcap, device != "tpu", kept)
    # The name tells whoever reads the compiled program how much the kernel computes (`plan/compilers/hlo.py`).
    name = f"attention_of_{seen}_blocks_of_{block_q}x{block_k}_and_sizes_{d}_{v_BTKD.shape[3]}"
    if len(shares) > 1:
        leaves = tuple(_share(x, index, len(shares)) for x in leaves)

    def run(q_BHSD: Any, k_BKTD: Any, v_BKTD: Any, sinks: Any, ids: Any, leaves: Any) -> Any:
        kernel = jax.tree.unflatten(tree, leaves)
        with jax.named_scope(name):
            return jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q_BHSD, k_BKTD, v_BKTD, ids, sinks)

    # The kernel does not scale: the queries do, by the true head size. Zeros behind it change no score.
    q_BSHD = (q_BSHD.astype(jnp.float32) * (d**-0.5 if scale is None else scale)).astype(q_BSHD.dtype)
    q_BHSD, k_BKTD, v_BKTD = (
        _padded(jnp.swapaxes(x, 1, 2), n) for x, n in ((q_BSHD, block_q), (k_BTKD, block_k), (v_BTKD, block_k))
    )
    ids = None
    if segment_ids is not None:
        of_q, of_k = (x.astype(jnp.int32) for x in segment_ids)
        # A padded query has the segment of the last one, and so sees the same keys.
        ids = SegmentIds(_lengthened(of_q, block_q, mode="edge"), _lengthened(of_k, block_k))
    out_BHSD = _at_precision(run, precision)(q_BHSD, k_BKTD, v_BKTD, sinks, ids, leaves)
    return jnp.swapaxes(out_BHSD[:, :, :s, : v_BTKD.shape[3]], 1, 2)


# ---- the mask


class _Visible(Mask):
    """Say which keys a query sees. The kernel calls `mask_function` with positions, so that no mask is stored."""

    def __init__(self, at: np.ndarray, keys: int, padded: int, *, causal: bool, window: int | None) -> None:
        self.q_sequence, self.keys, self.causal, self.window = at, keys, causal, window
        self._shape = (len(at), padded)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    def mask_function(self, at_q: Any, at_k: Any) -> Any:
        if not self.causal:
            there = at_k < self.keys
            return there if self.window is None else there & (abs(at_q - at_k) < self.window)
        behind = at_q >= at_k
        return behind if self.window is None else behind & (at_q - at_k < self.window)

    def __getitem__(self, index: Any) -> np.ndarray:
        at_q, at_k = self.q_sequence[index[0]], np.arange(self.shape[1], dtype=np.int32)[index[1]]
        return np.broadcast_to(self.mask_function(at_q[:, None], at_k[None, :]), (len(at_q), len(at_k)))

    __hash__ = object.__hash__


@functools.lru_cache(maxsize=256)
def _kernel(
    causal: bool,
    window: int | None,
    s: int,
    t: int,
    shares: tuple[Chunks, ...],
    softcap: float | None,
    interpret: bool,
    kept: str | None,
) -> tuple[tuple[np.ndarray, ...], Any, int]:
    """Return the kernel for shares of `s` queries each: arrays that describe its blocks, their tree, and the number of
    blocks that a share computes on average."""
    block_q, block_k = splash_block(s), splash_block(t)
    long_q, long_k = s + -s % block_q, t + -t % block_k
    # A padded query stands at the position of the last one, and so sees the same keys.
    at = np.concatenate([_positions(chunks)[np.minimum(np.arange(long_q), s - 1)] for chunks in shares])
    mask: Mask = _Visible(at, t, long_k, causal=causal, window=window)
    if not causal and window is None and long_k == t:
        mask = FullMask((len(at), long_k))
    sizes = BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )
    with jax.ensure_compile_time_eval():
        made = make_splash_mha(
            MultiHeadMask([mask]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=len(shares),
            attn_logits_soft_cap=softcap,
            residual_checkpoint_name=kept,
            interpret=interpret,
        )
        leaves, tree = jax.tree.flatten(made)
        blocks = np.asarray(made.fwd_mask_info.block_mask)
        return tuple(np.asarray(x) for x in leaves), tree, int(np.count_nonzero(blocks)) // len(shares)


def _positions(chunks: Chunks) -> np.ndarray:
    return np.concatenate([np.arange(first, first + size, dtype=np.int32) for first, size in chunks])


def _share(x: Any, index: Any, parts: int) -> Any:
    """Return a share of an array of the kernel: positions, (S,), or blocks, (1, S / block, ...)."""
    axis = min(x.ndim - 1, 1)
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(jnp.asarray(x), index * size, size, axis)


# ---- padding and precision


def _padded(x_BHSD: Any, multiple: int) -> Any:
    """Pad the positions to a multiple, and the head size to a multiple of `LANES`, with zeros."""
    s, d = x_BHSD.shape[2:]
    return jnp.pad(x_BHSD, ((0, 0), (0, 0), (0, -s % multiple), (0, -d % LANES)))


def _lengthened(ids_BS: Any, multiple: int, mode: str = "constant") -> Any:
    return jnp.pad(ids_BS, ((0, 0), (0, -ids_BS.shape[1] % multiple)), mode=mode)


def _at_precision(run: Any, precision: Any) -> Any:
    """Return `run(q, k, v, sinks, ids, leaves)` with all of its matmuls at `precision`. The kernel takes it from JAX's
    default. JAX traces the backward pass later, so the backward pass sets the default once more."""
    if precision is None:
        return run
    name = str(jax.lax.Precision(precision)).lower()

    def default() -> contextlib.AbstractContextManager[Any]:
        return jax.default_matmul_precision(name)

    @jax.custom_vjp
    def exact(q: Any, k: Any, v: Any, sinks: Any, ids: Any, leaves: Any) -> Any:
        with default():
            return run(q, k, v, sinks, ids, leaves)

    def forward(q: Any, k: Any, v: Any, sinks: Any, ids: Any, leaves: Any) -> Any:
        with default():
            return jax.vjp(lambda *given: run(*given, ids, leaves), q, k, v, sinks)

    def backward(pull: Any, g: Any) -> Any:
        with default():
            return (*pull(g), None, None)

    exact.defvjp(forward, backward)
    return exact
