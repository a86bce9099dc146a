"""Say which keys a query sees, from the options of `Ops.attention`.

Legend: B batch, S queries, T keys, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rule_of(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Tensor | tuple[Tensor, Tensor] | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    prefix: Tensor | None = None,
) -> tuple[Any, ...]:
    """Return the arguments of `visible`. Pairs are flattened, because their tensors are the same in every layer."""
    s, t = q_BSHD.shape[1], k_BTKD.shape[1]
    return (s, t, q_BSHD.device, causal, window, *_pair(segment_ids), *_pair(positions), prefix)


def _pair(given: Any) -> tuple[Any, Any]:
    """Return (for queries, for keys)."""
    return given if isinstance(given, tuple) else (given, given)


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
    prefix: Tensor | None = None,
) -> Tensor | None:
    """Return a boolean mask that broadcasts to (B, S, T), True if a query sees a key; None if it sees all keys."""
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
        mask = mask if mask is None or prefix is None else mask | (prefix != 0)[:, None, :]
    if segment_q is not None and segment_k is not None:
        same = segment_q[:, :, None] == segment_k[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def alibi_bias(
    s: int, t: int, device: torch.device, slopes: tuple[float, ...], at_q: Tensor | None, at_k: Tensor | None
) -> Tensor:
    """Return (1 or B, H, S, T) float32, -slope |position of the query - position of the key|."""
    if at_q is None or at_k is None:
        at_q, at_k = torch.arange(s, device=device), torch.arange(t, device=device)
    apart = (at_q[..., :, None] - at_k[..., None, :]).abs().float()
    apart = apart if apart.ndim == 3 else apart[None]
    return apart[:, None] * -torch.tensor(slopes, dtype=torch.float32, device=device)[:, None, None]
