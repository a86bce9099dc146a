"""Compute attention by FlexAttention: one kernel that reads its mask as a function, and skips whole blocks of it.

No array here has an element for each pair of a query and a key. The function of the mask (`seen_by`) decides about one
pair inside the kernel. The block mask lists, for each block of `BLOCK` queries, the blocks of keys in which a query may
see a key. It is computed from the smallest and the largest position and segment id of every block, so it may list a
block in which no query sees a key; there the kernel asks the function. It never leaves out a block that is needed.

torch compiles the kernel with Triton. Legend: B batch, S queries, T keys, H heads, K kv_heads, D head_dim, M and N
blocks of queries and keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as operator
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from portatrain.backends.torch.handed import BLOCK_MASK
from portatrain.backends.torch.visible import rule_of
from portatrain.model.attention_rules import slopes_of

BLOCK = 128
"""Queries, and keys, of a block of the block mask."""
Blocks = tuple[Tensor, ...]
"""The tensors of a block mask, in the order of `BlockMask`: of keys for each block of queries, then of queries for each
block of keys, each time (number, indices) of the blocks that need the function and of those seen whole."""


def flex(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    kept: Callable[..., Any],
    scale: float | None = None,
    alibi: bool | Sequence[float] = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Compute attention as `Ops.attention` defines it, without an array of S x T elements."""
    s, t, device, *mask = rule = rule_of(q_BSHD, k_BTKD, **options)
    blocks = None
    if (seen := seen_by(*mask)) is not None:
        sizes: dict[str, Any] = {"BLOCK_SIZE": (BLOCK, BLOCK), "mask_mod": seen}
        blocks = BlockMask((s, t), *kept(BLOCK_MASK, rule, block_mask), **sizes)
    slopes = slopes_of(alibi, q_BSHD.shape[2])
    slopes_H = None if slopes is None else kept("slopes", (slopes, device), _slopes)
    score = score_of(softcap, slopes_H, *mask[4:6])
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTKD, v_BTKD))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out, lse_BHS = _run(q, k, v, score, blocks, scale, lse=sinks is not None)
    if sinks is not None:
        # A sigmoid, of which the derivative has all its digits where it is nearly 1.
        share = F.logsigmoid(lse_BHS - sinks.float()[:, None]).exp()
        out = (out * share[..., None]).to(out.dtype)
    return out.transpose(1, 2)


# ---- the mask and the scores, as functions of one pair


def seen_by(
    causal: bool,
    window: int | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    at_q: Tensor | None,
    at_k: Tensor | None,
    prefix: Tensor | None,
) -> Callable[..., Any] | None:
    """Return a function of (sample, head, query, key) that tells if the query sees the key; None if all see all. The
    rule is the one of `visible`."""
    ranged = causal or window is not None
    if not ranged and segment_q is None:
        return None
    q_at, k_at, of_q, of_k, free = (_rows(x) for x in (at_q, at_k, segment_q, segment_k, prefix))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        found = None
        if ranged:
            behind = (i if q_at is None else _one(q_at, b, i)) - (j if k_at is None else _one(k_at, b, j))
            if window is None:
                found = behind >= 0
            elif causal:
                found = (behind >= 0) & (behind < window)
            else:
                found = (behind < window) & (behind > -window)
            found = found if free is None else found | (_one(free, b, j) != 0)
        if of_q is not None and of_k is not None:
            same = _one(of_q, b, i) == _one(of_k, b, j)
            found = same if found is None else found & same
        assert found is not None
        return found

    return seen


