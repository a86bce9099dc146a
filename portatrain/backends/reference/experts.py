"""Mixtures of experts in NumPy float64; `portatrain.model.ops_experts` documents the operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from portatrain.errors import UserError
from portatrain.model.lora import Factored, factored, not_adapted
from portatrain.model.ops_checks import check_quiet, recorded
from portatrain.model.ops_experts import check_body, check_experts, check_grouped, outside

Array = np.ndarray


class ReferenceExperts:
    """A mixin below `ReferenceOps`."""

    _expert_N: Array | None = None
    """In the body of `experts`: the expert of each row."""

    def experts(
        self, body: Callable[..., Any], x_BSE: Array, experts_BSC: Array, weights_BSC: Array, *params: Array
    ) -> Array:
        body, held = factored(body, params)
        n = check_experts(x_BSE, experts_BSC, weights_BSC, [np.shape(p) for p in held])
        if experts_BSC.size and not (experts_BSC.min() >= 0 and experts_BSC.max() < n):
            raise UserError(
                "ops.experts",
                expected=f"experts from 0 to {n - 1}",
                got=f"some from {experts_BSC.min()} to {experts_BSC.max()}",
                do="Choose among as many experts as the params have.",
            )
        if self._expert_N is not None:
            raise UserError(
                "ops.experts", expected="a call outside of a body", got="a call in one", do="Call it alone."
            )
        chosen = experts_BSC.shape[2]
        # A row for each pair, in any order: a body works row by row. Sorted, as backends have them.
        flat_N = experts_BSC.reshape(-1)
        order_N = np.argsort(flat_N, kind="stable")
        self._expert_N, before = flat_N[order_N], recorded(self)
        try:
            rows = x_BSE.reshape(-1, x_BSE.shape[-1])[order_N // chosen]
            found = check_body(body(self, rows, *held), len(rows))
        finally:
            self._expert_N = None
        check_quiet(self, before, "ops.experts")
        out_NF = np.zeros(found.shape)
        out_NF[order_N] = found
        out_BSCF = out_NF.reshape(*experts_BSC.shape, found.shape[1])
        return np.einsum("bscf,bsc->bsf", out_BSCF, weights_BSC)

    def grouped_matmul(self, x_NE: Array, w_XEF: Array) -> Array:
        expert_N = self._expert_N if self._expert_N is not None else outside("ops.grouped_matmul")
        check_grouped("ops.grouped_matmul", x_NE, w_XEF.shape)
        if isinstance(w_XEF, Factored):
            return w_XEF.multiplied(self.grouped_matmul, x_NE)
        out_NF = np.zeros((len(x_NE), w_XEF.shape[2]))
        for i, w_EF in enumerate(w_XEF):
            out_NF[expert_N == i] = x_NE[expert_N == i] @ w_EF
        return out_NF

    def grouped_bias(self, x_NF: Array, p_XF: Array) -> Array:
        expert_N = self._expert_N if self._expert_N is not None else outside("ops.grouped_bias")
        p_XF = not_adapted(p_XF)
        check_grouped("ops.grouped_bias", x_NF, p_XF.shape)
        return x_NF + p_XF[expert_N]
