"""Describe an NVIDIA or AMD GPU for XLA's compiler when no such GPU is present."""

from __future__ import annotations

from portatrain.plan.clusters.chip import Chip
from portatrain.plan.clusters.gpu_devices import AMD_DEVICES, DEVICES

CUDA, ROCM = "13.0.0", "7.0.0"
"""Versions of the vendors' libraries. Without one XLA takes them for older than any, and calls no matmul of 8 bits of
cuBLASLt or hipBLASLt."""


def description(chip: Chip) -> str:
    """Return the text form of XLA's GpuTargetConfigProto for ``chip``, one of those in `gpu_devices`."""
    return _amd(chip) if chip.name in AMD_DEVICES else _nvidia(chip)


def _nvidia(chip: Chip) -> str:
    one = DEVICES[chip.name]
    major, minor = one.capability
    bandwidth = chip.memory_bw.value if chip.memory_bw else 0.0
    return f"""
platform_name: "CUDA"
device_description_str: "{one.name}"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  runtime_version: "{CUDA}"
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


def _amd(chip: Chip) -> str:
    """Describe one device of the chip: on an MI250X this is one of two dies, with half of the memory."""
    one = AMD_DEVICES[chip.name]
    bandwidth = chip.memory_bw.value if chip.memory_bw else 0.0
    return f"""
platform_name: "ROCM"
device_description_str: "{one.name}"
dnn_version_info {{ major: 3 minor: 5 patch: 0 }}
gpu_device_info {{
  runtime_version: "{ROCM}"
  rocm_compute_capability {{ gcn_arch_name: "{one.isa}:sramecc+:xnack-" }}
  threads_per_block_limit: 1024
  threads_per_warp: 64
  threads_per_core_limit: {one.threads}
  shared_memory_per_block: {one.shared_kib << 10}
  shared_memory_per_block_optin: {one.shared_kib << 10}
  shared_memory_per_core: {one.shared_kib << 10}
  registers_per_core_limit: {one.registers}
  registers_per_block_limit: {one.registers}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65536
  block_dim_limit_z: 65536
  core_count: {one.cores}
  fpus_per_core: {one.fpus}
  clock_rate_ghz: {one.clock_ghz}
  l2_cache_size: {one.l2_mib << 20}
  memory_bandwidth: {int(bandwidth * 1e9 / chip.devices_per_chip)}
  device_memory_size: {int(chip.memory_bytes / chip.devices_per_chip)}
}}
"""
