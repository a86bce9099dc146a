"""Apply remat policies in torch: choose operation by operation what a block keeps (selective activation
checkpointing)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from portatrain.errors import UserError
from portatrain.model.remat import Policy

_aten: Any = torch.ops.aten

DOTS = frozenset({_aten.mm.default, _aten.addmm.default})
"""Contractions without a batch dimension; contractions with one are bmm and baddbmm."""

ATTENTION = frozenset(
    [
        torch.ops.higher_order.flex_attention,
        *(
            getattr(_aten, name).default
            for name in (
                "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_flash_attention_for_cpu",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_fused_attention_overrideable",
            )
            if hasattr(_aten, name)
        ),
    ]
)
"""The kernels of `scaled_dot_product_attention`, and FlexAttention. Attention written out consists of matmuls."""


@torch.library.custom_op("portatrain::keep", mutates_args=())
def keep(x: Tensor) -> Tensor:
    """Return a copy of x that a policy by name keeps. Other values are not copied."""
    return x.clone()


@keep.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


keep.register_autograd(lambda ctx, grad: grad)


def check_policy(policy: Policy) -> None:
    """Raise UserError if this backend cannot apply the policy."""
    if policy.offload:
        raise UserError(
            f"remat {policy.name!r} on the torch backend",
            expected="a policy that keeps activations on the device",
            got="one that moves them to the host",
            do=f"Use keep:{'+'.join(sorted(policy.names))}, or --backend jax.",
        )


def rematerialised(policy: Policy, run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with a backward pass that reads what `policy` keeps and recomputes the rest."""
    if policy.keeps_all:
        return run
    options: dict[str, Any] = {}
    if policy.name != "block":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _choice(policy))

    def again(*args: Any) -> Any:
        # Dropout is a hash, not a generator, so there is no random state to keep.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return again


def _choice(policy: Policy) -> Callable[..., CheckpointPolicy]:
    kept = set(DOTS if policy.dots else {torch.ops.portatrain.keep.default})
    if "attention" in policy.names and not policy.dots:
        kept |= ATTENTION

    def choose(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return choose
