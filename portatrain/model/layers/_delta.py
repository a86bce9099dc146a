"""Gated delta net: a recurrent layer whose state is a matrix for each head.

Shape letters: B batch, S seq, E embed, H value_heads, G key_heads, K key_size, V value_size, N chunks, C positions of a
chunk (I and J: two of them).
"""

from __future__ import annotations

import math
from typing import Any

from portatrain.errors import UserError
from portatrain.model.layers._norm import RMSNorm
from portatrain.model.module import Module, Param, Values
from portatrain.model.ops import Array, Ops

CHUNK = 64
"""Positions of a chunk, as in the kernels of flash-linear-attention and in transformers. The numbers depend on it by
rounding alone."""
L2_EPS = 1e-6
"""Added to the squared length of queries and keys before they are divided by their length."""


class GatedDeltaNet(Module):
    """Gated delta net (Yang, Kautz and Hatamizadeh 2025, arXiv:2412.06464), as OLMo Hybrid has it.

    Each head keeps a matrix (K, V). A token with query q, key k, value v, decay a and writing strength b does

        state = a * state;  state = state + b * k (v - k^T state)^T;  out = q^T state

    (equation 10 there). Queries, keys and values pass a short causal convolution and silu; queries and keys have length
    1. The recurrence runs in chunks of positions (`gated_delta_rule`). A document begins with an empty state, and its
    convolution sees nothing of the document before.

    Args:
        embed, key_heads, value_heads, key_size, value_size: sizes; key_heads must divide value_heads. A key head serves
            value_heads / key_heads value heads in a row.
        taps: positions that the convolution sees, its own included.
        doubled: the writing strength is in (0, 2) rather than (0, 1), so that a state may change its sign along a key
            (Grazzi et al. 2025, arXiv:2411.12537).
        norm_eps: the eps of the norm of the outputs.
        chunk: positions of a chunk.

    Raises:
        UserError: key_heads does not divide value_heads.
    """

    whole_sequence = True
    """The mesh axis context may not split the positions: `Layout.check` refuses it."""

    def __init__(
        self,
        *,
        embed: int,
        key_heads: int,
        value_heads: int,
        key_size: int,
        value_size: int,
        taps: int = 4,
        doubled: bool = False,
        norm_eps: float = 1e-5,
        chunk: int = CHUNK,
    ) -> None:
        if value_heads % key_heads:
            raise UserError(
                "GatedDeltaNet",
                expected="a number of value_heads that key_heads divides",
                got=f"value_heads={value_heads}, key_heads={key_heads}",
                do="Use key_heads=value_heads, or a divisor of it.",
            )
        keys, values = {"key_heads": key_heads, "key_size": key_size}, {"value_heads": value_heads}
        wide = {**values, "value_size": value_size}
        self.wq = Param(embed=embed, **keys)
        self.wk = Param(embed=embed, **keys)
        self.wv = Param(embed=embed, **wide)
        self.q_conv = Param(taps=taps, **keys)
        self.k_conv = Param(taps=taps, **keys)
        self.v_conv = Param(taps=taps, **wide)
        self.decay = Param(embed=embed, **values)
        self.decay_bias = Param(**values, fan_in_axes=0, init=_steps(value_heads))
        self.decay_log = Param(**values, fan_in_axes=0, init=_rates(value_heads))
        self.strength = Param(embed=embed, **values)
        self.gate = Param(embed=embed, **wide)
        self.out_norm = RMSNorm(value_size=value_size, eps=norm_eps)
        self.wo = Param(**wide, embed=embed, fan_in_axes=2)
        self.sizes = {**keys, **wide, "chunk": chunk}
        self.taps, self.chunk = taps, chunk
        self.groups, self.most = value_heads // key_heads, 2.0 if doubled else 1.0

    def __call__(self, ops: Ops, x_BSE: Array, documents_BS: Array | None = None) -> Array:
        """Return the output, (B, S, E), in the compute dtype, sharded as the residual stream.

        Args:
            x_BSE: (B, S, E).
            documents_BS: (B, S) integers that differ between neighbouring documents and do not decrease
                (`documents_of`), or None for one document a row.
        """
        x_BSE = ops.name(ops.shard(x_BSE, "batch", "seq", None), "normed")
        q_BSGK, k_BSGK, v_BSHV = (
            ops.name(ops.einsum(spec, x_BSE, w), "qkv")
            for spec, w in (("bse,egk->bsgk", self.wq), ("bse,egk->bsgk", self.wk), ("bse,ehv->bshv", self.wv))
        )
        earlier = range(1, min(self.taps, x_BSE.shape[1]))
        before = [None if documents_BS is None else same_before(ops, documents_BS, n) for n in earlier]
        q_BSGK, k_BSGK, v_BSHV = (
            ops.silu(causal_taps(ops, x, w, before))
            for x, w in ((q_BSGK, self.q_conv), (k_BSGK, self.k_conv), (v_BSHV, self.v_conv))
        )
        q_BSHK, k_BSHK = (self._for_values(ops, _unit(ops, x)) for x in (q_BSGK, k_BSGK))
        rise_BSH = ops.einsum("bse,eh->bsh", x_BSE, self.decay, dtype="float32")
        rise_BSH = ops.softplus(rise_BSH + ops.cast(ops.weight(self.decay_bias), "float32"))
        log_decay_BSH = -ops.exp(ops.cast(ops.weight(self.decay_log), "float32")) * rise_BSH
        strength_BSH = self.most * ops.sigmoid(ops.einsum("bse,eh->bsh", x_BSE, self.strength, dtype="float32"))
        rule = (q_BSHK, k_BSHK, ops.cast(v_BSHV, "float32"), log_decay_BSH, strength_BSH)
        out_BSHV = gated_delta_rule(ops, *rule, documents_BS, chunk=self.chunk)
        gate_BSHV = ops.einsum("bse,ehv->bshv", x_BSE, self.gate)
        gated_BSHV = self.out_norm(ops, out_BSHV) * ops.silu(ops.cast(gate_BSHV, "float32"))
        out_BSE = ops.einsum("bshv,hve->bse", ops.cast(gated_BSHV, "compute"), self.wo)
        return ops.name(ops.shard(out_BSE, "batch", "res_seq", None), "projected")

    def _for_values(self, ops: Ops, x_BSGK: Array) -> Array:
        """Return queries or keys for every value head, (B, S, H, K)."""
        if self.groups > 1:
            _, s, g, k = x_BSGK.shape
            x_BSGK = ops.concat([x_BSGK[:, :, :, None]] * self.groups, axis=3).reshape(-1, s, g * self.groups, k)
        return ops.shard(x_BSGK, "batch", "seq", "value_heads", None)


