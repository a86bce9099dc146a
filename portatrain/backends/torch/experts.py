"""Mixtures of experts in torch. A process sorts its tokens by expert; over the expert axis `RowOps` exchanges rows.
Legend as in `model/ops_experts.py`; n tokens of this process, Y experts of it, R processes of an exchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from portatrain.backends import choose_kernel, kernels
from portatrain.errors import UserError
from portatrain.model.lora import Factored, factored, not_adapted
from portatrain.model.ops_checks import check_quiet, recorded
from portatrain.model.ops_experts import check_body, check_experts, check_grouped, outside

LOADED: dict[str, Callable[..., Tensor]] = {}
"""Implementations by `Kernel.where`."""

Run = Callable[[Tensor, Tensor], Tensor]
"""A body with its params: (rows (N, E), sizes (X,)) -> (N, F)."""


@dataclasses.dataclass
class Rows:
    """What the operations of a body know: the number of rows of each expert of this process, and the number of rows
    that a kernel is chosen for. On a mesh this is the mean, since the true number changes from step to step."""

    sizes_X: Tensor
    expected: int


class TorchExperts:
    """Implement the operations of `TorchOps` for mixtures of experts, on the rows of one process."""

    static: Any
    rows: Rows | None
    weight: Callable[[Any], Any]

    def experts(self, body: Callable[..., Any], x_BSE: Any, experts_BSC: Any, weights_BSC: Any, *params: Any) -> Any:
        self._not_inside()
        body, params = factored(body, params)
        n = check_experts(x_BSE, experts_BSC, weights_BSC, [tuple(p.shape) for p in params])
        held = [self._expert_param(p) for p in params]
        mine, run = same_number(held), self._body(body, held)
        return self._of_tokens(run, x_BSE.to(self.static.compute), experts_BSC, weights_BSC, n, mine)

    def _not_inside(self) -> None:
        if self.rows is not None:
            raise UserError(
                "ops.experts", expected="a call outside of a body", got="a call in one", do="Call it alone."
            )

    def _expert_param(self, p: Any) -> Any:
        """Return the part of a param for the experts of this process, in the compute dtype."""
        return self.weight(p)

    def _body(self, body: Callable[..., Any], params: Sequence[Any]) -> Callable[..., Any]:
        def run(x_NE: Any, sizes_X: Tensor, expected: int) -> Any:
            inner: Any = self._inside(Rows(sizes_X, expected))
            before = recorded(inner)
            found = check_body(body(inner, x_NE, *params), x_NE.shape[0])
            check_quiet(inner, before, "ops.experts")
            return found

        return run

    def _inside(self, rows: Rows) -> Any:
        return dataclasses.replace(self, rows=rows, auxes={}, tallies={}, across=None)  # type: ignore[type-var]

    def _of_tokens(
        self, run: Callable[..., Any], x_BSE: Tensor, experts_BSC: Tensor, weights_BSC: Tensor, n: int, mine: int
    ) -> Any:
        """`mine`: the number of experts of this process, of n."""
        b, s, chosen = experts_BSC.shape
        flat_N = experts_BSC.reshape(-1)
        order_N, back_N = order_of(flat_N)
        sizes_X = _counts(flat_N[order_N], n)
        rows_NE = _Spread.apply(x_BSE.reshape(b * s, -1), order_N, back_N)
        found_NF = self._on_their_devices(run, rows_NE, sizes_X, mine)
        each = permuted(found_NF, back_N, order_N).reshape(b, s, chosen, -1)
        weights = weights_BSC.float()
        out = each[:, :, 0].float() * weights[:, :, 0, None]
        for c in range(1, chosen):
            out = out + each[:, :, c].float() * weights[:, :, c, None]
        return out.to(found_NF.dtype)

    def _on_their_devices(self, run: Callable[..., Any], rows_NE: Tensor, sizes_X: Tensor, mine: int) -> Tensor:
        return run(rows_NE, sizes_X, rows_NE.shape[0])

    def grouped_matmul(self, x_NE: Any, w_XEF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_matmul")
        check_grouped("ops.grouped_matmul", x_NE, tuple(w_XEF.shape))
        if isinstance(w_XEF, Factored):
            return w_XEF.multiplied(self.grouped_matmul, x_NE)
        compute = self.static.compute
        return self._grouped(x_NE.to(compute), w_XEF.to(compute), rows)

    def _grouped(self, x_NE: Tensor, w_XEF: Tensor, rows: Rows) -> Tensor:
        shape = (rows.expected if x_NE.shape[0] else 0, x_NE.shape[1], w_XEF.shape[2], w_XEF.shape[0])
        site = self.static.site
        compiled = torch.compiler.is_compiling()
        where = _kernel(site.backend, site.device, site.mesh, site.named, x_NE.dtype, shape, compiled)
        return LOADED[where](x_NE, w_XEF, sizes_X=rows.sizes_X)

    def grouped_bias(self, x_NF: Any, p_XF: Any) -> Any:
        rows = self.rows if self.rows is not None else outside("ops.grouped_bias")
        p_XF = not_adapted(p_XF)
        check_grouped("ops.grouped_bias", x_NF, tuple(p_XF.shape))
        return self._biased(x_NF, p_XF, rows)

    def _biased(self, x_NF: Tensor, p_XF: Tensor, rows: Rows) -> Tensor:
        """Add a bias as a matmul with a column of ones, so that its gradient is one too, and not a sum of one row
        after another. Eight columns, of which one is not zero, suit torch's kernel."""
        ones = torch.zeros(x_NF.shape[0], 8, dtype=p_XF.dtype, device=x_NF.device)
        ones[:, 0] = 1.0
        padded = torch.nn.functional.pad(p_XF[:, None], (0, 0, 0, 7))
        return (x_NF.float() + self._grouped(ones, padded, rows).float()).to(x_NF.dtype)


