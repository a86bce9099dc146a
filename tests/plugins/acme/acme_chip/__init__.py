"""What a chip vendor's package looks like: a backend of its own, found by its entry points alone.

`acme` runs on torch with a normalisation of its own. `acme-broken` has an attention that forgets its window.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from portatrain.backends.torch import TorchBackend, TorchOps


@dataclasses.dataclass
class AcmeOps(TorchOps):
    def rms_norm(self, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
        x32 = x.float()
        y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        return (y if scale is None else y * self.weight(scale).float()).to(x.dtype)


class AcmeBackend(TorchBackend):
    name = "acme"
    ops = AcmeOps
    process_per_device = True


@dataclasses.dataclass
class BrokenOps(AcmeOps):
    def attention(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return super().attention(q, k, v, **{**options, "window": None})


class BrokenBackend(AcmeBackend):
    name = "acme-broken"
    ops = BrokenOps


class NoBackend:
    """Has none of the verbs."""

    name = "acme-empty"
