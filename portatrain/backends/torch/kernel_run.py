"""Run one kernel outside of a model: its result and its gradients, for the kernel court (`testing/kernels/`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from portatrain.backends.kernels import Kernel

ADDED: Mapping[str, Mapping[str, Any]] = {"attention": {"kept": lambda what, of, make: make(*of)}, "grouped_matmul": {}}
"""The arguments that the backend adds, by operation."""


def devices() -> set[str]:
    """Return the kinds of device at hand, by torch's names."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}


def run(
    kernel: Kernel,
    operands: Mapping[str, np.ndarray],
    indices: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    keywords: tuple[str, ...] = (),
    dtype: str,
    device: str,
) -> tuple[str, list[np.ndarray]]:
    """Return the dtype of the result, and in float32 the result and the gradient of every operand but the last, which
    is the gradient of the result. `keywords`: the operands that the function takes by keyword."""

    def integers(given: Any) -> Any:
        if isinstance(given, tuple):
            return tuple(map(integers, given))
        return torch.tensor(given, device=device)

    *given, g = (torch.tensor(x, device=device).to(getattr(torch, dtype)) for x in operands.values())
    given = [x.requires_grad_() for x in given]
    named = dict(zip(operands, given, strict=False))
    by_keyword = {name: named.pop(name) for name in keywords}
    indices = {k: integers(x) for k, x in indices.items()}
    result = kernel.load()(*named.values(), **by_keyword, **indices, **options, **ADDED[kernel.operation])
    back = torch.autograd.grad(result, given, g.to(result.dtype), materialize_grads=True)
    found = [x.detach().to(device="cpu", dtype=torch.float32).numpy() for x in (result, *back)]
    return str(result.dtype).removeprefix("torch."), found
