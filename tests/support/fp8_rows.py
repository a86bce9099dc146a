"""Products of precision fp8 on tensor=2, where what shares a scale is in two shards of very different sizes."""

from __future__ import annotations

import numpy as np

from portatrain.model.fp8 import SCALINGS, Form

FORMS = {scaling: Form("be", "em", "bm", "e", scaling) for scaling in SCALINGS}


def arrays(scaling: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x (2, 4), w (4, 4) and the gradient of the result (2, 4). Of every row of x and g, and of w if all of it
    shares a scale, the second half is 2^-16 or 2^-29 of the first one, near the smallest number of the format, and
    alone decides a result."""
    halves = np.array([1.0, 1.0, 1.25 * 2.0**-16, 1.25 * 2.0**-16])
    x = np.stack([halves, 2 * halves])
    w = np.outer([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 2.0])
    if scaling == "tensor":
        w *= 1.25 * 2.0**-16
    w[0, 0], w[1, 1] = 1.0, 1.0
    g = np.array([[1.0, 1.0, 1.25 * 2.0**-31, 1.75 * 2.0**-31]] * 2)
    return x.astype(np.float32), w.astype(np.float32), g.astype(np.float32)


def on_two() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Return the product and the gradient of x on two processes, by what shares a scale and by the axis along which w
    is sharded, the contracted one or the other."""
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor, Shard

    from portatrain.backends.torch import TorchBackend
    from portatrain.backends.torch.mesh_values import plain
    from tests.support.mesh_cases import CASES

    backend = TorchBackend(CASES["lm, fp8"].program("tensor=2"))
    found = {}
    for scaling, form in FORMS.items():
        x, w, g = (torch.from_numpy(a) for a in arrays(scaling))
        for dim, cut in enumerate(("contracted", "kept")):
            ops, world = backend._ops({}, 1, True), backend.world
            part = w.chunk(2, dim)[world.at["tensor"]].contiguous()
            p = nn.Parameter(DTensor.from_local(part, world.params["tensor"], [Shard(dim)], run_check=False))
            value = ops._value(x).requires_grad_()
            y = plain(ops.einsum_fp8(form, value, p))
            (dx,) = torch.autograd.grad(y, value, g.to(y.dtype))
            found[scaling, cut] = y.float().detach().numpy(), plain(dx).float().numpy()
    return found