@torch.compiler.assume_constant_result
def _kernel(
    backend: str,
    device: str,
    mesh: str,
    named: kernels.Named,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    compiled: bool,
) -> str:
    """Return the key in `LOADED` of the kernel that runs. Arguments and result are constants only, so torch.compile
    calls this once and does not trace it."""
    site = kernels.Site(backend=backend, device=device, mesh=mesh, named=named)
    traits = frozenset({"compiled"} if compiled else ())
    case = kernels.Case(site=site, dtype=str(dtype).removeprefix("torch."), shape=shape, traits=traits)
    kernel = choose_kernel.choose("grouped_matmul", case).kernel
    LOADED.setdefault(kernel.where, kernel.load())
    return kernel.where


def load_kernels() -> None:
    """Fill `LOADED` with every kernel that may run, because a compiled block cannot import the functions that it
    calls."""
    for kernel in kernels.rows("grouped_matmul", "torch"):
        LOADED.setdefault(kernel.where, kernel.load())


def order_of(keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stable order of keys, and its inverse."""
    order = torch.argsort(keys_N, stable=True)
    at = torch.arange(order.shape[0], device=order.device)
    return order, torch.empty_like(order).scatter_(0, order, at)


def same_number(held: Sequence[Any]) -> int:
    """Return the number of experts of this process, which all params have."""
    counts = {p.shape[0] for p in held}
    if len(counts) != 1:
        raise UserError(
            "ops.experts",
            expected="params that all have their experts over the same mesh axes",
            got=f"{', '.join(map(str, sorted(counts)))} experts on this process",
            do="Give every param the axis experts first.",
        )
    return counts.pop()


def permuted(x_NE: Tensor, order_N: Tensor, back_N: Tensor) -> Tensor:
    """Return x[order]; `back` is the inverse of the order."""
    return _Permuted.apply(x_NE, order_N, back_N)


def _counts(sorted_N: Tensor, n: int) -> Tensor:
    """Return (n,): how often each of the numbers below n occurs in sorted numbers."""
    ends = torch.searchsorted(sorted_N, torch.arange(n, dtype=sorted_N.dtype, device=sorted_N.device), right=True)
    return torch.diff(ends, prepend=ends.new_zeros(1))


class _Permuted(torch.autograd.Function):
    """Return x[order]. The gradient of this gather is a gather by the inverse, `back`."""

    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, order_N: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_N)
        return x_NE[order_N]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return g[ctx.saved_tensors[0]], None, None


class _Spread(torch.autograd.Function):
    """Return (N, E): the row of a token once for each of its experts, in `order`. The gradient of a token is the sum
    over its experts, in their order, in float32."""

    @staticmethod
    def forward(ctx: Any, x_nE: Tensor, order_N: Tensor, back_N: Tensor) -> Tensor:
        ctx.save_for_backward(back_N)
        ctx.tokens = x_nE.shape[0]
        return x_nE[order_N // max(1, order_N.shape[0] // max(1, x_nE.shape[0]))]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        each = g[ctx.saved_tensors[0]].reshape(ctx.tokens, -1, g.shape[1])
        total = each[:, 0].float()
        for c in range(1, each.shape[1]):
            total = total + each[:, c].float()
        return total.to(g.dtype), None, None
