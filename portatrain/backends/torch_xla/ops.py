"""Implement `Ops` on torch-xla. Tensors are global: under SPMD a sharding is an annotation, never a change of shape.

The torch backend has all other operations. Contractions stay einsums, because XLA can shard their axes; for a matmul
over flattened axes it would gather the shards first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch_xla.core.xla_model as xla_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from portatrain.backends.torch.ops import DTYPES, TorchOps
from portatrain.backends.torch_xla.attention import attention
from portatrain.backends.torch_xla.devices import Devices, on_cpu
from portatrain.backends.torch_xla.losses import Cut, cross_entropy
from portatrain.model.lora import adapts
from portatrain.model.ops import Loss
from portatrain.model.scaled import scores


class _SummedInTwoSteps(torch.autograd.Function):
    """Broadcast p to (*lead, *p.shape), where lead is (B, 1, ...). Its gradient is summed within samples first, then
    over samples: XLA on a CPU adds rows one after another, and would merge the two sums without a barrier."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, lead: tuple[int, ...]) -> Tensor:
        ctx.lead = len(lead)
        return p.expand(*lead, *p.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return barrier(g)[0].sum(tuple(range(ctx.lead))), None


class _Shifts(TorchFunctionMode):
    """Make `x >> n` of integers a shift: torch-xla 2.9 divides, which rounds negative numbers in the other
    direction."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__rshift__:
            return torch.bitwise_right_shift(args[0], torch.full_like(args[0], args[1]))
        return func(*args, **(kwargs or {}))


def barrier(*tensors: Tensor) -> list[Tensor]:
    """Return the same values, behind a barrier across which XLA moves and merges nothing."""
    copies = [t.detach().clone() for t in tensors]
    xla_model.optimization_barrier_(copies)
    return copies


@dataclasses.dataclass
class XlaOps(TorchOps):
    """See `portatrain.model.ops.Ops`. devices: None if values have no sharding."""

    devices: Devices | None = None

    # ---- parameters and contractions

    @adapts
    def einsum(self, spec: str, *operands: Tensor, dtype: str | None = None) -> Tensor:
        if dtype == "exact":
            return torch.einsum(spec, *(self.weight(x).float() for x in operands))
        xs = [x.to(self.static.compute) for x in operands]
        if dtype is not None:
            xs = [x.to(DTYPES[dtype]) for x in xs]  # the products stay exact, the sum is kept unrounded
        return torch.einsum(spec, *xs)

    def bias(self, x: Tensor, p: Tensor) -> Tensor:
        return (x.float() + self._features(p, x)).to(x.dtype)

    # ---- normalisation, attention

    def rms_norm(self, x: Tensor, scale: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
        x32 = x.float()
        y = x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)
        return (y if scale is None else y * self._features(scale, y)).to(x.dtype)

    def layer_norm(
        self, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
    ) -> Tensor:
        x32 = x.float()
        centred = x32 - x32.mean(-1, keepdim=True)
        y = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
        if scale is not None:
            y = y * self._features(scale, y)
        if bias is not None:
            y = y + self._features(bias, y)
        return y.to(x.dtype)

    def _features(self, p: Tensor, like: Tensor) -> Tensor:
        """Return a parameter in float32, in a shape that broadcasts over `like`, (B, ..., *p.shape)."""
        p = self.weight(p).float()
        between = like.ndim - p.ndim - 1
        if between < 1 or not on_cpu():
            return p
        return _SummedInTwoSteps.apply(p, (like.shape[0], *(1,) * between))

    def attention(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, **options: Any) -> Tensor:
        if (sinks := options.get("sinks")) is not None:
            options["sinks"] = self.weight(sinks)
        return self.name(
            attention(q_BSHD, k_BTKD, v_BTKD, site=self.static.site, kept=self._kept, **options), "attention"
        )

    # ---- elementwise and shape

    def dropout(self, x: Tensor, rate: float, *, site: int) -> Tensor:
        with _Shifts():
            return super().dropout(x, rate, site=site)

    def noise(self, *shape: int, site: int, kind: str = "normal", draw: int = 0) -> Tensor:
        with _Shifts():
            return super().noise(*shape, site=site, kind=kind, draw=draw)

    def write(self, cache_BT: Tensor, value: Tensor, at: Tensor) -> Tensor:
        """Choose between cache and value at every position; an update at a computed index would be a scatter."""
        t, n = cache_BT.shape[1], value.shape[1]
        behind = torch.arange(t, dtype=torch.int32, device=value.device) - at  # index into value, if it is in range
        inside = ((behind >= 0) & (behind < n)).reshape(1, t, *(1,) * (value.ndim - 2))
        there = value.to(cache_BT.dtype).index_select(1, behind.clamp(0, n - 1))
        return torch.where(inside, there, cache_BT)

    # ---- losses

    @scores
    def cross_entropy(
        self,
        x: Tensor,
        table_VE: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> Loss:
        self._note(table_VE, targets)
        total, loss_B, weight_B = cross_entropy(
            x, self.weight(table_VE), targets, mask, z_loss=z_loss, softcap=softcap, cut=self._cut(table_VE)
        )
        return Loss(total, weight_B, loss_B)

    def _cut(self, table_VE: Tensor) -> Cut:
        """Return how the tokens of a loss and its table are sharded over the devices."""
        layout, devices = self.static.layout, self.devices
        if layout is None or devices is None:
            return Cut()
        batch, seq, vocab = (layout.spec((axis,))[0] for axis in ("batch", "seq", "vocab"))
        if table_VE.shape[0] % layout.mesh.over(vocab):
            vocab = ()
        return Cut(
            layout.mesh.over(batch),
            layout.mesh.over(seq),
            lambda t: devices.constrained(t, (vocab, ())),
            lambda t: devices.constrained(t, (batch, seq, vocab, ())),
        )

    # ---- structure

    def shard(self, x: Tensor, *axes: str | None) -> Tensor:
        if self.static.layout is None:
            return x
        spec = self.static.layout.spec(axes, what=f"ops.shard of shape {tuple(x.shape)}")
        return x if self.devices is None else self.devices.constrained(x, spec)

    def sum(self, x: Tensor, axes: Sequence[str | None], *, over: Sequence[str]) -> Tensor:
        dims = [i for i, a in enumerate(axes) if a in over]
        return x.float().sum(dims) if dims else x.float()
