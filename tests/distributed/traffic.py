"""What goes between processes: every collective of a call, with the bytes that a process puts in and gets out."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """While entered, `found[kind]` collects the largest of input and output bytes of every collective of that kind."""

    KINDS = (
        "all_gather",
        "allgather",
        "reduce_scatter",
        "all_reduce",
        "allreduce",
        "all_to_all",
        "broadcast",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # comes again, with local tensors
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = next((k for k in self.KINDS if k in func._schema.name), None)
            if name is not None:
                held = (
                    [t for t in tree_leaves(x) if isinstance(t, torch.Tensor)]
                    for x in (args[:1], args[1:2], out)
                )
                name = name.replace("allg", "all_g").replace("allr", "all_r")
                self.found[name].append(max(sum(t.nbytes for t in tensors) for tensors in held))
        return out
