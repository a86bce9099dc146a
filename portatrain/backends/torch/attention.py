"""Compute attention: with torch's fused kernel if it covers the case, else written out (`choose_kernel.py`
decides).

Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim (that of values may differ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from portatrain.backends import choose_kernel, kernels
from portatrain.model.attention_rules import slopes_of

SITE = kernels.Site(backend="torch")


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


def attention(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    site: kernels.Site = SITE,
    kept: Callable[..., Any] | None = None,
    **options: Any,
) -> Tensor:
    """Run the kernel that the table chooses; see `Ops.attention`. `kept(what, of, make)` returns make(*of), or its
    result from an earlier layer."""
    b, s, h, d = q_BSHD.shape
    where = _kernel(
        site.backend,
        site.device,
        site.mesh,
        site.named,
        q_BSHD.dtype,
        (b, s, k_BTKD.shape[1], h, k_BTKD.shape[2], d),
        options.get("causal", True),
        options.get("window") is not None,
        options.get("segment_ids") is not None,
        options.get("positions") is not None,
        options.get("softcap") is not None,
        options.get("prefix") is not None,
        bool(options.get("alibi", False)),
        options.get("sinks") is not None,
        v_BTKD.shape[3] != d,
    )
    return LOADED[where](q_BSHD, k_BTKD, v_BTKD, kept=kept or (lambda what, of, make: make(*of)), **options)


@torch.compiler.assume_constant_result
def _kernel(
    backend: str,
    device: str,
    mesh: str,
    named: kernels.Named,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *present: bool,
) -> str:
    """Return the key in `LOADED` of the kernel that runs. Arguments and result are constants only, so torch.compile
    calls this once and does not trace it."""
    names = ("causal", "window", "segments", "positions", "softcap", "prefix", "alibi", "sinks", "value-size")
    case = kernels.Case(
        site=kernels.Site(backend=backend, device=device, mesh=mesh, named=named),
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        traits=frozenset(name for name, there in zip(names, present, strict=True) if there),
    )
    kernel = choose_kernel.choose("attention", case).kernel
    LOADED.setdefault(kernel.where, kernel.load())
    return kernel.where


LOADED: dict[str, Callable[..., Tensor]] = {}
"""Implementations by `Kernel.where`."""


def load_kernels() -> None:
    """Fill `LOADED` with every kernel that may run, because a compiled block cannot import the functions that it
    calls."""
    for kernel in kernels.rows("attention", "torch"):
        LOADED.setdefault(kernel.where, kernel.load())


def sdpa_causal(q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, *, scale: float | None = None, **_: Any) -> Tensor:
    """Run torch's fused kernel with its own causal mask."""
    return _sdpa(q_BSHD, k_BTKD, v_BTKD, None, scale, causal=True)


def sdpa_masked(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    kept: Callable[..., Any],
    scale: float | None = None,
    positions: tuple[Tensor, Tensor] | None = None,
    alibi: bool | Sequence[float] = False,
    softcap: None = None,
    sinks: None = None,
    **options: Any,
) -> Tensor:
    """Run torch's fused kernel with an additive mask, made once; from a boolean mask torch would make it at each
    call."""
    rule = _rule(q_BSHD, k_BTKD, positions=positions, **options)
    slopes = slopes_of(alibi, q_BSHD.shape[2])
    bias = kept("bias", (*rule, q_BSHD.dtype, slopes), _bias)
    out = _sdpa(q_BSHD, k_BTKD, v_BTKD, bias, scale, causal=False)
    if positions is not None and bias is not None:
        # A query may see nothing only with free positions; otherwise it sees at least itself.
        mask = kept("visible", rule, visible)
        out = torch.where(mask.any(-1)[:, :, None, None], out, 0.0)
    return out


def _sdpa(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, bias: Tensor | None, scale: float | None, *, causal: bool
) -> Tensor:
    grouped = q_BSHD.shape[2] != k_BTKD.shape[2]
    scale = q_BSHD.shape[3] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _rule(
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


def _bias(*given: Any) -> Tensor | None:
    """Return (B, 1 or H, S, T): the bias of ALiBi or 0 if a query sees a key, else -inf; None for no bias at all."""
    *rule, dtype, slopes = given
    mask = visible(*rule)
    if slopes is not None:
        s, t, device, *_ = rule
        found = alibi_bias(s, t, device, slopes, *rule[7:9]).to(dtype)
        return found if mask is None else found.masked_fill(~mask[:, None], -torch.inf)
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)[:, None]


def written_out(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    kept: Callable[..., Any],
    alibi: bool | Sequence[float] = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """Compute attention as `Ops.attention` defines it."""
    rule = _rule(q_BSHD, k_BTKD, **options)
    mask = kept("visible", rule, visible)
    b, s, h, d = q_BSHD.shape
    kv_heads = k_BTKD.shape[2]
    q = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d).float()
    scores = torch.einsum("bskgd,btkd->bkgst", q, k_BTKD.float()) * (d**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if (slopes := slopes_of(alibi, h)) is not None:
        bias = kept("alibi", (*rule[:3], slopes, *rule[7:9]), alibi_bias)
        scores = scores + bias.unflatten(1, (kv_heads, h // kv_heads))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    weights = softmax(scores, sinks)
    if mask is not None:
        weights = weights * mask[:, None, None]
    out = torch.einsum("bkgst,btkd->bskgd", weights.to(v_BTKD.dtype), v_BTKD)
    return out.reshape(b, s, h, v_BTKD.shape[3])


def softmax(scores_BKGST: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax over the keys, with `sinks` (H,), if given, as one more score of each head, whose weight is
    dropped."""
    if sinks is None:
        return torch.softmax(scores_BKGST, dim=-1)
    b, kv_heads, groups, s, _ = scores_BKGST.shape
    beside = sinks.float().reshape(1, kv_heads, groups, 1, 1).expand(b, -1, -1, s, -1)
    return torch.softmax(torch.cat([scores_BKGST, beside], dim=-1), dim=-1)[..., :-1]
