"""NVIDIA's GPUs as XLA's compiler wants to be told of them: what a kernel may use, and how many units there are.

Per compute capability from the CUDA programming guide (its table of technical specifications); per part from the
vendor's whitepapers. Memory and bandwidth are the catalog's.
"""

from __future__ import annotations

from dataclasses import dataclass

from portatrain.plan.clusters.chip import Chip


@dataclass(frozen=True, kw_only=True)
class Device:
    """``cores``: streaming multiprocessors that are switched on. ``fpus``: fp32 units of one. ``shared_kib``: shared
    memory of one, of which a block may take all but 1 KiB."""

    name: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    l2_mib: int
    shared_kib: int
    threads: int = 2048
    fpus: int = 128


DEVICES = {
    "a100-40": Device(
        name="NVIDIA A100-SXM4-40GB", capability=(8, 0), cores=108, clock_ghz=1.41, l2_mib=40, shared_kib=164, fpus=64
    ),
    "a100-80": Device(
        name="NVIDIA A100-SXM4-80GB", capability=(8, 0), cores=108, clock_ghz=1.41, l2_mib=40, shared_kib=164, fpus=64
    ),
    "h100-sxm": Device(
        name="NVIDIA H100 80GB HBM3", capability=(9, 0), cores=132, clock_ghz=1.98, l2_mib=50, shared_kib=228
    ),
    "h200": Device(name="NVIDIA H200", capability=(9, 0), cores=132, clock_ghz=1.98, l2_mib=50, shared_kib=228),
    "b200": Device(name="NVIDIA B200", capability=(10, 0), cores=148, clock_ghz=1.965, l2_mib=126, shared_kib=228),
    "gb200": Device(name="NVIDIA GB200", capability=(10, 0), cores=152, clock_ghz=2.062, l2_mib=126, shared_kib=228),
    "b300": Device(name="NVIDIA B300", capability=(10, 3), cores=148, clock_ghz=1.92, l2_mib=126, shared_kib=228),
    "gb300": Device(name="NVIDIA GB300", capability=(10, 3), cores=152, clock_ghz=1.92, l2_mib=126, shared_kib=228),
}


def description(chip: Chip) -> str:
    """The text form of XLA's GpuTargetConfigProto for ``chip``."""
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
