"""Attention: torch's fused kernel where it says the same thing, else written out.

Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    s: int,
    t: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    at_q: Tensor | None,
    at_k: Tensor | None,
) -> Tensor | None:
    """A boolean mask that broadcasts to (B, S, T), True where a query sees a key; None where it sees all."""
    mask = None
    if causal or window is not None:
        if at_q is None or at_k is None:
            at_q, at_k = torch.arange(s, device=device), torch.arange(t, device=device)
        behind = at_q[..., :, None] - at_k[..., None, :]
        if causal:
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        elif window is not None:
            mask = behind.abs() < window
        mask = mask if mask is None or mask.ndim == 3 else mask[None]
    if segment_q is not None and segment_k is not None:
        same = segment_q[:, :, None] == segment_k[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    kept: Callable[..., Any] | None = None,
) -> Tensor:
    """See `Ops.attention`. `kept(what, of, make)` is make(*of), or its result from an earlier layer."""
    s, h, d = q_BSHD.shape[1:]
    t, kv_heads = k_BTKD.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    kept = kept or (lambda what, of, make: make(*of))
    in_place = causal and window is None and segment_ids is None and positions is None and s == t
    # Pairs are laid flat: it is the tensors in them that stay the same from layer to layer.
    rule = (s, t, q_BSHD.device, causal, window, *_pair(segment_ids), *_pair(positions))
    if softcap is not None:
        return _written_out(q_BSHD, k_BTKD, v_BTKD, kept("visible", rule, visible), softcap, scale)
    # The kernels want numbers to add, and would otherwise make them from a boolean mask in every layer.
    bias = None if in_place else kept("bias", (*rule, q_BSHD.dtype), _bias)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, is_causal=in_place, scale=scale, enable_gqa=h != kv_heads
    )
    if positions is not None and bias is not None:
        # Only with free positions may a query see nothing: in place, it sees itself at least.
        mask = kept("visible", rule, visible)
        out = torch.where(mask.any(-1)[:, None, :, None], out, 0.0)
    return out.transpose(1, 2)


def _pair(given: Any) -> tuple[Any, Any]:
    """(for queries, for keys)."""
    return given if isinstance(given, tuple) else (given, given)


def _bias(*rule_and_dtype: Any) -> Tensor | None:
    """(B, 1, S, T): 0 where a query sees a key, else -inf; None where it sees all."""
    *rule, dtype = rule_and_dtype
    mask = visible(*rule)
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]


def _written_out(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, mask: Tensor | None, softcap: float, scale: float
) -> Tensor:
    """As the definition says, with scores softcapped: torch's kernel has no place for that."""
    b, s, h, d = q_BSHD.shape
    kv_heads = k_BTKD.shape[2]
    q = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d).float()
    scores = torch.einsum("bskgd,btkd->bkgst", q, k_BTKD.float()) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights * mask[:, None, None]
    out = torch.einsum("bkgst,btkd->bskgd", weights.to(v_BTKD.dtype), v_BTKD)
    return out.reshape(b, s, h, d)
