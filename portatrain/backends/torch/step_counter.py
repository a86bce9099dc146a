"""Count one process's step operation by operation: live bytes, FLOPs, bytes of collectives.

It puts no hooks on modules. torch's FlopCounterMode and MemTracker put some on the results of a module, even while the
backward pass recomputes a block, and so keep every block's recomputed values until that pass ends.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

CPU_ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


class Watch(TorchDispatchMode):
    """Count while entered. `peak_bytes`: the largest size, at the end of an operation, of all storages made since;
    storages that FSDP2 empties and refills count with their size at that moment. `flops`: of matrix products and
    attention, with all pairs of positions. `moved`: bytes of the gathered array of every collective (twice for an
    all-reduce), by the size of its group."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes, self.flops = 0, 0.0
        self.moved: dict[int, float] = {}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(func, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                if (key := storage._cdata) not in self._alive:
                    self._alive[key] = weakref.ref(storage)
                    weakref.finalize(storage, self._alive.pop, key, None)
        held = (ref() for ref in list(self._alive.values()))
        self.peak_bytes = max(self.peak_bytes, sum(s.nbytes() for s in held if s is not None))
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = getattr(func, "_overloadpacket", func)
        name = str(packet)
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif name == CPU_ATTENTION:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif name == CPU_ATTENTION + "_backward":
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        elif "c10d" in name and "wait" not in name and "barrier" not in name:
            group = next((size for a in tree_leaves((args, kwargs)) if (size := _group_size(a))), 0)
            self.moved[group] = self.moved.get(group, 0.0) + _moved(name, args, out)


def _group_size(value: Any) -> int:
    """Return the size of a process group, given boxed as an operator's argument or by name; 0 for anything else."""
    import torch.distributed as dist

    if isinstance(value, dist.ProcessGroup):
        return value.size()
    if isinstance(value, str):  # the name of a group, or of a reduction
        named: Any = dist.distributed_c10d._resolve_process_group
        try:
            return named(value).size()
        except (RuntimeError, ValueError, KeyError):
            return 0
    if isinstance(value, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(value).size()
        except (RuntimeError, ValueError, TypeError):
            return 0
    return 0


def _moved(name: str, args: Any, out: Any) -> float:
    def nbytes(tree: Any) -> float:
        return float(sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)))

    if "allreduce" in name or "all_reduce" in name:
        return 2 * nbytes(args[0])
    # Either the result or the operand is the gathered array: the larger of the two.
    second = nbytes(args[1]) if len(args) > 1 else 0.0
    return max(nbytes(args[0]), second, nbytes(out) if "all_gather" in name else 0.0)