def documents_of(ops: Ops, segment_ids_BS: Array | None) -> Array | None:
    """Return the number of the document at each position of its row, (B, S) int32, counted from 0: a new one begins
    where the segment id changes. None for None."""
    if segment_ids_BS is None:
        return None
    begins_BS = segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1]
    counted_BS = ops.cumsum(ops.cast(begins_BS, "float32"), axis=1)  # whole numbers, exact below 2^24
    return ops.cast(ops.pad(counted_BS, axis=1, before=1), "int32")


def same_before(ops: Ops, documents_BS: Array, n: int) -> Array:
    """Return whether the position n before is of the same document, (B, S) bool."""
    return ops.pad(documents_BS[:, :-n], axis=1, before=n, value=-1) == documents_BS


def causal_taps(ops: Ops, x_BSGK: Array, kernel: Array, same: list[Array | None]) -> Array:
    """Return the causal depthwise convolution of x, in its shape and dtype: the sum over n of x[s - n] times
    kernel[taps - 1 - n], computed in float32, over positions of the same document.

    kernel: (taps, G, K). same: for n from 1 to taps - 1, or S - 1 if there are fewer positions, whether the position n
        before is of the same document, (B, S), or None.
    """
    kernel_TGK = ops.cast(ops.weight(kernel), "float32")
    x = ops.cast(x_BSGK, "float32")
    last: int = kernel_TGK.shape[0] - 1
    found = x * kernel_TGK[last]
    for n, same_BS in enumerate(same, start=1):
        moved = ops.pad(x[:, :-n], axis=1, before=n)
        if same_BS is not None:
            moved = ops.where(same_BS[:, :, None, None], moved, 0.0)
        found = found + moved * kernel_TGK[last - n]
    return ops.cast(found, "compute")


