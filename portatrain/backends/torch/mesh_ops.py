"""Implement `Ops` on a mesh with context and tensor axes: activations are DTensors over those axes, with global shapes
except along the batch, whose rows `RowOps` covers.

Arithmetic in the models follows DTensor's own rules. Every operation here takes the local parts, computes as on one
device, and declares the placements of the result. One rule gives the gradients: an operand that is whole while another
one is sharded gets a gradient that is a sum over the shards (Partial).

Documented choices: an embedding's rows and the logits stay sharded over vocab, so no process sees them whole. Those of
attention stand in `mesh_attention.py`. Legend: see `portatrain.model.ops`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from portatrain.backends.torch.mesh import World
from portatrain.backends.torch.mesh_attention import MeshAttention
from portatrain.backends.torch.mesh_experts import MeshExperts
from portatrain.backends.torch.mesh_losses import MeshLosses
from portatrain.backends.torch.mesh_measured import MeshMeasured
from portatrain.backends.torch.mesh_ops_arrays import MeshArrays
from portatrain.backends.torch.mesh_values import Kept, SumRows, Weight, of_all_experts, plain
from portatrain.backends.torch.ops import TorchOps
from portatrain.backends.torch.row_ops import RowOps
from portatrain.model import dropout_hash
from portatrain.model.fp8 import Form, unquantised
from portatrain.model.lora import adapts, not_adapted
from portatrain.model.rope import Scaling
from portatrain.model.scaled import looks_up, unscaled

Placements = Sequence[Placement]


@dataclasses.dataclass
class MeshOps(MeshMeasured, MeshAttention, MeshArrays, MeshLosses, MeshExperts, RowOps):
    """Implement `Ops` on context and tensor axes, see the top of this file."""

    def __post_init__(self) -> None:
        self.parts = TorchOps(
            dataclasses.replace(self.static, ops=None),
            self.step,
            self.seed_2,
            self.sample,
            self.layer,
            losses=self.losses,
            kept=self.kept,
        )
        """The operations of one device, for local parts."""

    # ---- values and local parts

    @staticmethod
    def placed(world: World, x: Tensor) -> Tensor:
        """Put a batch's array on the mesh: (B, S) is sharded over context if S divides; other arrays stay whole."""
        mesh, context = world.values, world.mesh.context
        assert mesh is not None and mesh.mesh_dim_names is not None
        whole: list[Placement] = [Replicate() for _ in mesh.mesh_dim_names]
        if x.ndim != 2 or context == 1 or x.shape[1] % context:
            return DTensor.from_local(x, mesh, whole, run_check=False)
        mine = x.chunk(context, dim=1)[world.at["context"]].contiguous()
        cut = [Shard(1) if n == "context" else Replicate() for n in mesh.mesh_dim_names]
        return DTensor.from_local(mine, mesh, cut, run_check=False)

    @property
    def axes(self) -> tuple[str, ...]:
        """Return the mesh axes of the DTensors."""
        return self.world.values.mesh_dim_names

    def _value(self, x: Any) -> Any:
        """Return x as a DTensor over the mesh's context and tensor axes."""
        x = unquantised(unscaled(x))
        if isinstance(x, nn.Parameter):
            return Weight.apply(of_all_experts(x, self.world), self.world)
        if isinstance(x, DTensor) or not isinstance(x, Tensor):
            return not_adapted(x)
        return self._from(x, [Replicate() for _ in self.axes])

    def _from(self, local: Tensor, placements: Placements) -> Any:
        return DTensor.from_local(local, self.world.values, tuple(placements), run_check=False)

    @staticmethod
    def _local(x: Any, placements: Placements, grads: Placements | None = None) -> Tensor:
        """Return this process's part of x under `placements`. `grads` are the placements of its gradient."""
        if tuple(x.placements) != tuple(placements):
            x = x.redistribute(placements=tuple(placements))
        return x.to_local(grad_placements=None if grads is None else tuple(grads))

    def _keep(self, x: Any, *dims: int) -> list[Placement]:
        """Return x's placements with `dims` made whole and partial sums completed."""
        held = [d % x.ndim for d in dims]
        return [p if isinstance(p, Shard) and p.dim not in held else Replicate() for p in x.placements]

    def _each(self, fn: Callable[[Tensor], Tensor], x: Any, *dims: int) -> Any:
        """Apply fn to the local part of x with `dims` whole; the result has the placements of x."""
        x = self._value(x)
        kept = self._keep(x, *dims)
        return self._from(fn(self._local(x, kept)), kept)

    @staticmethod
    def _beside(x_placements: Placements) -> list[Placement]:
        """Return the placements of a whole operand's gradient, given the placements of the other operand."""
        return [Partial() if isinstance(p, Shard) else Replicate() for p in x_placements]

    def _whole(self, p: Any, beside: Placements) -> Tensor:
        """Return a parameter whole, in the compute dtype, for use with a value that has the placements `beside`."""
        return self._local(self.weight(p), [Replicate() for _ in self.axes], self._beside(beside))

    # ---- parameters and contractions

    def weight(self, p: Any) -> Any:
        p = not_adapted(p)
        value = self._value(p)
        return value.to(self.static.compute) if isinstance(p, nn.Parameter) else value

    @adapts
    def einsum(self, spec: str, *operands: Any, dtype: str | None = None) -> Any:
        """Contract with at most one sharded letter per mesh axis, the parameter's letter if it has one. Operands with
        the letter are sharded along it, others are whole. The result is sharded along it, or Partial if it is
        contracted."""
        parts, result, _ = self._parts_of(spec, operands)
        return self._from(self.parts.einsum(spec, *parts, dtype=dtype), result)

    def einsum_fp8(self, form: Form, x: Any, w: Any, **options: Any) -> Any:
        """Contract as `einsum` does. The largest value of what shares a scale is that of all its shards."""
        (x, w), result, sharded = self._parts_of(form.forward.spec, (x, w))

        def most(largest: Tensor, over: str) -> Tensor:
            axes = [axis for axis, letter in sharded.items() if letter in over]
            return self.world.all_reduce(largest.contiguous(), axes, op=dist.ReduceOp.MAX) if axes else largest

        return self._from(self.parts.einsum_fp8(form, x, w, most=most, **options), result)

    def _parts_of(self, spec: str, operands: Sequence[Any]) -> tuple[list[Tensor], list[Placement], dict[str, str]]:
        """Return (local parts of the operands, placements of the result, the sharded letter by mesh axis)."""
        inputs, _, out = spec.replace(" ", "").partition("->")
        letters = inputs.split(",")
        sharded: dict[str, str] = {}
        xs = [self._value(x) for x in operands]
        first = sorted(range(len(xs)), key=lambda i: not isinstance(operands[i], nn.Parameter))
        placements: list[list[Placement]] = [[] for _ in xs]
        grads: list[list[Placement]] = [[] for _ in xs]
        result: list[Placement] = []
        for m in range(len(self.axes)):
            cut = [letters[i][p.dim] for i in first if isinstance(p := xs[i].placements[m], Shard)]
            letter = cut[0] if cut else None
            if letter is not None:
                sharded[self.axes[m]] = letter
            for i, mine in enumerate(letters):
                here = letter is not None and letter in mine
                placements[i].append(Shard(mine.index(letter)) if letter and here else Replicate())
                grads[i].append(placements[i][m] if here or letter is None else Partial())
            result.append(Replicate() if letter is None else Shard(out.index(letter)) if letter in out else Partial())
        return [self._local(x, p, g) for x, p, g in zip(xs, placements, grads, strict=True)], result, sharded

    @looks_up
    def embed(self, table_VE: Any, ids: Any) -> Any:
        """Look rows up in a table that is sharded over vocab: each process gives its rows, else zeros, as a Partial
        sum."""
        self._note(table_VE, ids)
        table, ids = self.weight(table_VE), self._value(ids)
        whole = self._keep(ids)
        vocab = [isinstance(p, Shard) and p.dim == 0 for p in table.placements]
        at = [
            Replicate() if v else p if isinstance(p, Shard) else Replicate() for v, p in zip(vocab, whole, strict=True)
        ]
        cut: list[Placement] = [Shard(0) if v else Replicate() for v in vocab]
        grads = [Shard(0) if v else b for v, b in zip(vocab, self._beside(at), strict=True)]
        rows, found = self._local(table, cut, grads), self._local(ids, at)
        if not any(vocab):
            return self._from(self.parts.embed(rows, found), at)
        start = rows.shape[0] * self.world.at["tensor"]
        mine = (found >= start) & (found < start + rows.shape[0])
        local = self.parts.embed(rows, torch.where(mine, found - start, 0))
        local = torch.where(mine[..., None], local, 0)
        return self._from(local, [Partial() if v else p for v, p in zip(vocab, at, strict=True)])

    def bias(self, x: Any, p: Any) -> Any:
        return x + self.weight(p)

    # ---- normalisation, position

    def rms_norm(self, x: Any, scale: Any = None, *, eps: float = 1e-6) -> Any:
        x = self._value(x)
        at = self._keep(x, -1)
        scale = None if scale is None else self._whole(scale, at)
        return self._from(self.parts.rms_norm(self._local(x, at), scale, eps=eps), at)

    def layer_norm(self, x: Any, scale: Any = None, bias: Any = None, *, eps: float = 1e-6) -> Any:
        x = self._value(x)
        at = self._keep(x, -1)
        scale, bias = (None if p is None else self._whole(p, at) for p in (scale, bias))
        return self._from(self.parts.layer_norm(self._local(x, at), scale, bias, eps=eps), at)

    def rope_table(
        self, positions: Any, head_dim: int, *, theta: float = 10000.0, scaling: Scaling | None = None
    ) -> Any:
        positions = self._value(positions)
        at = self._keep(positions)
        scaling = None if scaling is None else scaling.at(positions.shape[-1])  # the whole length, not a process's
        cos, sin = self.parts.rope_table(self._local(positions, at), head_dim, theta=theta, scaling=scaling)
        return self._from(cos, at), self._from(sin, at)

    def rope(self, x_BSHD: Any, table: Any) -> Any:
        x = self._value(x_BSHD)
        at = self._keep(x, -1)
        beside = tuple(
            Shard(t) if isinstance(p, Shard) and p.dim == 1 else Replicate() for p in at for t in [table[0].ndim - 2]
        )
        local = self._kept(
            "local-rope", (*table, beside), lambda cos, sin, lie: (self._local(cos, lie), self._local(sin, lie))
        )
        return self._from(self.parts.rope(self._local(x, at), local), at)

    # ---- elementwise and shape

    def dropout(self, x: Any, rate: float, *, site: int) -> Any:
        """Apply dropout by the hash of the global offset in the sample. A Partial sum is dropped part by part."""
        if not self.training or rate == 0:
            return x
        x = self._value(x)
        # The gradient of a part of a Partial sum is the gradient of the sum, whole on every process.
        grads = [Replicate() if isinstance(p, Partial) else p for p in x.placements]
        local = self._local(x, x.placements, grads)
        offsets = self._kept("offsets", (tuple(x.shape[1:]), tuple(x.placements)), self._offsets)
        keys_B = dropout_hash.sample_keys(self.seed_2, self.step, site, self.layer, self.sample)
        bits = dropout_hash.random_bits(keys_B[:, None], offsets[None, :]).reshape(local.shape)
        kept = torch.where(bits >= dropout_hash.threshold(rate), local * (1 / (1 - rate)), 0).to(local.dtype)
        return self._from(kept, x.placements)

    def _offsets(self, shape: tuple[int, ...], placements: Placements) -> Tensor:
        """Return (F,) int32, the flat global offsets of this process's elements in a sample of `shape`."""
        start, size = [0] * len(shape), list(shape)
        for axis, p in zip(self.axes, placements, strict=True):
            if isinstance(p, Shard):
                size[p.dim - 1] //= self.world.mesh.sizes[axis]
                start[p.dim - 1] += self.world.at[axis] * size[p.dim - 1]
        at = torch.zeros((), dtype=torch.int32, device=self.step.device)
        for first, n, whole in zip(start, size, shape, strict=True):
            here = torch.arange(first, first + n, dtype=torch.int32, device=self.step.device)
            at = at[..., None] * whole + here
        return at.flatten()

    def softmax(self, x: Any, *, axis: int = -1) -> Any:
        return self._each(lambda local: self.parts.softmax(local, axis=axis), x, axis)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        return super().where(self._value(condition), self._value(x), self._value(y))

    def concat(self, xs: Sequence[Any], *, axis: int) -> Any:
        return super().concat([self._value(x) for x in xs], axis=axis)

    def cast(self, x: Any, dtype: str) -> Any:
        return super().cast(self._value(x), dtype)

    def arange(self, n: int) -> Any:
        return self._value(self.parts.arange(n))

    def one_hot(self, ids: Any, n: int) -> Any:
        return self._each(lambda local: self.parts.one_hot(local, n), ids)

    def top_k(self, x: Any, k: int) -> tuple[Any, Any]:
        x = self._value(x)
        at = self._keep(x, -1)
        values, indices = self.parts.top_k(self._local(x, at), k)
        return self._from(values, at), self._from(indices, at)

    def write(self, cache_BT: Any, value: Any, at: Any) -> Any:
        cache, value = self._value(cache_BT), self._value(value)
        lie = [p if isinstance(p, Shard) and p.dim != 1 else Replicate() for p in value.placements]
        return self._from(self.parts.write(self._local(cache, lie), self._local(value, lie), plain(at)), lie)

    def sum(self, x: Any, axes: Sequence[str | None], *, over: Sequence[str]) -> Any:
        x = self._value(x)
        y: Any = self.parts.sum(x, axes, over=over)
        y = y.redistribute(placements=self._keep(y) if y.ndim else [Replicate() for _ in self.axes])
        if not self._crosses(axes, over):
            return y
        return self._from(SumRows.apply(y.to_local(), self.world), y.placements)

    # ---- structure

    def shard(self, x: Any, *axes: str | None) -> Any:
        x = self._value(x)
        layout, sizes = self.world.layout, self.world.mesh.sizes
        what = f"ops.shard of shape {tuple(x.shape)}"
        lie: list[Placement] = [Replicate() for _ in self.axes]
        for dim, over in enumerate(layout.spec(axes, what=what)):
            mine = [a for a in over if a in self.axes]
            shards, n = math.prod(sizes[a] for a in mine), x.shape[dim]
            if n % shards:
                if axes[dim] == "kv_heads" and shards % n == 0:
                    continue  # as the layout does with parameters
                raise layout.uneven(what, axes[dim], n, tuple(mine))
            for a in mine:
                lie[self.axes.index(a)] = Shard(dim)
        return x.redistribute(placements=lie)

    def name(self, x: Any, name: str) -> Any:
        x = self._value(x)
        return Kept.apply(x) if self.keeps(name) else x

    def aux(self, name: str, value_B: Any, *, reduce: str = "mean", loss: float = 0.0) -> None:
        super().aux(name, self._made(self._value(value_B)), reduce=reduce, loss=loss)

    def tally(self, module: Any, **values: Any) -> None:
        super().tally(module, **{k: plain(v) for k, v in values.items()})
