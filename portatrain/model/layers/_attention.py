"""Grouped-query attention. Shape letters: B batch, S seq, E embed, H heads, K kv_heads, D head_dim, Dv value_dim."""

from __future__ import annotations

from typing import Any

from portatrain.errors import UserError, choice
from portatrain.model.layers._norm import HeadsRMSNorm, OneRMSNorm, RMSNorm
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Ops


class Attention(Module):
    """Attention with `heads` query heads and `kv_heads` key-value heads (Ainslie et al. 2023).

    Args:
        embed, heads, kv_heads, head_dim: sizes; kv_heads must divide heads, and head_dim must be even.
        causal, window, softcap, scale: as in `Ops.attention`.
        bias: the letters of what has a bias: q queries, k keys, v values, o the output. True is 'qvo' (ViT): without
            rotary positions a bias of keys adds the same number to all scores of a query, and softmax cancels it.
        rotary_dim: the number of features of a head that are rotated, the first ones. None: all.
        qk_norm: norm of queries and keys before the rotation: 'head' or True, RMSNorm of each head (Henry et al. 2020);
            'one', the same times 1 + scale (Gemma 3); 'heads', over the features of all heads together (OLMo 2).
        norm_eps: the eps of these norms.
        sinks: give each head a learned score, 0 at first, that takes part in the softmax as in `Ops.attention`.
        value_head_dim: the size of a value head. None: head_dim.

    For a key-value cache, subclass it and call `qkv`, `ops.write`, `ops.attention` and `project`.

    Raises:
        UserError: kv_heads does not divide heads, or head_dim is odd.
    """

    def __init__(
        self,
        *,
        embed: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        bias: bool | str = False,
        qk_norm: bool | str = False,
        norm_eps: float = 1e-6,
        sinks: bool = False,
        value_head_dim: int | None = None,
        scale: float | None = None,
        rotary_dim: int | None = None,
    ) -> None:
        if heads % kv_heads:
            raise UserError(
                "Attention",
                expected="a number of heads that kv_heads divides",
                got=f"heads={heads}, kv_heads={kv_heads}",
                do="Use kv_heads=heads for multi-head attention, or kv_heads=1 to share one.",
            )
        for name, limit, least in (("window", window, "a window of at least 1"), ("softcap", softcap, "one above 0")):
            if limit is not None and limit <= 0:
                raise UserError("Attention", expected=f"{least}, or None", got=f"{name}={limit}", do="None: no limit.")
        if head_dim % 2:
            raise UserError(
                "Attention",
                expected="an even head_dim",
                got=str(head_dim),
                do="Use an even number: rotations act on pairs of features.",
            )
        self.wq = Param(embed=embed, heads=heads, head_dim=head_dim)
        self.wk = Param(embed=embed, kv_heads=kv_heads, head_dim=head_dim)
        # An axis of its own, so that a model in which the two sizes are one keeps the names of its axes.
        value = {"head_dim": head_dim} if value_head_dim is None else {"value_dim": value_head_dim}
        self.wv = Param(embed=embed, kv_heads=kv_heads, **value)
        self.wo = Param(heads=heads, **value, embed=embed, fan_in_axes=2)
        has = bias if isinstance(bias, str) else "qvo" if bias else ""

        def zeros(letter: str, **axes: int) -> Any:
            return Param(**axes, fan_in_axes=0, init="zeros") if letter in has else None

        self.q_bias = zeros("q", heads=heads, head_dim=head_dim)
        self.k_bias = zeros("k", kv_heads=kv_heads, head_dim=head_dim)
        self.v_bias = zeros("v", kv_heads=kv_heads, **value)
        self.o_bias = zeros("o", embed=embed)
        self.q_norm = _qk_norm(qk_norm, "heads", heads, head_dim, norm_eps)
        self.k_norm = _qk_norm(qk_norm, "kv_heads", kv_heads, head_dim, norm_eps)
        self.sink_bias: Any = Param(heads=heads, fan_in_axes=0, init="zeros") if sinks else None
        self.causal, self.window, self.softcap, self.scale = causal, window, softcap, scale
        self.rotary_dim = rotary_dim

    def __call__(
        self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array] | None = None, segment_ids: Array | None = None
    ) -> Array:
        """Return the attention output, (B, S, E), in the compute dtype.

        Args:
            x_BSE: (B, S, E).
            rope: the result of `ops.rope_table(positions, rotary_dim or head_dim)`, or None for no rotation.
            segment_ids: (B, S) integers, as in `Ops.attention`, or None.
        """
        q_BSHD, k_BSKD, v_BSKD = self.qkv(ops, x_BSE, rope)
        out_BSHD = ops.attention(
            q_BSHD,
            k_BSKD,
            v_BSKD,
            causal=self.causal,
            window=self.window,
            segment_ids=segment_ids,
            softcap=self.softcap,
            sinks=self.sink_bias,
            scale=self.scale,
        )
        return self.project(ops, out_BSHD)

    def qkv(self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        """Return queries (B, S, H, D), keys (B, S, K, D) and values (B, S, K, Dv); queries and keys are rotated by
        `rope`."""
        x_BSE = ops.name(ops.shard(x_BSE, "batch", "seq", None), "normed")
        q_BSHD = ops.einsum("bse,ehd->bshd", x_BSE, self.wq)
        k_BSKD = ops.einsum("bse,ekd->bskd", x_BSE, self.wk)
        v_BSKD = ops.einsum("bse,ekd->bskd", x_BSE, self.wv)
        q_BSHD = q_BSHD if self.q_bias is None else ops.bias(q_BSHD, self.q_bias)
        k_BSKD = k_BSKD if self.k_bias is None else ops.bias(k_BSKD, self.k_bias)
        v_BSKD = v_BSKD if self.v_bias is None else ops.bias(v_BSKD, self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHD, k_BSKD = self.q_norm(ops, q_BSHD), self.k_norm(ops, k_BSKD)
        if rope is not None:
            q_BSHD, k_BSKD = self.rotated(ops, q_BSHD, rope), self.rotated(ops, k_BSKD, rope)
        return ops.name(q_BSHD, "qkv"), ops.name(k_BSKD, "qkv"), ops.name(v_BSKD, "qkv")

    def rotated(self, ops: Ops, x_BSHD: Array, rope: tuple[Array, Array]) -> Array:
        """Return queries or keys with their first `rotary_dim` features rotated."""
        if self.rotary_dim is None:
            return ops.rope(x_BSHD, rope)
        turned, still = x_BSHD[..., : self.rotary_dim], x_BSHD[..., self.rotary_dim :]
        return ops.concat([ops.rope(turned, rope), still], axis=3)

    def project(self, ops: Ops, out_BSHD: Array) -> Array:
        """Project attention outputs (B, S, H, Dv) to (B, S, E), sharded as the residual stream."""
        out_BSE = ops.shard(ops.einsum("bshd,hde->bse", out_BSHD, self.wo), "batch", "res_seq", None)
        return ops.name(out_BSE if self.o_bias is None else ops.bias(out_BSE, self.o_bias), "projected")


def _qk_norm(kind: bool | str, axis: str, heads: int, head_dim: int, eps: float) -> Any:
    if not kind:
        return None
    if kind == "heads":
        return HeadsRMSNorm(**{axis: heads, "head_dim": head_dim}, eps=eps)
    if kind is not True and kind not in ("head", "one"):
        raise choice("Attention, qk_norm", str(kind), ("head", "one", "heads"))
    return (OneRMSNorm if kind == "one" else RMSNorm)(head_dim=head_dim, eps=eps)