def gated_delta_rule(
    ops: Ops,
    q_BSHK: Array,
    k_BSHK: Array,
    v_BSHV: Array,
    log_decay_BSH: Array,
    strength_BSH: Array,
    documents_BS: Array | None = None,
    *,
    chunk: int = CHUNK,
) -> Array:
    """Return the outputs of the recurrence of `GatedDeltaNet`, (B, S, H, V) float32, computed in chunks of positions
    (Yang et al. 2025, section 3.3, after Yang et al. 2024, arXiv:2406.06484).

    With g the sum of the logarithms of decay within a chunk, what a position writes, u, follows from all positions j
    before it in the chunk and from the state S at its begin:

        u_i + sum_j b_i e^(g_i - g_j) (k_i . k_j) u_j = b_i (v_i - e^(g_i) k_i^T S)

    This is a triangular system (`_inverse`) for each chunk; only S goes from chunk to chunk. e^g is never divided by,
    so a strong decay cannot overflow. Masks take the place of a decay to 0 where a document begins.

    Args:
        q_BSHK, k_BSHK, v_BSHV: float32; queries are scaled here by K^-1/2.
        log_decay_BSH: float32, at most 0. strength_BSH: float32.
        documents_BS: as in `GatedDeltaNet`.
        chunk: positions of a chunk. The result depends on it by rounding.

    bf16: the inverse and what is solved with it are computed from float32, other products from bfloat16 operands; sums,
    decays and states are float32.
    """
    length = q_BSHK.shape[1]
    size = min(chunk, length)
    more = -length % size
    n = (length + more) // size

    def cut(x: Array, value: float = 0.0) -> Array:
        """(B, S, ...) to (B, N, C, ...)."""
        padded = ops.pad(x, axis=1, after=more, value=value) if more else x
        return padded.reshape(-1, n, size, *x.shape[2:])

    def by_head(x: Array) -> Array:
        """(B, S, H, ...) to (B, N, H, C, ...)."""
        order = (0, 1, 3, 2, *range(4, x.ndim + 1))
        return ops.transpose(cut(x), order)

    q, k, v = by_head(q_BSHK * q_BSHK.shape[3] ** -0.5), by_head(k_BSHK), by_head(v_BSHV)
    g_BNHC, b_BNHC = ops.cumsum(by_head(log_decay_BSH), axis=3), by_head(strength_BSH)
    seen = _Seen.of(ops, None if documents_BS is None else cut(documents_BS, -1), size)
    # Never above 0 where a pair is seen; elsewhere the exponent is 0, so that no gradient is 0 times infinity.
    gap_BNHIJ = ops.where(seen.pairs, g_BNHC[..., :, None] - g_BNHC[..., None, :], 0.0)
    decay_BNHIJ = ops.where(seen.pairs, ops.exp(gap_BNHIJ), 0.0)
    bk = k * b_BNHC[..., None]
    system_BNHIJ = ops.einsum("bnhik,bnhjk->bnhij", bk, k, dtype="exact") * decay_BNHIJ
    inverse_BNHIJ = _inverse(ops, ops.where(seen.earlier, system_BNHIJ, 0.0))
    scores_BNHIJ = ops.einsum("bnhik,bnhjk->bnhij", q, k, dtype="float32") * decay_BNHIJ
    from_start = ops.exp(g_BNHC) if seen.start is None else ops.where(seen.start, ops.exp(g_BNHC), 0.0)
    to_end = ops.exp(g_BNHC[..., -1:] - g_BNHC)
    to_end = to_end if seen.end is None else ops.where(seen.end, to_end, 0.0)
    xs = {
        "new": ops.einsum("bnhij,bnhjv->bnhiv", inverse_BNHIJ, v * b_BNHC[..., None], dtype="exact"),
        "read": ops.einsum("bnhij,bnhjk->bnhik", inverse_BNHIJ, bk * from_start[..., None], dtype="exact"),
        "q": q * from_start[..., None],
        "k": k * to_end[..., None],
        "scores": scores_BNHIJ,
        "kept": from_start[..., -1],
    }

    def step(state_BHKV: Array, x: dict[str, Array]) -> tuple[Array, Array]:
        u_BHCV = x["new"] - ops.einsum("bhck,bhkv->bhcv", x["read"], state_BHKV, dtype="float32")
        out_BHCV = ops.einsum("bhck,bhkv->bhcv", x["q"], state_BHKV, dtype="float32")
        out_BHCV = out_BHCV + ops.einsum("bhij,bhjv->bhiv", x["scores"], u_BHCV, dtype="float32")
        added_BHKV = ops.einsum("bhck,bhcv->bhkv", x["k"], u_BHCV, dtype="float32")
        return state_BHKV * x["kept"][..., None, None] + added_BHKV, out_BHCV

    start_BHKV = 0.0 * (k[:, 0, :, 0, :, None] * v[:, 0, :, 0, None, :])
    _, out_BNHCV = ops.scan(step, start_BHKV, xs)
    out_BNCHV = ops.transpose(out_BNHCV, (0, 1, 3, 2, 4))
    return out_BNCHV.reshape(-1, n * size, *out_BNCHV.shape[3:])[:, :length]


