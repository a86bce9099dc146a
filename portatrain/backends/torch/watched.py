"""Record the operations of a step in torch (`backends/watched`): eagerly, with the gradient of every tensor kept."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from portatrain.backends.torch.accumulation import summed
from portatrain.backends.torch.losses import chunk_loss, token_losses
from portatrain.backends.torch.ops import run_block
from portatrain.backends.watched import Call, Watched, put_together, taken_apart, watching
from portatrain.model import remat
from portatrain.model.across_samples import Across


class Watches:
    """The method `watch` of a backend on one device."""

    def watch(self: Any, state: Any, batch: Mapping[str, np.ndarray], *, step: int) -> list[Watched] | None:
        """Return what each microbatch of `batch` computes, (accumulation, microbatch) arrays; the state stays. None if
        the model compares samples of several microbatches."""
        n = next(iter(batch.values())).shape[0]
        found = []
        for i in range(n):
            kept: list[tuple[Call, list[Any], list[Any]]] = []
            self._begun(state)
            with _eager(self, kept):
                across = Across(microbatches=n, index=i)
                loss, ops = self._forward(state, self._put({k: v[i] for k, v in batch.items()}), step, True, across)
                if across.wanted:
                    return None
                objective = summed(loss, ops.auxes)
                grads = self._ended(state, objective)
            for call, args, results in kept:
                call.arg_grads, call.result_grads = ([self._grad(t) for t in given] for given in (args, results))
            found.append(
                Watched(
                    calls=[call for call, *_ in kept],
                    loss=float(self._seen(objective)),
                    weight=float(self._seen(loss.weight_B).sum()),
                    grads=grads,
                )
            )
        return found

    def _seen(self, t: Tensor) -> np.ndarray:
        return host(t)

    def _grad(self, t: Tensor) -> np.ndarray | None:
        """Return the gradient of a tensor, zeros if none arrived; None for a constant."""
        return self._seen_gradient(t) if t.requires_grad else None

    def _seen_gradient(self, t: Tensor) -> np.ndarray:
        return np.zeros(tuple(t.shape), np.float32) if t.grad is None else host(t.grad)

    def _begun(self: Any, state: Any) -> None:
        state.optimizer.zero_grad(set_to_none=True)

    def _ended(self: Any, state: Any, objective: Tensor) -> dict[str, np.ndarray]:
        """Run the backward pass; return the gradients of the parameters, whole, and leave none behind."""
        objective.backward()
        grads = {name: np.zeros(self.definition.params[name].shape, np.float32) for name in self.program.trainable}
        for p in state.pieces:
            if p.role == "params" and p.tensor.grad is not None:
                grads[p.name][p.index] = host(p.tensor.grad)
        state.optimizer.zero_grad(set_to_none=True)
        return grads


@contextmanager
def _eager(backend: Any, kept: list[tuple[Call, list[Any], list[Any]]]) -> Iterator[None]:
    """Let the backend run blocks as they are written, with operations that note their calls in `kept`."""
    before = {name: vars(backend).get(name) for name in ("ops", "remat", "_runners")}
    plain = backend.ops
    base: Any = plain.func if isinstance(plain, functools.partial) else plain
    made = watching(base, _is_tensor, lambda *a: _noted(backend, kept, *a), _layer)
    backend.ops = functools.partial(made, **plain.keywords) if isinstance(plain, functools.partial) else made
    backend.remat = remat.parse("none")
    backend._runners = {"run_block": run_block, "run_again": run_block, "losses": (token_losses, chunk_loss)}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                vars(backend).pop(name, None)
            else:
                setattr(backend, name, value)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _layer(ops: Any) -> int | None:
    return int(ops.layer) if ops.across is None else None


def _noted(backend: Any, kept: list[Any], ops: Any, run: Any, call: Call, arrays: list[Tensor]) -> Any:
    given = [_own(t) for t in arrays]
    results: list[Tensor] = []
    result = run(given)
    template = taken_apart(result, _is_tensor, results)
    call.args, call.results = [backend._seen(t) for t in arrays], [backend._seen(t) for t in results]
    # A result that is an argument itself gets a name of its own: gradients are of this call alone.
    own = [r.view_as(r) if r.requires_grad and any(r is g for g in given) else r for r in results]
    for t in (*given, *own):
        if t.requires_grad:
            t.retain_grad()
    kept.append((call, given, own))
    return put_together(template, own)


def _own(t: Tensor) -> Tensor:
    """Return a view of `t`, so that the gradient of this use is one of its own; of a parameter, one that counts as a
    parameter."""
    if not t.requires_grad:
        return t
    view: Any = t.view_as(t)
    view._is_param = isinstance(t, torch.nn.Parameter)
    return view


def host(t: Tensor) -> np.ndarray:
    """Return a copy of a tensor in NumPy; of one in bfloat16, in float32."""
    t = t.detach()
    # A copy first: FSDP2 frees the memory of parameters, and cannot once NumPy has a view of it.
    return (t.float() if t.dtype == torch.bfloat16 else t.clone()).cpu().numpy()
