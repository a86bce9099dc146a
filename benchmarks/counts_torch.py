"""Count what a torch step executes: operations and matmul FLOPs, by the dispatcher (eager) or profiler (compiled)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of a step. operations: kernels that run, by name. matmul_flops: of plain matmuls. attention_flops: of
    fused attention, both of its matmuls over the whole square, and five matmuls in its backward pass."""

    operations: dict[str, int] = field(default_factory=dict)
    matmul_flops: float = 0.0
    attention_flops: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.operations.values())


# These operations allocate, describe, or call others that are counted, so they run no kernel themselves.
NOT_KERNELS = {
    "to",
    "detach_",
    "zero_",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "alias",
    "result_type",
    "resize_",
    "_reshape_alias",
    "set_",
    "resolve_conj",
    "resolve_neg",
}
VIEWS = {
    "view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "as_strided",
    "split",
    "unbind",
    "chunk",
    "unflatten",
    "view_as",
    "narrow",
    "flatten",
    "reshape",
    "mT",
    "numpy_T",
    "expand_as",
}
MATMULS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


def _matmul_flops(name: str, shapes: list[Any]) -> float:
    """Return 2 m n k of the product of the two matrices among an operation's arguments."""
    a, b = (shapes[i] for i in MATMULS[name])
    return 2.0 * prod(a) * b[-1]


def _attention_flops(q_shape: Any, k_shape: Any, *, backward: bool) -> float:
    """Return the FLOPs for q (B, H, S, D), k (B, K, T, D): 2 matmuls forward; backward the scores again and 4 more."""
    b, h, s, d = q_shape
    return (5 if backward else 2) * 2.0 * b * h * s * k_shape[2] * d


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.matmul_flops = self.attention_flops = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in NOT_KERNELS and func.namespace == "aten":
            self.operations[name] += 1
        if name in MATMULS:
            self.matmul_flops += _matmul_flops(name, [getattr(a, "shape", ()) for a in args])
        elif name.startswith("_scaled_dot_product"):
            backward = "backward" in name
            q, k = args[1:3] if backward else args[:2]
            self.attention_flops += _attention_flops(q.shape, k.shape, backward=backward)
        return func(*args, **(kwargs or {}))


def count_eager(step: Callable[[], object]) -> Counts:
    """Count every operation of one call that runs a kernel, without views and allocations."""
    with _Seen() as seen:
        step()
    return Counts(
        operations=dict(seen.operations), matmul_flops=seen.matmul_flops, attention_flops=seen.attention_flops
    )


def count_compiled(step: Callable[[], object]) -> Counts:
    """Count a step with compiled parts, whose generated kernels count as one operation each ('fused').

    The parts must have been compiled with `profile_kernels` on, and run before.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step()
    operations: Counter[str] = Counter()
    matmul_flops = attention_flops = 0.0
    for event in found.events():
        fused = "cpp_fused" in event.name or "triton_" in event.name
        name = event.name.removeprefix("aten::").removesuffix("_out")
        if fused:
            operations["fused"] += 1
        if not event.name.startswith("aten::") or name in NOT_KERNELS | VIEWS:
            continue
        if name in MATMULS:
            matmul_flops += _matmul_flops(name, event.input_shapes)
        inner = [c for c in event.cpu_children if c.name.startswith("aten::")]
        attention = name.startswith("_scaled_dot_product")
        if attention:
            backward = "backward" in name
            q, k = event.input_shapes[1:3] if backward else event.input_shapes[:2]
            attention_flops += _attention_flops(q, k, backward=backward)
        # An operation that only calls others is not a kernel; one that calls only allocations and views is.
        leaf = all(c.name.removeprefix("aten::") in NOT_KERNELS | VIEWS for c in inner)
        inside = _inside_kernel(event)
        if not inside and (leaf or attention or name in MATMULS or name.startswith("_foreach")):
            operations[name] += 1
    return Counts(operations=dict(operations), matmul_flops=matmul_flops, attention_flops=attention_flops)


def _inside_kernel(event: Any) -> bool:
    """Return whether an operation was called by another one that counts as a whole."""
    above = event.cpu_parent
    while above is not None:
        name = above.name.removeprefix("aten::").removesuffix("_out")
        if above.name.startswith("aten::") and (
            name in MATMULS or name.startswith(("_scaled_dot_product", "_foreach", "_fused"))
        ):
            return True
        above = above.cpu_parent
    return False


def profile_kernels() -> None:
    """Make torch.compile name every kernel that it generates to the profiler. Call it before anything is compiled."""
    import torch._inductor.config as inductor

    inductor.cpp.enable_kernel_profile = True
    torch._dynamo.reset()
