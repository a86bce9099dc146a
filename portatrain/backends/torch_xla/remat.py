"""Recompute whole blocks behind a barrier; without it XLA would merge the second forward pass with the first one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from portatrain.backends.torch_xla.ops import barrier
from portatrain.errors import UserError
from portatrain.model.remat import Policy


def check_policy(policy: Policy) -> None:
    """Raise UserError if this backend cannot apply the policy."""
    if not policy.keeps_all and policy.name != "block":
        raise UserError(
            f"remat {policy.name!r} on the torch-xla backend",
            expected="none or block",
            got=repr(policy.name),
            do="Use block, which computes a whole block again, or --backend jax.",
        )


def rematerialised(policy: Policy, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run(block, static, context, carry, args, kept)` with a backward pass that keeps the inputs alone."""
    if policy.keeps_all:
        return run

    def again(block: Any, static: Any, context: Any, carry: Any, args: Any, kept: Any) -> Any:
        leaves, shape = tree_flatten((context, carry, args))
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        found: list[Any] = []  # the structure of the results

        def call(*given: Tensor) -> tuple[Tensor, ...]:
            now = list(leaves)
            for i, tensor in zip(tensors, given, strict=True):
                now[i] = tensor
            context, carry, args = tree_unflatten(now, shape)
            outs, made = tree_flatten(run(block, static, context, carry, args, kept))
            found[:] = [outs, made]
            return tuple(out for out in outs if isinstance(out, Tensor))

        # A block must train even if nothing before it does.
        trains = torch.zeros((), device=leaves[tensors[0]].device, requires_grad=True)
        results = iter(_Again.apply(call, trains, *(leaves[i] for i in tensors)))
        outs, made = found
        return tree_unflatten([next(results) if isinstance(out, Tensor) else out for out in outs], made)

    return again


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], trains: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given)
        with torch.no_grad():
            outs = call(*given)
        return tuple(out.clone() for out in outs)  # one may be an input, which is no result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        given = ctx.saved_tensors
        there = {i: g for i, g in enumerate(grads) if g is not None}
        behind = barrier(*given, *there.values())
        inputs, after = behind[: len(given)], behind[len(given) :]
        for tensor, old in zip(inputs, given, strict=True):
            tensor.requires_grad_(old.requires_grad)
        with torch.enable_grad():
            outs = ctx.call(*inputs)
        pairs = [(outs[i], g) for i, g in zip(there, after, strict=True) if outs[i].requires_grad]
        torch.autograd.backward([out for out, _ in pairs], [g for _, g in pairs])
        return None, None, *(tensor.grad for tensor in inputs)
