"""Compute attention written out, for XLA to fuse and partition. All scores exist: (B, K, G, S, T) over all devices.

Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim (that of values may differ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from portatrain.backends import choose_kernel, kernels
from portatrain.backends.torch.attention import softmax
from portatrain.backends.torch.visible import alibi_bias, visible
from portatrain.model.attention_rules import slopes_of

SITE = kernels.Site(backend="torch-xla")


def attention(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, site: kernels.Site = SITE, **options: Any) -> Tensor:
    """Run the kernel that the table chooses; see `Ops.attention`."""
    b, s, h, d = q_BSHD.shape
    shape = (b, s, k_BTKD.shape[1], h, k_BTKD.shape[2], d)
    dtype = str(q_BSHD.dtype).removeprefix("torch.")
    traits = choose_kernel.attention_traits(options, (d, v_BTKD.shape[3]))
    case = kernels.Case(site=site, dtype=dtype, shape=shape, traits=traits)
    return choose_kernel.choose("attention", case).kernel.load()(q_BSHD, k_BTKD, v_BTKD, **options)


def written_out(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    prefix: Tensor | None = None,
    alibi: bool | Sequence[float] = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    kept: Callable[..., Any],
) -> Tensor:
    """See `Ops.attention`. `kept(what, of, make)` returns make(*of), or its result from an earlier layer."""
    b, s, h, d = q_BSHD.shape
    t, kv_heads = k_BTKD.shape[1:3]
    of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    at_q, at_k = positions if positions is not None else (None, None)
    rule = (s, t, q_BSHD.device, causal, window, of_q, of_k, at_q, at_k, prefix)
    mask = kept("visible", rule, visible)
    q_BSKGD = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d)
    scores = torch.einsum("bskgd,btkd->bkgst", q_BSKGD.float(), k_BTKD.float())
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if (slopes := slopes_of(alibi, h)) is not None:
        bias = kept("alibi", (s, t, q_BSHD.device, slopes, at_q, at_k), alibi_bias)
        scores = scores + bias.reshape(bias.shape[0], kv_heads, h // kv_heads, s, t)
    if mask is not None:
        mask = mask[:, None, None]
        scores = torch.where(mask, scores, torch.finfo(torch.float32).min)
    weights = softmax(scores, sinks)
    # A query may see nothing only with these; otherwise it sees at least itself.
    if mask is not None and (positions is not None or isinstance(segment_ids, tuple)):
        weights = torch.where(mask, weights, 0.0)
    out = torch.einsum("bkgst,btkd->bskgd", weights.to(v_BTKD.dtype), v_BTKD)
    return out.reshape(b, s, h, v_BTKD.shape[3])
