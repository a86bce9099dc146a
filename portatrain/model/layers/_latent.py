"""Multi-head latent attention. Shape letters: B batch, S seq, E embed, L latent, H heads, D features per head of a
query or key, N of them without positions, R of them rotary, V features per head of a value."""

from __future__ import annotations

from typing import Any

from portatrain.errors import UserError
from portatrain.model.layers._norm import RMSNorm
from portatrain.model.module import Module, Param
from portatrain.model.ops import Array, Ops


class LatentAttention(Module):
    """Causal attention with keys and values that are made from one small latent per token (DeepSeek-AI 2024,
    arXiv:2405.04434, section 2.1, "MLA").

    A token keeps `kv_rank` + `rope_dim` numbers for all heads. Each head makes its key and value from the latent. The
    rotary part of a key is one vector per token, which all heads share.

    Args:
        embed, heads: sizes of the input, and number of heads.
        nope_dim, rope_dim: features per head of queries and keys without positions, and with rotary positions;
            rope_dim must be even.
        value_dim: features per head of the values.
        kv_rank: size of the latent of keys and values.
        q_rank: size of the latent of queries. None: queries are made from the input.
        window, softcap, scale: as in `Ops.attention`. scale: default (nope_dim + rope_dim)^-0.5.
        norm_eps: the eps of the norms of the two latents.

    Raises:
        UserError: rope_dim is odd.
    """

    def __init__(
        self,
        *,
        embed: int,
        heads: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        kv_rank: int,
        q_rank: int | None = None,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        if rope_dim % 2:
            raise UserError(
                "LatentAttention",
                expected="an even rope_dim",
                got=str(rope_dim),
                do="Use an even number: rotations act on pairs of features.",
            )
        # The latent has one axis name as a result and another as an input: the second is sharded over fsdp, as embed.
        query = {"heads": heads, "head_dim": nope_dim + rope_dim}
        self.wq_down = None if q_rank is None else Param(embed=embed, q_rank=q_rank)
        self.q_norm = None if q_rank is None else RMSNorm(q_rank=q_rank, eps=norm_eps)
        self.wq = Param(embed=embed, **query) if q_rank is None else Param(latent=q_rank, **query)
        self.wkv_down = Param(embed=embed, kv_rank=kv_rank)
        self.kv_norm = RMSNorm(kv_rank=kv_rank, eps=norm_eps)
        self.wk = Param(latent=kv_rank, heads=heads, nope_dim=nope_dim)
        self.wv = Param(latent=kv_rank, heads=heads, value_dim=value_dim)
        self.wk_rope = Param(embed=embed, rope_dim=rope_dim)
        self.wo = Param(heads=heads, value_dim=value_dim, embed=embed, fan_in_axes=2)
        self.heads, self.parts = heads, (nope_dim, rope_dim)
        self.window, self.softcap, self.scale = window, softcap, scale

    def __call__(self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array], segment_ids: Array | None = None) -> Array:
        """Return the attention output, (B, S, E), in the compute dtype, sharded as the residual stream.

        Args:
            x_BSE: (B, S, E).
            rope: the result of `ops.rope_table(positions, rope_dim)`.
            segment_ids: (B, S) integers, as in `Ops.attention`, or None.
        """
        q_BSHD, k_BSHD, v_BSHV = self.qkv(ops, x_BSE, rope)
        out_BSHV = ops.attention(
            q_BSHD, k_BSHD, v_BSHV, window=self.window, segment_ids=segment_ids, softcap=self.softcap, scale=self.scale
        )
        out_BSE = ops.shard(ops.einsum("bshv,hve->bse", out_BSHV, self.wo), "batch", "res_seq", None)
        return ops.name(out_BSE, "projected")

    def qkv(self, ops: Ops, x_BSE: Array, rope: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        """Return queries and keys, (B, S, H, N + R), and values (B, S, H, V); the last R features of queries and keys
        are rotated by `rope`."""
        x_BSE = ops.name(ops.shard(x_BSE, "batch", "seq", None), "normed")
        q_BSHD = self._queries(ops, x_BSE)
        latent_BSL = self.kv_norm(ops, ops.einsum("bse,el->bsl", x_BSE, self.wkv_down))
        k_BSHN = ops.einsum("bsl,lhn->bshn", latent_BSL, self.wk)
        v_BSHV = ops.einsum("bsl,lhv->bshv", latent_BSL, self.wv)
        k_BS1R = ops.rope(ops.einsum("bse,er->bsr", x_BSE, self.wk_rope)[:, :, None, :], rope)
        # Every head has a copy of the one rotary part.
        k_BSHR = ops.where(ops.arange(self.heads)[:, None] >= 0, k_BS1R, 0.0)
        k_BSHR = ops.shard(k_BSHR, "batch", "seq", "heads", None)
        q_BSHN, q_BSHR = ops.split(q_BSHD, self.parts)
        q_BSHD = ops.concat([q_BSHN, ops.rope(q_BSHR, rope)], axis=3)
        k_BSHD = ops.concat([k_BSHN, k_BSHR], axis=3)
        return ops.name(q_BSHD, "qkv"), ops.name(k_BSHD, "qkv"), ops.name(v_BSHV, "qkv")

    def _queries(self, ops: Ops, x_BSE: Array) -> Array:
        """Return the queries before their rotation, (B, S, H, N + R)."""
        if self.wq_down is None or self.q_norm is None:
            return ops.einsum("bse,ehd->bshd", x_BSE, self.wq)
        latent_BSL: Any = self.q_norm(ops, ops.einsum("bse,el->bsl", x_BSE, self.wq_down))
        return ops.einsum("bsl,lhd->bshd", latent_BSL, self.wq)