def score_of(
    softcap: float | None, slopes_H: Tensor | None, at_q: Tensor | None, at_k: Tensor | None
) -> Callable[..., Any] | None:
    """Return a function of (scaled score, sample, head, query, key) that applies the soft-cap and then ALiBi; None if
    there is neither."""
    if softcap is None and slopes_H is None:
        return None
    q_at, k_at = _rows(at_q), _rows(at_k)

    def scored(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes_H is not None:
            behind = (i if q_at is None else _one(q_at, b, i)) - (j if k_at is None else _one(k_at, b, j))
            score = score - slopes_H[h] * behind.abs()
        return score

    return scored


def _rows(x: Tensor | None) -> Tensor | None:
    """Return x (S,) if all samples have the same, else (B, S): of two sizes that broadcast, neither is indexed."""
    return x.flatten() if x is not None and x.ndim == 2 and x.shape[0] == 1 else x


def _one(x: Tensor, b: Tensor, i: Tensor) -> Tensor:
    return x[i] if x.ndim == 1 else x[b, i]


def _slopes(slopes: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(slopes, dtype=torch.float32, device=device)


# ---- the blocks


def block_mask(
    s: int,
    t: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    segment_q: Tensor | None,
    segment_k: Tensor | None,
    at_q: Tensor | None,
    at_k: Tensor | None,
    prefix: Tensor | None,
) -> Blocks:
    """Return the tensors of the block mask, from the arguments of `visible`. Every tensor has M N elements or fewer for
    each sample."""
    some = every = torch.ones(1, -(-s // BLOCK), -(-t // BLOCK), dtype=torch.bool, device=device)
    if causal or window is not None:
        low_q, high_q = _ends(torch.arange(s, device=device) if at_q is None else at_q)
        low_k, high_k = _ends(torch.arange(t, device=device) if at_k is None else at_k)
        # The nearest and the farthest of the differences between the position of a query and that of a key.
        near, far = low_q[:, :, None] - high_k[:, None, :], high_q[:, :, None] - low_k[:, None, :]
        if window is None:
            some, every = far >= 0, near >= 0
        else:
            least = 0 if causal else 1 - window
            some, every = (far >= least) & (near < window), (near >= least) & (far < window)
        if prefix is not None:
            all_free, one_free = _ends((prefix != 0).int())
            some, every = some | (one_free[:, None, :] != 0), every | (all_free[:, None, :] != 0)
    if segment_q is not None and segment_k is not None:
        (low_q, high_q), (low_k, high_k) = _ends(segment_q), _ends(segment_k)
        meet = (low_q[:, :, None] <= high_k[:, None, :]) & (low_k[:, None, :] <= high_q[:, :, None])
        single = (low_q == high_q)[:, :, None] & (low_k == high_k)[:, None, :]
        some, every = some & meet, every & meet & single
    # A last block that is not full has queries or keys that do not exist: the kernel must ask for each pair.
    if s % BLOCK:
        every = every & (torch.arange(every.shape[1], device=device) < s // BLOCK)[:, None]
    if t % BLOCK:
        every = every & (torch.arange(every.shape[2], device=device) < t // BLOCK)
    part, whole = (some & ~every)[:, None], every[:, None]
    part, whole = torch.broadcast_tensors(part, whole)
    return (*_listed(part), *_listed(whole), *_listed(part.mT), *_listed(whole.mT))


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of every block of x (S,) or (B, S), each (1 or B, blocks)."""
    x = x[None] if x.ndim == 1 else x
    if lack := -x.shape[1] % BLOCK:
        x = torch.cat([x, x[:, -1:].expand(-1, lack)], dim=1)
    x = x.unflatten(1, (-1, BLOCK))
    return x.amin(-1), x.amax(-1)


def _listed(there: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number (.., M) of True in each row of `there` (.., M, N), and their indices first (.., M, N)."""
    order = torch.sort(there.to(torch.int8), dim=-1, descending=True, stable=True).indices
    return there.sum(-1, dtype=torch.int32), order.int()


# ---- the kernel


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Any] | None,
    blocks: BlockMask | None,
    scale: float,
    *,
    lse: bool,
) -> tuple[Tensor, Any]:
    """Return the result (B, H, S, D) and, if `lse`, the log of the sum of exponentials of the scores (B, H, S)."""
    grouped = q.shape[1] != k.shape[1]
    aux = AuxRequest(lse=True) if lse else None
    if q.device.type == "cpu":
        return _operator(q, k, v, score, blocks, scale, lse=lse)
    if torch.compiler.is_compiling():
        return _both(flex_attention(q, k, v, score, blocks, scale, grouped, return_aux=aux))
    if isinstance(q, FakeTensor):
        return _operator(q, k, v, score, blocks, scale, lse=lse)
    # Under a mode that watches operations, such as selective checkpointing, torch would not compile the kernel and
    # would compute all scores. So the mode does not see the kernel: its values are recomputed, never kept.
    seen = is_in_torch_dispatch_mode(include_infra_modes=False)
    hidden: AbstractContextManager[Any] = _disable_current_modes() if seen else nullcontext()
    with hidden:
        return _both(_compiled()(q, k, v, score, blocks, scale, grouped, return_aux=aux))


def _both(found: Any) -> tuple[Tensor, Any]:
    return (found[0], found[1].lse) if isinstance(found, tuple) else (found, None)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Return the compiled kernel. If torch cannot compile it, it raises: `flex_attention` as it is would compute all
    scores."""
    return torch.compile(flex_attention, fullgraph=True)


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Callable[..., Any] | None,
    blocks: BlockMask | None,
    scale: float,
    *,
    lse: bool,
) -> tuple[Tensor, Any]:
    """Call FlexAttention's operator as it is. A trace without contents sees the tensors of the kernel. With contents
    this is torch's own reference for the kernel, which computes all scores: for tests of the functions above."""
    options: Any = module._apply_kernel_options(q, k, v, False, None, None)
    blocks = module._create_empty_block_mask(q, k) if blocks is None else blocks
    score = module._identity if score is None else score
    if not torch.compiler.is_compiling():
        score = _unpacked(score)
    out, lse_in_bits, _ = operator(q, k, v, score, blocks.as_tuple(), scale, options)
    return out, lse_in_bits * math.log(2) if lse else None


def _unpacked(score: Callable[..., Any]) -> Callable[..., Any]:
    """Return `score`, of which no tensor goes through hooks for saved tensors: the operator derives it while those of
    activation checkpointing are set, which would take its tensors for those of the model."""

    def scored(*args: Any) -> Any:
        before = torch._C._autograd._saved_tensors_hooks_set_tracing(True)
        try:
            return score(*args)
        finally:
            torch._C._autograd._saved_tensors_hooks_set_tracing(before)

    return scored
