"""Implement `Ops` in torch. Arrays are tensors of this process."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from portatrain.backends.kernels import Site
from portatrain.backends.token_ids import TokenIds
from portatrain.backends.torch import fp8
from portatrain.backends.torch.across_samples import AcrossSamples
from portatrain.backends.torch.attention import SITE, attention
from portatrain.backends.torch.experts import Rows, TorchExperts
from portatrain.backends.torch.handed import Handed
from portatrain.backends.torch.losses import chunk_loss, cross_entropy, token_losses
from portatrain.backends.torch.low_precision import low_rows
from portatrain.backends.torch.measured import Measured, largest_logit
from portatrain.backends.torch.ops_arrays import TorchArrays
from portatrain.backends.torch.remat import keep
from portatrain.backends.torch.rms_norm import by_sample, rms_norm
from portatrain.model import dropout_hash
from portatrain.model.across_samples import Across
from portatrain.model.fp8 import Form
from portatrain.model.layout import Layout
from portatrain.model.lora import adapts, not_adapted
from portatrain.model.ops import Aux, Loss, check_aux, check_layer, check_samples
from portatrain.model.remat import POLICIES, Policy, check_used
from portatrain.model.rope import Scaling, rotary
from portatrain.model.scaled import looks_up, scores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int32": torch.int32, "bool": torch.bool}


NAMED = "names of activations"
"""The key in `TorchOps.kept` under which blocks list the names that they gave."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What does not change while a program runs: torch.compile specialises on it."""

    training: bool
    compute: torch.dtype = torch.float32
    remat: Policy = POLICIES["none"]
    layout: Layout | None = None
    ops: Any = None
    """The class of operations, TorchOps unless a mesh needs another one."""
    site: Site = SITE
    """The facts that decide which kernels run."""
    measures: bool = False
    """True if the step records activations (`model/measured.py`)."""
    calls: bool = False
    """True if blocks are run by their own call, with the hooks that other libraries put on it."""


