"""Accumulate the gradients of a step over its microbatches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends.torch.across_samples import joined
from portatrain.model.across_samples import Across
from portatrain.model.ops import Aux, Loss


class Accumulates:
    """The loop over microbatches of `OneDevice`. A mesh changes how a microbatch begins and which sums go over all
    processes."""

    _compares = False
    """True once a model has compared samples of different microbatches."""
    compares_samples = False
    _forward: Callable[..., Any]
    _put: Callable[..., dict[str, Tensor]]
    _grads: Callable[..., list[Tensor]]

    def _accumulate(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> tuple[Any, ...]:
        """Leave the gradients of the mean loss in `.grad`; return (loss, weight, aux sums, tallies)."""
        state.optimizer.zero_grad(set_to_none=True)
        n = next(iter(batch.values())).shape[0]
        held = self._handed_over(state, batch, step) if n > 1 and self._compares else None
        mean: Any = 0.0
        weight: Any = 0.0
        auxes: dict[str, dict[str, Tensor]] = {}
        tallies: dict[str, Tensor] = {}
        for i in range(n):
            self._begin(state, last=i == n - 1)
            across = Across(microbatches=n, index=i, held=held)
            loss, ops = self._forward(state, self._put({k: v[i] for k, v in batch.items()}), step, True, across)
            self.compares_samples = self.compares_samples or across.calls > 0
            if across.wanted:  # known once the model has run; nothing has been added up yet
                self._compares = True
                self._free(state)
                return self._accumulate(state, batch, step)
            objective = summed(loss, ops.auxes)
            mine = loss.weight_B.sum()
            # With one microbatch the weight is known before the backward pass, which then scales for free.
            objective = objective / self._over_rows(mine) if n == 1 else objective
            self._backward(state, objective)
            mean, weight = (objective.detach(), mine) if n == 1 else (mean + objective.detach(), weight + mine)
            with torch.no_grad():
                for key, found in ops.auxes.items():
                    auxes[key] = _join_aux(auxes.get(key), found)
            for key, value in ops.tallies.items():
                tallies[key] = tallies[key] + value if key in tallies else value
        mean, weight, auxes = self._reduced(state, mean, weight, auxes)
        if n > 1:
            self._scale(state, 1.0 / weight)
            mean = mean / weight
        return mean, weight, auxes, tallies

    @torch.no_grad()
    def _handed_over(self, state: Any, batch: Mapping[str, np.ndarray], step: int) -> list[list[Tensor]]:
        """Return, for each call of `ops.across_samples`, its arrays for all samples of the step."""
        n = next(iter(batch.values())).shape[0]
        found = []
        for i in range(n):
            across = Across(microbatches=n, index=i, collecting=True)
            self._forward(state, self._put({k: v[i] for k, v in batch.items()}), step, True, across)
            found.append(across.found)
        self._free(state)
        return joined(found)

    def _free(self, state: Any) -> None:
        """Free what a forward pass keeps for a backward pass, as none follows."""

    def _begin(self, state: Any, *, last: bool) -> None:
        """Prepare a microbatch; `last` says that it is the last one of its step."""

    def _backward(self, state: Any, objective: Tensor) -> None:
        objective.backward()

    def _scale(self, state: Any, factor: Tensor) -> None:
        """Multiply the gradients."""
        torch._foreach_mul_(self._grads(state), factor)

    def _over_rows(self, x: Tensor) -> Tensor:
        """Turn a sum over this process's rows into a sum over the rows of the microbatch."""
        return x

    def _reduced(self, state: Any, loss: Any, weight: Any, auxes: dict[str, dict[str, Tensor]]) -> tuple[Any, ...]:
        """Turn sums over this process's rows into sums over the batch; leave the gradients of its parts in `.grad`."""
        return loss, weight, auxes


def summed(loss: Loss, auxes: Mapping[str, Aux]) -> Tensor:
    """Return the summed loss with the auxiliary losses, whose samples count by their weights."""
    total: Tensor = loss.sum
    for aux in auxes.values():
        if aux.loss:
            total = total + aux.loss * (aux.value_B * loss.weight_B).sum()
    return total


def _join_aux(so_far: dict[str, Tensor] | None, aux: Aux) -> dict[str, Tensor]:
    """Accumulate an aux over samples and microbatches: a sum, or the maximum."""
    if aux.reduce == "max":
        high = aux.value_B.max()
        return {"max": high if so_far is None else torch.maximum(so_far["max"], high)}
    if aux.reduce == "peaks":
        peaks = aux.value_B.amax(0)
        return {"max": peaks if so_far is None else torch.maximum(so_far["max"], peaks)}
    if aux.reduce == "layers":
        count = torch.tensor(float(aux.value_B.shape[0]))
        found = {"layers": aux.value_B.sum(0), "count": count}
        return found if so_far is None else {k: v + so_far[k] for k, v in found.items()}
    found = {"sum": aux.value_B.sum(), "count": torch.tensor(float(aux.count * math.prod(aux.value_B.shape)))}
    if aux.reduce == "sum":
        found.pop("count")
    return found if so_far is None else {k: v + so_far[k] for k, v in found.items()}


def aux_value(part: Mapping[str, Any]) -> Tensor:
    """Return the metric of an accumulated part."""
    if "max" in part:
        value: Tensor = part["max"]
        return value
    value = part["layers" if "layers" in part else "sum"]
    return value / part["count"] if "count" in part else value
