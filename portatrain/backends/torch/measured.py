"""Measure activations in torch (`model/measured.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends import kernels
from portatrain.backends.torch.probe import square
from portatrain.backends.torch.visible import visible
from portatrain.model.measured import Measures


class Measured(Measures):
    """The part of `TorchOps` that measures."""

    static: Any

    @property
    def _measured(self) -> bool:
        return bool(self.static.measures)

    @staticmethod
    def _floats(x: Any) -> bool:
        return isinstance(x, Tensor) and x.is_floating_point()

    def _squares(self, arrays: list[Any]) -> Tensor:
        with torch.no_grad():
            total, count = self._square(arrays[0]), arrays[0].numel()
            for x in arrays[1:]:
                total, count = total + self._square(x), count + x.numel()
            return torch.stack([total, torch.full_like(total, count)])[None, None].float()

    def _square(self, x: Any) -> Tensor:
        """Return () the sum of squares of x, over all processes that hold parts of it."""
        return square(x)

    def _peaks(self, x: Any) -> Tensor:
        with torch.no_grad():
            return x.amax(tuple(range(x.ndim - 1)))[None, None].float()


def largest_logit(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    segment_ids: Any = None,
    positions: Any = None,
    prefix: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return () float32, the largest logit of a query and a key that it sees; -inf if no query sees a key.

    Logits exist for one chunk of queries at a time. Letters: B batch, S queries, T keys, H heads, K kv_heads, G = H/K,
    D head_dim.
    """
    with torch.no_grad():
        b, s, h, d = q_BSHD.shape
        t, kv_heads = k_BTKD.shape[1:3]
        size = s // kernels.chunks(b, h, s, t)
        of_q, of_k = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        line = positions is None and s == t  # so the keys after a causal query's own are not needed
        at_q, at_k = positions or (torch.arange(s, device=q_BSHD.device), torch.arange(t, device=q_BSHD.device))
        q_BSKGD = q_BSHD.reshape(b, s, kv_heads, h // kv_heads, d)
        tops = []
        for start in range(0, s, size):
            end = start + size
            keys = slice(0, end) if line and causal and prefix is None else slice(0, t)
            k = k_BTKD[:, keys]
            mask = visible(
                size,
                k.shape[1],
                k.device,
                causal,
                window,
                None if of_q is None else of_q[:, start:end],
                None if of_k is None else of_k[:, keys],
                at_q[..., start:end],
                at_k[..., keys],
                None if prefix is None else prefix[:, keys],
            )
            logits = torch.einsum("bskgd,btkd->bkgst", q_BSKGD[:, start:end], k)
            if mask is not None:
                logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
            tops.append(logits.amax().float())
        return torch.stack(tops).amax() * (d**-0.5 if scale is None else scale)


def on_host(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return values as NumPy, in one copy from the device."""
    if not values:
        return {}
    sizes = [x.numel() for x in values.values()]
    parts = torch.cat([x.reshape(-1).float() for x in values.values()]).cpu().split(sizes)
    return {k: part.reshape(x.shape).numpy() for (k, x), part in zip(values.items(), parts, strict=True)}
