"""Compute the gradients of a first step in float64, by the torch backend on one device, as the reference for two
float32 runs, each of which has rounding errors of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import numpy as np
import torch

from portatrain.backends.program import Program
from portatrain.backends.torch import TorchBackend, one_device

Arrays = dict[str, np.ndarray]
Change = Callable[[str, np.ndarray], np.ndarray]


class Exact(TorchBackend):
    """Run the torch backend with float64 in place of float32."""

    def init_state(self) -> Any:
        state = super().init_state()
        state.module.double()
        return state

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        return {k: v.double() if v.is_floating_point() else v for k, v in super()._put(batch).items()}

    def _grads(self, state: Any) -> list[torch.Tensor]:
        return [p.grad for p in state.optimizer.param_groups[0]["params"] if p.grad is not None]


def exact(program: Program, batch: Arrays, *, change: Change | None = None) -> Arrays:
    """Return gradients of the mean loss of `batch` by name; casts to float32 become casts to float64. `program` is
    fp32. `change` returns the values of a parameter that replace the initial ones, given name and values."""

    def double(x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        return x.double(*args, **options)

    wide = mock.patch.dict(one_device.COMPUTE, {"fp32": torch.float64})
    with mock.patch.object(torch.Tensor, "float", double), wide:
        backend = Exact(dataclasses.replace(program, compile=False))
        state = backend.init_state()
        for p in state.pieces if change else ():
            if p.role == "params":
                p.tensor.data = torch.from_numpy(change(p.name, p.tensor.detach().numpy()))
        backend._accumulate(state, batch, 1)
    found = {n: np.zeros(program.definition.params[n].shape) for n in program.trainable}
    for p in state.pieces:
        if p.role == "params" and p.tensor.grad is not None:
            found[p.name][p.index] = p.tensor.grad.numpy()
    return found
