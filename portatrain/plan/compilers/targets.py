"""Choose the compiler that checks a plan for a cluster, its options and its environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from portatrain.errors import UserError
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.clusters.gpu_devices import DEVICES
from portatrain.plan.clusters.slices import text
from portatrain.plan.compilers import gpus


@dataclass(frozen=True, kw_only=True)
class Target:
    """A compiler. ``compiler``: 'tpu', 'cuda' or 'fsdp2'. ``options``: plain data for it. ``modules``: the
    modules that it imports. ``extra``: the extra of this project that installs them. ``env``: its environment
    variables."""

    compiler: str
    options: Mapping[str, Any]
    modules: tuple[str, ...]
    extra: str
    env: Mapping[str, str] = field(default_factory=dict)


TPU_ENV = {
    "JAX_PLATFORMS": "cpu",  # the TPU's compiler is asked for by name; looking for TPUs takes minutes
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CUDA_ENV = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # there is no GPU to time kernels on
}


def target(cluster: Cluster, compiler: str = "auto") -> Target:
    """Return the compiler for ``cluster``, by name or 'auto': libtpu for TPUs, XLA's GPU compiler for NVIDIA, else
    FSDP2's trace.

    Raises:
      UserError: that compiler does not know the chip.
    """
    chip = cluster.chip
    if compiler == "auto":
        compiler = "tpu" if chip.aot else "cuda" if chip.name in DEVICES else "fsdp2"
    if compiler == "tpu":
        if not chip.aot:
            raise _unknown(cluster, "libtpu", "a TPU of generation v4, v5e, v5p, v6e or 7x")
        options: dict[str, Any] = {"topology_name": chip.aot.format(topology=text(cluster.dims))}
        if chip.name == "tpu-v4":
            options["chip_config_name"] = "megacore"  # one device a chip, as on the machine
        if cluster.domain == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if cluster.slices > 1:
            options["num_slices"] = cluster.slices
        return Target(
            compiler=compiler, options=options, modules=("jax", "flax", "optax", "libtpu"), extra="tpu", env=TPU_ENV
        )
    if compiler == "cuda":
        if chip.name not in DEVICES:
            raise _unknown(cluster, "XLA's GPU compiler", f"one of {', '.join(DEVICES)}")
        each = min(chip.chips_in_host, cluster.domain)
        hosts = cluster.domain // each
        options = {
            "target_config": gpus.description(chip),
            "topology": f"{cluster.chips // cluster.domain}x{hosts}x{each}",
        }
        modules = ("jax", "flax", "optax", "jax_plugins.xla_cuda13")
        return Target(compiler=compiler, options=options, modules=modules, extra="cuda", env=CUDA_ENV)
    if chip.vendor == "google":
        raise _unknown(cluster, "FSDP2", "a chip that torch runs on")
    options = {"world": cluster.devices}
    return Target(compiler="fsdp2", options=options, modules=("torch",), extra="torch")


def check_installed(wanted: Target) -> None:
    """Raise UserError, with the install command, if the compiler is not installed."""
    gone = [name for name in wanted.modules if not _there(name)]
    if gone:
        raise UserError(
            f"--compile with {wanted.compiler}",
            expected=f"{', '.join(wanted.modules)} to be installed",
            got=f"no {', '.join(gone)}",
            do=f"Install it with: pip install 'portatrain[{wanted.extra}]'. No accelerator is needed.",
        )


def environment(wanted: Target) -> dict[str, str]:
    """Return the environment of the compiler's process: the environment of this one and the variables that it needs."""
    mine = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    return mine | dict(wanted.env) | {"TF_CPP_MIN_LOG_LEVEL": "3"}


def _there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that contains it is missing
        return False


def _unknown(cluster: Cluster, what: str, expected: str) -> UserError:
    return UserError(
        f"--compile for {cluster.name}",
        expected=f"{expected}, which {what} compiles for",
        got=cluster.chip.name,
        do="Leave --compile out for the plan by arithmetic, or name another compiler: --compiler tpu, cuda or fsdp2.",
    )
