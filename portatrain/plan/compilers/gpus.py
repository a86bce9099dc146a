"""Describe an NVIDIA GPU for XLA's compiler when no such GPU is present."""

from __future__ import annotations

from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.gpu_devices import DEVICES


def description(chip: Chip) -> str:
    """Return the text form of XLA's GpuTargetConfigProto for ``chip``, one of `gpu_devices.DEVICES`."""
    one = DEVICES[chip.name]
    major, minor = one.capability
    bandwidth = chip.memory_bw.value if chip.memory_bw else 0.0
    return f"""
platform_name: "CUDA"
device_description_str: "{one.name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {one.threads}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {(one.shared_kib - 1) << 10}
  shared_memory_per_core: {one.shared_kib << 10}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  core_count: {one.cores}
  fpus_per_core: {one.fpus}
  clock_rate_ghz: {one.clock_ghz}
  l2_cache_size: {one.l2_mib << 20}
  memory_bandwidth: {int(bandwidth * 1e9)}
  device_memory_size: {int(chip.memory_bytes)}
}}
"""