class _Seen:
    """What positions of a chunk see: `pairs`, those before it in its document and itself; `earlier`, the same without
    itself, both (.., 1, I, J) bool; `start`, the state at the begin of the chunk, and `end`, whether the state at its
    end still holds what a position writes, (B, N, 1, C) bool, or None if all do."""

    def __init__(self, pairs: Array, earlier: Array, start: Array | None, end: Array | None) -> None:
        self.pairs, self.earlier, self.start, self.end = pairs, earlier, start, end

    @classmethod
    def of(cls, ops: Ops, documents_BNC: Array | None, size: int) -> _Seen:
        at = ops.arange(size)
        pairs, earlier = at[:, None] >= at[None], at[:, None] > at[None]
        if documents_BNC is None:
            return cls(pairs, earlier, None, None)
        same_BN1IJ = (documents_BNC[..., :, None] == documents_BNC[..., None, :])[:, :, None]
        last_BN = documents_BNC[:, :, -1]
        # The first chunk has no state before it: any document will do.
        before_BN = ops.concat([documents_BNC[:, :1, 0], last_BN[:, :-1]], axis=1)
        start_BN1C = (documents_BNC == before_BN[..., None])[:, :, None]
        end_BN1C = (documents_BNC == last_BN[..., None])[:, :, None]
        return cls(pairs & same_BN1IJ, earlier & same_BN1IJ, start_BN1C, end_BN1C)


def _inverse(ops: Ops, a_BNHIJ: Array) -> Array:
    """Return the inverse of I + a for a strictly lower triangular a, (B, N, H, I, J) float32.

    Blocks of 1, 2, 4, ... positions are joined: with t the inverse of the blocks on the diagonal and m the part of `a`
    between the two halves of a joined block, t - t m t is the inverse of the joined blocks. This is as stable as
    substitution, and consists of products of matrices. (The product of I + (-a)^(2^n) is one too, but the powers of `a`
    grow beyond what float32 holds before they vanish.)

    The inverse is formed without gradients. A last product, with a - a = 0, has the gradient of an inverse, -t da t.
    """
    size = a_BNHIJ.shape[3]
    at, quiet = ops.arange(size), ops.stop_gradient(a_BNHIJ)
    t = quiet * 0.0 + ops.cast(at[:, None] == at[None], "float32")
    for level in range(math.ceil(math.log2(size)) if size > 1 else 0):
        block = at // 2**level
        joins = (block[:, None] == block[None] + 1) & (block[:, None] % 2 == 1)
        t = t - _product(ops, _product(ops, t, ops.where(joins, quiet, 0.0)), t)
    return t - _product(ops, _product(ops, t, a_BNHIJ - quiet), t)


def _product(ops: Ops, x: Array, y: Array) -> Array:
    return ops.einsum("bnhij,bnhjl->bnhil", x, y, dtype="exact")


def _unit(ops: Ops, x: Array) -> Array:
    """Return x / sqrt(sum(x^2) + eps) over the last axis, float32."""
    size: int = x.shape[-1]
    return ops.rms_norm(ops.cast(x, "float32"), eps=L2_EPS / size) * size**-0.5


def _rates(heads: int) -> Values:
    """Return initial `decay_log` of each head: the logarithms of the quantiles of the uniform distribution from 0 to
    16, from which the published implementation draws them."""
    return Values(values=tuple(_rounded(math.log(16 * (h + 0.5) / heads)) for h in range(heads)))


def _steps(heads: int) -> Values:
    """Return initial `decay_bias` of each head: softplus of them is 0.001 to 0.1, evenly spread by their logarithms, as
    the distribution from which the published implementation draws them; in an order unlike that of `_rates`."""
    golden = (math.sqrt(5) - 1) / 2
    order = sorted(range(heads), key=lambda h: (h + 1) * golden % 1)
    found: list[Any] = [None] * heads
    for place, h in enumerate(order):
        step = 1e-3 * 100 ** ((place + 0.5) / heads)
        found[h] = _rounded(step + math.log(-math.expm1(-step)))
    return Values(values=tuple(found))


def _rounded(x: float) -> float:
    """Return x as a multiple of 2^-12: a logarithm may differ in its last bit from machine to machine."""
    return round(x * 4096) / 4096
