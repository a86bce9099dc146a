"""Attention: torch's fused kernel where it says the same thing, else written out.

Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(
    s: int,
    t: int,
    device: torch.device,
    *,
    causal: bool,
    window: int | None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None,
    positions: tuple[Tensor, Tensor] | None,
) -> Tensor | None:
    """A boolean mask that broadcasts to (B, S, T), True where a query sees a key; None where it sees all."""
    mask = None
    if causal or window is not None:
        if positions is None:
            positions = (torch.arange(s, device=device), torch.arange(t, device=device))
        behind = positions[0][..., :, None] - positions[1][..., None, :]
        if causal:
            mask = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        elif window is not None:
            mask = behind.abs() < window
        mask = mask if mask is None or mask.ndim == 3 else mask[None]
    if segment_ids is not None:
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        same = of_q[:, :, None] == of_k[:, None, :]
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
    masks: dict[Any, Any] | None = None,
) -> Tensor:
    """See `portatrain.ops.Ops.attention`. `masks` keeps the mask for further calls with the same tensors."""
    s, h, d = q_BSHD.shape[1:]
    t, kv_heads = k_BTKD.shape[1:3]
    scale = d**-0.5 if scale is None else scale
    rule: dict[str, Any] = {
        "causal": causal, "window": window, "segment_ids": segment_ids, "positions": positions,
    }  # fmt: skip
    in_place = causal and window is None and segment_ids is None and positions is None and s == t
    mask = None if in_place else _kept(masks, s, t, q_BSHD.device, rule)
    if softcap is not None:
        if in_place:
            mask = visible(s, t, q_BSHD.device, **rule)
        return _written_out(q_BSHD, k_BTKD, v_BTKD, mask, softcap, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=in_place, scale=scale,
        enable_gqa=h != kv_heads,
    )  # fmt: skip
    if positions is not None and mask is not None:
        # Only with free positions may a query see nothing: in place, it sees itself at least.
        out = torch.where(mask.any(-1)[:, None, :, None], out, 0.0)
    return out.transpose(1, 2)


def _kept(masks: dict[Any, Any] | None, s: int, t: int, device: torch.device, rule: dict[str, Any]) -> Tensor | None:
    if masks is None:
        return visible(s, t, device, **rule)
    key = (s, t, *(tuple(map(id, v)) if isinstance(v, tuple) else v if isinstance(v, int) else id(v) for v in rule.values()))
    if key not in masks:
        masks[key] = (visible(s, t, device, **rule), rule)  # the rule holds the tensors: their ids stay theirs
    return masks[key][0]


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