@dataclasses.dataclass
class TorchOps(Measured, AcrossSamples, TorchArrays, TorchExperts):
    """See `portatrain.model.ops.Ops`. `auxes` and `tallies` collect the values that the model records.

    `run_block` runs one layer of a Stack (compiled, if the backend compiles), `run_again` one layer under the remat
    policy, `losses` all logits or one chunk of them. `kept` holds results of one layer that the others need too: masks
    and rotation tables.
    """

    static: Static
    step: Tensor
    seed_2: Tensor
    sample: Tensor
    layer: Tensor
    run_block: Callable[..., Any] | None = None
    run_again: Callable[..., Any] | None = None
    losses: tuple[Callable[..., Any], Callable[..., Any]] = (token_losses, chunk_loss)
    auxes: dict[str, Aux] = dataclasses.field(default_factory=dict)
    tallies: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    kept: dict[Any, Any] | None = None
    handed: Handed | None = None
    """In a compiled block that hands block masks on."""
    hands: bool = False
    """True if `run_block` and `run_again` are `run_block_handing`."""
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The arrays of the batch, for `ids`."""
    ids: TokenIds | None = None
    across: Across | None = dataclasses.field(default_factory=Across)
    """None in the block of a Stack."""
    rows: Rows | None = None
    """In the body of `experts`."""
    path: str = ""
    hushed: bool = False

    @property
    def training(self) -> bool:
        return self.static.training

    # ---- parameters and contractions

    def weight(self, p: Tensor) -> Tensor:
        p = not_adapted(p)
        return p.to(self.static.compute) if isinstance(p, torch.nn.Parameter) else p

    @adapts
    def einsum(self, spec: str, *operands: Tensor, dtype: str | None = None) -> Tensor:
        compute = self.static.compute
        if dtype == "exact":
            xs = [self.weight(x).float() for x in operands]
        else:
            xs = [x.to(compute) for x in operands]
            if dtype is not None and DTYPES[dtype] != compute:
                xs = [x.to(DTYPES[dtype]) for x in xs]  # the products stay exact, the sum is kept unrounded
        plan = _plan(spec) if torch.compiler.is_compiling() else _cached_plan(spec)
        if plan is None:
            return torch.einsum(spec, *xs)
        contracted, transposed = plan
        return _as_matmul(xs[0], xs[1], contracted, transposed)

    def einsum_fp8(self, form: Form, x: Tensor, w: Tensor, **options: Any) -> Tensor:
        """Return the product of precision fp8 (`model/fp8.py`) of an activation and a parameter."""
        compute, site = self.static.compute, self.static.site
        sizes = form.sizes(tuple(x.shape), tuple(w.shape))
        where = fp8.kernel_of(
            site.backend, site.device, site.mesh, site.formats, site.named, compute, sizes, form.scaling
        )
        return fp8.contraction(form, x.to(compute), w.to(compute), where, site.formats, **options)

    def _note(self, table_VE: Tensor, ids: Tensor) -> None:
        if not torch.compiler.is_compiling() and self.ids is not None and isinstance(table_VE, Tensor):
            self.ids.note(self.given, ids, table_VE.shape[0])

    @looks_up
    def embed(self, table_VE: Tensor, ids: Tensor) -> Tensor:
        self._note(table_VE, ids)
        if self.static.compute != torch.float32:
            return low_rows(table_VE, ids, self.static.compute)
        return F.embedding(ids, self.weight(table_VE))

    # ---- normalisation, position, attention

    def bias(self, x: Tensor, p: Tensor) -> Tensor:
        p = self.weight(p)
        return x + (by_sample(p, x) if p.ndim == 1 else p)

    def rms_norm(self, x: Tensor, scale: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
        return rms_norm(x, None if scale is None else self.weight(scale), eps)

    def layer_norm(
        self, x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
    ) -> Tensor:
        scale = None if scale is None else self.weight(scale).float()
        bias = None if bias is None else self.weight(bias).float()
        if x.device.type != "cpu":
            return F.layer_norm(x.float(), x.shape[-1:], scale, bias, eps).to(x.dtype)
        # On a CPU the fused kernel adds the gradients of scale and bias one row after another (2.13: off by 3e-6 of
        # their scale over 1024 rows). Outside of it they are ordinary sums, which torch adds in pairs.
        y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps)
        y = y if scale is None else y * by_sample(scale, y)
        return (y if bias is None else y + by_sample(bias, y)).to(x.dtype)

    def rope_table(
        self, positions: Tensor, head_dim: int, *, theta: float = 10000.0, scaling: Scaling | None = None
    ) -> tuple[Tensor, Tensor]:
        frequencies, factor = rotary(head_dim, theta, scaling, positions.shape[-1])
        angles = positions.float()[..., None] * torch.tensor(frequencies, dtype=torch.float32, device=positions.device)
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if factor == 1 else (factor * cos, factor * sin)

    def rope(self, x_BSHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        x = x_BSHD.float()
        if torch.compiler.is_compiling():  # which fuses it, and turns a roll into slow indexing
            cos, sin = (t[..., None, :] for t in table)  # (S, 1, D/2) or (B, S, 1, D/2): broadcast over heads
            x1, x2 = x.chunk(2, dim=-1)
            y = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
        else:
            cos, sin = self._kept("rope", table, _whole_table)
            y = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
        return y.to(x_BSHD.dtype)

    def attention(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, **options: Any) -> Tensor:
        if (sinks := options.get("sinks")) is not None:
            options["sinks"] = self.weight(sinks)
        if self.measures:
            self._measure("logit", self.path, largest_logit(q_BSHD, k_BTKD, **options)[None, None, None], "peaks")
        out = attention(q_BSHD, k_BTKD, v_BTKD, site=self.static.site, kept=self._kept, **options)
        # The result of a kernel is kept with the tensors of its backward pass; attention written out is kept by name.
        by_hand = options.get("softcap") is not None or options.get("sinks") is not None
        return self.name(out, "attention") if by_hand else out

    def _kept(self, what: str, of: tuple[Any, ...], make: Callable[..., Any]) -> Any:
        """Return make(*of), or the result that an earlier layer got for the same tensors and values."""
        if self.kept is None:
            return make(*of) if self.handed is None else self.handed.keep(what, of, make)
        key = (what, *(id(v) if isinstance(v, Tensor) else v for v in of))
        if key not in self.kept:
            self.kept[key] = (make(*of), of)  # holding the tensors keeps their ids theirs
        return self.kept[key][0]

    # ---- elementwise and shape

    def dropout(self, x: Tensor, rate: float, *, site: int) -> Tensor:
        if not self.training or rate == 0:
            return x
        keys_B = dropout_hash.sample_keys(self.seed_2, self.step, site, self.layer, self.sample)
        offsets = torch.arange(math.prod(x.shape[1:]), dtype=torch.int32, device=x.device)
        bits = dropout_hash.random_bits(keys_B[:, None], offsets[None, :]).reshape(x.shape)
        return torch.where(bits >= dropout_hash.threshold(rate), x * (1 / (1 - rate)), 0).to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        self.units(x)
        return F.silu(x)

    def gelu(self, x: Tensor, *, approximate: bool = False) -> Tensor:
        self.units(x)
        if not approximate and x.device.type == "cpu" and not torch.compiler.is_compiling():
            # The CPU's own kernel gives NaN for infinity, and infinity from 2^127 on.
            return 0.5 * x * torch.special.erfc(x * -(0.5**0.5))
        return F.gelu(x, approximate="tanh" if approximate else "none")

    def relu(self, x: Tensor) -> Tensor:
        self.units(x)
        return F.relu(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def tanh(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def exp(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def log(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def softmax(self, x: Tensor, *, axis: int = -1) -> Tensor:
        return torch.softmax(x, dim=axis, dtype=torch.float32).to(x.dtype)

    def where(self, condition: Tensor, x: Any, y: Any) -> Tensor:
        return torch.where(condition, x, y)

    def concat(self, xs: Sequence[Tensor], *, axis: int) -> Tensor:
        return torch.cat(list(xs), dim=axis)

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(self.static.compute if dtype == "compute" else DTYPES[dtype])

    def arange(self, n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int32, device=self.step.device)

    def one_hot(self, ids: Tensor, n: int) -> Tensor:
        return (ids[..., None] == torch.arange(n, dtype=ids.dtype, device=ids.device)).float()

    def top_k(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        # torch.topk leaves the order of ties open; a stable sort does not.
        values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
        return values[..., :k], indices[..., :k].to(torch.int32)

    def write(self, cache_BT: Tensor, value: Tensor, at: Tensor) -> Tensor:
        index = at.long() + torch.arange(value.shape[1], device=value.device)
        return cache_BT.index_copy(1, index, value.to(cache_BT.dtype))

    def sum(self, x: Tensor, axes: Sequence[str | None], *, over: Sequence[str]) -> Tensor:
        dims = [i for i, a in enumerate(axes) if a in over]
        return x.sum(dims, dtype=torch.float32) if dims else x.float()

    def mean(self, x: Tensor, axes: Sequence[str | None], *, over: Sequence[str]) -> Tensor:
        count = math.prod(
            [n for n, a in zip(x.shape, axes, strict=True) if a in over]
        )  # a list: dynamo has no generators
        return self.sum(x, axes, over=over) / count

    def stop_gradient(self, x: Tensor) -> Tensor:
        return x.detach()

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
        whole, chunk = self.losses
        total, loss_B, weight_B = cross_entropy(
            x, self.weight(table_VE), targets, mask, z_loss=z_loss, softcap=softcap, whole=whole, chunk=chunk
        )
        return Loss(total, weight_B, loss_B)

    def loss(self, loss_B: Tensor, weight_B: Tensor) -> Loss:
        check_samples(loss_B, weight_B)
        loss_B = loss_B.float()
        return Loss(loss_B.sum(), weight_B.float(), loss_B.detach())

    # ---- structure

    def shard(self, x: Tensor, *axes: str | None) -> Tensor:
        if self.static.layout is not None and not torch.compiler.is_compiling():
            self.static.layout.spec(axes, what=f"ops.shard of shape {tuple(x.shape)}")
        return x

    def stack(self, stack: Any, carry: Any, shared: Sequence[Any], per_layer: Any) -> tuple[Any, Any]:
        again = not self.static.remat.keeps_all and self.training and torch.is_grad_enabled()
        run = (self.run_again if again else None) or self.run_block or run_block
        layers = (self.layer * stack.n + torch.arange(stack.n, dtype=torch.int32, device=self.step.device)).unbind()
        # A compiled block cannot keep anything: it makes masks and tables anew and fuses them with their uses. Only
        # block masks, which it cannot fuse, are handed from layer to layer.
        kept = self.kept if self.run_block in (None, run_block) else None
        handed: dict[str, Any] = {}
        outside = set() if kept is None else kept.pop(NAMED, set())
        outs, tallies = [], []
        for index, block in enumerate(stack):
            extra = () if per_layer is None else (tree_map(lambda a, i=index: a[i], per_layer),)
            context = (self.step, self.seed_2, self.sample, layers[index])
            # If FSDP2 holds the block, the call must go through its hooks.
            hooked = getattr(block, "run_layer", None)
            call = functools.partial(run, block) if hooked is None else functools.partial(hooked, run)
            carry, out, auxes, tally, *made = call(
                self.static, context, carry, (*shared, *extra), handed if self.hands else kept
            )
            handed = handed | made[0] if made else handed
            for key, (value_B, count, reduce, loss) in auxes.items():
                self._record(key, Aux(value_B, count, reduce, loss))
            outs.append(out)
            tallies.append(tally)
        if kept is not None:
            named = kept.setdefault(NAMED, set())
            if again:
                check_used(self.static.remat, named)
            named |= outside
        for key in tallies[0]:
            value = torch.stack([t[key] for t in tallies])
            self.tallies[key] = self.tallies[key] + value if key in self.tallies else value
        return carry, _stacked(outs)

    def name(self, x: Tensor, name: str) -> Tensor:
        return keep(x) if self.keeps(name) else x

    def keeps(self, name: str) -> bool:
        """Record that a block gave this name; return whether the remat policy keeps its value."""
        if self.kept is not None:
            self.kept.setdefault(NAMED, set()).add(name)
        policy = self.static.remat
        return self.training and policy.by_name and name in policy.names

    def aux(self, name: str, value_B: Tensor, *, reduce: str = "mean", loss: float = 0.0) -> None:
        check_aux(name, value_B, reduce, loss)
        if reduce == "layers":
            if not self.training:
                return
            value_B = value_B.detach()[:, None]
        self._record(name, Aux(value_B.float(), 1, reduce, loss))

    def _record(self, name: str, aux: Aux) -> None:
        held = self.auxes.get(name)
        self.auxes[name] = aux if held is None else held.join(name, aux, torch.maximum, torch.cat)

    def tally(self, module: Any, **values: Tensor) -> None:
        if not self.training:
            return
        for key, value in values.items():
            full = f"{module.path}/{key}" if module.path else key
            value = value.detach().to(getattr(module, key).dtype)
            self.tallies[full] = self.tallies[full] + value if full in self.tallies else value


def run_block(
    block: Any, static: Static, context: tuple, carry: Any, args: tuple, kept: dict[Any, Any] | None
) -> tuple[Any, Any, dict, dict]:
    """Run one layer; return (carry, out, auxes as plain tuples, tallies). Pure, so it can be compiled and
    recomputed."""
    make: Callable[..., TorchOps] = static.ops or TorchOps
    return _layer(block, make(static, *context, kept=kept, across=None), carry, args)


def run_block_handing(
    block: Any, static: Static, context: tuple, carry: Any, args: tuple, handed: dict[str, Any]
) -> tuple[Any, Any, dict, dict, dict]:
    """Run one layer as `run_block` does, with what earlier layers made; return also what this one made."""
    make: Callable[..., TorchOps] = static.ops or TorchOps
    mine = Handed(handed, tuple(a for a in tree_leaves(args) if isinstance(a, Tensor)))
    return *_layer(block, make(static, *context, handed=mine, across=None), carry, args), mine.made


def _layer(block: Any, ops: TorchOps, carry: Any, args: tuple) -> tuple[Any, Any, dict, dict]:
    # The module's own call is not used: hooks (FSDP2's) are around all of this, not inside the compiled part.
    carry, out = check_layer(block, (block if ops.static.calls else block.forward)(ops, carry, *args))
    return carry, out, {k: (a.value_B, a.count, a.reduce, a.loss) for k, a in ops.auxes.items()}, ops.tallies


def _whole_table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each (..., 1, D), sin with the sign of its half: a rotation is x cos + roll(x, D/2) sin."""
    return torch.cat([cos, cos], dim=-1)[..., None, :], torch.cat([-sin, sin], dim=-1)[..., None, :]


