"""List NVIDIA's and AMD's GPUs: the name under which a driver reports each, its instruction set and its units.

NVIDIA, per compute capability: the CUDA programming guide (its table of technical specifications); per part: the
vendor's whitepapers. AMD: the ROCm documentation, "AMD GPU specifications" (compute units, LDS, L2 cache of one die,
registers); the clock is the peak engine clock, with which 2,048 (CDNA 3) and 4,096 (CDNA 4) dense bf16 operations of a
compute unit and cycle give the bf16 peak of the data sheet. Memory and bandwidth are in the catalog of chips.
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


@dataclass(frozen=True, kw_only=True)
class AmdDevice:
    """One AMD GPU model, as the driver shows it: an MI250X is two such devices, one for each die."""

    name: str
    """The beginning of the name that the driver reports."""
    isa: str
    """The target of the LLVM compiler."""
    cores: int
    """Compute units that are enabled."""
    clock_ghz: float
    l2_mib: int
    """L2 cache of one die (XCD), which is what the driver reports."""
    shared_kib: int
    """Local data share (LDS) of one compute unit."""
    threads: int = 2048
    """Threads that one compute unit can hold: 32 wavefronts of 64."""
    registers: int = 131072
    """32-bit vector registers of one compute unit: a file of 512 KiB."""
    fpus: int = 128
    """fp32 operations that one compute unit starts in a cycle; XLA takes the same number for every AMD GPU."""


# The key is the name of the chip in the catalog.
AMD_DEVICES: dict[str, AmdDevice] = {
    "mi250x": AmdDevice(name="AMD Instinct MI250X", isa="gfx90a", cores=110, clock_ghz=1.7, l2_mib=8, shared_kib=64),
    "mi300x": AmdDevice(name="AMD Instinct MI300X", isa="gfx942", cores=304, clock_ghz=2.1, l2_mib=4, shared_kib=64),
    "mi325x": AmdDevice(name="AMD Instinct MI325X", isa="gfx942", cores=304, clock_ghz=2.1, l2_mib=4, shared_kib=64),
    "mi350x": AmdDevice(name="AMD Instinct MI350X", isa="gfx950", cores=256, clock_ghz=2.2, l2_mib=4, shared_kib=160),
    "mi355x": AmdDevice(name="AMD Instinct MI355X", isa="gfx950", cores=256, clock_ghz=2.4, l2_mib=4, shared_kib=160),
}
