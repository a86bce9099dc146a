"""Join the processes of a mesh and list its devices. There is one process, or several with an equal number of
devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from portatrain.errors import UserError
from portatrain.model.layout import Mesh
from portatrain.system import processes, proxies


def join() -> None:
    """Join the processes that the environment names, unless this process has joined. Call it before any JAX
    computation.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe the processes, as `portatrain train --processes` and torchrun
    set them. On a TPU slice of several hosts JAX reads the TPU's own environment. On CPUs gloo carries the collectives.
    """
    if jax.distributed.is_initialized():
        return
    # JAX would install its own handler of SIGTERM, and nothing here asks it for a step at which to stop.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would connect to the coordinator through an HTTP proxy, and JAX would warn of the variables that name one.
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    proxies.bypass(os.environ.get("MASTER_ADDR", ""), *workers)
    jax.config.update("jax_check_proxy_envs", False)
    n = processes.world_size()
    if n is not None and n > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(
                f"process {processes.rank()} of {n}",
                expected="MASTER_ADDR and MASTER_PORT, where process 0 listens",
                got=f"no {' and no '.join(missing)}",
                do="Start it with --processes, or by `launch`, which sets them.",
            )
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            num_processes=n,
            process_id=processes.rank(),
        )
    elif n is None and len(workers) > 1:
        jax.distributed.initialize()


def device_mesh(
    mesh: Mesh, devices: Sequence[Any] | None = None, order: Callable[[Sequence[Any]], Sequence[Any]] | None = None
) -> jax.sharding.Mesh:
    """Return the JAX mesh of a portable mesh over `devices`, in their order. Without `devices` it uses the first
    devices of one process, or all devices of several processes, in `order`.

    Without `order` devices are numbered process by process, so that the devices of a process are neighbours on the
    minor axes. Raises UserError if there are too few devices, or if several processes have another number of devices
    than the mesh.
    """
    there = sorted(jax.devices(), key=lambda d: (d.process_index, d.id)) if devices is None else list(devices)
    many = devices is None and jax.process_count() > 1
    if len(there) < mesh.devices or (many and len(there) != mesh.devices):
        of = f" in {jax.process_count()} processes" if many else ""
        raise UserError(
            f"mesh {mesh}",
            expected=f"{mesh.devices} devices",
            got=f"{len(there)} {there[0].platform} device(s){of}",
            do="Use a mesh of that many devices; on a CPU, --devices N simulates N devices.",
        )
    there = there[: mesh.devices]
    if devices is None and order is not None:
        there = list(order(there))
    grid = np.array(there, dtype=object).reshape(tuple(mesh.sizes.values()))
    return jax.sharding.Mesh(grid, tuple(mesh.sizes))
