"""Compute attention: with torch's fused kernel if it covers the case, else written out (`choose_kernel.py`
decides).

Legend: B batch, S queries, T keys, H heads, K kv_heads, G = H/K, D head_dim (that of values may differ).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from portatrain.backends import choose_kernel, kernels
from portatrain.backends.torch.visible import alibi_bias, rule_of, visible
from portatrain.model.attention_rules import slopes_of

SITE = kernels.Site(backend="torch")
FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.OVERRIDEABLE,
]
"""The kernels of `scaled_dot_product_attention` that make no array of all scores."""


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
    rule = rule_of(q_BSHD, k_BTKD, positions=positions, **options)
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
    run = functools.partial(
        F.scaled_dot_product_attention, q, k, v, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if bias is not None or q.device.type not in kernels.FLEX_DEVICES:
        return run().transpose(1, 2)
    with sdpa_kernel(FUSED):  # else torch would compute all scores if no fused kernel covers the case, and not say so
        return run().transpose(1, 2)


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
    rule = rule_of(q_BSHD, k_BTKD, **options)
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
