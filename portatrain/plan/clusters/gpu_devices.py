"""List NVIDIA's GPUs: the name under which a driver reports each, its compute capability and its units.

Per compute capability from the CUDA programming guide (its table of technical specifications); per part from the
vendor's whitepapers. Memory and bandwidth are in the catalog of chips.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU model. Sizes are of the whole device unless the field says otherwise."""

    name: str
    """The beginning of the name that the driver reports."""
    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors that are enabled."""
    clock_ghz: float
    l2_mib: int
    shared_kib: int
    """Shared memory of one multiprocessor; a block may use all but 1 KiB of it."""
    threads: int = 2048
    """Threads that one multiprocessor can hold."""
    fpus: int = 128
    """fp32 units of one multiprocessor."""


# The key is the name of the chip in the catalog.
DEVICES: dict[str, Device] = {
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
