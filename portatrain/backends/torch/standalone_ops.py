"""Run operations on their own, without a model, for the contract suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from portatrain.backends.base import Context
from portatrain.backends.state import sample_words
from portatrain.backends.torch.ops import Static, TorchOps
from portatrain.model import dropout_hash

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-state": torch.bfloat16, "fp8": torch.bfloat16}


def words(seed: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the step and the two words of the seed, int32."""
    return (
        torch.tensor(step, dtype=torch.int32, device=device),
        torch.tensor(dropout_hash.words(seed), dtype=torch.int32, device=device),
    )


class StandaloneOps:
    """Implement `evaluate` and `differentiate` of a backend with its class of operations."""

    ops: Any = TorchOps

    @classmethod
    def _standalone(cls, context: Context) -> TorchOps:
        sample = np.zeros(1, np.int64) if context.sample is None else context.sample
        return cls.ops(
            Static(context.training, COMPUTE[context.precision], ops=cls.ops),
            *words(context.seed, context.step, torch.device("cpu")),
            sample=torch.from_numpy(sample_words(sample)),
            layer=torch.zeros((), dtype=torch.int32),
            kept={},
        )

    @classmethod
    def evaluate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> Any:
        args = tree_map(lambda a: torch.from_numpy(np.array(a)), args)
        with torch.no_grad():
            return tree_map(lambda t: t.numpy(), fn(cls._standalone(context), *args))

    @classmethod
    def differentiate(cls, fn: Callable[..., Any], args: tuple[Any, ...], context: Context) -> tuple[Any, tuple]:
        args = tree_map(lambda a: torch.from_numpy(np.array(a)), args)
        floating = [t.requires_grad_() for t in tree_leaves(args) if t.is_floating_point()]
        value = fn(cls._standalone(context), *args)
        grads = torch.autograd.grad(value, floating, allow_unused=True)
        return value.detach().numpy(), tuple(
            np.zeros(t.shape, np.float32) if g is None else g.numpy() for g, t in zip(grads, floating, strict=True)
        )
