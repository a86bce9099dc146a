"""Choose the compiler that checks a plan for a cluster, its options and its environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from portatrain.errors import UserError
from portatrain.plan.clusters.cluster import Cluster
from portatrain.plan.clusters.gpu_devices import AMD_DEVICES, DEVICES
from portatrain.plan.clusters.slices import text
from portatrain.plan.compilers import gpus, rocm
from portatrain.plan.cost.policy import tuning_of


@dataclass(frozen=True, kw_only=True)
class Target:
    """A compiler. ``compiler``: 'tpu', 'cuda', 'rocm' or 'fsdp2'. ``options``: plain data for it. ``modules``: the
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
GPU_COMPILERS = ("cuda", "rocm")
GPU_ENV = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # there is no GPU to time kernels on
}


def target(cluster: Cluster, compiler: str = "auto") -> Target:
    """Return the compiler for ``cluster``, by name or 'auto': libtpu for TPUs, XLA's GPU compilers for NVIDIA and
    AMD, else FSDP2's trace.

    Raises:
      UserError: that compiler does not know the chip.
    """
    chip = cluster.chip
    if compiler == "auto":
        gpu = "cuda" if chip.name in DEVICES else "rocm" if chip.name in AMD_DEVICES else ""
        compiler = "tpu" if chip.aot else gpu or "fsdp2"
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
    if compiler in GPU_COMPILERS:
        return _gpu(cluster, compiler)
    if chip.vendor == "google":
        raise _unknown(cluster, "FSDP2", "a chip that torch runs on")
    options = {"world": cluster.devices, "device": tuning_of(chip.stack).device}
    return Target(compiler="fsdp2", options=options, modules=("torch",), extra="torch")


def _gpu(cluster: Cluster, compiler: str) -> Target:
    chip = cluster.chip
    known: Collection[str] = DEVICES if compiler == "cuda" else AMD_DEVICES
    if chip.name not in known:
        raise _unknown(cluster, f"XLA's compiler for {compiler}", f"one of {', '.join(known)}")
    each = min(chip.chips_in_host, cluster.domain)
    options = {
        "target_config": gpus.description(chip),
        "topology": f"{cluster.domains}x{cluster.domain // each}x{each * chip.devices_per_chip}",
    }
    modules = ["jax", "flax", "optax"]
    if compiler == "cuda":
        modules.append("jax_plugins.xla_cuda13")
        return Target(compiler=compiler, options=options, modules=tuple(modules), extra="cuda", env=GPU_ENV)
    modules += ["jax_plugins.xla_rocm7", "jax_rocm7_plugin"]
    return Target(compiler=compiler, options=options, modules=tuple(modules), extra="rocm-compile", env=GPU_ENV)


def check_installed(wanted: Target) -> None:
    """Raise UserError, with the install command, if the compiler is not installed or its packages do not match."""
    gone = [name for name in wanted.modules if not _there(name)]
    if gone:
        raise UserError(
            f"--compile with {wanted.compiler}",
            expected=f"{', '.join(wanted.modules)} to be installed",
            got=f"no {', '.join(gone)}",
            do=f"Install it with: pip install 'portatrain[{wanted.extra}]'. No accelerator is needed."
            + (" Or use --compiler fsdp2, which traces the torch backend." if wanted.compiler in GPU_COMPILERS else ""),
        )
    if wanted.compiler == "rocm":
        rocm.check_versions()


def environment(wanted: Target) -> dict[str, str]:
    """Return the environment of the compiler's process: the environment of this one and the variables that it needs.

    For AMD's compiler it names the stand-ins of ROCm's libraries, which are made here unless they are in the cache.
    """
    mine = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    mine |= dict(wanted.env) | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    folder = rocm.library_folder() if wanted.compiler == "rocm" else None
    if folder is not None:
        mine["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), mine.get("LD_LIBRARY_PATH"))))
    return mine


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
        do="Leave --compile out for the plan by arithmetic, or name another compiler: --compiler tpu, cuda, rocm or "
        "fsdp2.",
    )
