"""Every operation on arrays on a mesh of two processes, with x cut along each of its axes; run by test_arrays.py."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from portatrain.backends.torch.mesh import World, join
from portatrain.backends.torch.mesh_ops import MeshOps
from portatrain.backends.torch.ops import Static, TorchOps
from portatrain.backends.torch.standalone_ops import words
from portatrain.model.layout import Layout, Mesh
from portatrain.model.module import describe
from portatrain.testing.tolerance import tolerance
from tests.support.array_table import TABLE, arguments, weight
from tests.support.mesh_cases import CASES


def run(fn: Any, ops: Any, x: Any, kernel: Any, index: Any) -> list[np.ndarray]:
    """(result, gradient of x, gradient of the kernel), whole."""
    x, kernel = x.detach().requires_grad_(), kernel.detach().requires_grad_()
    y = fn(ops, x, kernel, index)
    found = [y]
    if y.is_floating_point():
        w: Any = torch.from_numpy(weight(tuple(y.shape)))
        w = ops._value(w) if isinstance(y, DTensor) else w
        (y * w).sum().backward()
        found += [g for g in (x.grad, kernel.grad) if g is not None]
    return [(v.full_tensor() if isinstance(v, DTensor) else v).detach().numpy() for v in found]


def main(args: argparse.Namespace) -> int:
    bad = []
    for on in args.meshes:
        mesh = Mesh.parse(on)
        device = join(mesh)
        model: Any = CASES["vit, accumulation, dropout"].model
        world = World(Layout.of(describe(model.build()), mesh), device)
        static = Static(True)
        given = {"sample": torch.tensor([[5, 0], [7, 1]], dtype=torch.int32), "layer": torch.tensor(0)}
        alone = TorchOps(static, *words(3, 2, device), **given, kept={})
        ops = MeshOps(static, *words(3, 2, device), **given, kept={}, world=world)
        x, kernel, index = (torch.from_numpy(a) for a in arguments())
        assert world.values is not None
        for name, fn in TABLE.items():
            expected = run(fn, alone, x, kernel, index)
            for lie in (Replicate(), Shard(1), Shard(2)):
                there = distribute_tensor(x, world.values, [lie])
                whole = distribute_tensor(kernel, world.values, [Replicate()])
                try:
                    found = run(fn, ops, there, whole, index)
                except Exception as error:
                    bad.append(f"{on}, {name}, x lies as {lie}: {error!r}")
                    continue
                for mine, true in zip(found, expected, strict=True):
                    allowed = tolerance(size := float(np.abs(true).max()), size) if true.dtype.kind == "f" else 0.0
                    if mine.shape != true.shape or not np.abs(mine - true).max() <= allowed:
                        bad.append(f"{on}, {name}, x lies as {lie}")
    if dist_rank() == 0:
        Path(args.out).write_text(json.dumps(bad))
    return 0


def dist_rank() -> int:
    from portatrain.system.processes import rank

    return rank()
