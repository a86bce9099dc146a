"""An attention kernel of one's own for the torch backend: a row of the table, and the function that it names."""

from __future__ import annotations

from typing import Any

from portatrain.backends.kernels import Case, Kernel


def _refuses(case: Case) -> str | None:
    return "a window, segments or positions" if case.traits - {"causal"} else None


ROW = Kernel(
    operation="attention", name="acme-einsum", backends=("torch",), where="acme_lab.kernels:attention", refuses=_refuses
)


def attention(
    q_BSHD: Any, k_BTKD: Any, v_BTKD: Any, *, causal: bool = True, scale: float | None = None, **_: Any
) -> Any:
    """Return (B, S, H, D): softmax(scale * q k^T) v in float32, with an axis for the queries that share a key head."""
    import torch

    (b, s, h, d), k = q_BSHD.shape, k_BTKD.shape[2]
    q_BSKGD = q_BSHD.float().reshape(b, s, k, h // k, d) * (d**-0.5 if scale is None else scale)
    scores = torch.einsum("bskgd,btkd->bkgst", q_BSKGD, k_BTKD.float())
    if causal:
        seen = torch.ones(s, k_BTKD.shape[1], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bkgst,btkd->bskgd", scores.softmax(-1), v_BTKD.float())
    return out.reshape(b, s, h, d).to(q_BSHD.dtype)