def _stacked(outs: list[Any]) -> Any:
    return None if outs[0] is None else tree_map(lambda *xs: torch.stack(xs), *outs)


def _plan(spec: str) -> tuple[int, bool] | None:
    """Plan a contraction of two operands as one plain matmul. Return (the number of contracted axes, whether the second
    operand has them last); None for any other contraction."""
    inputs, _, out = spec.replace(" ", "").partition("->")
    if inputs.count(",") != 1:
        return None
    x, w = inputs.split(",")
    contracted = [c for c in x if c in w and c not in out]
    n = len(contracted)
    if n == 0 or list(x[-n:]) != contracted or any(c in x for c in out if c in w):
        return None
    if list(w[:n]) == contracted and out == x[:-n] + w[n:]:
        return n, False
    if list(w[-n:]) == contracted and out == x[:-n] + w[:-n]:
        return n, True
    return None


_cached_plan = functools.lru_cache(maxsize=1024)(_plan)


def _as_matmul(x: Tensor, w: Tensor, contracted: int, transposed: bool) -> Tensor:
    if contracted > 1:
        x = x.flatten(-contracted)
    free = w.shape[:-contracted] if transposed else w.shape[contracted:]
    if not free:
        return x @ w.flatten()
    if w.ndim > 2:
        w = w.reshape(-1, x.shape[-1]) if transposed else w.reshape(x.shape[-1], -1)
    y = x @ (w.mT if transposed else w)
    return y.unflatten(-1, free) if len(free) > 1 else y
