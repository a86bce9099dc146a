"""Processes that join and agree on a number: `run_processes(n, "tests.support.proxy_worker:main", {...})`."""

from __future__ import annotations

import argparse


def main(args: argparse.Namespace) -> int:
    """Join as backend `args.backend` does; return 0 if all processes have met."""
    from portatrain.system.processes import rank, world_size

    n = world_size() or 1
    if args.backend == "jax":
        import jax
        import numpy as np
        from jax.experimental import multihost_utils

        from portatrain.backends.jax.mesh import join

        join()
        assert jax.process_count() == n
        met = int(np.sum(multihost_utils.process_allgather(np.int32(rank()))))
    else:
        import torch
        import torch.distributed as dist

        from portatrain.backends.torch.mesh import join as join_torch
        from portatrain.model.layout import Mesh

        join_torch(Mesh(fsdp=n))
        value = torch.tensor(rank())
        dist.all_reduce(value)
        met = int(value)
        dist.destroy_process_group()
    return 0 if met == sum(range(n)) else 1
