"""The part of `Ops` for mixtures of experts, and the checks and conventions that backends share.

N rows, one for each pair of a token and one of its experts; X experts; E and F feature sizes; C chosen experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from portatrain.errors import UserError
from portatrain.model.ops_results import Array


class ExpertOps(Protocol):
    """See the top of `portatrain.model.ops`; `Ops` inherits from it."""

    def experts(
        self, body: Callable[..., Array], x_BSE: Array, experts_BSC: Array, weights_BSC: Array, *params: Array
    ) -> Array:
        """Send every token to C of X experts, and return the weighted sum of what they make of it, (B, S, F).

        x_BSE: (B, S, E). experts_BSC: (B, S, C) integers in [0, X), the experts of each token, usually distinct.
        weights_BSC: (B, S, C), the weight of each. params: the parameters of the experts, each (X, ...), with the
        axis `experts` first.
        body: called as body(ops, x_NE, *params), with one row for each pair of a token and an expert, sorted by expert.
        It returns (N, F): row by row, with `ops.grouped_matmul`, `ops.grouped_bias` and elementwise operations of the
        `ops` that it gets. It must not call dropout, aux, tally or noise, since a row knows no sample.
        No token is dropped, however uneven the load. The sum over the C experts is taken in the order of experts_BSC,
        in float32, so the result does not depend on where experts lie. On a mesh with an expert axis rows travel to
        the devices of their experts and back, and parameters stay; features may be split over tensor.
        bf16: rows and results of the body are bfloat16; weights and the sum are float32; the result is bfloat16.
        Raises UserError for other shapes. `layers.Experts` and `layers.Router` use it.
        Example: `y_BSE = ops.experts(self.expert, x_BSE, experts_BSC, weights_BSC, self.gate, self.up, self.down)`
        """
        ...

    def grouped_matmul(self, x_NE: Array, w_XEF: Array) -> Array:
        """Return (N, F): each row times the matrix of its expert. Only in the body of `ops.experts`.

        x_NE: (N, E) rows of the body; w_XEF: one of its params. bf16: as `einsum`.
        Example: `hidden_NM = ops.silu(ops.grouped_matmul(x_NE, gate_XEM)) * ops.grouped_matmul(x_NE, up_XEM)`
        """
        ...

    def grouped_bias(self, x_NF: Array, p_XF: Array) -> Array:
        """Return x + p[expert of the row], (N, F). Only in the body of `ops.experts`.

        x_NF: (N, F) rows of the body; p_XF: one of its params. bf16: as `bias`.
        Example: `up_NM = ops.grouped_bias(ops.grouped_matmul(x_NE, up_XEM), up_bias_XM)`
        """
        ...


def check_experts(x_BSE: Array, experts_BSC: Array, weights_BSC: Array, shapes: list[tuple[int, ...]]) -> int:
    """Return X, the number of experts; raise UserError if the arguments of `ops.experts` do not fit together."""
    tokens = tuple(x_BSE.shape[:2])
    chosen = tuple(experts_BSC.shape)
    fits = x_BSE.ndim == 3 and len(chosen) == 3 and chosen[:2] == tokens and tuple(weights_BSC.shape) == chosen
    if not fits or chosen[2] < 1:
        raise UserError(
            "ops.experts",
            expected="x (B, S, E), and experts and weights (B, S, C) for the same tokens, with C at least 1",
            got=f"x {tuple(x_BSE.shape)}, experts {chosen}, weights {tuple(weights_BSC.shape)}",
            do="Give every token its C experts and their weights.",
        )
    counts = {shape[0] if shape else 0 for shape in shapes}
    if len(counts) != 1 or min(counts) < 1:
        raise UserError(
            "ops.experts",
            expected="one or more params (X, ...), all for the same number X of experts",
            got=", ".join(map(str, shapes)) or "none",
            do="Declare them as Param(experts=X, ...), and hand each of them to ops.experts.",
        )
    return counts.pop()


def check_grouped(what: str, x: Array, shape: tuple[int, ...]) -> None:
    """Raise UserError unless x (N, E) fits params of `shape`: (X, E, F) for a matmul, (X, E) for a bias."""
    ranks = {"ops.grouped_matmul": 3, "ops.grouped_bias": 2}[what]
    if x.ndim != 2 or len(shape) != ranks or x.shape[1] != shape[1]:
        raise UserError(
            f"{what} of rows {tuple(x.shape)}",
            expected="params (X, E, F)" if ranks == 3 else "params (X, E)",
            got=str(shape),
            do="Give it rows (N, E) of the body, and a param with the axis experts first and E second.",
        )


def check_body(found: Any, rows: int) -> Any:
    """Return what a body returned; raise UserError unless it has a row for every row."""
    shape = tuple(getattr(found, "shape", ()))
    if len(shape) != 2 or shape[0] != rows:
        raise UserError(
            "the body of ops.experts",
            expected=f"an array (N, F) with N = {rows}, a row for every row that it got",
            got=f"shape {shape}" if shape else f"a {type(found).__name__}",
            do="Return one array; weigh and add in ops.experts, not in the body.",
        )
    return found


def outside(what: str) -> NoReturn:
    """Refuse an operation that only the body of `ops.experts` has."""
    raise UserError(
        what,
        expected="a call in the body of ops.experts, with the ops that the body gets",
        got="a call outside of it",
        do="Write body(ops, x_NE, *params) and hand it to ops.experts; elsewhere use ops.einsum and ops.bias.",
    )
